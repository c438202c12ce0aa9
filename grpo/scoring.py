"""Calling the reward functions, in TRL's convention, see the top of rewards.py."""
import asyncio
import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

from transformers import TrainerState

from grpo.constants import require
from grpo.metrics import Metrics
from grpo.types import Group, Prompt, samples_of, tokens_until


@dataclass(eq=False)
class Reward:
    """An entry of REWARDS."""
    function: Callable
    weight: float  # 0: the function is only logged
    name: str  # in the metrics; no two are the same


def name_of(function) -> str:
    """A name for any callable: that of a partial is its function's, that of an object its class's."""
    while isinstance(function, partial) and not hasattr(function, "__name__"):
        function = function.func
    return getattr(function, "__name__", type(function).__name__).strip("<>")


def load_rewards(rewards: list) -> list[Reward]:
    """The entries of REWARDS: functions, names (of rewards.py, or `module:function`), and (either, weight).

    The command line writes a weight as "0.5*name". SystemExit names what is missing or doubled.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `module` may lie where the command was started
    found = []
    for entry in rewards:
        function, weight = entry if isinstance(entry, (tuple, list)) else (entry, 1.0)
        if isinstance(function, str):
            factor, module, name = re.fullmatch(r"(?:([^*]*)\*)?(?:(.*):)?(.*)", function, re.DOTALL).groups()
            try:
                weight = float(factor or weight)
                function = getattr(importlib.import_module((module or "rewards").strip()), name.strip())
            except Exception as error:  # importing a file of the user's may raise anything
                raise SystemExit(f"no reward function {entry} ({type(error).__name__}: {error}): name one of "
                                 "rewards.py, or module:function") from None
        require(callable(function), f"REWARDS holds {entry!r}, which is not a function")
        require(math.isfinite(weight), f"REWARDS: the weight of {name_of(function)} is {weight}, not a finite number")
        require(function not in [reward.function for reward in found], f"REWARDS holds {name_of(function)} twice")
        names = {reward.name for reward in found}
        name = plain = name_of(function)
        while name in names:
            name = f"{plain}_{len(names) + 1}"
        found.append(Reward(function, weight, name))
    require(found, "REWARDS is empty: name one reward function at least")
    return found


def arguments(prompts: list[Prompt], **ours) -> dict:
    """What reward functions are called with: the data set's columns, and TRL's own arguments, which go first."""
    names = prompts[0].columns if prompts else []
    columns = {name: [prompt.columns[name] for prompt in prompts] for name in names}
    return columns | {"prompts": [prompt.messages or prompt.text for prompt in prompts],
                      "prompt_texts": [prompt.text for prompt in prompts]} | ours


def bound(function, given: dict) -> inspect.BoundArguments:
    """`given` as the function's arguments: all, or those that it names if it does not take any keyword."""
    signature = inspect.signature(function)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        given = {name: value for name, value in given.items() if name in signature.parameters}
        if not given:
            raise TypeError("it takes neither completions nor columns. Does it make a reward function? Then call it in "
                            "a file of yours and name what it returns: REWARDS=mine:f")
    return signature.bind(**given)


def call(function, given: dict):
    taken = bound(function, given)
    return function(*taken.args, **taken.kwargs)


@lru_cache
def event_loop() -> asyncio.AbstractEventLoop:
    """One for the whole run, because clients keep connections in it; not the thread's, which functions may be using."""
    return asyncio.new_event_loop()


def settled(results: list) -> list:
    """The results, those of `async` functions awaited all at once; an error that one raises is its result."""
    async def wait():
        return await asyncio.gather(*filter(inspect.isawaitable, results), return_exceptions=True)
    answers = iter(event_loop().run_until_complete(wait()) if any(map(inspect.isawaitable, results)) else [])
    return [next(answers) if inspect.isawaitable(result) else result for result in results]


def check_rewards(rewards: list[Reward], *data_sets: list[Prompt]) -> None:
    """SystemExit if a function cannot be called with the columns, or finds a row that it could never judge."""
    for prompts in filter(None, data_sets):
        given = arguments(prompts, completions=[], completion_ids=[], trainer_state=None, log_extra=None,
                          log_metric=None)
        for reward in rewards:
            try:
                bound(reward.function, given)
                if hasattr(reward.function, "check"):
                    reward.function.check(rows=[prompt.number for prompt in prompts], **given)
                try_out(reward, prompts[:2])
            except (TypeError, ValueError) as error:
                raise SystemExit(f"reward {reward.name} cannot judge the data set: {error}; "
                                 f"columns: {list(prompts[0].columns)}") from error


