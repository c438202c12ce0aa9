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
from itertools import chain
from math import comb, inf, isnan, nan
from pathlib import Path
from statistics import fmean, stdev

import torch.distributed as dist
from tqdm import tqdm

from grpo import checkpoint, distributed, report
from grpo.constants import Over, override_constants, require
from grpo.data import load_prompts
from grpo.metrics import Metrics, add_rewards
from grpo.policy import Policy
from grpo.sampling import MAX_SEQUENCES, open_sampler
from grpo.scoring import Reward, check_rewards, load_rewards, score
from grpo.types import Prompt, Sample

MODEL = "examples/arithmetic/model"  # local folder or hub name; or two of them, with a comma between
DTYPE = "auto"  # float32 on a CPU, bfloat16 on an accelerator; or either by name
TRUST_REMOTE_CODE = False  # True runs the Python files of MODEL, if it has any
EVAL_DATASET = "examples/arithmetic/heldout.jsonl"  # .jsonl, .parquet, or hub name[:config[:split]]
EVAL_SAMPLES: Over(0, 2**16) = 8  # completions of each problem at TEMPERATURE, for avg@k and pass@k
QUESTION_COLUMN = "question"  # holds the problem
SYSTEM_PROMPT = "First reason between <think> and </think>, then give the answer between <answer> and </answer>."
REWARDS = ["reward_correct", "reward_format"]  # names of rewards.py, or module:function; the first counts as accuracy
OUTPUT_DIR = "runs/arithmetic"  # evaluation.json, .jsonl and .html
SEED: Over(-1, 2**31 - 1) = 0
TEMPERATURE: Over(1e-6) = 1.0
MAX_PROMPT_TOKENS = 128  # longer prompts are left out
MAX_COMPLETION_TOKENS: Over(0) = 64
MIN_COMPLETION_TOKENS = 0
SAMPLER = "auto"  # as in grpo_train.py
VLLM_MEMORY = 0.4

MEASURES = {"accuracy": "accuracy", "format": "right form", "reward": "reward", "tokens": "tokens",
            "cut_off": "cut off"}
IMAGINED = {  # problems, and the limits of what is possible; two differences that count and weigh as the four halves
    "rate": ([0, 0, 1, 1], 0, 1), "difference": ([0.5**0.5, -(0.5**0.5)], -1, 1), "mean": ([], -inf, inf)}
SHOWN = 200  # problems in evaluation.html; all are in evaluation.jsonl


def evaluate(rollouts, prompts: list[Prompt], rewards: list[Reward], tokenizer) -> dict[str, float]:
    """Greedy completions of held-out prompts, shared by the processes: accuracy, rewards, length, share cut off."""
    if not prompts:
        return {}
    metrics = Metrics()
    groups = sum(rollouts(prompts[dist.get_rank() :: dist.get_world_size()], 1, 0.0), [])
    if groups:  # there may be fewer prompts than processes
        score(groups, rewards, tokenizer, metrics)
    add_rewards(metrics, groups, rewards)
    return {f"eval_{name.removeprefix('completion_')}": value for name, value in metrics.reduced().items()}


# ------------------------------------------------------------------------------------------------- evaluation alone

def compare() -> None:
    """A table about MODEL, and OUTPUT_DIR/evaluation.json, .jsonl and .html."""
    names, folder = MODEL.split(","), Path(OUTPUT_DIR)
    with checkpoint.writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
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
             "REWARDS": {reward.name: reward.weight for reward in rewards},
             "unjudged": sum(row["accuracy"] is None for answers in found for some in answers.values() for row in some)}
    both = {"models": [{"model": name} | result for name, result in zip(names, results)]}
    both |= {"difference": results[2]} if len(names) > 1 else {}
    text, rows = table(names, results, about), [row for answers in found for some in answers.values() for row in some]
    checkpoint.replace(folder / "evaluation.json", json.dumps(about | both, indent=1))
    checkpoint.replace(folder / "evaluation.jsonl", "".join(json.dumps(row, default=str) + "\n" for row in rows))
    checkpoint.replace(folder / "evaluation.html", page(names, found, text))
    print(f"\n{text}\n\nproblem by problem: {folder}/evaluation.html; every completion: {folder}/evaluation.jsonl")


