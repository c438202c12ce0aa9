"""Rewards: functions that turn completions into numbers. `grpo/scoring.py` calls them.

A reward function is `f(completions, **columns) -> list[float | None]`, or an `async` one. This is TRL's convention: a
function written for one runs in the other. Completions are strings, or lists of chat messages, whose last one counts,
if the data set's `prompt` is a list of messages. The columns are lists of the same length: the data set's (`answer`,
...), `prompts`, `prompt_texts` (in the chat template) and `completion_ids`; and TRL's `trainer_state`, `log_metric`
and `log_extra`. `None` means that the function does not apply to that completion. For process supervision a value may
also be a list of `(end_character, reward)`: one reward for each step of the completion, whose text ends before that
character.

A function may carry `f.check(rows, **columns)`, called before training starts with each whole data set, `rows`
being its rows' numbers; it raises ValueError at a row that could never be judged.

The names without `reward_` in front are Open R1's, with its parameters, defaults and values; a docstring says where one
of them deliberately differs.
"""
import importlib
import itertools
import math
import re
import warnings
from functools import partial, wraps

from grpo.answers import extract_answer, gold_answer, last_latex
from grpo.math_judge import LONGEST_ANSWER, get_ready, is_equal, is_mathematics
from grpo.reward_model import reward_model  # noqa: F401: one of the functions

TAGS = "<think>", "</think>", "<answer>", "</answer>"
NO_ANSWER = "n/a", "nan", "none", "null", "inf", "-inf"


def texts(completions: list) -> list[str]:
    """The completions as strings; of chat messages the content of the last one."""
    return [one if isinstance(one, str) else one[-1]["content"]
            for one in completions]


def with_thinking(written, /, prompts=None, prompt_texts=None, **columns) -> list[str]:
    """Completions as strings, behind that part of the thinking which the prompts have begun."""
    found = texts(written)
    prompts = prompts or [""] * len(found)
    prompt_texts = prompt_texts or prompts
    return [begun_thinking(*pair) + text
            for *pair, text in zip(prompts, prompt_texts, found, strict=True)]


def begun_thinking(prompt: str | list, prompt_text: str) -> str:
    """What a prompt has of the completion's thinking: from the row's own last message, or from the chat template.

    A template may end in `<think>` (DeepSeek-R1, QwQ), or in an empty block, perhaps just `</think>`, that stands for
    no thinking at all (Qwen3, DeepSeek-V3.1).
    """
    if not isinstance(prompt_text, str):
        prompt_text = ""
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        own = prompt[-1]["content"]
        _, tag, rest = own.rpartition("<think>")
        if tag:
            return tag + rest
        prompt_text = prompt_text.rstrip().removesuffix(own.strip())
    end = re.search(r"(<think>)?\s*(</think>)?$", prompt_text.rstrip()[-100:])
    if end[2]:
        return "<think>\n\n</think>\n"
    return "<think>\n" if end[1] else ""


# ------------------------------------------------------------------------------------------------- right or wrong

def reward_correct(completions, answer, **columns) -> list[float]:
    """+1 where the completion's answer (see `extract_answer`) means the same as the column `answer`, otherwise -1."""
    found = map(extract_answer, with_thinking(completions, **columns))
    pairs = zip(map(gold_answer, answer), found, strict=True)
    return [1.0 if is_equal(gold, text) else -1.0 for gold, text in pairs]


def check_answers(answer, rows=None, **columns) -> None:
    """ValueError at the first gold answer that cannot be judged: no completion could match it."""
    get_ready()  # meanwhile, or the first step of the training would wait for the judge
    for row, value in zip(rows or itertools.count(1), answer):
        gold = gold_answer(value)
        if type(value) not in (str, int, float) or gold.lower() in NO_ANSWER:
            raise ValueError(f"row {row}: the answer is {value!r:.50}, "
                             "expected text or a number")
        if not is_equal(gold, gold):
            raise ValueError(f"row {row}: the answer {gold!r:.50} cannot be parsed "
                             f"or is over {LONGEST_ANSWER} letters")


reward_correct.check = check_answers


