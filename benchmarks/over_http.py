"""What HTTP costs: log-probs from the reference server against the same forward pass in this process, in turns.

    python benchmarks/over_http.py                            # 512 entries, 4 prompts x 8 completions of 64 tokens
    python benchmarks/over_http.py vocab=151936 rounds=5

Both use all cores, one at a time. The answer's log-probs are compared too.
"""
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import compare
import torch

from grpo.policy import load_model
from grpo.reference import request_logps
from ref_server import batched_logps


def main(vocab="512", rounds="30") -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        compare.build(folder, int(vocab), "exact")
        model, _ = load_model(str(folder))
        prompts = torch.randint(int(vocab), (4, 25)).repeat_interleave(8, 0)
        tokens = torch.cat([prompts, torch.randint(int(vocab), (32, 64))], 1).flatten()
        rows = tokens, torch.full((32,), 25), torch.full((32,), 64)
        seconds = {"in this process": [], "over HTTP": []}
        with compare.reference_server(folder, dict(os.environ)) as (_, url):
            ways = (lambda: batched_logps(model, *rows, 1.0, 16384),
                    lambda: torch.cat(request_logps(url, *rows, 1.0)))
            for _ in range(int(rounds) + 2):
                answers = []
                for way, measured in zip(ways, seconds.values()):
                    time.sleep(0.05)  # this process's threads spin for a while after their work, on the server's cores
                    start = time.perf_counter()
                    answers.append(way())
                    measured.append(time.perf_counter() - start)
    pairs = list(zip(*seconds.values()))[2:]  # the first two warm up
    ratio = statistics.median(http / here for here, http in pairs)
    print(f"{vocab} entries: here {statistics.median(here for here, _ in pairs):.3f} s, over HTTP "
          f"{statistics.median(http for _, http in pairs):.3f} s, median ratio {ratio:.3f}; largest difference "
          f"{(answers[0] - answers[1]).abs().max():.1e}")


if __name__ == "__main__":
    main(**dict(argument.split("=") for argument in sys.argv[1:]))
