"""Supervised fine-tuning: a policy learns to write the solutions of a data set.

    python examples/sft.py DATASET=solutions.jsonl OUTPUT_DIR=runs/sft                     # one process
    deepspeed examples/sft.py MODEL=... DATASET=... SOLUTION_COLUMN=... OUTPUT_DIR=...     # all GPUs

The loss is the mean of -log p over the tokens of a step's solutions, EOS included, prompts left out. OUTPUT_DIR gets
model and tokenizer for `from_pretrained`, and training.json with the held-out loss before and after. It is written
whole or not at all.
"""
import math
import sys
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples.tuning import fine_tune, save, share  # noqa: E402
from grpo import distributed  # noqa: E402
from grpo.constants import Over, constants_of, explained, override_constants, require  # noqa: E402
from grpo.data import load_prompts, tokens_of  # noqa: E402
from grpo.policy import Policy, batched_logps  # noqa: E402
from grpo.types import Prompt, Sample, pack  # noqa: E402

MODEL = "examples/arithmetic/model"  # local folder or hub name
DTYPE = "auto"  # float32 on a CPU, bfloat16 on an accelerator
DATASET = "runs/solutions.jsonl"  # as grpo_train.py's, with one more column:
SOLUTION_COLUMN = "solution"  # what the policy is to write
QUESTION_COLUMN = "question"
SYSTEM_PROMPT = "First reason between <think> and </think>, then give the answer between <answer> and </answer>."
OUTPUT_DIR = "runs/sft"
SEED: Over(-1, 2**31 - 1) = 0
HELDOUT: Over(0, 0.5) = 0.1  # share of the rows, the last ones, that train nothing and measure the loss
STEPS: Over(0) = 60
BATCH_SIZE: Over(0) = 16  # solutions of a step, all processes together
MICRO_BATCH: Over(0) = 16  # of them in a forward and backward pass of a process; fewer need less memory
MAX_TOKENS = 512  # of prompt and solution; longer rows are left out
LR = 1e-5  # for pre-trained models
WARMUP_STEPS = 5
GRADIENT_CHECKPOINTING = False
ZERO_STAGE: Literal[0, 1, 2, 3] = 1


def written(prompt: Prompt, solution: str, tokenizer) -> Sample:
    """The solution as if it had been sampled: tokens (T,), EOS included."""
    ids = tokens_of(solution + tokenizer.eos_token, tokenizer)
    return Sample(prompt, torch.tensor(ids), torch.zeros(len(ids)), ended=True)


def supervised_loss(logps, samples: list[Sample], tokens: float, device="cpu") -> torch.Tensor:
    """-log p of the samples' tokens, in nats, divided by the `tokens` of the whole step.

    `logps` gives packed rows their log-probs (C,), see `token_logps`.
    """
    rows = [tensor.to(device) for tensor in pack(samples)]
    return -logps(*rows).sum() / tokens


def read_solutions(tokenizer) -> list[Sample]:
    samples = []
    for prompt in load_prompts(DATASET, tokenizer, SYSTEM_PROMPT, MAX_TOKENS, QUESTION_COLUMN):
        solution = prompt.columns.get(SOLUTION_COLUMN)
        sentence = f"{DATASET}, row {prompt.number}: no text in SOLUTION_COLUMN={SOLUTION_COLUMN}"
        with explained(sentence, (TypeError, ValueError)):
            samples.append(written(prompt, solution, tokenizer))
    short = [one for one in samples if len(one.prompt.ids) + len(one.tokens) <= MAX_TOKENS]
    require(len(short) > 1, f"{DATASET}: {len(short)} of {len(samples)} rows have at most {MAX_TOKENS=} tokens; "
                            "two are needed, of which one is held out")
    return short


def main():
    distributed.start()
    require(not Path(OUTPUT_DIR).exists(), f"{OUTPUT_DIR=} is already there: choose another, or remove it")
    policy = Policy(MODEL, MAX_TOKENS, DTYPE, gradient_checkpointing=GRADIENT_CHECKPOINTING)
    samples = read_solutions(policy.tokenizer)
    count = math.ceil(HELDOUT * len(samples))
    train, heldout = samples[:-count], samples[-count:]

    def losses(engine, step):
        batches = share(train, step, BATCH_SIZE, MICRO_BATCH, SEED)
        [tokens] = distributed.reduce([sum(len(one.tokens) for one in sum(batches, []))])
        for batch in batches:
            yield supervised_loss(engine, batch, tokens, engine.device)

    def heldout_loss():
        with policy.gathered():
            return -batched_logps(policy.model, *pack(heldout), 1.0, MICRO_BATCH * MAX_TOKENS).mean().item()

    measured = [heldout_loss()]
    fine_tune(policy.module, losses, STEPS, LR, WARMUP_STEPS, ZERO_STAGE)
    measured.append(heldout_loss())
    record = constants_of(__name__) | {"solutions": len(train), "heldout_loss": measured}
    save(OUTPUT_DIR, policy.model, policy.tokenizer, record)
    if dist.get_rank() == 0:
        before, after = measured
        print(f"{OUTPUT_DIR}: {len(train)} solutions, held-out loss {before:.4f} -> {after:.4f} nats per token")


if __name__ == "__main__":
    override_constants(__name__, sys.argv[1:])
    distributed.run(main)
