"""Rewards judged in a second, on one core, the share of answers that need math-verify in its guarded process, and how
many of the labelled answers in tests/ are judged as they are labelled.

    python benchmarks/rewards.py
"""
import json
import os
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rewards  # noqa: E402
from grpo import math_judge  # noqa: E402

COMPLETIONS = 20_000


def gsm8k_like(rng: random.Random) -> tuple[str, str]:
    """A completion of 100 to 200 words with an answer as language models write them, and a gold answer as GSM8K's."""
    gold = rng.choice([rng.randint(1, 200), rng.randint(200, 100_000), round(rng.uniform(1, 100), 2)])
    answer = gold if rng.random() < 0.5 else rng.randint(1, 1000)
    forms = ["{:,}", "${}", "\\${}", "**{}**", "{} dollars", "{}.", "The answer is {}.", "x = {}", "\\boxed{{{}}}",
             "{} or {}", "There are {} apples left.", "{}/2 = {}"]
    form = rng.choice(["{}"] * 4 + forms)
    work = " ".join(rng.choice("so we add the number of apples and get 12 + 30 = 42 which is then doubled".split())
                    for _ in range(rng.randint(100, 200)))
    return f"<think>\n{work}\n</think>\n<answer>\n{form.format(answer, answer)}\n</answer>", f"{work}\n#### {gold:,}"


def main() -> None:
    os.sched_setaffinity(0, {0})  # math-verify's processes too
    asked = []
    judge = math_judge.ask_judge
    math_judge.ask_judge = lambda gold, answer: asked.append(answer) or judge(gold, answer)
    math_judge.ask_judge("1", "2")  # starts the process that imports math-verify
    rng = random.Random(0)
    completions, golds = zip(*(gsm8k_like(rng) for _ in range(COMPLETIONS)))
    labelled, solved = ([json.loads(line) for line in (ROOT / "tests" / name).read_text().splitlines()]
                        for name in ("answers.jsonl", "solutions.jsonl"))
    mathematics = [f"<think>a</think><answer>{row['answer']}</answer>" for row in labelled]
    mathematics_golds = [row["gold"] for row in labelled]
    solutions = {"solution": [row["solution"] for row in solved]}
    print(f"{'':42}{'a second':>10}{'through math-verify':>22}{'as labelled':>14}{'wrong accepted':>17}")
    for name, function, texts, columns, rows in [
        ("reward_correct, like GSM8K", rewards.reward_correct, completions, {"answer": golds}, []),
        ("reward_correct, tests/answers.jsonl", rewards.reward_correct, mathematics, {"answer": mathematics_golds},
         labelled),
        ("reward_format, like GSM8K", rewards.reward_format, completions, {}, []),
        ("accuracy_reward, like GSM8K", rewards.accuracy_reward, completions, {"solution": golds}, []),
        ("accuracy_reward, tests/solutions.jsonl", rewards.accuracy_reward, [row["completion"] for row in solved],
         solutions, solved),
    ]:
        asked.clear()
        start = time.perf_counter()
        values = function(texts, **columns)
        rate = len(texts) / (time.perf_counter() - start)
        print(f"{name:42}{rate:10,.0f}{len(asked) / len(texts):22.2%}", end="" if rows else "\n")
        if rows:
            accepted = [(value or 0) > 0 for value in values]
            agreement = sum(one == row["right"] for one, row in zip(accepted, rows)) / len(rows)
            wrong = [one for one, row in zip(accepted, rows) if not row["right"]]
            print(f"{agreement:14.1%}{sum(wrong):10} of {len(wrong)}")


if __name__ == "__main__":
    main()
