"""What flows from the sampler to the update: completions, and the rows and micro-batches that are made of them."""
from typing import NamedTuple

import torch


class Completion(NamedTuple):
    """What the policy answered: token ids, EOS included when it came."""
    tokens: torch.Tensor  # (C,) int64, on the CPU
    logps: torch.Tensor  # (C,) float32, under the policy at the sampling temperature
    ended: bool  # with EOS; otherwise it was cut off at max_tokens


def pack(samples: list[dict]) -> list[torch.Tensor]:
    """Samples as B ragged rows: tokens (N,), prompt_lens (B,), completion_lens (B,)."""
    tokens = torch.cat([part for sample in samples for part in (sample["prompt"], sample["completion"])])
    lens = torch.tensor([[len(sample["prompt"]), len(sample["completion"])] for sample in samples]).T
    return [tokens, *lens]


def micro_batches(rows: list, budget: int) -> list[list]:
    """Rows, each a dict with its `length`, in batches of similar length, longest first.

    Rows x longest length is at most `budget`, but a longer row makes a batch by itself.
    """
    batches = []
    for row in sorted(rows, key=lambda row: -row["length"]):
        if not batches or batches[-1][0]["length"] * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(row)
    return batches
