"""Rewards and the reference while other completions are being written, against afterwards: seconds of a step.

    python benchmarks/overlap.py                  # a reward that takes 20 ms a completion, as another program's may
    python benchmarks/overlap.py milliseconds=0

8 prompts x 8 completions of natural lengths up to 256 tokens, of the model of compare.py, in turns. "Afterwards" the
sampler looks for finished groups only at the end. The server has a core of its own, the trainer the other one.
"""
import os
import statistics
import sys
import tempfile
from pathlib import Path

import compare

WAYS = {"meanwhile": 64, "afterwards": 10**9}  # tokens from one look for finished groups to the next
REWARD = """
import time
from grpo.sampling import transformers as sampler
sampler.BLOCK = {block}
def slow(completions, **columns):
    time.sleep({seconds} * len(completions))
    return [len(completion) % 7 for completion in completions]
"""
PHASES = ("seconds", "seconds_sample", "seconds_reward", "seconds_ref_wait", "seconds_train")


def main(milliseconds="20", rounds="3", steps="12") -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder, found = Path(temporary), {way: [] for way in WAYS}
        compare.build(folder, 512, "natural")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": temporary}
        for way, block in WAYS.items():
            (folder / f"{way}.py").write_text(REWARD.format(block=block, seconds=float(milliseconds) / 1000))
        for number in range(int(rounds)):
            for way in WAYS:
                with compare.reference_server(folder, environment) as (_, url):
                    rows = compare.train(
                        f"{temporary}/{way}{number}", environment, MODEL=folder, DATASET=f"{folder}/data.jsonl",
                        REF_SERVER=url, PROMPTS_PER_STEP=8, GROUP_SIZE=8, MAX_COMPLETION_TOKENS=256, STEPS=int(steps),
                        REWARDS=f"{way}:slow")[2:]
                found[way].append({name: statistics.median(row[name] for row in rows) for name in PHASES})
                print(f"{way:11}" + ", ".join(f"{name} {found[way][-1][name]:.3f}" for name in PHASES), flush=True)
    ratios = [after["seconds"] / during["seconds"] for during, after in zip(*found.values())]
    print(f"afterwards a step takes {statistics.median(ratios):.2f} times as long")


if __name__ == "__main__":
    main(**dict(argument.split("=") for argument in sys.argv[1:]))
