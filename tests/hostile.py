"""Lets hostile completions loose on the reward functions and prints what happened, as JSON.

python tests/hostile.py main|threads      # one after the other, or each of them from eight threads at once
"""

import json
import resource
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rewards  # noqa: E402
from grpo import math_judge  # noqa: E402

COSTLY = {  # mathematics that never ends, or ends in all the memory there is
    "tower of powers": "9^{9^{9^{9}}}",
    "python tower": "9**9**9**9",
    "factorial": "1000000000!",
    "nested factorials": "((9!)!)!",
    "sum": "\\sum_{i=1}^{1000000000} i^{i}",
    "product": "\\prod_{i=1}^{1000000000} i",
    "integral": "\\int_0^1 x^{x^{x^x}} dx",
    "determinant": "\\det\\begin{vmatrix}"
    + " \\\\ ".join(" & ".join(f"x_{{{i}{j}}}" for j in range(11)) for i in range(11))
    + "\\end{vmatrix}",
    "binomial": "\\binom{10^{9}}{5\\cdot 10^{8}}",
    "modulus": "7^{10^{18}} \\bmod 11",
    "expansion": "(a+b+c+d+e+f+g)^{200}",
    "continued fraction": "\\frac{1}{" * 100 + "5" + "}" * 100,
    "carets": "x^" * 440,
}
LONG = {  # text that a careless expression goes through again and again
    "brackets": "(" * 900,
    "nesting": "(" * 450 + "5" + ")" * 450,
    "braces": "{" * 450 + "}" * 450,
    "many braces": "{" * 100_000,
    "many digits": "9" * 100_000,
    "digits": "9" * 900,
    "exponent": "1e999999999",
    "tags": "<answer>" * 50_000,
    "thoughts": "<think>" * 50_000,
    "ends of thoughts": "</think>" * 50_000,
    "boxes": "\\boxed{" * 14_000,
    "formulas": "\\(" * 50_000,
    "dollars": "$" * 999,
    "new lines": "\n" * 100_000,
    "backslashes": "\\" * 1000,
    "words": "a " * 450,
    "alternatives": "5 or " * 190,
    "commas": "1," * 450,
    "names": "a," * 440,
    "equals": "x=" * 440,
    "relations": "1<" * 440,
    "signs": "\\pm " * 220,
    "matrices": "\\begin{pmatrix}" * 60,
    "times": "1:00 " * 150,
    "leads": "is " * 300,
    "steps": "Step 1" * 16_000,
}
ODD = {
    "code": "__import__('os').system('touch hacked')",
    "NUL": "5\0",
    "surrogate": "5\ud800",
    "Arabic five": "\u0665",
    "wide five": "\uff15",
    "small five": "\u2075",
    "thousands of dollars": "5" + "$" * 999 + "6",
}
HOSTILE = COSTLY | LONG | ODD
FUNCTIONS = [
    rewards.reward_correct,
    rewards.accuracy_reward,
    rewards.reward_format,
    rewards.format_reward,
    rewards.tag_count_reward,
    rewards.reasoning_steps_reward,
    rewards.len_reward,
    rewards.get_cosine_scaled_reward(),
    rewards.get_repetition_penalty_reward(3, -1.0),
    rewards.reward_len,
]
JUDGES = FUNCTIONS[:2]  # the others that compare answers call accuracy_reward


def judge(name: str, functions: list, outcomes: list) -> None:
    """Functions on the hostile text as the answer, in a box, and alone; then a right answer after it."""
    for completion in (
        f"<think>a</think>\n<answer>{HOSTILE[name]}</answer>",
        f"<think>a</think>\\boxed{{{HOSTILE[name]}}}",
        HOSTILE[name],
    ):
        for function in functions:
            start = time.monotonic()
            value = function([completion], answer=["5"], solution=["$5$"])[0]
            right = function in JUDGES and value > 0
            outcomes.append((time.monotonic() - start, right, name, function.__name__))
    good = "<think>a</think><answer>0.5</answer>"
    math_judge.compare.cache_clear()
    if rewards.reward_correct([good], answer=["\\sqrt{4}/4"]) != [1.0]:
        outcomes.append((0.0, True, name, "the next completion was not judged as usual"))


def main(threads: int, names) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    math_judge.ask_judge("1", "1")  # starts the process that imports math-verify, two seconds, once in a run
    outcomes, functions = [], JUDGES if threads else FUNCTIONS
    for name in names:
        started = [threading.Thread(target=judge, args=(name, functions, outcomes)) for _ in range(threads)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        if not threads:
            judge(name, functions, outcomes)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10

    from sympy.external.gmpy import GROUND_TYPES

    expected = len(names) * 3 * len(functions) * max(1, threads)
    slowest = max(outcomes)
    print(json.dumps({
        "seconds": slowest[0],
        "slowest": slowest[2:],
        "right": sorted({(name, what) for _, right, name, what in outcomes if right}),
        "judged": len(outcomes) == expected,
        "grown_mb": grown,
        "arithmetic": GROUND_TYPES,
    }))


if __name__ == "__main__":
    if sys.argv[1] == "main":
        main(0, HOSTILE)
    else:
        main(8, COSTLY)
