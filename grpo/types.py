"""What flows from the data set to the update: prompts, their samples in groups, and micro-batches of samples."""
from bisect import bisect_left
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import isnan
from typing import NamedTuple

import torch


@dataclass(eq=False)
class Prompt:
    """A row of a data set."""
    ids: list[int]  # its tokens
    text: str = ""  # what they say, in the chat template
    messages: list | None = None  # the row's `prompt`, if that is chat messages
    columns: dict = field(default_factory=dict)  # the row's other columns, for the reward functions
    number: int = 0  # the row's, from 1


class PendingLogps(NamedTuple):
    """A sample's log-probs: a row of what a server will answer to a request."""
    rows: Future
    row: int

    def result(self) -> torch.Tensor:
        """Waits for them. Raises what the request has raised."""
        return self.rows.result()[self.row]


@dataclass(eq=False)
class Sample:
    """A completion of a prompt: first what the sampler knows, then what is found out about it."""
    prompt: Prompt
    tokens: torch.Tensor  # (T,) int64 on the CPU, EOS included
    sampler_logps: torch.Tensor  # (T,) float32, under the sampler at the sampling temperature
    ended: bool  # with EOS; otherwise it was cut off
    text: str = ""  # without EOS
    rewards: list[float] = field(default_factory=list)  # by reward function; NaN: it does not apply
    steps: list[list] = field(default_factory=list)  # by reward function [(end_token, reward), ...], if it judges steps
    reward: float = 0.0  # the weighted sum of all reward functions; NaN: none applies
    outcome: float = 0.0  # of the functions that do not judge steps; 0 if all of them do; NaN: none applies
    extra: dict = field(default_factory=dict)  # what reward functions want in completions.jsonl
    advantages: torch.Tensor | None = None  # (T,)
    weight: float = 0.0  # of each token in the loss
    ref_logps: PendingLogps | None = None  # whose `result` is (T,) float32, from the reference server


@dataclass(eq=False)
class Group:
    """All samples of a prompt."""
    prompt: Prompt
    samples: list[Sample]

    def has_signal(self) -> bool:
        """Whether the rewards of the outcomes, or of a function's steps, differ: equal ones give no advantage."""
        outcomes = {sample.outcome for sample in self.samples if not isnan(sample.outcome)}
        functions = zip(*(sample.steps for sample in self.samples))
        return len(outcomes) > 1 or any(len({reward for _, reward in sum(steps, [])}) > 1 for steps in functions)


def samples_of(groups: list[Group]) -> list[Sample]:
    return [sample for group in groups for sample in group.samples]


@dataclass(eq=False)
class MicroBatch:
    """B samples for one forward and backward pass, their C completion tokens one after the other."""
    samples: list[Sample]
    tokens: torch.Tensor  # (N,), every prompt followed by its completion, no padding
    prompt_lens: torch.Tensor  # (B,)
    completion_lens: torch.Tensor  # (B,)
    advantages: torch.Tensor  # (C,)
    weights: torch.Tensor  # (C,)
    sampler_logps: torch.Tensor  # (C,)
    old_logps: torch.Tensor | None = None  # (C,) under the policy that sampled, once they are known
    ref_logps: torch.Tensor | None = None  # (C,) once they are there


def pack(samples: list[Sample]) -> list[torch.Tensor]:
    """Samples as ragged rows: tokens (N,), prompt_lens (B,), completion_lens (B,)."""
    tokens = torch.cat([part for sample in samples for part in (torch.tensor(sample.prompt.ids), sample.tokens)])
    lens = torch.tensor([[len(sample.prompt.ids), len(sample.tokens)] for sample in samples]).T
    return [tokens, *lens]


def split(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of rows of these lengths in batches, rows x longest <= budget tokens, each with the longest row first.

    The long rows are in the first batches. Rows whose lengths have equally many bits keep their order, so most of a
    group stays together and shares its prompt. A row over the budget is a batch by itself.
    """
    batches, longest = [], 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index].bit_length()):
        longest = max(longest, lengths[index])
        if not batches or longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return [sorted(batch, key=lambda index: -lengths[index]) for batch in batches]


def in_batches(samples: list[Sample], budget: int) -> list[list[Sample]]:
    lengths = [len(sample.prompt.ids) + len(sample.tokens) for sample in samples]
    return [[samples[index] for index in batch] for batch in split(lengths, budget)]


def micro_batch(samples: list[Sample], device) -> MicroBatch:
    weights = [torch.full_like(sample.advantages, sample.weight) for sample in samples]
    parts = [sample.advantages for sample in samples], weights, [sample.sampler_logps for sample in samples]
    return MicroBatch(samples, *(tensor.to(device) for tensor in [*pack(samples), *map(torch.cat, parts)]))


def tokens_until(tokenizer, tokens, characters: int) -> int:
    """How many of the tokens it takes to write so many characters."""
    return bisect_left(range(len(tokens)), characters,  # section 4.1.3: index(j)
                       key=lambda count: len(tokenizer.decode(tokens[:count])))
