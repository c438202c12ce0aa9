"""What models are worth, in a table about one of them, or about two side by side.

    python -m grpo.evaluate MODEL=runs/arithmetic/step_60
    python -m grpo.evaluate MODEL=examples/arithmetic/model,runs/arithmetic/step_60 EVAL_SAMPLES=16
    deepspeed --module grpo.evaluate MODEL=one,other EVAL_DATASET=...               # all GPUs share the problems

Each problem is answered greedily once, and EVAL_SAMPLES times at TEMPERATURE. Needs no reference server.

Intervals hold 95 % and take the problems for the units, because the samples of one problem are no independent evidence:
1.96 standard errors of the per-problem means, or of their differences between two models (Miller, "Adding error bars to
evals", arXiv 2411.00640). That alone would give a rate of 0 or 1 no width at all, so a few problems are imagined along:
for a rate two with 1 and two with 0 (Agresti and Coull, The American Statistician 52, 1998), for a difference half a
pair of each kind, 1 and 1, 0 and 0, 1 and 0, 0 and 1 (Agresti and Min, Statistics in Medicine 24, 2005).
"""
import json
import sys
from contextlib import nullcontext
from html import escape
from math import comb, inf, isnan
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.distributed as dist
from tqdm import tqdm

from grpo import checkpoint, distributed, report
from grpo.constants import override_constants, require
from grpo.data import load_prompts
from grpo.distributed import reduce
from grpo.policy import load_model, stop_ids
from grpo.sampling import open_sampler
from grpo.sampling.transformers import MAX_SEQUENCES, in_order
from rewards import check_rewards, compute_rewards, load_rewards

MODEL = "examples/arithmetic/model"  # local folder or hub name; or two of them, with a comma between
DTYPE = "auto"  # float32 on a CPU, bfloat16 on an accelerator; or either by name
EVAL_DATASET = "examples/arithmetic/heldout.jsonl"  # .jsonl, .parquet, or hub name[:config[:split]]
EVAL_SAMPLES = 8  # completions of each problem at TEMPERATURE, for avg@k and pass@k
QUESTION_COLUMN = "question"  # holds the problem
SYSTEM_PROMPT = "First reason between <think> and </think>, then give the answer between <answer> and </answer>."
REWARDS = ["reward_correct", "reward_format"]  # names of rewards.py, or module:function; the first counts as accuracy
OUTPUT_DIR = "runs/arithmetic"  # evaluation.json, .jsonl and .html
SEED = 0
TEMPERATURE = 1.0
MAX_PROMPT_TOKENS = 128  # longer prompts are left out
MAX_COMPLETION_TOKENS = 64
MIN_COMPLETION_TOKENS = 0
SAMPLER = "auto"  # as in grpo_train.py
VLLM_MEMORY = 0.4

MEASURES = {"accuracy": "accuracy", "format": "right form", "reward": "reward", "tokens": "tokens",
            "cut_off": "cut off"}
IMAGINED = {  # problems, and the limits of what is possible; two differences that count and weigh as the four halves
    "rate": ([0, 0, 1, 1], 0, 1), "difference": ([0.5**0.5, -(0.5**0.5)], -1, 1), "mean": ([], -inf, inf)}
SHOWN = 200  # problems in evaluation.html; all are in evaluation.jsonl


def columns(rows: list[dict]) -> dict[str, list]:
    """What the reward functions see of the data set."""
    return {name: [row["columns"][name] for row in rows] for name in (rows[0]["columns"] if rows else [])}


def score(rewards: dict, rows: list[dict], completions: list, tokenizer) -> list[dict]:
    """Samples: completions of the prompts in `rows`, one of each, and what they are worth.

    The token ids `prompt` and `completion`, tensors; `sampler_logps`; `length`, of both; `ended`; the `text`, EOS cut
    off; by function a number in `rewards`, None as NaN, and a list in `steps`; the weighted sums `total`, of all
    functions, and `outcome`, of those that did not judge its steps.
    """
    samples = [{"prompt": torch.tensor(row["ids"]), "completion": completion.tokens, "sampler_logps": completion.logps,
                "length": len(row["ids"]) + len(completion.tokens), "ended": completion.ended,
                "text": tokenizer.decode(completion.tokens[: -1 if completion.ended else None])}
               for row, completion in zip(rows, completions)]
    values, steps = compute_rewards(
        rewards, [one["text"] for one in samples], prompts=[row["text"] for row in rows],
        completion_ids=[one["completion"].tolist() for one in samples], **columns(rows))
    for one, its_values, its_steps in zip(samples, zip(*values), zip(*steps)):
        parts = [0.0 if isnan(value) else weight * value for value, weight in zip(its_values, rewards.values())]
        one |= {"rewards": its_values, "steps": its_steps, "total": sum(parts),
                "outcome": sum(part for part, function_steps in zip(parts, its_steps) if not function_steps)}
    return samples


