"""What a run tells: its .jsonl files, the progress bar's line, the table before and after, the picture, the model card.

    python -m grpo.report runs/arithmetic            # table and reward.png, also while the run goes on
    python -m grpo.report runs/arithmetic runs/other # another run's curves for comparison
"""
import json
import os
import re
import resource
import sys
import time
from collections import Counter
from contextlib import contextmanager
from math import inf, nan
from pathlib import Path

import torch

OF_TOKENS = ("kl", "entropy", "clip_low_frac", "clip_high_frac", "clip_region_frac")
SUMS = ("loss", "completion_tokens_total", "advantage_zero_groups", "skipped_updates", "stop")
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


@contextmanager
def timed(seconds: Counter, name: str, wait=True):
    """Adds the seconds that the block takes to `seconds[name]`, until the accelerator has done its work, if `wait`."""
    start = time.perf_counter()
    yield
    if wait and torch.accelerator.is_available():
        torch.accelerator.synchronize()
    seconds[name] += time.perf_counter() - start


def peak_memory_mb() -> float:
    """Of this process since its start: the allocator's peak on an accelerator, resident memory on a CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def means(sums: dict[str, float], completions: int) -> dict[str, float]:
    """Means over all completions; of a reward function over those that it applies to, as many as "count ..." says; over
    as many tokens as were trained on; and what stays a sum."""
    divisors = dict.fromkeys(SUMS, 1) | dict.fromkeys(OF_TOKENS, max(1, sums.get("count tokens", 0)))
    divisors |= {name.removeprefix("count "): count or nan for name, count in sums.items() if name.startswith("count ")}
    return {name: value / divisors.get(name, completions)
            for name, value in sums.items() if not name.startswith("count ")}


def write(folder: str, name: str, rows: list[dict]) -> None:
    """Appends rows to `folder`/`name`.jsonl; a value that is not a number becomes null."""
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/{name}.jsonl", "a", encoding="utf-8") as file:
        for row in rows:
            numbers = {key: None if value in (inf, -inf) or value != value else value for key, value in row.items()}
            file.write(json.dumps(numbers) + "\n")


def log(folder: str, metrics: dict, trackers) -> None:
    """A row of metrics.jsonl, and the same for the trackers."""
    write(folder, "metrics", [metrics])
    trackers.write_events([(name, value, metrics["step"]) for name, value in metrics.items() if name != "step"])


def one_line(metrics: dict) -> str:
    skipped = ", UPDATE SKIPPED: not finite" if metrics["skipped_updates"] else ""
    return (f"reward {metrics['reward']:.2f}, accuracy {metrics['accuracy']:.0%}, "
            f"{metrics['completion_tokens_mean']:.0f} tokens, KL {metrics['kl']:.1e}{skipped}")


def read(folder: str) -> list[dict]:
    with open(f"{folder}/metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def series(history: list[dict], name: str) -> list[tuple[int, float]]:
    return [(metrics["step"], metrics[name]) for metrics in history if metrics.get(name) is not None]


def before_and_after(history: list[dict]) -> list[tuple[str, float, float]]:
    """The rows of TABLE that the run has numbers for: title, first and last value."""
    found = {title: series(history, name) for name, title in TABLE.items()}
    return [(title, points[0][1], points[-1][1]) for title, points in found.items() if points]


def show(folder: str, *others: str) -> None:
    """Prints the table of `folder`/metrics.jsonl and draws `folder`/reward.png, other runs' curves dashed behind."""
    runs = {run: read(run) for run in (folder, *others)}
    history = runs[folder]
    print(f"\n{'':28}{'before':>10}{'after':>10}")
    for title, first, last in before_and_after(history):
        print(f"{title:28}{first:10.3f}{last:10.3f}")
    seconds = sum(second for _, second in series(history, "seconds"))
    print(f"\n{history[-1]['step']} steps in {seconds:.0f} s; the curves are in {folder}/reward.png, "
          f"the page by python -m http.server -d {folder}")
    draw(runs, f"{folder}/reward.png")


def draw(runs: dict[str, list[dict]], path) -> None:
    """The curves of the first run, and dashed those of the others."""
    from matplotlib.figure import Figure  # here, because it takes half a second of every process's start

    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, PANELS.items()):
        for number, (run, run_history) in enumerate(runs.items()):
            for name in names:
                if points := series(run_history, name):
                    label, style = (f"{name}, {run}", "--") if number else (name, "-")
                    axes.plot(*zip(*points), style, label=label, marker="o" if name.startswith("eval") else None)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=110, format="png")


CARD = """---
{front}
---

# {model}, trained with GRPO

{sentence}

| | before | after |
|---|---|---|
{metrics}

![Reward, held-out accuracy, completion length and KL to the reference, step by step](reward.png)

```python
from transformers import pipeline
chat = pipeline("text-generation", model=".")  # this folder, or its name on the hub
print(chat({messages}, max_new_tokens={tokens}))
```

| constant | value |
|---|---|
{constants}
"""


def card(run: Path, folder: Path) -> None:
    """A model card in `folder`, a checkpoint of the run: README.md as the Hugging Face hub reads it, and reward.png.

    It holds nothing that differs between two runs of the same constants: no times, no memory.
    """
    constants, history = json.loads((run / "run.json").read_text()), read(run)
    rows = before_and_after(history)
    start, data = constants["MODEL"], constants["DATASET"]
    front = {"library_name": "transformers", "pipeline_tag": "text-generation",
             "tags": ["grpo", "reinforcement-learning"]}
    front |= {"base_model": start} if on_hub(start) else {}
    front |= {"datasets": [data.split(":")[0]]} if on_hub(data.split(":")[0]) else {}
    sentence = (f"{plain(start)} after {history[-1]['step']} steps of GRPO (Group Relative Policy Optimization, "
                f"[arXiv 2402.03300](https://arxiv.org/abs/2402.03300)) on {plain(data)}, with the rewards "
                f"{plain(constants['REWARDS'])}.")
    messages = [{"role": "system", "content": constants["SYSTEM_PROMPT"]},
                {"role": "user", "content": "What is 2 + 3?"}]
    (folder / "README.md").write_text(CARD.format(
        front="\n".join(f"{name}: {json.dumps(value)}" for name, value in front.items()),
        model=plain(os.path.basename(start.rstrip("/"))), sentence=sentence,
        metrics="\n".join(f"| {title} | {first:.3f} | {last:.3f} |" for title, first, last in rows),
        messages=repr(messages), tokens=constants["MAX_COMPLETION_TOKENS"],
        constants="\n".join(f"| `{name}` | {plain(value)} |" for name, value in constants.items())), encoding="utf-8")
    draw({"": history}, folder / "reward.png")


def on_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.endswith(".jsonl") and not os.path.exists(name)


def plain(value) -> str:
    """A value as text that Markdown and HTML show as it is, in a table too."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w .,:/=+-]", lambda letter: f"&#{ord(letter[0])};", text)


if __name__ == "__main__":
    show(*sys.argv[1:] or ["runs/arithmetic"])
