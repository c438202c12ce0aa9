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
import gc
import json
import sys
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
from grpo.types import Prompt, Sample, samples_of

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

MEASURES = "accuracy", "format", "reward", "tokens", "cut_off"
IMAGINED = {  # problems, and the limits of what is possible
    "rate": ([0, 0, 1, 1], 0, 1),
    "difference": ([0.5**0.5, -(0.5**0.5)], -1, 1),  # as many as the four halves, with their sum and sum of squares
    "mean": ([], -inf, inf),
}
SHOWN = 200  # problems in evaluation.html; all are in evaluation.jsonl


def evaluate(sampler, prompts: list[Prompt], rewards: list[Reward], tokenizer, metrics: Metrics) -> dict[str, float]:
    """Greedy completions of held-out prompts, shared by the processes: accuracy, rewards, length, share cut off.

    `metrics` are those of the next step, and empty.
    """
    if not prompts:
        return {}
    groups = sum(sampler(prompts[dist.get_rank() :: dist.get_world_size()], 1, 0.0), [])
    if groups:  # there may be fewer prompts than processes
        score(groups, rewards, tokenizer, metrics)
    add_rewards(metrics, groups, rewards)
    return {f"eval_{name.removeprefix('completion_')}": value for name, value in metrics.reduced().items()}


# ------------------------------------------------------------------------------------------------- evaluation alone

def main() -> None:
    """A table about MODEL, and OUTPUT_DIR/evaluation.json, .jsonl and .html."""
    names, folder = MODEL.split(","), Path(OUTPUT_DIR)
    require(len(names) < 3, f"MODEL={MODEL}: expected one model or two")
    require(EVAL_DATASET, "EVAL_DATASET=: nothing to evaluate on")
    distributed.start()
    with checkpoint.writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    rewards = load_rewards(REWARDS)
    found = []
    for name in names:
        found.append(complete_all(name, rewards))
        gc.collect()  # a model's modules refer to each other, and the next one needs its memory
    numbers = sorted(set.intersection(*map(set, found)))  # each tokenizer leaves out what is too long for it
    require(len(numbers) > 1, f"EVAL_DATASET={EVAL_DATASET}: an interval needs two problems at least")
    if dist.get_rank() > 0:
        return
    models = [[answers[number] for number in numbers] for answers in found]
    results = {"problems": len(numbers), "EVAL_DATASET": EVAL_DATASET, "EVAL_SAMPLES": EVAL_SAMPLES,
               "TEMPERATURE": TEMPERATURE, "MAX_COMPLETION_TOKENS": MAX_COMPLETION_TOKENS,
               "SYSTEM_PROMPT": SYSTEM_PROMPT, "SEED": SEED,
               "REWARDS": {reward.name: reward.weight for reward in rewards},
               "unjudged": sum(row["accuracy"] is None for answers in sum(models, []) for row in answers)}
    results |= summary(names, models)
    table = report.filled("evaluation.txt", **results)
    lines = [json.dumps(row, default=str) + "\n" for answers in sum(models, []) for row in answers]
    checkpoint.replace(folder / "evaluation.json", json.dumps(results, indent=1))
    checkpoint.replace(folder / "evaluation.jsonl", "".join(lines))
    checkpoint.replace(folder / "evaluation.html", page(models, table))
    print(f"\n{table}\nproblem by problem: {folder}/evaluation.html; every completion: evaluation.jsonl there")