def tally(rewards: dict, samples: list[dict]) -> dict[str, float]:
    """Sums to log, see `report.means`."""
    sums = {"reward": sum(one["total"] for one in samples), "accuracy": sum(one["rewards"][0] > 0 for one in samples),
            "completion_tokens_mean": sum(len(one["completion"]) for one in samples),
            "truncated_frac": sum(not one["ended"] for one in samples)}
    for number, function in enumerate(rewards):
        values = [value for one in samples if not isnan(value := one["rewards"][number])]
        sums |= {f"reward/{function.__name__}": sum(values), f"count reward/{function.__name__}": len(values)}
    return sums


def evaluate(rollouts, tokenizer, rewards: dict, rows: list[dict], **options) -> dict[str, float]:
    """Greedy completions of the held-out rows, shared by the processes: accuracy, rewards, length, share cut off.

    `rollouts` is that of a sampler; `options` are max_tokens and stop.
    """
    mine = rows[dist.get_rank() :: dist.get_world_size()]
    completions = in_order(rollouts([row["ids"] for row in mine], 1, temperature=0, **options))
    sums = tally(rewards, score(rewards, mine, completions, tokenizer))
    means = report.means(reduce(sums), len(rows))
    return {f"eval_{name.removeprefix('completion_')}": value for name, value in means.items()}


# ------------------------------------------------------------------------------------------------- evaluation alone

def compare() -> None:
    """A table about MODEL, and OUTPUT_DIR/evaluation.json, .jsonl and .html."""
    names, folder = MODEL.split(","), Path(OUTPUT_DIR)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"OUTPUT_DIR={folder} cannot be written: {error}") from error
    rewards = load_rewards(REWARDS)
    found = [complete_all(name, rewards) for name in names]
    numbers = sorted(set.intersection(*map(set, found)))  # each tokenizer leaves out what is too long for it
    found = [{number: answers[number] for number in numbers} for answers in found]
    require(len(numbers) > 1, f"EVAL_DATASET={EVAL_DATASET}: an interval needs two problems at least")
    if dist.get_rank() > 0:
        return
    results = summary([list(map(worth, answers.values())) for answers in found])
    about = {"problems": len(numbers), "EVAL_DATASET": EVAL_DATASET, "EVAL_SAMPLES": EVAL_SAMPLES,
             "TEMPERATURE": TEMPERATURE, "MAX_COMPLETION_TOKENS": MAX_COMPLETION_TOKENS,
             "SYSTEM_PROMPT": SYSTEM_PROMPT, "SEED": SEED,
             "REWARDS": {function.__name__: weight for function, weight in rewards.items()}}
    both = {"models": [{"model": name} | result for name, result in zip(names, results)]}
    both |= {"difference": results[2]} if len(names) > 1 else {}
    text, rows = table(names, results, about), [row for answers in found for some in answers.values() for row in some]
    checkpoint.replace(folder / "evaluation.json", json.dumps(about | both, indent=1))
    checkpoint.replace(folder / "evaluation.jsonl", "".join(json.dumps(row, default=str) + "\n" for row in rows))
    checkpoint.replace(folder / "evaluation.html", page(names, found, text))
    print(f"\n{text}\n\nproblem by problem: {folder}/evaluation.html; every completion: {folder}/evaluation.jsonl")


def complete_all(name: str, rewards: dict) -> dict[int, list[dict]]:
    """A model's completions with their rewards, by the problem's number: the greedy one, then EVAL_SAMPLES more.

    The processes take turns at blocks of problems. These and the seeds are the same for any number of processes, and so
    are the completions.
    """
    rank, world, longest = dist.get_rank(), dist.get_world_size(), MAX_PROMPT_TOKENS + MAX_COMPLETION_TOKENS
    model, tokenizer = load_model(name, longest, DTYPE)
    rows = load_prompts(EVAL_DATASET, tokenizer, SYSTEM_PROMPT, MAX_PROMPT_TOKENS, QUESTION_COLUMN)
    check_rewards(rewards, columns(rows))
    rollouts, ready = open_sampler(SAMPLER, model, nullcontext, name, longest, VLLM_MEMORY)
    options = {"max_tokens": MAX_COMPLETION_TOKENS, "stop": stop_ids(model, tokenizer)}
    size = max(1, MAX_SEQUENCES // EVAL_SAMPLES)
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)][rank::world]
    found, everybody = {row["number"]: [] for block in blocks for row in block}, [None] * world
    with ready(), tqdm(desc=name, total=len(found), unit="problem", disable=None if rank == 0 else True) as progress:
        for block in blocks:
            prompts = [row["ids"] for row in block]
            greedy = in_order(rollouts(prompts, 1, temperature=0, **options))
            sampled = in_order(rollouts(
                prompts, EVAL_SAMPLES, temperature=TEMPERATURE, min_tokens=MIN_COMPLETION_TOKENS,
                seeds=[SEED << 32 | row["number"] for row in block], **options))
            for repeated, completions in (1, greedy), (EVAL_SAMPLES, sampled):
                its_rows = [row for row in block for _ in range(repeated)]
                for answer in judged(name, rewards, its_rows, completions, tokenizer):
                    answers = found[answer["problem"]]
                    answers.append({"sample": len(answers)} | answer)
            progress.update(len(block))
    dist.all_gather_object(everybody, found)
    return {number: answers for part in everybody for number, answers in part.items()}


