"""Data sets: from rows of a file or of the hub to prompts.

    python -m grpo.data openai/gsm8k:main:train 400     # prints the first rows as a .jsonl file has them
"""
import json
import os
import random
import re
import sys
from datetime import date
from functools import lru_cache

from jinja2 import TemplateError

from grpo.constants import explained, require
from grpo.types import Prompt


def load_prompts(name: str, tokenizer, system_prompt: str, max_tokens: int, question="question",
                 vocab_size: int = sys.maxsize) -> list[Prompt]:
    """The rows of a data set, see `read`, as prompts. Those over `max_tokens` are left out and counted.

    A row has the column `question`, put behind the system prompt in the chat template, or `prompt`: a string, used as
    it is, or chat messages, of which a last one of the assistant is continued. SystemExit says what is wrong.
    """
    require(name, "DATASET is empty: name a file or a data set of the hub")
    with explained(f"cannot read the data set {name}"):
        rows = read(name)
    prompts, names = [], list(rows[0]) if rows else []
    hint = "; conversations are ShareGPT's: make them prompt, with role and content" * ("conversations" in names)
    require({question, "prompt"} & set(names), f"{name} needs a column {question} (QUESTION_COLUMN) or prompt: "
                                               f"{len(rows)} rows with {names}{hint}")
    for number, row in enumerate(rows, start=1):
        try:
            if row.keys() != set(names):
                raise ValueError(f"the columns are {list(row)}, the first row's are {names}")
            prompts.append(to_prompt(row, number, tokenizer, system_prompt, question))
            if (last := max(prompts[-1].ids)) >= vocab_size:  # as Gemma 3's token for images
                raise ValueError(f"the prompt has {tokenizer.decode(last)!r}, which the embedding has no row for: save "
                                 "the model after model.resize_token_embeddings(len(tokenizer))")
        except (ValueError, TypeError) as error:
            raise SystemExit(f"row {number} of the data set {name}: {error}") from error
    short = [prompt for prompt in prompts if len(prompt.ids) <= max_tokens]
    require(short, f"every prompt of {name} has more than MAX_PROMPT_TOKENS={max_tokens} tokens")
    if left_out := len(prompts) - len(short):
        print(f"{name}: left out {left_out} of {len(prompts)} prompts, over MAX_PROMPT_TOKENS={max_tokens}", flush=True)
    return short


def to_prompt(row: dict, number: int, tokenizer, system_prompt: str, question: str) -> Prompt:
    """ValueError or TypeError if the row makes no prompt."""
    given, asked = row.get("prompt"), row.get(question)
    columns = {name: value for name, value in row.items() if name != "prompt"}
    if isinstance(given, str) and given:
        ids, begin = tokens_of(given, tokenizer), tokenizer("").input_ids[:1]
        needs_bos = begin == [tokenizer.bos_token_id] != ids[:1]  # Llama's and Gemma's tokenizers put it there
        return Prompt(begin * needs_bos + ids, given, None, columns, number)
    if given:
        check_messages(given)
    elif not isinstance(asked, str) or not asked.strip():
        wrong = {question: asked} if question in row else {"prompt": given}
        raise ValueError(f"expected a text, or chat messages as prompt, but found {wrong}")
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages = given or [*system, {"role": "user", "content": asked}]
    text = in_template(messages, tokenizer)
    return Prompt(tokens_of(text, tokenizer), text, given, columns, number)


def in_template(messages: list[dict], tokenizer) -> str:
    """The messages in the model's chat template. ValueError if it refuses them, or leaves one out without a word."""
    messages = [{key: value for key, value in one.items() if value is not None} for one in messages]  # Parquet's
    parts = [one | {"content": [{"type": "text", "text": one["content"]}]} for one in messages]
    continued, hint = messages[-1]["role"] == "assistant", "SYSTEM_PROMPT= leaves the system message out"
    for form in messages, parts:  # templates of vision-language models may want parts
        try:
            text = tokenizer.apply_chat_template(
                form, tokenize=False, add_generation_prompt=not continued, continue_final_message=continued,
                strftime_now=date(2026, 1, 1).strftime)  # a run that goes on tomorrow has the same prompts
        except TemplateError as error:
            raise ValueError(f"MODEL's chat template says: {error} ({hint})") from None
        lost = [one["content"] for one in messages
                if one["role"] != "assistant" and one["content"].strip() not in text]
        if not lost:
            return text
    raise ValueError(f"MODEL's chat template leaves out {lost[0]!r:.80} ({hint})")


def check_messages(messages) -> None:
    """ValueError if they are no chat messages."""
    if not isinstance(messages, list):
        raise ValueError(f"prompt is {messages!r:.80}, expected a text or a list of chat messages")
    for message in messages:
        if isinstance(message, dict) and {"from", "value"} <= message.keys():
            raise ValueError("the messages are ShareGPT's: rename from to role, value to content, human to user and "
                             "gpt to assistant")
        texts = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"prompt holds {message!r:.80}, expected a message with role and content")


def tokens_of(text: str, tokenizer) -> list[int]:
    text.encode()  # UnicodeEncodeError, a ValueError, at half a character
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"the prompt {text!r} has no tokens")
    return ids


def pick(prompts: list[Prompt], number: int, seed: int) -> Prompt:
    """The prompt with this number, from 0, in an endless row of epochs, each in an order of its own."""
    return prompts[epoch_order(seed, number // len(prompts), len(prompts))[number % len(prompts)]]


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(size), size)


def read(name: str) -> list[dict]:
    """The rows of `path[:config[:split]]`, a file of the usual formats or a hub data set; a `.jsonl` file as it is."""
    if name.endswith(".jsonl"):
        return read_jsonl(name)
    from datasets import load_dataset  # here, because it takes half a second, and .jsonl files need none of it

    path, config, split = (*name.split(":", 2), "", "")[:3]
    file = re.search(r"\.(json|csv|parquet|arrow)l?(\.(gz|bz2|xz|zst|zip))?$", path)
    if not file and os.path.isfile(path):
        raise ValueError("expected a .jsonl, .json, .csv, .parquet or .arrow file, perhaps compressed")
    source = {"path": file[1], "data_files": path} if file else {"path": path}
    return load_dataset(**source, name=config or None, split=split or "train").to_list()


def read_jsonl(path: str) -> list[dict]:
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    rows.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"line {number} is not a JSON object: {error}") from None
    return rows


if __name__ == "__main__":
    for row in read(sys.argv[1])[: int(sys.argv[2])]:
        print(json.dumps(row, default=str))
