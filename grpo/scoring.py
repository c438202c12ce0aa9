"""Calling the reward functions, in TRL's convention, see the top of rewards.py."""
import asyncio
import atexit
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from functools import partial
from math import isfinite, isnan, nan
from typing import NamedTuple

import torch
from transformers import TrainerState

from grpo.constants import explained, require
from grpo.metrics import Metrics
from grpo.reward_model import reward_model
from grpo.types import Group, Prompt, Sample, samples_of, tokens_until

# One for the whole run, because clients keep connections in it; not the thread's loop, which functions may be using
loop = asyncio.Runner(loop_factory=asyncio.new_event_loop)
atexit.register(loop.close)


class Reward(NamedTuple):
    """An entry of REWARDS."""
    function: Callable
    weight: float  # 0: the function is only logged
    name: str  # in the metrics; no two are the same


def name_of(function) -> str:
    """A name for any callable: that of a partial is its function's, that of an object its class's."""
    if isinstance(function, partial) and not hasattr(function, "__name__"):
        return name_of(function.func)
    return getattr(function, "__name__", type(function).__name__).strip("<>")


def load_rewards(rewards: list) -> list[Reward]:
    """The entries of REWARDS: functions, names, and (either, weight). A name is that of a function in rewards.py,
    `module:function`, or a folder with a reward model.

    The command line writes a weight as "0.5*name". SystemExit names what is missing or doubled.
    """
    sys.path.append(os.getcwd())  # `module` may lie where the command was started
    found = []
    for entry in rewards:
        function, weight = entry if isinstance(entry, (tuple, list)) else (entry, 1.0)
        if isinstance(function, str):
            factor, _, place = (part.strip() for part in function.rpartition("*"))
            module, _, name = (part.strip() for part in place.rpartition(":"))
            try:
                weight = float(factor or weight)
                if os.path.isfile(f"{place}/config.json"):
                    function = reward_model(place)
                else:
                    function = getattr(importlib.import_module(module or "rewards"), name)
            except Exception as error:  # importing a file of the user's may raise anything
                raise SystemExit(f"no reward function {entry} ({type(error).__name__}: {error}): name one of "
                                 "rewards.py, module:function, or the folder of a reward model") from None
        name = name_of(function)
        require(callable(function), f"REWARDS holds {entry!r}, which is not a function")
        require(isfinite(weight), f"REWARDS: the weight of {name} is {weight}, not a finite number")
        require(function not in [one.function for one in found], f"REWARDS holds {name} twice")
        while name in [one.name for one in found]:
            name += f"_{len(found) + 1}"
        found.append(Reward(function, weight, name))
    require(found, "REWARDS is empty: name one reward function at least")
    return found


def arguments(prompts: list[Prompt], **ours) -> dict:
    """What reward functions are called with: the data set's columns, and TRL's own arguments, which go first."""
    columns = {name: [prompt.columns[name] for prompt in prompts] for name in prompts[0].columns}
    return columns | {"prompts": [prompt.messages or prompt.text for prompt in prompts],
                      "prompt_texts": [prompt.text for prompt in prompts]} | ours


def bound(function, given: dict) -> Callable:
    """The function with `given` as its arguments: all, or those that it names if it does not take any keyword."""
    signature = inspect.signature(function)
    if not any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values()):
        given = {name: value for name, value in given.items() if name in signature.parameters}
        if not given:
            raise TypeError("it takes neither completions nor columns. Does it make a reward function? Then call it in "
                            "a file of yours and name what it returns: REWARDS=mine:f")
    signature.bind(**given)
    return partial(function, **given)


def call(functions: list[Callable], given: dict) -> list:
    """What the functions return, `async` ones awaited all at once; an error that one raises is its result."""
    results = []
    for function in functions:
        try:
            results.append(bound(function, given)())
        except Exception as error:
            results.append(error)

    async def settle():
        waiting = [one if inspect.isawaitable(one) else asyncio.sleep(0, one) for one in results]
        return await asyncio.gather(*waiting, return_exceptions=True)
    return loop.run(settle())


