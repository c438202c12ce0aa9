"""What completions are worth, in numbers to log: sampled ones of a step, greedy ones of the held-out problems."""
import torch
import torch.distributed as dist

import report
from processes import reduce
from rewards import compute_rewards


def columns(rows: list[dict]) -> dict[str, list]:
    """What the reward functions see of the data set."""
    return {name: [row["columns"][name] for row in rows] for name in (rows[0]["columns"] if rows else [])}


def score(rewards: dict, rows: list[dict], completions: list, tokenizer):
    """The completions as text, EOS cut off; their rewards by function (F, B), None as NaN; their steps, F lists of B;
    the weighted sum of all functions (B,), and of those without steps (B,); sums to log."""
    texts = [tokenizer.decode(completion.tokens[: -1 if completion.ended else None]) for completion in completions]
    ids = [completion.tokens.tolist() for completion in completions]
    prompts = [row["text"] for row in rows]
    values, steps = compute_rewards(rewards, texts, prompts=prompts, completion_ids=ids, **columns(rows))
    values = torch.tensor(values, dtype=torch.float64)
    weighted = values * torch.tensor(list(rewards.values()))[:, None]
    totals, outcomes = weighted.nansum(0), weighted[[not any(row) for row in steps]].nansum(0)
    sums = {"reward": totals.sum(), "accuracy": (values[0] > 0).sum(), "completion_tokens_mean": sum(map(len, ids)),
            "truncated_frac": sum(not completion.ended for completion in completions)}
    for function, row in zip(rewards, values):
        sums |= {f"reward/{function.__name__}": row.nansum(), f"count reward/{function.__name__}": (~row.isnan()).sum()}
    return texts, values, steps, totals, outcomes, sums


def evaluate(draw, tokenizer, rewards: dict, rows: list[dict], **options) -> dict[str, float]:
    """Greedy completions of the held-out rows, shared by the processes: accuracy, rewards, length, share cut off.

    `draw` is `sampler.sample` of a model, or like it; `options` are max_tokens and stop.
    """
    mine = rows[dist.get_rank() :: dist.get_world_size()]
    completions = draw([row["ids"] for row in mine], 1, temperature=0, **options)
    *_, sums = score(rewards, mine, completions, tokenizer)
    means = report.means(reduce(sums), len(rows))
    return {f"eval_{name.removeprefix('completion_')}": value for name, value in means.items()}
