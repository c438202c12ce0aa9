"""Rewards: functions that turn completions into numbers, and how they are called.

A reward function is `f(completions, **columns) -> list[float | None]`. Completions are strings, or lists of chat
messages whose last one counts; the columns are the data set's (`answer`, ...) plus `prompts` and `completion_ids`, all
lists of the same length. This is TRL's convention: a function written for one runs in the other. `None` means that the
function does not apply to that completion. For process supervision a value may also be a list of `(end_character,
reward)`: one reward for each step of the completion, whose text ends before that character.

A function may carry `f.check(**columns)`, called once with the whole data set before training starts; it raises
ValueError at a row that could never be judged.

The names without `reward_` in front are Open R1's, with its parameters, defaults and values; a docstring says where one
of them deliberately differs.
"""
import importlib
import inspect
import math
import re
from functools import partial, wraps

from grpo.answers import clean, extract_answer, gold_answer, last_latex
from grpo.constants import require
from grpo.math_judge import LONGEST_ANSWER, get_ready, is_equal, is_mathematics
from grpo.reward_model import reward_model  # noqa: F401: one of the functions
from grpo.types import Group, Prompt, samples_of, tokens_until

TAGS = "<think>", "</think>", "<answer>", "</answer>"


def texts(completions: list) -> list[str]:
    """The completions as strings; of chat messages the content of the last one."""
    return [one if isinstance(one, str) else one[-1]["content"]
            for one in completions]


# ------------------------------------------------------------------------------------------------- right or wrong

def reward_correct(completions, answer, **columns) -> list[float]:
    """+1 where the completion's answer (see `extract_answer`) means the same as the column `answer`, otherwise -1."""
    pairs = zip(texts(completions), answer, strict=True)
    right = [is_equal(gold_answer(gold), extract_answer(text)) for text, gold in pairs]
    return [1.0 if one else -1.0 for one in right]


def check_answers(answer, **columns) -> None:
    """ValueError at the first gold answer that cannot be parsed, so that no completion could ever be right."""
    get_ready()  # meanwhile, or the first step of the training would wait for the judge
    for row, gold in enumerate(map(gold_answer, answer), start=1):
        if len(gold) > LONGEST_ANSWER or not clean(gold):
            raise ValueError(f"row {row}: the answer {gold!r:.50} cannot be parsed "
                             f"or is over {LONGEST_ANSWER} letters")


reward_correct.check = check_answers


def reward_format(completions, **columns) -> list[float]:
    """+1.25 for exactly `<think>...</think>`, white space, `<answer>...</answer>`, neither blank; otherwise -1."""
    pattern = r"<think>(.*)</think>\s*<answer>(.*)</answer>"
    values = []
    for text in texts(completions):
        match = match_tags(pattern, text.strip())
        full = match and match[1].strip() and match[2].strip()
        values.append(1.25 if full else -1.0)
    return values


def match_tags(pattern: str, text: str) -> re.Match | None:
    """A full match, if each tag is there once: counted first, because the pattern then has no second way to match."""
    if all(text.count(tag) == 1 for tag in TAGS):
        return re.fullmatch(pattern, text, re.DOTALL)


# ------------------------------------------------------------------------------------------------- Open R1's and TRL's

def accuracy_reward(completions, solution, **columns) -> list[float | None]:
    r"""1 where the last `\boxed{}` of the whole completion, or else its last LaTeX, equals the `solution`, otherwise 0.

    None where the solution is not mathematics: Open R1 rewarded that once. It also swaps math-verify's two arguments,
    which changes the verdict on equations and inequalities.
    """
    golds = [last_latex(str(gold)) or gold_answer(gold) for gold in solution]
    values = []
    for text, gold in zip(texts(completions), golds, strict=True):
        right = is_mathematics(gold) and is_equal(gold, last_latex(text))
        values.append(float(right) if is_mathematics(gold) else None)
    return values


def format_reward(completions, **columns) -> list[float]:
    r"""1 for exactly `<think>\n...\n</think>\n<answer>\n...\n</answer>`, otherwise 0.

    Open R1's expression also accepts lines in front, text after the answer and a second block.
    """
    pattern = r"<think>\n.*\n</think>\n<answer>\n.*\n</answer>\n?"
    return [1.0 if match_tags(pattern, text) else 0.0
            for text in texts(completions)]


