"""Rewards: functions that turn completions into numbers, and what they share.

A reward function is `f(completions, **columns) -> list[float | None]`. Completions are strings, or lists of chat
messages whose last one counts; the columns are the data set's (`answer`, ...) plus `prompts` and `completion_ids`, all
lists of the same length. This is TRL's convention: a function written for one runs in the other. `None` means that the
function does not apply to that completion. For process supervision a value may also be a list of `(end_character,
reward)`: one reward for each step of the completion, whose text ends before that character.

A function may carry `f.check(**columns)`, called once with the whole data set before training starts; it raises
ValueError at a row that could never be judged.

The names without `reward_` in front are Open R1's, with its parameters, defaults and values, so that they can be taken
over; a docstring says where one of them deliberately differs.
"""
import importlib
import inspect
import math
import os
import re
import threading
from functools import lru_cache, partial, wraps
from itertools import accumulate

from grpo.answers import clean, quantity, same
from grpo.math_judge import ask_judge

LONGEST_ANSWER = 1000  # characters; a longer answer is wrong


def texts(completions: list) -> list[str]:
    """The completions as strings; of chat messages the content of the last one."""
    return [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]


# ------------------------------------------------------------------------------------------------- right or wrong

def reward_correct(completions, answer, **columns) -> list[float]:
    """+1 where the completion's answer (see `extract_answer`) means the same as the column `answer`, otherwise -1."""
    return [1.0 if is_equal(gold_answer(gold), extract_answer(completion)) else -1.0
            for completion, gold in zip(texts(completions), answer, strict=True)]


def check_answers(answer, **columns) -> None:
    """ValueError at the first gold answer that says nothing, so that no completion could ever be right.

    Meanwhile the judge gets ready, which takes seconds: a step of the training would have to wait for it.
    """
    threading.Thread(target=ask_judge, args=("1", "1"), daemon=True).start()
    for row, gold in enumerate(map(gold_answer, answer), start=1):
        if len(gold) > LONGEST_ANSWER or not clean(gold):
            raise ValueError(f"row {row}: the answer {gold!r:.50} cannot be parsed or is over {LONGEST_ANSWER} letters")


reward_correct.check = check_answers


def reward_format(completions, **columns) -> list[float]:
    """+1.25 for exactly `<think>...</think>`, white space, `<answer>...</answer>`, neither blank; otherwise -1."""
    matches = (match_tags(r"<think>(.*)</think>\s*<answer>(.*)</answer>", text.strip()) for text in texts(completions))
    return [1.25 if match and match[1].strip() and match[2].strip() else -1.0 for match in matches]


def match_tags(pattern: str, text: str) -> re.Match | None:
    """A full match, if each tag is there once: counted first, because the pattern then has no second way to match."""
    if all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return re.fullmatch(pattern, text, re.DOTALL)


# ------------------------------------------------------------------------------------------------- Open R1's and TRL's

def accuracy_reward(completions, solution, **columns) -> list[float | None]:
    r"""1 where the last `\boxed{}` of the whole completion, or else its last LaTeX, equals the `solution`, otherwise 0.

    None where the solution is not mathematics: Open R1 rewarded that once. It also swaps math-verify's two arguments,
    which changes the verdict on equations and inequalities.
    """
    golds = [last_latex(str(gold)) or gold_answer(gold) for gold in solution]
    return [float(is_equal(gold, last_latex(completion))) if is_mathematics(gold) else None
            for completion, gold in zip(texts(completions), golds, strict=True)]


def format_reward(completions, **columns) -> list[float]:
    r"""1 for exactly `<think>\n...\n</think>\n<answer>\n...\n</answer>`, otherwise 0.

    Open R1's expression also accepts lines in front, text after the answer and a second block.
    """
    pattern = r"<think>\n.*\n</think>\n<answer>\n.*\n</answer>\n?"
    return [1.0 if match_tags(pattern, text) else 0.0 for text in texts(completions)]


def tag_count_reward(completions, **columns) -> list[float]:
    """A quarter for each of the four tags that stands exactly once, on its own line."""
    tags = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
    return [sum(text.count(tag) == 1 for tag in tags) / 4 for text in texts(completions)]


def reasoning_steps_reward(completions, **columns) -> list[float]:
    """A third for each "Step 1:", "1." at the start, bullet, "First,", "Second,", "Next," or "Finally,"; at most 1."""
    steps = re.compile(r"Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,")
    return [min(1.0, len(steps.findall(text)) / 3) for text in texts(completions)]


