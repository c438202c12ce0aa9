"""How time and memory grow: completion length, group size, vocabulary, processes, reference servers.

    python benchmarks/scale.py                        # all of it, a quarter of an hour; draws benchmarks/scale.png
    python benchmarks/scale.py vocabulary groups      # some of it, undrawn

One step of training with everything else held: 2 prompts x 4 completions of 128 tokens, 512 entries, the model of
compare.py, one thread a process. Printed is the exponent of a power law through the seconds of all points but the first
(1: as fast as the work).
"""
import math
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import compare
from matplotlib.figure import Figure

AXES = {  # what varies, and its values
    "lengths": [64, 256, 1024, 4096],
    "groups": [4, 16, 64],
    "vocabulary": [512, 8192, 151936],
    "processes": [1, 2],
    "servers": [1, 2],
}
PHASES = ("seconds_sample", "seconds_ref_wait", "seconds_train", "peak_memory_mb")
LABELS = {
    "lengths": "tokens of a completion",
    "groups": "completions of a prompt",
    "vocabulary": "entries of the vocabulary",
    "processes": "trainer processes",
    "servers": "reference servers",
    "seconds_sample": "sampling",
    "seconds_ref_wait": "waiting for the reference",
    "seconds_train": "training",
}


def measure(folders: dict, axis: str, value: int) -> dict[str, float]:
    """The median step, the first left out, and the peak memory."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    folder = folders[value if axis == "vocabulary" else 512]
    length, group = (value if axis == name else other for name, other in (("lengths", 128), ("groups", 4)))
    with ExitStack() as stack:
        output = stack.enter_context(tempfile.TemporaryDirectory())
        urls = [stack.enter_context(compare.reference_server(folder, environment))[1]
                for _ in range(value if axis == "servers" else 1)]
        rows = compare.train(
            output, environment, ranks=value if axis == "processes" else 1, MODEL=folder, PROMPTS_PER_STEP=2,
            DATASET=f"{folder}/data.jsonl", REF_SERVER=",".join(urls), GROUP_SIZE=group, MAX_COMPLETION_TOKENS=length,
            MIN_COMPLETION_TOKENS=length, STEPS=2 if length > 1000 else 4, MICRO_BATCH_TOKENS=2048)[2:]
    return {name: statistics.median(row[name] for row in rows) for name in PHASES}


def exponent(xs: list[float], ys: list[float]) -> float:
    """Of the power law through the points, by least squares of the logarithms."""
    xs, ys = [math.log(x) for x in xs], [math.log(max(y, 1e-3)) for y in ys]
    middle = statistics.mean(xs)
    return sum((x - middle) * y for x, y in zip(xs, ys)) / sum((x - middle) ** 2 for x in xs)


def draw(results: dict[str, list[dict]], path) -> None:
    """For each axis the seconds, above, and the memory, below."""
    figure = Figure(figsize=(3.2 * len(results), 5.5), layout="constrained")
    for (axis, found), (above, below) in zip(results.items(), figure.subplots(2, len(results)).T):
        for name in PHASES[:3]:
            above.plot(AXES[axis], [max(0.01, result[name]) for result in found], "o-", label=LABELS[name])
        below.plot(AXES[axis], [result["peak_memory_mb"] for result in found], "ko-")
        above.set(title=LABELS[axis], yscale="log", ylim=(0.008, 120))
        below.set(ylim=(0, 1500))
        for plot in (above, below):
            plot.set_xscale("log")
            plot.set_xticks(AXES[axis], [f"{value:,}" for value in AXES[axis]])
            plot.minorticks_off()
            plot.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds a step (log)")
    figure.axes[len(results)].set_ylabel("peak memory of a trainer, MB")
    figure.axes[len(results) - 1].legend(fontsize="small")
    figure.savefig(path, dpi=90)


def main(*names: str) -> None:
    names, results = names or tuple(AXES), {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        for vocab in {512, *(AXES["vocabulary"] if "vocabulary" in names else ())}:
            folders[vocab] = Path(temporary) / str(vocab)
            compare.build(folders[vocab], vocab, "exact", longest=8192)
        for axis in names:
            results[axis] = []
            for value in AXES[axis]:
                result = measure(folders, axis, value)
                print(f"{axis} {value}: " + ", ".join(f"{name} {result[name]:.3g}" for name in PHASES), flush=True)
                results[axis].append(result)
            for name in ("seconds_sample", "seconds_train") if len(AXES[axis]) > 2 else ():
                power = exponent(AXES[axis][1:], [result[name] for result in results[axis][1:]])
                print(f"{axis}: {name} grows with the power {power:.2f}", flush=True)
    if names == tuple(AXES):
        draw(results, compare.ROOT / "benchmarks" / "scale.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