def complete_all(name: str, rewards: list[Reward]) -> dict[int, list[dict]]:
    """A model's rows of evaluation.jsonl by the problem's number: the greedy completion, then EVAL_SAMPLES more.

    The processes take turns at blocks of problems. Blocks and seeds are the same for any number of processes, and so
    are the completions; vLLM, which takes the weights over for each block, gets one for each process.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    policy = Policy(name, MAX_PROMPT_TOKENS + MAX_COMPLETION_TOKENS, DTYPE, trust_remote_code=TRUST_REMOTE_CODE)
    prompts = load_prompts(EVAL_DATASET, policy.tokenizer, SYSTEM_PROMPT, MAX_PROMPT_TOKENS, QUESTION_COLUMN,
                           policy.vocab_size)
    check_rewards(rewards, policy.tokenizer, prompts)
    sampler = open_sampler(SAMPLER, policy, MAX_COMPLETION_TOKENS, VLLM_MEMORY)
    size = -(-len(prompts) // world) if SAMPLER == "vllm" else max(1, MAX_SEQUENCES // EVAL_SAMPLES)
    blocks = [prompts[start : start + size] for start in range(0, len(prompts), size)][rank::world]
    found = {prompt.number: [] for block in blocks for prompt in block}
    for block in tqdm(blocks, name, unit="block", disable=rank > 0 or None):
        seeds = [SEED << 32 | prompt.number for prompt in block]
        greedy = sampler(block, 1, 0.0)
        sampled = sampler(block, EVAL_SAMPLES, TEMPERATURE, seeds, MIN_COMPLETION_TOKENS)
        for groups in [*greedy, *sampled]:
            score(groups, rewards, policy.tokenizer, Metrics())
            for sample in samples_of(groups):
                answers = found[sample.prompt.number]
                answers.append(row(name, len(answers), sample, rewards))
    return {number: answers for part in distributed.of_all(found) for number, answers in part.items()}


def row(model: str, number: int, sample: Sample, rewards: list[Reward]) -> dict:
    """A row of evaluation.jsonl, None where no reward function judged.

    The form is right if the first reward with "format" in its name is above 0.
    """
    values = {reward.name: None if isnan(value) else value for reward, value in zip(rewards, sample.rewards)}
    positive = {name: None if value is None else value > 0 for name, value in values.items()}
    return {
        "model": model,
        "problem": sample.prompt.number,
        "sample": number,
        "prompt": sample.prompt.text,
        "columns": sample.prompt.columns,
        "completion": sample.text,
        "accuracy": positive[rewards[0].name],
        "reward": None if isnan(sample.reward) else sample.reward,
        "tokens": len(sample.tokens),
        "cut_off": not sample.ended,
        **{"format": right for name, right in reversed(positive.items()) if "format" in name},
        "rewards": values,
    }


def pass_at(k: int, samples: int, right: int) -> float:
    """The chance that one of k is right, drawn from so many samples without putting back: the unbiased estimator of
    pass@k (Chen et al., arXiv 2107.03374, equation 1). NaN if there are fewer samples."""
    return 1 - comb(samples - right, k) / comb(samples, k) if k <= samples else nan


def worth(answers: list[dict]) -> dict[str, float]:
    """A problem's numbers, from its greedy completion, the first, and the sampled ones; NaN where too few are judged.
    """
    def mean(values):
        known = [value for value in values if value is not None]
        return fmean(known) if known else nan

    greedy, *sampled = answers
    names = [name for name in MEASURES if name in greedy]
    judged = [answer["accuracy"] for answer in sampled if answer["accuracy"] is not None]
    count, powers = len(sampled), {2**i for i in range(len(sampled).bit_length())}
    return {
        **{f"greedy/{name}": mean([greedy[name]]) for name in names},
        **{f"sampled/pass@{k}": pass_at(k, len(judged), sum(judged)) for k in sorted(powers | {count})},
        **{f"sampled/{name}": mean(answer[name] for answer in sampled) for name in names},
    }


def interval(values: list[float], kind: str) -> dict[str, float]:
    """The mean of a number that each problem has, NaN aside, and the ends of its interval; see the top of this file."""
    imagined, least, most = IMAGINED[kind]
    values = [value for value in values if not isnan(value)]
    if len(values) < 2:
        return dict.fromkeys(("value", "low", "high"))
    everything = [*values, *imagined]
    middle, error = fmean(everything), 1.96 * stdev(everything) / len(everything) ** 0.5
    return {"value": fmean(values), "low": max(least, middle - error), "high": min(most, middle + error)}


def intervals(problems: list[dict], kind: str) -> dict[str, dict]:
    """Those of all numbers of the problems; `kind` is that of the rates."""
    kinds = {name: "mean" if name.endswith(("/reward", "/tokens")) else kind for name in problems[0]}
    return {name: interval([problem[name] for problem in problems], kinds[name]) for name in kinds}


def summary(names: list[str], models: list) -> dict:
    """All intervals of the models, given as a list of answers for each problem, and of the second's difference to the
    first, problem by problem."""
    worths = [[worth(answers) for answers in problems] for problems in models]
    found = {"models": [{"model": name} | intervals(problems, "rate") for name, problems in zip(names, worths)]}
    if len(models) == 2:
        differences = [{name: other[name] - one[name] for name in one} for one, other in zip(*worths)]
        found["difference"] = intervals(differences, "difference")
    return found


# ------------------------------------------------------------------------------------------------- side by side

def page(models: list, table: str) -> str:
    """evaluation.html: the models' completions next to each other, first where the models differ in what is right, then
    what is wrong. Everything that a model or a data set wrote is escaped, and the page may neither run nor load."""
    def order(problem):
        right = [[bool(answer["accuracy"]) for answer in answers] for answers in problem]
        greedy, sampled = [row[0] for row in right], [sum(row[1:]) for row in right]
        differ = len({tuple(answer["completion"] for answer in answers) for answers in problem})
        return min(greedy) - max(greedy), min(sampled) - max(sampled), -differ, sum(greedy), sum(sampled)

    problems = sorted(zip(*models), key=order)
    text = report.filled("evaluation.html", table=table, problems=problems, shown=SHOWN)
    # everything beyond ASCII as a number: whatever it is, it can be written and the page stays valid
    return text.encode("ascii", "xmlcharrefreplace").decode()


if __name__ == "__main__":
    override_constants(__name__, sys.argv[1:])
    distributed.run(main)