def len_reward(completions, solution, prompts=None, **columns) -> list[float | None]:
    """Shorter is better (Kimi k1.5, arXiv 2501.12599, section 2.3.3): 0.5 - (length - min) / (max - min) in characters.

    A wrong completion gets at most 0; lengths that are all equal give 0. min and max are those of the prompt's group,
    as in the paper; Open R1 takes them over the whole call, which is the same for one prompt or without `prompts`.
    None where the solution is not mathematics; Open R1 takes every completion for right there.
    """
    lengths = [len(text) for text in texts(completions)]
    groups = list(map(str, prompts)) if prompts else [""] * len(lengths)
    values = []
    for length, group, correct in zip(lengths, groups, accuracy_reward(completions, solution)):
        peers = [other for other, its_group in zip(lengths, groups) if its_group == group]
        value = 0.5 - (length - min(peers)) / (max(peers) - min(peers)) if len(set(peers)) > 1 else 0.0
        values.append(None if correct is None else value if correct else min(0.0, value))
    return values


def get_cosine_scaled_reward(min_value_wrong=-1.0, max_value_wrong=-0.5, min_value_correct=0.5, max_value_correct=1.0,
                             max_len=1000):
    """Right answers: from max down to min over `max_len` characters, along a cosine; wrong ones: from min up to max.

    "Demystifying long chain-of-thought", arXiv 2502.03373, section 4. Beyond `max_len` the value stays; Open R1's turns
    back, so that a wrong completion of twice that length is as good as an empty one. None as in `accuracy_reward`.
    """
    def cosine_scaled_reward(completions, solution, **columns):
        values = []
        for text, correct in zip(texts(completions), accuracy_reward(completions, solution)):
            start, end = (max_value_correct, min_value_correct) if correct else (min_value_wrong, max_value_wrong)
            cosine = math.cos(math.pi * min(1.0, len(text) / max_len))
            values.append(None if correct is None else end + (start - end) * (1 + cosine) / 2)
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
            ngrams = list(zip(*(words(text.lower())[i:] for i in range(ngram_size))))
            values.append(max_penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0)
        return values
    return repetition_penalty_reward


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int):
    """0 up to max - cache tokens, then down to -1 at max and beyond (DAPO, arXiv 2503.14476, equation 13)."""
    def soft_overlong_punishment_reward(completion_ids, **columns):
        over = [len(ids) - (max_completion_len - soft_punish_cache) for ids in completion_ids]
        return [0.0 if n <= 0 else -1.0 if n > soft_punish_cache else -n / soft_punish_cache for n in over]
    return soft_overlong_punishment_reward


def reward_len(completions=None, target: int = 200, **columns):
    """-|target - characters|, from TRL's tutorial; `reward_len(target=50)` is the function for another target."""
    if completions is None:
        return wraps(reward_len)(partial(reward_len, target=target))
    return [-float(abs(target - len(text))) for text in texts(completions)]


def reward_model(path: str, device=None, batch_size: int = 16):
    """A reward function from a sequence classification model with one label: its logit for prompt + completion.

    It stays on `device`, by default this process's GPU, or the CPU if there is none. ValueError for several labels.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    device = device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right")
    model = AutoModelForSequenceClassification.from_pretrained(path).to(device).eval()
    if model.config.num_labels != 1:
        raise ValueError(f"the reward model {path} has {model.config.num_labels} labels: expected 1")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id

    @torch.inference_mode()
    def reward(completions, prompts, **columns):
        both = [prompt + completion if isinstance(completion, str)
                else tokenizer.apply_chat_template(prompt + completion, tokenize=False)
                for prompt, completion in zip(prompts, completions, strict=True)]
        values = []
        for start in range(0, len(both), batch_size):
            batch = both[start : start + batch_size]
            tokens = tokenizer(batch, padding=True, add_special_tokens=False, return_tensors="pt").to(device)
            values += model(**tokens).logits[:, 0].tolist()
        return values
    reward.__name__ = os.path.basename(os.path.normpath(path))
    return reward


# ------------------------------------------------------------------------------------------------- answers

def extract_answer(completion: str) -> str | None:
    """The text of the single complete `<answer>` block after the last `</think>`; None if there is no such block."""
    _, thought, rest = completion.rpartition("</think>")
    if not thought or rest.count("<answer>") != 1 or rest.count("</answer>") != 1:
        return None
    inside = rest.partition("<answer>")[2]
    return inside.partition("</answer>")[0].strip() if "</answer>" in inside else None


def gold_answer(gold) -> str:
    """A data set's answer as text; GSM8K writes it behind `####`, at the end of the solution."""
    return str(gold).rpartition("####")[2].strip()


