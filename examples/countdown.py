"""Countdown: reach a target with three or four numbers, each used once, and + - * /. The problems are made here.

    deepspeed examples/countdown.py                  # the model needs the Hugging Face hub; any constant behind it

Columns: `question`, `numbers`, `target`. What a model has to learn is to search: most of what it tries first is wrong.
"""
import ast
import json
import operator
import os
import random
import re
import runpy
import sys
import uuid
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from rewards import extract_answer, with_thinking  # noqa: E402

FOLDER = ROOT / "examples/countdown"
SIZES = {"train": 8000, "heldout": 200}
LONGEST = 100  # characters of an expression; a longer one is wrong
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
CONSTANTS = [  # those that differ from grpo_train.py's
    "MODEL=Qwen/Qwen2.5-1.5B-Instruct",
    f"DATASET={FOLDER}/train.jsonl",
    f"EVAL_DATASET={FOLDER}/heldout.jsonl",
    "REWARDS=examples.countdown:reward_countdown,0.1*reward_format",
    "OUTPUT_DIR=runs/countdown",
    "STEPS=500",
    "MAX_PROMPT_TOKENS=256",
    "MAX_COMPLETION_TOKENS=1024",
    "BETA=0",
    "LR=1e-6",
    "GRADIENT_CHECKPOINTING=True",
    "EVAL_EVERY=50",
    "SAVE_EVERY=100",
]


def reward_countdown(completions, numbers, target, **columns) -> list[float]:
    """1 where the answer is an expression of exactly these numbers whose value is exactly the target; otherwise 0."""
    written = with_thinking(completions, **columns)
    return [float(reaches(extract_answer(completion), its_numbers, its_target))
            for completion, its_numbers, its_target in zip(written, numbers, target, strict=True)]


def reaches(answer: str | None, numbers: list[int], target: int) -> bool:
    """The characters, the length and the numbers are looked at first, so that what is parsed and computed is small."""
    if not answer or len(answer) > LONGEST or not re.fullmatch(r"[0-9+*/() -]+", answer):
        return False
    if sorted(re.findall(r"\d+", answer)) != sorted(map(str, numbers)):
        return False
    try:
        return value(ast.parse(answer, mode="eval").body) == target
    except (SyntaxError, KeyError, ZeroDivisionError):
        return False


def value(node) -> Fraction:
    """KeyError at anything but numbers and the four operations between them: at a sign, `**`, `//`, a call."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    operation = OPERATIONS[type(getattr(node, "op", None))]  # of signs it is another one
    return operation(value(node.left), value(node.right))


def make_problem(rng: random.Random) -> dict:
    """Numbers, and a target that some expression of them reaches: two by two they become one, never a fraction."""
    numbers = [rng.randint(1, 99) for _ in range(rng.choice([3, 4]))]
    values = list(numbers)
    while len(values) > 1:
        a, b = (values.pop(rng.randrange(len(values))) for _ in range(2))
        values.append(rng.choice([a + b, abs(a - b), a * b, a // b if b and a % b == 0 else a + b]))
    listed = ", ".join(map(str, numbers))
    question = (f"Write an expression whose value is {values[0]}. Use each of the numbers {listed} exactly once, and "
                "nothing else but + - * / and brackets.")
    return {"question": question, "numbers": numbers, "target": values[0]}


def make_problems(count: int, rng: random.Random) -> list[dict]:
    """`count` problems with targets from 10 to 999, no two with the same numbers and target."""
    problems = {}
    while len(problems) < count:
        problem = make_problem(rng)
        if 10 <= problem["target"] <= 999:
            problems[tuple(sorted(problem["numbers"])), problem["target"]] = problem
    return list(problems.values())


def write_problems(folder: Path) -> None:
    """train.jsonl and heldout.jsonl, always the same. Several processes may do so at once: what they see is whole."""
    problems = iter(make_problems(sum(SIZES.values()), random.Random(0)))
    folder.mkdir(exist_ok=True)
    for name, size in SIZES.items():
        unfinished = folder / f"{name}.{uuid.uuid4()}.unfinished"
        unfinished.write_text("".join(json.dumps(next(problems)) + "\n" for _ in range(size)))
        os.replace(unfinished, folder / f"{name}.jsonl")


if __name__ == "__main__":
    write_problems(FOLDER)
    sys.argv[1:] = [*CONSTANTS, *sys.argv[1:]]  # of two values the later wins
    runpy.run_path(str(ROOT / "grpo_train.py"), run_name="__main__")
