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

    def __init__(self, step=1, steps=0):
        self.step, self.steps = step, steps  # of the training
        self.totals, self.counts, self.logged = {}, {}, defaultdict(list)
        self.seconds = Counter(seconds_sample=0, seconds_reward=0, seconds_ref_wait=0, seconds_train=0)
        self.start = self.now = time.perf_counter()

    def add(self, name: str, total, count=None) -> None:
        """`reduced` gives the mean, all totals over all counts; without a count it gives the sum of the totals."""
        self.totals[name] = self.totals.get(name, 0) + torch.as_tensor(total, dtype=torch.float64).detach()
        if count is not None:
            self.counts[name] = self.counts.get(name, 0) + torch.as_tensor(count, dtype=torch.float64)

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

    def row(self) -> dict[str, float]:
        """What `reduced` gives, and this process's seconds in each lap, seconds since the start, and peak memory."""
        return {name: fmean(values) for name, values in self.logged.items()} | self.reduced() | self.seconds | {
            "seconds": time.perf_counter() - self.start, "peak_memory_mb": peak_memory_mb()}


def peak_memory_mb() -> float:
    """Of this process since its start: the allocator's peak on an accelerator, resident memory on a CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def add_rewards(metrics: Metrics, groups: list[Group], rewards: list) -> None:
    """What the groups' samples are worth. Means are over the samples to which a reward function applies."""
    samples = samples_of(groups)
    count = len(samples)
    add_mean(metrics, "reward", [one.reward for one in samples])
    add_mean(metrics, "accuracy", [one.rewards[0] if isnan(one.rewards[0]) else one.rewards[0] > 0 for one in samples])
    metrics.add("unjudged_frac", sum(isnan(one.reward) for one in samples), count)
    metrics.add("completion_tokens_mean", sum(len(one.tokens) for one in samples), count)
    metrics.add("truncated_frac", sum(not one.ended for one in samples), count)
    for place, reward in enumerate(rewards):
        add_mean(metrics, f"reward/{reward.name}", [one.rewards[place] for one in samples])


def add_mean(metrics: Metrics, name: str, values: list[float]) -> None:
    known = [value for value in values if not isnan(value)]
    metrics.add(name, sum(known), len(known))


def add_groups(metrics: Metrics, groups: list[Group], rewards: list) -> None:
    """`add_rewards`, and what only groups of several samples have."""
    add_rewards(metrics, groups, rewards)
    metrics.add("completion_tokens_total", sum(len(one.tokens) for one in samples_of(groups)))
    judged = [[one.reward for one in group.samples if not isnan(one.reward)] for group in groups]
    add_mean(metrics, "reward_std", [stdev(values) for values in judged if len(values) > 1])
    metrics.add("advantage_zero_groups", sum(not group.has_signal() for group in groups))