def complete_all(name: str, rewards: list[Reward]) -> dict[int, list[dict]]:
    """A model's rows of evaluation.jsonl by the problem's number: the greedy completion, then EVAL_SAMPLES more.

    The processes take turns at blocks of problems. Blocks and seeds are the same for any number of processes, and so
    are the completions; vLLM, which takes the weights over for each block, gets one for each process.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    policy = Policy(name, MAX_PROMPT_TOKENS + MAX_COMPLETION_TOKENS, DTYPE, trust_remote_code=TRUST_REMOTE_CODE)
    prompts = load_prompts(EVAL_DATASET, policy.tokenizer, SYSTEM_PROMPT, MAX_PROMPT_TOKENS, QUESTION_COLUMN)
    check_rewards(rewards, prompts)
    rollouts = open_sampler(SAMPLER, policy, MAX_COMPLETION_TOKENS, VLLM_MEMORY)
    size = -(-len(prompts) // world) if SAMPLER == "vllm" else max(1, MAX_SEQUENCES // EVAL_SAMPLES)
    blocks = [prompts[start : start + size] for start in range(0, len(prompts), size)][rank::world]
    found, everybody = {prompt.number: [] for block in blocks for prompt in block}, [None] * world
    with tqdm(desc=name, total=len(found), unit="problem", disable=None if rank == 0 else True) as progress:
        for block in blocks:
            seeds = [SEED << 32 | prompt.number for prompt in block]
            for groups in chain(rollouts(block, 1, 0.0),
                                rollouts(block, EVAL_SAMPLES, TEMPERATURE, seeds, MIN_COMPLETION_TOKENS)):
                score(groups, rewards, policy.tokenizer, Metrics())
                for group in groups:
                    answers = found[group.prompt.number]
                    answers += [row(name, len(answers) + place, sample, rewards)
                                for place, sample in enumerate(group.samples)]
            progress.update(len(block))
    dist.all_gather_object(everybody, found)
    return {number: answers for part in everybody for number, answers in part.items()}


def row(model: str, number: int, sample: Sample, rewards: list[Reward]) -> dict:
    """A row of evaluation.jsonl. A completion has the right form if a reward with "format" in its name is above 0;
    None is what no reward function judged."""
    values = {reward.name: None if isnan(value) else value for reward, value in zip(rewards, sample.rewards)}
    positive = {name: None if value is None else value > 0 for name, value in values.items()}
    form = [right for name, right in positive.items() if "format" in name]
    return {"model": model, "problem": sample.prompt.number, "sample": number, "prompt": sample.prompt.text,
            "columns": sample.prompt.columns, "completion": sample.text, "accuracy": [*positive.values()][0],
            "reward": None if isnan(sample.reward) else sample.reward, "tokens": len(sample.tokens),
            "cut_off": not sample.ended, **({"format": form[0]} if form else {}), "rewards": values}


def pass_at(k: int, samples: int, right: int) -> float:
    """The chance that one of k is right, drawn from so many samples without putting back: the unbiased estimator of
    pass@k (Chen et al., arXiv 2107.03374, equation 1)."""
    return 1 - comb(samples - right, k) / comb(samples, k)


def worth(answers: list[dict]) -> dict[str, float]:
    """A problem's numbers, in the order of the table, from its greedy completion, the first, and the sampled ones; NaN
    if none of them was judged, or fewer than pass@k needs."""
    def mean(values):
        known = [value for value in values if value is not None]
        return fmean(known) if known else nan

    greedy, sampled = (
        {f"{kind}/{name}": mean(answer[name] for answer in some) for name in MEASURES if name in some[0]}
        for kind, some in (("greedy", answers[:1]), ("sampled", answers[1:])))
    samples, judged = len(answers) - 1, [one["accuracy"] for one in answers[1:] if one["accuracy"] is not None]
    numbers = sorted({2**i for i in range(samples.bit_length())} | {samples})
    passes = {f"sampled/pass@{k}": pass_at(k, len(judged), sum(judged)) if k <= len(judged) else nan for k in numbers}
    return greedy | {"sampled/accuracy": nan} | passes | sampled


def is_rate(name: str) -> bool:
    return not name.endswith(("/reward", "/tokens"))


def interval(values: list[float], kind: str) -> dict[str, float]:
    """The mean of a number that each problem has, NaN aside, and the ends of its interval; see the top of this file."""
    (imagined, least, most), values = IMAGINED[kind], [value for value in values if not isnan(value)]
    if len(values) < 2:
        return dict.fromkeys(("value", "low", "high"))
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
    if unjudged := about.get("unjudged"):
        lines.append(f"{unjudged} completions that {[*about['REWARDS']][0]} did not judge are left out of the accuracy")
    lines.append("with 95 % confidence intervals; the problems are the units, and the pairs of a difference")
    return "\n".join(lines)


def cell(number: dict[str, float], rate: bool, signed: bool) -> str:
    if number["value"] is None:
        return "not judged"
    factor, sign, unit = 100 if rate else 1, "+" if signed else "", " %" if rate and not signed else ""
    value, low, high = (f"{factor * number[key]:{sign}.{1 if rate else 2}f}" for key in ("value", "low", "high"))
    return f"{value}{unit} [{low}, {high}]"


# ------------------------------------------------------------------------------------------------- side by side

def page(names: list[str], found: list[dict[int, list[dict]]], text: str) -> str:
    """evaluation.html: the models' completions next to each other, first where the models differ in what is right, then
    what is wrong. Everything that a model or a data set wrote is escaped, and the page may neither run nor load."""
    def order(number):
        right = [[bool(answer["accuracy"]) for answer in answers[number]] for answers in found]
        greedy, sampled = [row[0] for row in right], [sum(row[1:]) for row in right]
        differ = len({tuple(answer["completion"] for answer in answers[number]) for answers in found})
        return min(greedy) - max(greedy), min(sampled) - max(sampled), -differ, sum(greedy), sum(sampled), number

    problems = []
    for number in sorted(found[0], key=order)[:SHOWN]:
        greedy, *sampled = zip(*(answers[number] for answers in found))
        problems.append((number, greedy, sampled))
    filled = report.template("evaluation.html").render(names=names, table=text, problems=problems, count=len(found[0]))
    # everything beyond ASCII as a number: whatever it is, it can be written and the page stays valid
    return filled.encode("ascii", "xmlcharrefreplace").decode()


def main() -> None:
    require(MODEL.count(",") < 2, f"MODEL={MODEL}: expected one model or two")
    require(EVAL_DATASET, "EVAL_DATASET=: nothing to evaluate on")
    distributed.start()
    compare()


if __name__ == "__main__":
    override_constants(__name__, sys.argv[1:])
    distributed.run(main)
