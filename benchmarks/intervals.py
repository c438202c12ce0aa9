"""How often the truth is inside grpo/evaluate.py's 95 % intervals, and two others, for simulated problems and samples.

    python benchmarks/intervals.py

A problem is solved with a chance of its own (a beta distribution with that mean; the smaller its concentration, the
more problems are solved always or never), and each of its samples with that chance.
"""
import sys
from itertools import product
from pathlib import Path

import numpy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grpo.evaluate import interval  # noqa: E402

TRIALS = 4000


def plain(values, samples):
    """1.96 standard errors of the problems' means."""
    error = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return values.mean() - error, values.mean() + error


def wilson(values, samples):
    """Wilson's, with as many independent samples as would have this standard error."""
    count, p, variance, z = len(values), values.mean(), values.var(ddof=1) / len(values), 1.96
    count = min(count * samples, p * (1 - p) / variance) if variance else count
    centre, error = p + z**2 / 2 / count, z * (p * (1 - p) / count + z**2 / 4 / count**2) ** 0.5
    return (centre - error) / (1 + z**2 / count), (centre + error) / (1 + z**2 / count)


def ours(values, samples):
    found = interval(values.tolist(), "rate")
    return found["low"], found["high"]


lowest, random = {}, numpy.random.default_rng(1)
print(f"{'problems':>8}{'samples':>8}{'mean':>6}{'concentration':>15}   inside: ours, Wilson's, plain   mean widths")
for problems, samples, mean, concentration in product((50, 200), (1, 8, 32), (0.5, 0.9, 0.98), (0.3, 3, 100)):
    chances = random.beta(mean * concentration, (1 - mean) * concentration, (TRIALS, problems))
    drawn = random.binomial(samples, chances) / samples
    ends = {way: numpy.array([way(row, samples) for row in drawn]).clip(0, 1) for way in (ours, wilson, plain)}
    inside = {way: ((low <= mean) & (mean <= high)).mean() for way, (low, high) in ((w, e.T) for w, e in ends.items())}
    lowest = {way: min(share, lowest.get(way, 1)) for way, share in inside.items()}
    print(f"{problems:8}{samples:8}{mean:6}{concentration:15}   ", *(f"{share:.1%}" for share in inside.values()),
          "  ", *(f"{(end[:, 1] - end[:, 0]).mean():.3f}" for end in ends.values()), flush=True)
print("the lowest of each:", *(f"{way.__name__} {share:.1%}" for way, share in lowest.items()))
