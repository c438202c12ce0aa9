"""The numbers of one step: sums with their counts by name, added up over all processes once, and a stopwatch."""
import resource
import time
from collections import Counter, defaultdict
from math import isnan, nan
from statistics import fmean, stdev

import torch

from grpo.distributed import reduce
from grpo.types import Group, samples_of


class Metrics:
    """`metrics.add("kl", total, count)` anywhere in a step; all processes use the same names.

    A sum or count may be a tensor on an accelerator: nothing waits for it before `reduced`.
    """

    def __init__(self, step=1, steps=1):
        self.step, self.steps = step, steps  # of the training
        self.totals, self.counts, self.logged = Counter(), Counter(), defaultdict(list)
        self.seconds = Counter(seconds_sample=0, seconds_reward=0, seconds_ref_wait=0, seconds_train=0)
        self.start = self.now = time.perf_counter()

    def add(self, name: str, total, count=None) -> None:
        """`reduced` gives the sum of all totals, divided by the sum of all counts where there are any."""
        self.totals[name] += torch.as_tensor(total, dtype=torch.float64).detach()
        if count is not None:
            self.counts[name] += count

    def add_values(self, name: str, values: list[float]) -> None:
        """`reduced` gives the mean of all that are not NaN."""
        known = [value for value in values if not isnan(value)]
        self.add(name, sum(known), len(known))

    def add_tokens(self, values: dict[str, torch.Tensor], which: torch.Tensor) -> None:
        """Means of values (C,), a number a token, over the tokens for which `which` (C,) is true."""
        for name, value in values.items():
            self.add(name, torch.where(which, value.detach().double(), 0).sum(), which.sum())

    def log(self, name: str, value: float) -> None:
        """For reward functions, TRL's `log_metric`: the mean of this process's values is in `row`."""
        self.logged[name].append(float(value))

    def lap(self, name: str, wait=False) -> None:
        """The seconds since the last lap belong to `name`; with `wait` only once the accelerator has done its work."""
        if wait and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        before, self.now = self.now, time.perf_counter()
        self.seconds[f"seconds_{name}"] += self.now - before

    def reduced(self) -> dict[str, float]:
        """Means and sums over all processes, in the order in which they were added; NaN where the count is 0."""
        sums = reduce([*self.totals.values(), *self.counts.values()])
        counts = dict(zip(self.counts, sums[len(self.totals) :]))
        return {name: total / (counts.get(name, 1) or nan) for name, total in zip(self.totals, sums)}

    def row(self, **known) -> dict[str, float]:
        """The step, `known` numbers, what `reduced` gives, and this process's seconds in each lap, seconds since the
        start, and peak memory. No reward function's `log` replaces one of them."""
        known = {"step": self.step} | known
        logged = {name: fmean(values) for name, values in self.logged.items()}
        return known | logged | self.reduced() | self.seconds | known | {
            "seconds": time.perf_counter() - self.start, "peak_memory_mb": peak_memory_mb()}


def peak_memory_mb() -> float:
    """Of this process since its start: the allocator's peak on an accelerator, resident memory on a CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def add_rewards(metrics: Metrics, groups: list[Group], rewards: list) -> None:
    """What the groups' samples are worth. Means are over the samples to which a reward function applies."""
    samples = samples_of(groups)
    by_function = [[sample.rewards[place] for sample in samples] for place in range(len(rewards))]
    metrics.add_values("reward", [sample.reward for sample in samples])
    metrics.add_values("accuracy", [first if isnan(first) else first > 0 for first in by_function[0]])
    metrics.add_values("unjudged_frac", [isnan(sample.reward) for sample in samples])
    metrics.add_values("completion_tokens_mean", [len(sample.tokens) for sample in samples])
    metrics.add_values("truncated_frac", [not sample.ended for sample in samples])
    for reward, values in zip(rewards, by_function):
        metrics.add_values(f"reward/{reward.name}", values)


def add_groups(metrics: Metrics, groups: list[Group], rewards: list) -> None:
    """`add_rewards`, and what only groups of several samples have."""
    add_rewards(metrics, groups, rewards)
    metrics.add("completion_tokens_total", sum(len(sample.tokens) for sample in samples_of(groups)))
    judged = [[sample.reward for sample in group.samples if not isnan(sample.reward)] for group in groups]
    metrics.add_values("reward_std", [stdev(values) for values in judged if len(values) > 1])
    metrics.add("advantage_zero_groups", sum(not group.has_signal() for group in groups))
