"""Data sets: from rows of a file or of the hub to prompts."""
import json
import random
from functools import lru_cache

from jinja2 import TemplateError

from grpo.types import Prompt


def load_prompts(name: str, tokenizer, system_prompt: str, max_tokens: int, question="question") -> list[Prompt]:
    """The rows of a .jsonl or .parquet file, or of a hub data set (`name[:config[:split]]`), as prompts.

    A row has the column `question`, put behind the system prompt in the chat template, or `prompt`: a string, used as
    it is, or chat messages. Prompts over `max_tokens` are left out and counted. SystemExit says what is wrong.
    """
    try:
        rows = read_jsonl(name) if name.endswith(".jsonl") else read_hub(*name.split(":", 2))
    except Exception as error:  # `datasets` has its own for broken files, and only their cause says something
        raise SystemExit(f"cannot read the data set {name}: {error} {error.__cause__ or ''}".strip())
    prompts, names = [], list(rows[0]) if rows else []
    if question not in names and "prompt" not in names:
        raise SystemExit(f"{name} needs a column {question} (QUESTION_COLUMN) or prompt: {len(rows)} rows with {names}")
    for number, row in enumerate(rows, start=1):
        if row.keys() != set(names):
            raise SystemExit(f"row {number} of the data set {name} has the columns {list(row)}, the first has {names}")
        messages = {"system": system_prompt, "user": row.get(question)}
        text = row.pop("prompt", None) or [{"role": role, "content": said} for role, said in messages.items() if said]
        if not isinstance(text, str):
            try:
                text = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
            except TemplateError as error:
                raise SystemExit(f"row {number} of {name}: MODEL's chat template says: {error} "
                                 "(SYSTEM_PROMPT= leaves the system message out)") from error
        row.pop(question, None)
        prompts.append(Prompt(tokenizer(text, add_special_tokens=False).input_ids, text, row, number))
    short = [prompt for prompt in prompts if 0 < len(prompt.ids) <= max_tokens]
    if not short:
        raise SystemExit(f"every prompt of {name} has more than MAX_PROMPT_TOKENS={max_tokens} tokens")
    if left_out := len(prompts) - len(short):
        print(f"{name}: left out {left_out} of {len(prompts)} prompts, over MAX_PROMPT_TOKENS={max_tokens}", flush=True)
    return short


def pick(prompts: list[Prompt], number: int, seed: int) -> Prompt:
    """The prompt with this number, from 0, in an endless row of epochs, each in an order of its own."""
    return prompts[epoch_order(seed, number // len(prompts), len(prompts))[number % len(prompts)]]


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(size), size)


def read_jsonl(path: str) -> list[dict]:
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"line {number} is not a JSON object: {error}") from None
    return rows


def read_hub(path: str, config: str = "", split: str = "") -> list[dict]:
    from datasets import load_dataset  # here, because it takes half a second, and local files need none of it

    source = {"path": "parquet", "data_files": path} if path.endswith(".parquet") else {"path": path}
    return load_dataset(**source, name=config or None, split=split or "train").to_list()
