"""Rejection sampling: of the completions that a policy wrote, those from which another one is to learn.

    python -m grpo.evaluate MODEL=policy EVAL_DATASET=examples/arithmetic/train.jsonl OUTPUT_DIR=runs/sampled
    python examples/rejection_sample.py EVALUATION=runs/sampled/evaluation.jsonl SOLUTIONS=runs/kept.jsonl
    python examples/sft.py DATASET=runs/kept.jsonl OUTPUT_DIR=runs/sft

DeepSeek-R1 (arXiv 2501.12948, section 2.3.3) keeps what is right and leaves out what is hard to read. Here a completion
is kept that is right, well formed and whole, repeats few of its n-grams, and differs from the others of its question in
more than white space; at most PER_QUESTION of these, drawn at random. A row of SOLUTIONS is one for sft.py.
"""
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grpo.checkpoint import replace  # noqa: E402
from grpo.constants import Over, explained, override_constants, require  # noqa: E402
from grpo.data import read_jsonl  # noqa: E402
from rewards import get_repetition_penalty_reward  # noqa: E402

EVALUATION = "runs/arithmetic/evaluation.jsonl"  # as `python -m grpo.evaluate` writes it
SOLUTIONS = "runs/kept.jsonl"
PER_QUESTION: Over(0) = 2
NGRAM: Over(0) = 4  # words
MAX_REPEATED: Over(-1, 1) = 0.2  # share of a completion's n-grams that were there before
SEED = 0


def is_good(row: dict) -> bool:
    """Right, well formed as far as a reward function judged that, whole, and decoded without a broken letter."""
    judged = row["accuracy"] and row.get("format", True)
    broken = re.search("[\ud800-\udfff\ufffd]", row["completion"])
    return bool(judged) and not row["cut_off"] and not broken


def select(rows: list[dict]) -> list[dict]:
    """Of the rows of an evaluation.jsonl: the data set's columns with `prompt` and `solution`, question by question."""
    repeated = get_repetition_penalty_reward(NGRAM, -1.0)
    questions = {}  # prompt -> words -> row
    for row in filter(is_good, rows):
        if -repeated([row["completion"]])[0] <= MAX_REPEATED:
            words = " ".join(row["completion"].split())
            questions.setdefault(row["prompt"], {}).setdefault(words, row)
    rng, kept = random.Random(SEED), []
    for found in questions.values():
        chosen = rng.sample([*found.values()], min(PER_QUESTION, len(found)))
        kept += [row["columns"] | {"prompt": row["prompt"], "solution": row["completion"]} for row in chosen]
    return kept


def main():
    with explained(f"EVALUATION={EVALUATION} is no evaluation.jsonl of grpo.evaluate"):
        rows = read_jsonl(EVALUATION)
        kept = select(rows)
    require(kept, f"EVALUATION={EVALUATION}: none of {len(rows)} completions is right, well formed and whole: "
                  "sample more of them (EVAL_SAMPLES), or train the policy longer first")
    path = Path(SOLUTIONS)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, "".join(json.dumps(row) + "\n" for row in kept))
    questions, answered = (len({row["prompt"] for row in some}) for some in (rows, kept))
    print(f"{path}: {len(kept)} of {len(rows)} completions, for {answered} of {questions} questions")


if __name__ == "__main__":
    override_constants(__name__, sys.argv[1:])
    main()