def tag_count_reward(completions, **columns) -> list[float]:
    """A quarter for each of the four tags that stands exactly once, on its own line."""
    tags = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
    return [sum(text.count(tag) == 1 for tag in tags) / 4
            for text in texts(completions)]


def reasoning_steps_reward(completions, **columns) -> list[float]:
    """A third for each "Step 1:", "1." at the start, bullet, "First,", "Second,", "Next," or "Finally,"; at most 1."""
    steps = re.compile(r"Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,")
    return [min(1.0, len(steps.findall(text)) / 3)
            for text in texts(completions)]


def len_reward(completions, solution, prompts=None, **columns) -> list[float | None]:
    """Shorter is better (Kimi k1.5, arXiv 2501.12599, section 2.3.3): 0.5 - (length - min) / (max - min) in characters.

    A wrong completion gets at most 0; lengths that are all equal give 0. min and max are those of the prompt's group,
    as in the paper; Open R1 takes them over the whole call, which is the same for one prompt or without `prompts`.
    None where the solution is not mathematics; Open R1 takes every completion for right there.
    """
    lengths = [len(text) for text in texts(completions)]
    groups = list(map(str, prompts)) if prompts else [""] * len(lengths)
    right, values = accuracy_reward(completions, solution), []
    for length, group, correct in zip(lengths, groups, right):
        peers = [other for other, its_group in zip(lengths, groups)
                 if its_group == group]
        spread = max(peers) - min(peers)
        value = 0.5 - (length - min(peers)) / spread if spread else 0.0
        if not correct:
            value = None if correct is None else min(0.0, value)
        values.append(value)
    return values


def get_cosine_scaled_reward(min_value_wrong=-1.0, max_value_wrong=-0.5,
                             min_value_correct=0.5, max_value_correct=1.0, max_len=1000):
    """Right answers: from max down to min over `max_len` characters, along a cosine; wrong ones: from min up to max.

    "Demystifying long chain-of-thought", arXiv 2502.03373, section 4. Beyond `max_len` the value stays; Open R1's turns
    back, so that a wrong completion of twice that length is as good as an empty one. None as in `accuracy_reward`.
    """
    def cosine_scaled_reward(completions, solution, **columns):
        right, values = accuracy_reward(completions, solution), []
        for text, correct in zip(texts(completions), right):
            start, end = min_value_wrong, max_value_wrong
            if correct:
                start, end = max_value_correct, min_value_correct
            cosine = math.cos(math.pi * min(1.0, len(text) / max_len))
            value = end + (start - end) * (1 + cosine) / 2
            values.append(None if correct is None else value)
        return values
    return cosine_scaled_reward


def get_repetition_penalty_reward(ngram_size: int, max_penalty: float, language: str = "en"):
    """max_penalty * (1 - unique n-grams / n-grams), of lower-case words; 0 if there are fewer words than `ngram_size`.

    arXiv 2502.03373, appendix C.2. `language` "zh" cuts words with jieba. ValueError for a positive penalty.
    """
    if max_penalty > 0:
        raise ValueError(f"max_penalty {max_penalty} should not be positive")
    if language not in ("en", "zh"):
        raise ValueError(f"language {language!r} is not supported: expected 'en' or 'zh'")
    words = str.split if language == "en" else importlib.import_module("jieba").lcut

    def repetition_penalty_reward(completions, **columns):
        values = []
        for text in texts(completions):
            found = words(text.lower())
            ngrams = list(zip(*(found[i:] for i in range(ngram_size))))
            repeated = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
            values.append(max_penalty * repeated)
        return values
    return repetition_penalty_reward


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int):
    """0 up to max - cache tokens, then down to -1 at max and beyond (DAPO, arXiv 2503.14476, equation 13)."""
    def soft_overlong_punishment_reward(completion_ids, **columns):
        free = max_completion_len - soft_punish_cache
        over = [len(ids) - free for ids in completion_ids]
        return [0.0 if n <= 0 else -1.0 if n > soft_punish_cache else -n / soft_punish_cache for n in over]
    return soft_overlong_punishment_reward


def reward_len(completions=None, target: int = 200, **columns):
    """-|target - characters|, from TRL's tutorial; `reward_len(target=50)` is the function for another target."""
    if completions is None:
        return wraps(reward_len)(partial(reward_len, target=target))
    return [-float(abs(target - len(text))) for text in texts(completions)]


# ------------------------------------------------------------------------------------------------- calling them

