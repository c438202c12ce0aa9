"""A reward model from preferences: which of two completions of a question is better?

    python -m grpo.evaluate MODEL=policy REWARDS=rule EVAL_DATASET=... OUTPUT_DIR=runs/new     # completions, judged
    python examples/preferences.py MODEL=policy EVALUATION=runs/new/evaluation.jsonl OUTPUT_DIR=runs/judge
    deepspeed grpo_train.py REWARDS=reward_format,0.5*runs/judge                               # a folder is a reward

The rule stands for the people who compare completions: the one that it rewards more is the better one. MODEL is a
policy, whose body gets a new head with one label, or a reward model that is to be trained further. Then OLD names the
evaluations of its earlier training, and REPLAY says how much of them it sees again (DeepSeekMath, algorithm 1).
OUTPUT_DIR gets the model, and training.json with its accuracy before and after, on a pair of every fifth question,
which trains nothing. Completions have to be texts: of chat messages `reward_model` sees the whole conversation instead.
"""
import random
import sys
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples.tuning import fine_tune, save, share  # noqa: E402
from grpo import distributed  # noqa: E402
from grpo.constants import Over, constants_of, explained, override_constants, require  # noqa: E402
from grpo.data import read_jsonl  # noqa: E402
from grpo.evaluate import interval  # noqa: E402
from grpo.policy import dtype_called  # noqa: E402
from grpo.reward_model import logits_of, set_padding  # noqa: E402

MODEL = "examples/arithmetic/model"
DTYPE = "auto"  # float32 on a CPU, bfloat16 on an accelerator
EVALUATION = "runs/arithmetic/evaluation.jsonl"  # as `python -m grpo.evaluate` writes it
OLD = ""  # earlier ones, with commas between
REPLAY: Over(-1, 1) = 0.1  # share of the pairs of OLD that are trained on again; DeepSeekMath's is 0.1
OUTPUT_DIR = "runs/judge"
SEED: Over(-1, 2**31 - 1) = 0
PER_QUESTION: Over(0) = 2  # pairs, drawn at random
STEPS: Over(0) = 60
BATCH_SIZE: Over(0) = 16  # pairs of a step, all processes together
MICRO_BATCH: Over(0) = 16  # of them in a forward and backward pass of a process
LR = 1e-5
WARMUP_STEPS = 5
HELDOUT_EVERY = 5  # each fifth question


class Pair(NamedTuple):
    """Two completions, each with its prompt in front."""
    better: str
    worse: str


def bradley_terry(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(r_better - r_worse), in nats, of B pairs of rewards (B,): minus the log-probability that the better
    one wins (Bradley and Terry, Biometrika 39, 1952; InstructGPT, arXiv 2203.02155, equation 1)."""
    return -logsigmoid(better - worse)


def pairs_of(rows: list[dict]) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and held-out ones, from rows of an evaluation.jsonl. Equal rewards make no pair."""
    questions = {}  # prompt -> completion -> reward
    for row in rows:
        found = questions.setdefault(row["prompt"], {})
        if row["reward"] is not None:
            found[row["completion"]] = row["reward"]
    rng, parts = random.Random(SEED), ([], [])
    for number, (prompt, rewards) in enumerate(questions.items()):
        ranked = [Pair(prompt + one, prompt + other) for one, other in permutations(rewards, 2)
                  if rewards[one] > rewards[other]]
        chosen = rng.sample(ranked, min(PER_QUESTION, len(ranked)))
        held_out = number % HELDOUT_EVERY == 0
        parts[held_out].extend(chosen[:1] if held_out else chosen)  # for the interval, pairs are independent
    return parts


def with_replay(new: list[Pair], old: list[Pair]) -> list[Pair]:
    """All new pairs and REPLAY of the old ones, rounded."""
    return new + random.Random(SEED).sample(old, round(REPLAY * len(old)))


def read_pairs(path: str) -> tuple[list[Pair], list[Pair]]:
    with explained(f"{path} is no evaluation.jsonl of grpo.evaluate"):
        return pairs_of(read_jsonl(path))


def main():
    distributed.start()
    require(not Path(OUTPUT_DIR).exists(), f"{OUTPUT_DIR=} is already there: choose another, or remove it")
    old_files = [path for path in OLD.split(",") if path]
    new, heldout = read_pairs(EVALUATION)
    require(new and heldout, f"EVALUATION={EVALUATION}: too few questions have completions of different reward to "
                             "compare: sample more of them (EVAL_SAMPLES, TEMPERATURE), or take more questions")
    earlier = [read_pairs(path) for path in old_files]
    pairs = with_replay(new, [pair for train, _ in earlier for pair in train])
    measured = {EVALUATION: heldout} | {path: its for path, (_, its) in zip(old_files, earlier)}

    torch.manual_seed(SEED)  # for a policy's new head
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with explained(f"cannot load MODEL={MODEL} as a reward model"):
        kind, dtype = AutoModelForSequenceClassification, dtype_called(DTYPE)
        model = kind.from_pretrained(MODEL, num_labels=1, dtype=dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        set_padding(model, tokenizer)

    def rewards_of(module, some: list[Pair]):
        """Those of the better and of the worse completions, (B,) each."""
        better, worse = zip(*some)
        return logits_of(module, tokenizer, [*better, *worse]).float().chunk(2)

    def losses(engine, step):
        for batch in share(pairs, step, BATCH_SIZE, MICRO_BATCH, SEED):
            yield bradley_terry(*rewards_of(engine, batch)).sum() / BATCH_SIZE

    @torch.no_grad()
    def accuracy(some: list[Pair]) -> dict:
        wins = []
        for start in range(0, len(some), MICRO_BATCH):
            better, worse = rewards_of(model, some[start : start + MICRO_BATCH])
            wins += (better > worse).float().tolist()
        return interval(wins, "rate")

    before = {path: accuracy(some) for path, some in measured.items()}
    fine_tune(model, losses, STEPS, LR, WARMUP_STEPS)
    after = {path: accuracy(some) for path, some in measured.items()}
    record = {"pairs": len(new), "replayed": len(pairs) - len(new), "before": before, "after": after}
    save(OUTPUT_DIR, model, tokenizer, constants_of(__name__) | record)
    if dist.get_rank() == 0:
        print(f"{OUTPUT_DIR}: {len(new)} new pairs, {len(pairs) - len(new)} old ones; accuracy on held-out pairs")
        for path, some in measured.items():
            shown = [f"{part[path]['value']:.3f}" if len(some) > 1 else "?" for part in (before, after)]
            print(f"  {path}: {' -> '.join(shown)} ({len(some)})")


if __name__ == "__main__":
    override_constants(__name__, sys.argv[1:])
    distributed.run(main)