def try_out(reward: Reward, prompts: list[Prompt]) -> None:
    """One call with made-up completions: it raises what the first rollouts would, after minutes perhaps."""
    said = "I do not know."
    compute_rewards([reward], arguments(
        prompts, completions=[[{"role": "assistant", "content": said}] if one.messages else said for one in prompts],
        completion_ids=[[0] for _ in prompts], trainer_state=TrainerState(max_steps=1),
        log_extra=lambda *_: None, log_metric=lambda *_: None))


def score(groups: list[Group], rewards: list[Reward], tokenizer, metrics: Metrics) -> None:
    """Sets `text`, `rewards`, `steps`, `reward` and `outcome` of the groups' samples, by one call of each function."""
    samples = samples_of(groups)
    for sample in samples:
        sample.text = tokenizer.decode(sample.tokens[: -1 if sample.ended else None])

    def log_extra(column, values):
        for sample, value in zip(samples, values, strict=True):
            sample.extra[column] = value

    values, steps = compute_rewards(rewards, arguments(
        [sample.prompt for sample in samples],
        completions=[[{"role": "assistant", "content": one.text}] if one.prompt.messages else one.text
                     for one in samples],
        completion_ids=[sample.tokens.tolist() for sample in samples],
        trainer_state=TrainerState(global_step=metrics.step - 1, max_steps=metrics.steps),  # updates so far
        log_extra=log_extra, log_metric=metrics.log))
    for sample, numbers, written in zip(samples, zip(*values), zip(*steps)):
        sample.rewards = list(numbers)
        parts = [(reward.weight * number, some) for reward, number, some in zip(rewards, numbers, written)
                 if reward.weight and not math.isnan(number)]
        sample.reward = sum(part for part, _ in parts) if parts else math.nan
        sample.outcome = sum(part for part, some in parts if not some) if parts else math.nan  # section 4.1.2: r
        # section 4.1.3: r^index(j)
        sample.steps = [[(tokens_until(tokenizer, sample.tokens, end), value) for end, value in some if reward.weight]
                        for reward, some in zip(rewards, written)]


def compute_rewards(rewards: list[Reward], given: dict) -> tuple[list, list]:
    """By reward and completion the value (NaN for None, the sum of the steps), and the list of steps.

    ValueError names the function and the completion that it raises at, SystemExit what else it returned.
    """
    results, values, steps = [], [], []
    for reward in rewards:
        try:
            results.append(call(reward.function, given))
        except Exception as error:
            results.append(error)
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in given["completions"]]
    for reward, result in zip(rewards, settled(results)):
        if isinstance(result, Exception):
            completion = culprit(reward.function, given)
            raise ValueError(f"reward {reward.name} raised {result!r} at the completion {completion!r}") from result
        try:
            result = list(result)
            values.append(list(map(as_number, result)))
        except (TypeError, ValueError):
            raise SystemExit(f"reward {reward.name} returned {result!r:.80}, "
                             "expected a list of numbers and None") from None
        if len(result) != len(texts):
            raise SystemExit(f"reward {reward.name} returned {len(result)} values for {len(texts)} completions")
        steps.append([value if isinstance(value, list) else [] for value in result])
        for value, some, text in zip(result, steps[-1], texts):
            outside = any(not 0 < end <= len(text) for end, _ in some)
            if outside or value is not None and not math.isfinite(as_number(value)):
                raise SystemExit(f"reward {reward.name} returned {value} for {text!r}")
    return values, steps


def as_number(value) -> float:
    if isinstance(value, list):
        return float(sum(reward for _, reward in value))
    return math.nan if value is None else float(value)


def culprit(function, given: dict):
    """The first completion that `function` raises at by itself, or a note that none does."""
    for i, completion in enumerate(given["completions"]):
        row = {name: values[i : i + 1] if isinstance(values, list) else values for name, values in given.items()}
        try:
            list(map(as_number, settled([call(function, row | {"log_extra": lambda *_: None})])[0]))
        except Exception:
            return completion
    return "no single completion"
