"""Process supervision on the embedded task: a reward for each written step. And clean solutions, with all steps.

    python ref_server.py
    deepspeed grpo_train.py REWARDS=0*reward_correct,examples.steps:reward_steps OUTPUT_DIR=runs/steps
    python examples/steps.py ROWS=300 SOLUTIONS=runs/solutions.jsonl     # writes a column `solution` for sft.py

`reward_correct` has no weight: it is only logged, and the policy learns from the steps alone.
"""
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grpo.checkpoint import replace  # noqa: E402
from grpo.constants import Over, override_constants  # noqa: E402
from grpo.data import read  # noqa: E402

DATASET = "examples/arithmetic/train.jsonl"
ROWS: Over(0) = 300  # of DATASET, the first ones
SOLUTIONS = "runs/solutions.jsonl"


def working(question: str) -> list[str]:
    """The line of each operation, one after the other, and the end of the thinking."""
    first, *operations = re.search(r"What is (.*)\?", question)[1].replace("+ ", "+").replace("- ", "-").split()
    total, lines = int(first), []
    for operation in operations:
        result = total + int(operation)
        lines.append(f"{total} {operation[0]} {operation[1:]} = {result}")
        total = result
    return [*lines, "</think>"]


def reward_steps(completions, prompts, **columns) -> list[list[tuple[int, float]]]:
    """+1 for a line that carries out the question's next operation rightly and for the end after the last; else -1."""
    values = []
    for completion, prompt in zip(completions, prompts):
        expected, steps = working(prompt), []
        for line in re.finditer(r"<think>\n|(.+)\n", completion):
            if line[1] is None:
                continue
            steps.append((line.end(), 1.0 if line[1] == expected[len(steps)] else -1.0))
            if steps[-1][1] < 0 or len(steps) == len(expected):
                break
        values.append(steps)
    return values


def solution(row: dict) -> str:
    lines = "\n".join(["<think>", *working(row["question"])])
    return f"{lines}\n<answer>{row['answer']}</answer>"


def main():
    rows = [row | {"solution": solution(row)} for row in read(DATASET)[:ROWS]]
    path = Path(SOLUTIONS)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} solutions")


if __name__ == "__main__":
    override_constants(__name__, sys.argv[1:])
    main()