def load_rewards(rewards: list) -> dict:
    """Functions and their weights, from functions, names (of this file, or `module:function`), and (either, weight).

    The command line writes a weight as "0.5*name". SystemExit names what is missing or doubled.
    """
    weights = {}
    for reward in rewards:
        weight = 1.0
        if isinstance(reward, (tuple, list)):
            reward, weight = reward
        if isinstance(reward, str):
            written = re.fullmatch(r"(?:(.*)\*)?(?:(.*):)?(.*)", reward, re.DOTALL)
            factor, module, name = written.groups()
            try:
                weight = float(factor or weight)
                reward = getattr(importlib.import_module(module or __name__), name)
            except (ImportError, AttributeError, ValueError) as error:
                raise SystemExit(f"no reward function {reward} ({error}): "
                                 "name one of rewards.py, or module:function")
        names = [function.__name__ for function in weights]
        require(reward.__name__ not in names,
                f"two reward functions are called {reward.__name__}: "
                "metrics could not tell them apart")
        weights[reward] = weight
    return weights


def columns_of(prompts: list[Prompt]) -> dict[str, list]:
    """The data set's columns as the reward functions take them."""
    names = prompts[0].columns if prompts else []
    return {name: [prompt.columns[name] for prompt in prompts] for name in names}


def check_rewards(functions, columns: dict[str, list]) -> None:
    """SystemExit if a function cannot be called with these columns, or finds a row that it could never judge."""
    for function in functions:
        bind = inspect.signature(function).bind
        try:
            bind(completions=[], prompts=[], completion_ids=[], **columns)
            if hasattr(function, "check"):
                function.check(**columns)
        except (TypeError, ValueError) as error:
            raise SystemExit(f"reward {function.__name__} cannot judge the data set: "
                             f"{error}; columns: {list(columns)}")


def score(groups: list[Group], rewards: dict, tokenizer) -> None:
    """Sets `text`, `rewards`, `steps`, `reward` and `outcome` of the groups' samples, by one call of each function.

    A function of weight 0 is only logged.
    """
    samples = samples_of(groups)
    for sample in samples:
        sample.text = tokenizer.decode(sample.tokens[: -1 if sample.ended else None])
    prompts = [sample.prompt for sample in samples]
    columns = columns_of(prompts) | {
        "prompts": [prompt.text for prompt in prompts],
        "completion_ids": [sample.tokens.tolist() for sample in samples],
    }
    values, steps = compute_rewards(rewards, [sample.text for sample in samples], **columns)
    for sample, numbers, written in zip(samples, zip(*values), zip(*steps)):
        sample.rewards = list(numbers)
        for weight, number, some in zip(rewards.values(), numbers, written):
            part = 0.0 if math.isnan(number) else weight * number
            sample.reward += part
            sample.outcome += 0.0 if some else part  # section 4.1.2: r
            # section 4.1.3: r^index(j)
            sample.steps.append([(tokens_until(tokenizer, sample.tokens, end), value)
                                 for end, value in some if weight])


def compute_rewards(functions, completions: list[str], **columns) -> tuple[list, list]:
    """By function and completion the value (NaN for None, the sum of the steps), and the list of steps.

    ValueError names the function and the completion that it fails at.
    """
    values, steps = [], []
    for function in functions:
        name = function.__name__
        try:
            result = list(function(completions=completions, **columns))
            values.append(list(map(as_number, result)))
        except Exception as error:
            completion = culprit(function, completions, columns)
            raise ValueError(f"reward {name} raised {error!r} "
                             f"at the completion {completion!r}") from error
        if len(result) != len(completions):
            raise ValueError(f"reward {name} returned {len(result)} values "
                             f"for {len(completions)} completions")
        steps.append([value if isinstance(value, list) else [] for value in result])
        for value, some, completion in zip(result, steps[-1], completions):
            outside = any(not 0 < end <= len(completion) for end, _ in some)
            if outside or value is not None and not math.isfinite(as_number(value)):
                raise ValueError(f"reward {name} returned {value} for {completion!r}")
    return values, steps


def as_number(value) -> float:
    if isinstance(value, list):
        return float(sum(reward for _, reward in value))
    return math.nan if value is None else float(value)


def culprit(function, completions: list[str], columns: dict[str, list]) -> str:
    """The first completion that `function` raises at by itself, or a note that none does."""
    for i, completion in enumerate(completions):
        row = {name: values[i : i + 1] for name, values in columns.items()}
        try:
            list(map(as_number, function(completions=[completion], **row)))
        except Exception:
            return completion
    return "no single completion"