def judged(name: str, rewards: dict, rows: list[dict], completions: list, tokenizer) -> list[dict]:
    """The rows of evaluation.jsonl for these completions. Of the right form is what a reward with "format" in its name
    gives more than 0."""
    functions, answers = [function.__name__ for function in rewards], []
    form = next((i for i, function in enumerate(functions) if "format" in function), None)
    for row, one in zip(rows, score(rewards, rows, completions, tokenizer)):
        answers.append({
            "model": name, "problem": row["number"], "prompt": row["text"], "columns": row["columns"],
            "completion": one["text"], "accuracy": one["rewards"][0] > 0, "reward": one["total"],
            "tokens": len(one["completion"]), "cut_off": not one["ended"],
            **({} if form is None else {"format": one["rewards"][form] > 0}),
            "rewards": {function: None if isnan(v) else v for function, v in zip(functions, one["rewards"])}})
    return answers


def pass_at(k: int, samples: int, right: int) -> float:
    """The chance that one of k is right, drawn from so many samples without putting back: the unbiased estimator of
    pass@k (Chen et al., arXiv 2107.03374, equation 1)."""
    return 1 - comb(samples - right, k) / comb(samples, k)


def worth(answers: list[dict]) -> dict[str, float]:
    """A problem's numbers, in the order of the table, from its greedy completion, the first, and the sampled ones."""
    greedy, sampled = (
        {f"{kind}/{name}": fmean(answer[name] for answer in some) for name in MEASURES if name in some[0]}
        for kind, some in (("greedy", answers[:1]), ("sampled", answers[1:])))
    samples, right = len(answers) - 1, sum(answer["accuracy"] for answer in answers[1:])
    numbers = sorted({2**i for i in range(samples.bit_length())} | {samples})
    passes = {f"sampled/pass@{k}": pass_at(k, samples, right) for k in numbers}
    return greedy | {"sampled/accuracy": right / samples} | passes | sampled


def is_rate(name: str) -> bool:
    return not name.endswith(("/reward", "/tokens"))


def interval(values: list[float], kind: str) -> dict[str, float]:
    """The mean of a number that each problem has, and the ends of its interval; see the top of this file."""
    imagined, least, most = IMAGINED[kind]
    everything = [*values, *imagined]
    middle, error = fmean(everything), 1.96 * stdev(everything) / len(everything) ** 0.5
    return {"value": fmean(values), "low": max(least, middle - error), "high": min(most, middle + error)}


def summary(models: list[list[dict]]) -> list[dict[str, dict[str, float]]]:
    """For each model, given as the numbers of its problems, every number's mean and interval; of two models also those
    of the second's difference to the first, problem by problem."""
    parts = [("rate", problems) for problems in models]
    if len(models) == 2:
        pairs = zip(*models)
        parts.append(("difference", [{name: other[name] - one[name] for name in one} for one, other in pairs]))
    return [{name: interval([problem[name] for problem in problems], kind if is_rate(name) else "mean")
             for name in problems[0]} for kind, problems in parts]


def table(names: list[str], results: list[dict], about: dict) -> str:
    """The results as text, a column for each model and one for the difference."""
    titles = [*names, "difference"][: len(results)]
    widths = [max(26, len(title) + 2) for title in titles]
    lines = [f"{about['problems']} problems".ljust(28) + "".join(map(str.rjust, titles, widths))]
    kinds = {"greedy": "one greedy completion", "sampled": f"{about['EVAL_SAMPLES']} sampled completions, temperature "
                                                           f"{about['TEMPERATURE']}"}
    special = {"greedy/accuracy": "accuracy (pass@1)", "sampled/accuracy": f"accuracy (avg@{about['EVAL_SAMPLES']})"}
    for kind, heading in kinds.items():
        lines.append(heading)
        for name in (name for name in results[0] if name.startswith(kind) and name != "sampled/pass@1"):  # it is avg@k
            short = name.partition("/")[2]
            title = special.get(name) or MEASURES.get(short, short)
            cells = [cell(result[name], is_rate(name), column == 2) for column, result in enumerate(results)]
            lines.append(f"  {title:26}" + "".join(map(str.rjust, cells, widths)))
    lines.append("with 95 % confidence intervals; the problems are the units, and the pairs of a difference")
    return "\n".join(lines)


