"""What a run has learned so far: draws reward.png beside its metrics.jsonl and prints a table, before and after.

    python plot.py runs/arithmetic              # also while the run goes on

The trainer does this at the end of a run. It reads nothing but metrics.jsonl.
"""
import json
import sys

from matplotlib.figure import Figure

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


def report(folder: str) -> None:
    """Prints the table of `folder`/metrics.jsonl and draws `folder`/reward.png."""
    with open(f"{folder}/metrics.jsonl", encoding="utf-8") as file:
        history = [json.loads(line) for line in file]

    def series(name):
        return [(metrics["step"], metrics[name]) for metrics in history if name in metrics]

    print(f"\n{'':28}{'before':>10}{'after':>10}")
    for name, title in TABLE.items():
        if points := series(name):
            print(f"{title:28}{points[0][1]:10.3f}{points[-1][1]:10.3f}")
    seconds = sum(second for _, second in series("seconds"))
    print(f"\n{history[-1]['step']} steps, {seconds:.0f} s of training; {folder}/reward.png shows the way")

    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, PANELS.items()):
        for name in names:
            if points := series(name):
                axes.plot(*zip(*points), label=name, marker="o" if name.startswith("eval") else None)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    figure.savefig(f"{folder}/reward.png", dpi=110)


if __name__ == "__main__":
    report(sys.argv[1] if len(sys.argv) > 1 else "runs/arithmetic")