def last_latex(text: str) -> str | None:
    r"""What is inside the last complete `\boxed{}`, or else the last of `$...$`, `$$...$$`, `\(...\)` and `\[...\]`."""
    _, boxed, rest = text.rpartition(r"\boxed{")
    for end, depth in enumerate(accumulate((letter == "{") - (letter == "}") for letter in rest if boxed)):
        if depth < 0:
            return rest[:end]
    parts = re.split(r"(?<!\\)(?:\$\$?|\\[()\[\]])", text)  # every second one is mathematics
    return parts[-3 + len(parts) % 2] if len(parts) > 2 else None


@lru_cache(maxsize=10000)
def is_equal(gold: str, answer: str | None) -> bool:
    """Whether the answer means the same as the gold answer, see `answers.same`; mathematics goes to a judge."""
    if not answer or max(len(gold), len(answer)) > LONGEST_ANSWER:
        return False
    try:
        return same(gold, answer, too_dangerous_here)
    except (NotImplementedError, RecursionError):
        return ask_judge(gold, answer)


@lru_cache(maxsize=10000)
def is_mathematics(text: str) -> bool:
    """Whether a gold answer can be read as a quantity, or by math-verify."""
    return bool(len(text) <= LONGEST_ANSWER and re.search(r"[\d\\^=]", text)
                and (quantity(clean(text)) or ask_judge(text, None)))


def too_dangerous_here(gold: str, answer: str):
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------- calling them

def load_rewards(rewards: list) -> dict:
    """Functions and their weights, from functions, names (of this file, or `module:function`), and (either, weight).

    The command line writes a weight as "0.5*name". SystemExit names what is missing or doubled.
    """
    weights = {}
    for reward in rewards:
        reward, weight = reward if isinstance(reward, (tuple, list)) else (reward, 1.0)
        if isinstance(reward, str):
            factor, module, name = re.fullmatch(r"(?:(.*)\*)?(?:(.*):)?(.*)", reward, re.DOTALL).groups()
            try:
                weight = float(factor or weight)
                reward = getattr(importlib.import_module(module or __name__), name)
            except (ImportError, AttributeError, ValueError) as error:
                raise SystemExit(f"no reward function {reward} ({error}): name one of rewards.py, or module:function")
        if reward.__name__ in [other.__name__ for other in weights]:
            raise SystemExit(f"two reward functions are called {reward.__name__}: metrics could not tell them apart")
        weights[reward] = weight
    return weights


def check_rewards(functions, columns: dict[str, list]) -> None:
    """SystemExit if a function cannot be called with these columns, or finds a row that it could never judge."""
    for function in functions:
        try:
            inspect.signature(function).bind(completions=[], prompts=[], completion_ids=[], **columns)
            getattr(function, "check", lambda **columns: None)(**columns)
        except (TypeError, ValueError) as error:
            raise SystemExit(f"reward {function.__name__} cannot judge the data set: {error}; columns: {list(columns)}")


def compute_rewards(functions, completions: list[str], **columns) -> tuple[list[list[float]], list[list[list]]]:
    """Of every function and completion the value (NaN for None, the sum of the steps) and the list of steps.

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
            raise ValueError(f"reward {name} raised {error!r} at the completion {completion!r}") from error
        if len(result) != len(completions):
            raise ValueError(f"reward {name} returned {len(result)} values for {len(completions)} completions")
        steps.append([value if isinstance(value, list) else [] for value in result])
        for value, number, its_steps, completion in zip(result, values[-1], steps[-1], completions):
            wrong_end = any(not 0 < end <= len(completion) for end, _ in its_steps)
            if wrong_end or value is not None and not math.isfinite(number):
                raise ValueError(f"reward {name} returned {value} for {completion!r}")
    return values, steps


def as_number(value) -> float:
    if isinstance(value, list):
        return float(sum(reward for _, reward in value))
    return math.nan if value is None else float(value)


def culprit(function, completions: list[str], columns: dict[str, list]) -> str:
    """The first completion that `function` raises at by itself, or a note that none does."""
    for i, completion in enumerate(completions):
        try:
            one = function(completions=[completion], **{name: values[i : i + 1] for name, values in columns.items()})
            list(map(as_number, one))
        except Exception:
            return completion
    return "no single completion"