def cell(number: dict[str, float], rate: bool, signed: bool) -> str:
    factor, sign, unit = 100 if rate else 1, "+" if signed else "", " %" if rate and not signed else ""
    value, low, high = (f"{factor * number[key]:{sign}.{1 if rate else 2}f}" for key in ("value", "low", "high"))
    return f"{value}{unit} [{low}, {high}]"


# ------------------------------------------------------------------------------------------------- side by side

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><title>Evaluation</title><style>
body {{font: 15px/1.4 sans-serif; margin: 1em auto; max-width: 80em; padding: 0 1em}}
pre {{white-space: pre-wrap; overflow-wrap: anywhere; margin: .3em 0}} .numbers {{white-space: pre; overflow-x: auto}}
table {{border-collapse: collapse; width: 100%; table-layout: fixed}} h2 {{font-size: 1.1em; margin-top: 2em}}
td, th {{border: 1px solid #bbb; padding: .3em .6em; vertical-align: top; text-align: left; overflow-wrap: anywhere}}
.right {{background: #e8f5e6}} .wrong {{background: #fbeceb}} small, .prompt {{color: #555}}
</style><h1>Evaluation</h1><pre class="numbers">{table}</pre><p>{note}</p>
{problems}</html>
"""


def page(names: list[str], found: list[dict[int, list[dict]]], text: str) -> str:
    """evaluation.html: the models' completions next to each other. Where they differ in what is right comes first, then
    what is wrong. Everything that a model or a data set wrote is escaped, and the page may neither run nor load."""
    def order(number):
        right = [[answer["accuracy"] for answer in answers[number]] for answers in found]
        greedy, sampled = [row[0] for row in right], [sum(row[1:]) for row in right]
        differ = len({tuple(answer["completion"] for answer in answers[number]) for answers in found})
        return min(greedy) - max(greedy), min(sampled) - max(sampled), -differ, sum(greedy), sum(sampled), number

    numbers = sorted(found[0], key=order)
    heads = "".join(f"<th>{escape(name)}</th>" for name in names)
    problems = [problem_html(number, [answers[number] for answers in found], heads) for number in numbers[:SHOWN]]
    first = "Problems where the models differ" if len(names) > 1 else "Problems with a wrong answer"
    rest = f" The first {SHOWN} of {len(numbers)}; all are in evaluation.jsonl." if len(numbers) > SHOWN else ""
    note = f"{first} come first. Green is right, red is wrong.{rest}"
    # everything beyond ASCII as a number: whatever it is, it can be written and the page stays valid
    filled = PAGE.format(table=escape(text), note=note, problems="\n".join(problems))
    return filled.encode("ascii", "xmlcharrefreplace").decode()


def problem_html(number: int, found: list[list[dict]], heads: str) -> str:
    """A problem: its prompt and columns, the greedy completions, and behind a click the sampled ones."""
    def table_rows(pairs):
        return "".join(f"<tr>{''.join(map(answer_html, pair))}</tr>" for pair in pairs)

    greedy, *sampled = zip(*found)
    right = " | ".join(f"{sum(answer['accuracy'] for answer in answers[1:])} right" for answers in found)
    facts = ", ".join(f"{name}: {value}" for name, value in greedy[0]["columns"].items())
    return (f"<h2>Problem {number}</h2><pre class=prompt>{escape(greedy[0]['prompt'])}</pre><p>{escape(facts)}</p>"
            f"<table><tr>{heads}</tr>{table_rows([greedy])}</table>"
            f"<details><summary>{len(sampled)} samples: {right}</summary>"
            f"<table>{table_rows(sampled)}</table></details>")


def answer_html(answer: dict) -> str:
    values = [f"{name} {'none' if value is None else f'{value:.4g}'}" for name, value in answer["rewards"].items()]
    facts = ", ".join([*values, f"{answer['tokens']} tokens", *["cut off"] * answer["cut_off"]])
    colour = "right" if answer["accuracy"] else "wrong"
    return f"<td class={colour}><small>{escape(facts)}</small><pre>{escape(answer['completion'])}</pre></td>"


def main() -> None:
    require(MODEL.count(",") < 2, f"MODEL={MODEL}: expected one model or two")
    require(EVAL_DATASET, "EVAL_DATASET=: nothing to evaluate on")
    require(EVAL_SAMPLES > 0, f"EVAL_SAMPLES={EVAL_SAMPLES}: expected 1 at least")
    require(TEMPERATURE > 0, f"TEMPERATURE={TEMPERATURE}: sampling needs a positive one")
    distributed.start()
    compare()


if __name__ == "__main__":
    override_constants(globals(), sys.argv[1:])
    distributed.run(main)