def reward_format(completions, **columns) -> list[float]:
    """+1.25 for exactly `<think>...</think>`, white space, `<answer>...</answer>`, neither blank; otherwise -1.

    The thinking may be blank if the chat template made it so, see `begun_thinking`.
    """
    pattern = r"<think>(.*)</think>\s*<answer>(.*)</answer>"
    values = []
    pairs = zip(with_thinking(completions, **columns), texts(completions))
    for text, own in pairs:
        match = match_tags(pattern, text.strip())
        thought = match and (match[1].strip() or "</think>" not in own)
        values.append(1.25 if thought and match[2].strip() else -1.0)
    return values


def match_tags(pattern: str, text: str) -> re.Match | None:
    """A full match, if each tag is there once: counted first, because the pattern then has no second way to match."""
    if all(text.count(tag) == 1 for tag in TAGS):
        return re.fullmatch(pattern, text, re.DOTALL)


# ------------------------------------------------------------------------------------------------- Open R1's and TRL's

def accuracy_reward(completions, solution, **columns) -> list[float | None]:
    r"""1 where the last `\boxed{}` after the last `</think>`, or else the last LaTeX, equals `solution`, otherwise 0.

    None where the solution is not mathematics: Open R1 rewarded that once. It also swaps math-verify's two arguments,
    which changes the verdict on equations and inequalities.
    """
    found = [last_latex(text.rpartition("</think>")[2]) for text in texts(completions)]
    pairs = zip(map(gold_answer, solution), found, strict=True)
    return [float(is_equal(gold, text)) if is_mathematics(gold) else None
            for gold, text in pairs]


def check_solutions(solution, rows=None, **columns) -> None:
    """A warning with the share of solutions that cannot be judged, in 500 of the rows; ValueError if none can be.

    Those are the ones that are not mathematics, where the reward is None, and those that do not even equal themselves.
    """
    get_ready()
    numbered = list(zip(rows or itertools.count(1), solution))
    sample = numbered[:: len(numbered) // 500 + 1]
    golds = [(row, gold_answer(gold)) for row, gold in sample]
    bad = [(row, gold) for row, gold in golds
           if not (is_mathematics(gold) and is_equal(gold, last_latex(f"\\boxed{{{gold}}}")))]
    if bad:
        row, gold = bad[0]
        found = (f"{len(bad)} of {len(golds)} solutions cannot be judged, "
                 f"the first in row {row}: {gold!r:.50}")
        if len(bad) == len(golds):
            raise ValueError(found)
        warnings.warn(f"{found}; their reward is None or wrong", stacklevel=2)


accuracy_reward.check = check_solutions


def format_reward(completions, **columns) -> list[float]:
    r"""1 for exactly `<think>\n...\n</think>\n<answer>\n...\n</answer>`, otherwise 0.

    Open R1's expression also accepts lines in front, text after the answer and a second block.
    """
    pattern = r"<think>\n.*\n</think>\n<answer>\n.*\n</answer>\n?"
    return [1.0 if match_tags(pattern, text) else 0.0
            for text in with_thinking(completions, **columns)]


def tag_count_reward(completions, **columns) -> list[float]:
    """A quarter for each of the four tags that stands exactly once, on its own line."""
    tags = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
    return [sum(text.count(tag) == 1 for tag in tags) / 4
            for text in with_thinking(completions, **columns)]


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


len_reward.check = check_solutions


def get_cosine_scaled_reward(
        min_value_wrong=-1.0, max_value_wrong=-0.5,
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
    cosine_scaled_reward.check = check_solutions
    return cosine_scaled_reward


def get_repetition_penalty_reward(
        ngram_size: int, max_penalty: float, language: str = "en"):
    """max_penalty * (1 - unique n-grams / n-grams), of lower-case words; 0 if there are fewer words than `ngram_size`.

    arXiv 2502.03373, appendix C.2. `language` "zh" cuts words with jieba. ValueError for a positive penalty.
    """
    if max_penalty > 0:
        raise ValueError(f"max_penalty {max_penalty} should not be positive")
    if language not in ("en", "zh"):
        raise ValueError(f"language {language!r} is not supported: "
                         "expected 'en' or 'zh'")
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
        return [0.0 if n <= 0 else -1.0 if n > soft_punish_cache
                else -n / soft_punish_cache for n in over]
    return soft_overlong_punishment_reward


def reward_len(completions=None, target: int = 200, **columns):
    """-|target - characters|, from TRL's tutorial; `reward_len(target=50)` is the function for another target."""
    if completions is None:
        return wraps(reward_len)(partial(reward_len, target=target))
    return [-float(abs(target - len(text))) for text in texts(completions)]
