"""From a data set to prompts, from prompts to completions; and the model that both scripts start with.

    rows = load_prompts("train.jsonl", tokenizer, system_prompt, max_prompt_tokens)
    completions = sample(model, [row["ids"] for row in rows], group_size, ...)

A prompt is prefilled once for its whole group, a finished sequence leaves the batch at once, and each token's log-prob
under the sampling policy comes along at no extra forward pass. Random numbers belong to the prompt's seed, not to the
batch: the same prompt gets the same completions however the prompts are spread over processes.
"""
import ctypes
import gc
import json
from bisect import bisect_left
from typing import NamedTuple

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer

from layers import RoomyLayer, fuse, next_logits, pack_attention, select_rows

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h
MAX_SEQUENCES = 512  # decoded at a time; more are taken one slice after the other
BLOCK = 64  # tokens from one look for groups that are finished to the next
LOOK_EVERY = 8  # tokens on an accelerator, which waits whenever it is asked whether a completion has ended
CHAT_TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}"
                 "{% if add_generation_prompt %}Assistant:{% endif %}")  # for base models that have none


# ------------------------------------------------------------------------------------------------- model and prompts

def dtype_called(name: str) -> torch.dtype:
    """float32 or bfloat16; "auto" is bfloat16 on an accelerator, float32 on a CPU. SystemExit at another name."""
    auto = torch.bfloat16 if torch.accelerator.is_available() else torch.float32
    known = {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise SystemExit(f"DTYPE={name}: expected one of {', '.join(known)}")
    return known[name]


def load_model(path: str, tokens: int = 0, dtype: str = "auto"):
    """The causal LM at `path` (folder or hub name), see `dtype_called`, and its tokenizer.

    SystemExit if it cannot be loaded, or has no room for so many `tokens` of prompt and completion.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype_called(dtype)).to(device).eval()
        pack_attention(model)
        if device.type == "cuda":
            fuse(model)
            torch.backends.cuda.enable_cudnn_sdp(False)  # makes a plan for each new shape: at every decoded token
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(f"cannot load MODEL={path}: {reason} (the embedded model: python examples/arithmetic.py)")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", tokens)
    if tokens > longest:
        raise SystemExit(f"MAX_PROMPT_TOKENS + MAX_COMPLETION_TOKENS is over the {longest} tokens of MODEL={path}")
    gc.freeze()  # what has been imported and loaded stays, there is nothing to collect
    if device.type == "cpu" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # else the memory of a tensor goes back to the kernel, which has to clear it again for the next one
        for setting, value in (M_TRIM_THRESHOLD, 2**30), (M_MMAP_MAX, 0), (M_ARENA_MAX, 1):
            libc.mallopt(setting, value)
    return model, tokenizer


def add_adapters(model, rank: int, seed: int):
    """LoRA (arXiv 2106.09685) at every linear layer but the LM head: `model` itself changes, and from now on only the
    adapters are trained. What is returned is the same model for saving, as `checkpoint.save` needs it."""
    from peft import LoraConfig, get_peft_model  # here, because it takes half a second and 13 MB

    torch.manual_seed(seed)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def stop_ids(model, tokenizer) -> list[int]:
    """Every token that ends a completion: the generation config may name several, the tokenizer one more."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def tokens_until(tokenizer, tokens, characters: int) -> int:
    """How many of the tokens it takes to write so many characters."""
    return bisect_left(range(len(tokens)), characters, key=lambda count: len(tokenizer.decode(tokens[:count])))


def load_prompts(name: str, tokenizer, system_prompt: str, max_tokens: int, question: str = "question") -> list[dict]:
    """The rows of a .jsonl or .parquet file or a hub data set (`name[:config[:split]]`): `text`, `ids`, the row's
    `number` (from 1) and the other `columns`.

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
        prompts.append({"text": text, "ids": tokenizer(text, add_special_tokens=False).input_ids, "columns": row,
                        "number": number})
    short = [prompt for prompt in prompts if 0 < len(prompt["ids"]) <= max_tokens]
    if not short:
        raise SystemExit(f"every prompt of {name} has more than MAX_PROMPT_TOKENS={max_tokens} tokens")
    if left_out := len(prompts) - len(short):
        print(f"{name}: left out {left_out} of {len(prompts)} prompts, over MAX_PROMPT_TOKENS={max_tokens}", flush=True)
    return short


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


# ------------------------------------------------------------------------------------------------- completions

class Completion(NamedTuple):
    """What the policy answered: token ids, EOS included when it came."""
    tokens: torch.Tensor  # (C,) int64, on the CPU
    logps: torch.Tensor  # (C,) float32, under the policy at the sampling temperature
    ended: bool  # with EOS; otherwise it was cut off at max_tokens


def sample(model, prompts: list[list[int]], group_size: int, *, max_tokens: int, stop: list[int],
           temperature: float = 1.0, min_tokens: int = 0, seeds: list[int] | None = None,
           decoder=None, done=lambda groups: None) -> list[Completion]:
    """`group_size` completions of each prompt, group after group; temperature 0 is greedy and needs no `seeds`.

    None ends before `min_tokens` tokens. The model is in eval mode meanwhile: dropout is not part of the policy.
    `decoder` may be another one than `decode`. `done` is called after every BLOCK tokens, and at the end, with the
    groups that have been finished since then, {place of the prompt: its completions}.
    """
    was_training, groups = model.training, {}
    model.eval()
    step = max(1, MAX_SEQUENCES // group_size)
    for start in range(0, len(prompts), step):
        some = slice(start, start + step)
        uniforms = torch.cat([
            torch.rand(group_size, max_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in seeds[some]]) if temperature else None
        for decoded in filter(None, (decoder or decode)(
                model, prompts[some], group_size, max_tokens, stop, temperature, min_tokens, uniforms)):
            few = {start + place: [Completion(c.tokens.clone(), c.logps.clone(), c.ended) for c in group]
                   for place, group in decoded.items()}  # copies, which are fit for autograd
            groups |= few
            done(few)
    model.train(was_training)
    return [completion for place in range(len(prompts)) for completion in groups[place]]


@torch.inference_mode()
def decode(model, prompts, group_size, max_tokens, stop, temperature, min_tokens, uniforms):
    """`sample` for prompts that fit together; uniforms (B, max_tokens) in [0, 1), B = prompts x group_size.

    Yields the groups that have been finished since the last time (see `finished`).
    """
    logits, mask, position, cache = prefill(model, prompts, group_size, max_tokens)
    device, longest = model.device, mask.shape[1] - max_tokens
    stop, look = torch.tensor(stop, device=device), LOOK_EVERY if device.type != "cpu" else 1
    written = tokens, logps, lengths, ended = blank(len(logits), max_tokens, device)
    rows, told = torch.arange(len(logits), device=device), set()  # the completions that are still being written
    uniforms = uniforms.to(device) if temperature else None
    for t in range(max_tokens):
        logits = logits.float().div_(temperature or 1)
        if t < min_tokens - 1:
            logits[:, stop] = -torch.inf
        token, logp = draw(logits, uniforms[rows, t] if temperature else None)
        tokens[rows, t], logps[rows, t] = token, logp
        stopped = torch.isin(token, stop) & ~ended[rows]
        lengths[rows] = torch.where(stopped, t + 1, lengths[rows])
        ended[rows] |= stopped
        if t % look == look - 1 and (gone := ended[rows]).any():
            live = (~gone).nonzero()[:, 0]
            going = torch.arange(len(live), device=device)  # the last rows take the places of those that ended
            going[gone[: len(live)]] = live[live >= len(live)]
            select_rows(cache, going)
            rows, token, mask, position = rows[going], token[going], mask[going], position[going]
        last = len(rows) == 0 or t == max_tokens - 1
        if last or t % BLOCK == BLOCK - 1:
            yield finished(written, group_size, rows[:0] if last else rows, told)
        if last:
            break
        end = longest + t + 1
        logits = next_logits(model, token, mask[:, :end], position[:, end - 1 : end], cache)


def prefill(model, prompts, group_size, max_tokens):
    """Logits (B, V) after the prompts, mask and position (B, L + max_tokens) of all tokens, and the cache of L."""
    device, longest = model.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)  # (P, L), padded on the left
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * (len(p) + max_tokens) for p in prompts], device=device)
    position = mask.cumsum(1).sub(1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    logits = model(input_ids=ids, attention_mask=mask[:, :longest], position_ids=position[:, :longest],
                   past_key_values=cache, logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(group_size)
    return *(tensor.repeat_interleave(group_size, 0) for tensor in (logits, mask, position)), cache


def blank(count, max_tokens, device):
    """What completions are written into: tokens and log-probs (B, max_tokens), lengths and ended (B,)."""
    return (torch.zeros(count, max_tokens, dtype=torch.long, device=device),
            torch.zeros(count, max_tokens, device=device),
            torch.full((count,), max_tokens, device=device),
            torch.zeros(count, dtype=torch.bool, device=device))


def finished(written, group_size, rows, told: set) -> dict[int, list[Completion]]:
    """The groups, by the prompt's place, without those of which `rows` are still being written and those `told`."""
    writing, groups = set((rows // group_size).tolist()), {}
    for place in sorted(set(range(len(written[0]) // group_size)) - writing - told):
        tokens, logps, lengths, ended = (tensor.unflatten(0, (-1, group_size))[place].cpu() for tensor in written)
        groups[place] = [Completion(tokens[i, :n], logps[i, :n], end)
                         for i, (n, end) in enumerate(zip(lengths.tolist(), ended.tolist()))]
    told.update(groups)
    return groups


def draw(logits, uniform):
    """Tokens (B,) and their log-probs (B,) from logits (B, V), for uniform (B,) in [0, 1); greedy without it.

    Inverse sampling: the first token whose cumulative probability exceeds uniform. Of a large vocabulary first the
    block, then the token in it: no sort, no `multinomial`, and next to no sums in float64, which keep the tail exact.
    """
    if uniform is None:
        logp, token = logits.log_softmax(-1).max(-1)
        return token, logp
    probs = logits.softmax(-1)
    size = next(size for size in range(512, 0, -1) if probs.shape[1] % size == 0)
    blocks = probs.unflatten(1, (-1, size))
    sums = blocks.sum(-1)
    block, uniform = pick(sums, uniform)
    place, _ = pick(blocks[torch.arange(len(block), device=block.device), block], uniform)
    token = block * size + place
    total = sums.sum(-1, dtype=torch.float64)  # 1, but for what softmax loses where it adds 150,000 up in float32
    return token, (probs.gather(1, token[:, None])[:, 0] / total).log().float()


def pick(weights, uniform):
    """Indices (B,) in weights (B, N) that uniform (B,) points at, and where within each, again in [0, 1)."""
    ends = weights.cumsum(-1, dtype=torch.float64)
    target = uniform[:, None] * ends[:, -1:]
    index = torch.searchsorted(ends, target, right=True).clamp_(max=weights.shape[1] - 1)  # if they are no numbers
    size = weights.gather(1, index)
    inside = (target - ends.gather(1, index) + size) / size
    return index[:, 0], inside[:, 0].clamp(0, 1 - 2**-52)  # rounding must not lead to what has no weight


# ------------------------------------------------------------------------------------------------- batches

def pack(samples: list[dict]) -> list[torch.Tensor]:
    """Samples as B ragged rows: tokens (N,), prompt_lens (B,), completion_lens (B,)."""
    tokens = torch.cat([part for sample in samples for part in (sample["prompt"], sample["completion"])])
    lens = torch.tensor([[len(sample["prompt"]), len(sample["completion"])] for sample in samples]).T
    return [tokens, *lens]


def micro_batches(rows: list, budget: int) -> list[list]:
    """Rows, each a dict with its `length`, in batches of similar length, longest first.

    Rows x longest length is at most `budget`, but a longer row makes a batch by itself.
    """
    batches = []
    for row in sorted(rows, key=lambda row: -row["length"]):
        if not batches or batches[-1][0]["length"] * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(row)
    return batches
