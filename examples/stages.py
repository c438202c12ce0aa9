"""The table and the picture of a recipe, from the evaluations of its stages.

    python examples/stages.py FOLDERS=runs/r1/heldout_1 STAGES=start,a_cold_start PICTURE=runs/r1/stages.png

Each folder has what `python -m grpo.evaluate` writes about one model or two; the stages are their models, in order. The
last of the evaluation's REWARDS is one that the policies did not see.
"""
import json
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grpo.constants import explained, override_constants, require  # noqa: E402
from grpo.data import read_jsonl  # noqa: E402
from grpo.evaluate import interval  # noqa: E402

FOLDERS = ["runs/r1/heldout_1"]
STAGES = ["start", "a_cold_start"]
PICTURE = "runs/r1/stages.png"
MEASURES = {  # what the table calls them, and what evaluation.json does
    "accuracy, greedy": "greedy/accuracy",
    "accuracy, sampled": "sampled/accuracy",
    "right form, sampled": "sampled/format",
    "tokens, sampled": "sampled/tokens",
}


def mean_reward(rows: list[dict], model: str, reward: str) -> dict:
    """The mean of one reward function over the sampled completions of a model in evaluation.jsonl, with interval."""
    problems = {}
    for row in rows:
        value = row["rewards"][reward]
        if row["model"] == model and row["sample"] > 0 and value is not None:
            problems.setdefault(row["problem"], []).append(value)
    return interval([fmean(values) for values in problems.values()], "mean")


def measures_of(folder: Path) -> list[dict]:
    """What is shown of each of the evaluation's models."""
    with explained(f"{folder} holds no evaluation"):
        results = json.loads((folder / "evaluation.json").read_text())
        *_, hidden = results["REWARDS"]
        rows = read_jsonl(folder / "evaluation.jsonl")
        return [{title: model[name] for title, name in MEASURES.items() if name in model}
                | {f"{hidden}, sampled": mean_reward(rows, model["model"], hidden)} for model in results["models"]]


def show(columns: list[str], panels: dict, picture) -> None:
    """Prints a table and draws a picture of the panels: title -> label -> an `interval` for each column, or None."""
    def cell(point):
        if not point or point["value"] is None:
            return "-"
        return f"{point['value']:.2f} ±{(point['high'] - point['low']) / 2:.2f}"

    lines = {f"{title} {label}": points for title, lines in panels.items() for label, points in lines.items()}
    table = [("", columns)] + [(title, [*map(cell, points)]) for title, points in lines.items()]
    left, width = max(map(len, lines)), max(12, *map(len, columns)) + 2
    print()
    for title, cells in table:
        print(title.ljust(left) + "".join(text.rjust(width) for text in cells))
    draw(columns, panels, picture)
    print(f"\n± is half of the 95 % interval; the picture is {picture}")


def draw(columns: list[str], panels: dict, picture) -> None:
    from matplotlib.figure import Figure  # here, because it takes half a second

    figure = Figure(figsize=(12, 7), layout="constrained")
    for number, (title, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(2, -(-len(panels) // 2), number)
        for label, points in lines.items():
            known = [(x, p["value"], p["value"] - p["low"], p["high"] - p["value"])
                     for x, p in enumerate(points) if p and p["value"] is not None]
            if known:
                x, y, *errors = zip(*known)
                axes.errorbar(x, y, [[max(0, e) for e in side] for side in errors], marker="o", capsize=3, label=label)
        axes.set(title=title.rstrip(","))
        axes.set_xticks(range(len(columns)), columns, rotation=20)
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize="small")
    figure.savefig(picture, dpi=110)


def main():
    found = sum((measures_of(Path(folder)) for folder in FOLDERS), [])
    require(len(found) == len(STAGES), f"STAGES: {len(STAGES)} names for {len(found)} models in FOLDERS")
    panels = {title: {"": [measures.get(title) for measures in found]} for title in found[0]}
    show(STAGES, panels, PICTURE)


if __name__ == "__main__":
    override_constants(__name__, sys.argv[1:])
    main()
