"""How time and memory grow: completion length, group size, vocabulary, processes, reference servers.

    python benchmarks/scale.py                        # all of it, a quarter of an hour; draws benchmarks/scale.png
    python benchmarks/scale.py vocabulary groups      # some of it, undrawn

One step of training with everything else held: 2 prompts x 4 completions of 128 tokens, 512 entries, the model of
compare.py, one thread a process. Printed is the exponent of a power law through all points but the first (1: as
fast as the work), of every phase and of the memory beyond the smallest run's.
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


def main(*names: str) -> None:
    names = names or tuple(AXES)
    figure = Figure(figsize=(4 * len(names), 7), layout="constrained")
    plots = figure.subplots(2, len(names), squeeze=False)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        for vocab in {512, *(AXES["vocabulary"] if "vocabulary" in names else ())}:
            folders[vocab] = Path(temporary) / str(vocab)
            compare.build(folders[vocab], vocab, "exact", longest=8192)
        for column, axis in enumerate(names):
            values, results = AXES[axis], []
            for value in values:
                results.append(measure(folders, axis, value))
                print(f"{axis} {value}: " + ", ".join(f"{name} {results[-1][name]:.3g}" for name in PHASES), flush=True)
            for name in PHASES:
                ys = [result[name] for result in results]
                plots[int(name == "peak_memory_mb"), column].loglog(values, ys, "o-", label=name)
                if len(values) > 2:
                    least = ys[0] if name == "peak_memory_mb" else 0
                    power = exponent(values[1:], [y - least for y in ys[1:]])
                    print(f"{axis}: {name} grows with the power {power:.2f}", flush=True)
            plots[0, column].set(title=axis, ylabel="s")
            plots[1, column].set(xlabel=axis, ylabel="MB")
            plots[0, column].legend(fontsize="small")
    if names == tuple(AXES):
        figure.savefig(compare.ROOT / "benchmarks" / "scale.png", dpi=80)


if __name__ == "__main__":
    main(*sys.argv[1:])