def check_rewards(rewards: list[Reward], tokenizer, *data_sets: list[Prompt]) -> None:
    """SystemExit if a function cannot be called with the columns, finds a row that it could never judge, or fails at
    two prompts written again as completions, as it would at the first rollouts, minutes later perhaps."""
    for prompts in filter(None, data_sets):
        given = arguments(prompts, completions=[], completion_ids=[], trainer_state=None, log_extra=None,
                          log_metric=None)
        for reward in rewards:
            try:
                bound(reward.function, given)
                if hasattr(reward.function, "check"):
                    reward.function.check(**given | {"rows": [prompt.number for prompt in prompts]})
                score([Group(one, [Sample(one, torch.tensor(one.ids), torch.zeros(1), False)]) for one in prompts[:2]],
                      [reward], tokenizer, Metrics())
            except (TypeError, ValueError) as error:
                raise SystemExit(f"reward {reward.name} cannot judge the data set: {error}; "
                                 f"columns: {list(prompts[0].columns)}") from error


def score(groups: list[Group], rewards: list[Reward], tokenizer, metrics: Metrics) -> None:
    """Sets `text`, `rewards`, `steps`, `reward` and `outcome` of the groups' samples, by one call of each function."""
    samples = samples_of(groups)
    for sample in samples:
        sample.text = tokenizer.decode(sample.tokens[: -1 if sample.ended else None])

    def log_extra(column, values):
        for sample, value in zip(samples, values, strict=True):
            sample.extra[column] = value

    values, steps = compute_rewards(rewards, arguments(
        [one.prompt for one in samples],
        completions=[[{"role": "assistant", "content": one.text}] if one.prompt.messages else one.text
                     for one in samples],
        completion_ids=[one.tokens.tolist() for one in samples],
        trainer_state=TrainerState(global_step=metrics.step - 1, max_steps=metrics.steps),  # steps so far
        log_extra=log_extra, log_metric=metrics.log))
    for sample, numbers, all_steps in zip(samples, zip(*values), zip(*steps)):
        sample.rewards = list(numbers)
        parts = [(reward.weight * number, steps) for reward, number, steps in zip(rewards, numbers, all_steps)
                 if reward.weight]
        sample.reward = total(part for part, _ in parts)
        outcomes = [part for part, steps in parts if steps is None]
        sample.outcome = total(outcomes) if outcomes else 0.0  # section 4.1.2: r
        # section 4.1.3: r^index(j)
        sample.steps = [[(tokens_until(tokenizer, sample.tokens, end), value) for end, value in steps or []
                         if reward.weight] for reward, steps in zip(rewards, all_steps)]


def total(values) -> float:
    """The sum of all that are not NaN; NaN if there are none."""
    known = [value for value in values if not isnan(value)]
    return sum(known) if known else nan


def compute_rewards(rewards: list[Reward], given: dict) -> tuple[list, list]:
    """By reward and completion the value (NaN for None, the sum of the steps), and the list of steps, None without one.

    ValueError names the function and the completion that it raises at, SystemExit what else it returned.
    """
    values, steps = [], []
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in given["completions"]]
    for reward, result in zip(rewards, call([one.function for one in rewards], given)):
        said = f"reward {reward.name} returned"
        if isinstance(result, Exception):
            completion = culprit(reward.function, given)
            raise ValueError(f"reward {reward.name} raised {result!r} at the completion {completion!r}") from result
        with explained(f"{said} {result!r:.80}, expected a list of numbers and None", (TypeError, ValueError)):
            result = list(result)
            values.append(list(map(as_number, result)))
        require(len(result) == len(texts), f"{said} {len(result)} values for {len(texts)} completions")
        steps.append([value if isinstance(value, list) else None for value in result])
        for value, number, some, text in zip(result, values[-1], steps[-1], texts):
            inside = all(0 < end <= len(text) for end, _ in some or [])
            require(inside and (value is None or isfinite(number)), f"{said} {value} for {text!r}")
    return values, steps


def as_number(value) -> float:
    if isinstance(value, list):
        return float(sum(reward for _, reward in value))
    return nan if value is None else float(value)


def culprit(function, given: dict):
    """The first completion that `function` raises at by itself, or a note that none does."""
    for i, completion in enumerate(given["completions"]):
        row = {name: values[i : i + 1] if isinstance(values, list) else values for name, values in given.items()}
        if isinstance(call([function], row | {"log_extra": lambda *_: None})[0], Exception):
            return completion
    return "no single completion"
