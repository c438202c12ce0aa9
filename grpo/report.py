"""What a run writes and shows: .jsonl files, the progress bar, the table before and after, the picture, a model card.

    python -m grpo.report runs/arithmetic            # table and reward.png, also while the run goes on
    python -m grpo.report runs/arithmetic runs/other # another run's curves for comparison
"""
import json
import re
import sys
from itertools import product
from pathlib import Path

import torch.distributed as dist
from jinja2 import Environment, FileSystemLoader, select_autoescape
from tqdm import tqdm

from grpo.constants import require
from grpo.types import Group

PANELS = {
    "reward (mean of the step)": ["reward"],
    "held-out accuracy (greedy)": ["eval_accuracy"],
    "completion length (tokens)": ["completion_tokens_mean", "eval_tokens_mean"],
    "KL to the reference (nats per token)": ["kl"],
}
TABLE = {
    "eval_accuracy": "held-out accuracy, greedy",
    "eval_reward": "held-out reward, greedy",
    "eval_tokens_mean": "held-out length, tokens",
    "accuracy": "training accuracy, sampled",
    "reward": "training reward",
    "completion_tokens_mean": "training length, tokens",
    "kl": "KL to the reference",
    "entropy": "entropy, nats per token",
}


class Log:
    """What the first process tells about a run, step by step: the .jsonl files, the trackers, the progress bar."""

    def __init__(self, folder: str, monitor, last: int, steps: int):
        self.folder, self.monitor, self.silent = folder, monitor, dist.get_rank() > 0
        self.progress = tqdm(desc="GRPO", initial=last, total=steps, disable=self.silent)
        for row in read(folder) if last and not self.silent else ():
            self.track(row)  # from the start: their files are new ones, see `checkpoint.prepare`

    def write(self, row: dict, group: Group | None = None, rewards=()) -> None:
        """A row of metrics.jsonl, the same for the trackers, and a group's completions."""
        if self.silent:
            return
        append(f"{self.folder}/metrics.jsonl", row)
        self.track(row)
        if not group:
            return
        for sample in group.samples:
            known = {"step": row["step"], "prompt": group.prompt.text, "completion": sample.text,
                     "advantage": sample.advantages.mean().item()}
            values = {reward.name: value for reward, value in zip(rewards, sample.rewards)}
            append(f"{self.folder}/completions.jsonl", known | sample.extra | values | known)  # our names win
        shown = "reward {reward:.2f}, accuracy {accuracy:.0%}, {completion_tokens_mean:.0f} tokens, KL {kl:.1e}"
        skipped = ", UPDATE SKIPPED: not finite" if row["skipped_updates"] else ""
        self.progress.set_postfix_str(shown.format_map(row) + skipped, refresh=False)
        self.progress.update()

    def track(self, row: dict) -> None:
        """The row for the trackers."""
        self.monitor.write_events([(name, value, row["step"]) for name, value in row.items()
                                   if name != "step" and value is not None])

    def close(self) -> None:
        self.progress.close()
        if not self.silent:
            show(self.folder)


def trackers(names: list[str], folder: str) -> dict:
    """DeepSpeed's settings for TRACKERS. SystemExit at an unknown one."""
    known = {name: {"output_path": folder, "job_name": name} for name in ("csv", "tensorboard")}
    known["wandb"] = {"project": "grpo", "group": folder}
    require(known.keys() >= set(names), f"TRACKERS={','.join(names)}: expected {', '.join(known)}")
    return {name.replace("csv", "csv_monitor"): {"enabled": True} | known[name] for name in names}


def append(path: str, row: dict) -> None:
    """Adds a line to a .jsonl file. Arrays become lists; what JSON does not know, NaN above all, becomes null."""
    text = json.dumps(row, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
    known = json.loads(text, parse_constant=lambda _: None)
    with open(path, "a") as file:
        file.write(json.dumps(known) + "\n")


def read(folder: str) -> list[dict]:
    file = Path(folder, "metrics.jsonl")
    require(file.exists(), f"{file} is not there: no run has come to its first step in {folder}")
    return [json.loads(line) for line in file.read_text().splitlines()]


def series(history: list[dict], name: str) -> list[tuple[int, float]]:
    return [(metrics["step"], metrics[name]) for metrics in history if metrics.get(name) is not None]


def before_and_after(history: list[dict]) -> list[tuple[str, float, float]]:
    """The rows of TABLE that the run has numbers for: title, first and last value."""
    found = {title: series(history, name) for name, title in TABLE.items()}
    return [(title, points[0][1], points[-1][1]) for title, points in found.items() if points]


def show(folder: str, *others: str) -> None:
    """Prints the table of `folder`/metrics.jsonl and draws `folder`/reward.png, other runs' curves dashed behind."""
    history = read(folder)
    print(f"\n{'':28}{'before':>10}{'after':>10}")
    for title, first, last in before_and_after(history):
        print(f"{title:28}{first:10.3f}{last:10.3f}")
    seconds = sum(metrics.get("seconds", 0) for metrics in history)
    print(f"\n{history[-1]['step']} steps in {seconds:.0f} s; the curves are in {folder}/reward.png, "
          f"the page by python -m http.server -d {folder}")
    draw({"": history} | {f", {run}": read(run) for run in others}, f"{folder}/reward.png")


def draw(runs: dict[str, list[dict]], path) -> None:
    """The curves of runs, by what the legend puts behind their names; where that is nothing they are not dashed."""
    from matplotlib.figure import Figure  # here, because it takes half a second of every process's start

    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, PANELS.items()):
        for (run, history), name in product(runs.items(), names):
            if points := series(history, name):
                style = ("o" if name.startswith("eval") else "") + ("--" if run else "-")
                axes.plot(*zip(*points), style, label=name + run)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def filled(template: str, **values) -> str:
    """A template of this folder with the values put in; into HTML they are put as text."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(),
                              trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.get_template(template).render(values)


def card(run: Path, folder: Path) -> None:
    """A model card in `folder`, a checkpoint of the run: README.md as the Hugging Face hub reads it, and reward.png.

    It holds nothing that differs between two runs of the same constants: no times, no memory.
    """
    constants, history = json.loads((run / "run.json").read_text()), read(run)
    text = filled("model_card.md", constants=constants, steps=history[-1]["step"], rows=before_and_after(history),
                  plain=plain, on_hub=on_hub)
    (folder / "README.md").write_text(text, encoding="utf-8")
    draw({"": history}, folder / "reward.png")


def on_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.endswith(".jsonl") and not Path(name).exists()


def plain(value) -> str:
    """A value as text that Markdown and HTML show as it is, in a table too."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w .,:/=+-]", lambda letter: f"&#{ord(letter[0])};", text)


if __name__ == "__main__":
    show(*sys.argv[1:] or ["runs/arithmetic"])
