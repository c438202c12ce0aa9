"""Completions of prompts, by the policy's own modules in transformers: the default sampler.

    completions = sample(model, [row["ids"] for row in rows], group_size, ...)

A prompt is prefilled once for its whole group, a finished sequence leaves the batch (on a GPU within 8 tokens), and
each token's log-prob under the sampling policy comes along at no extra forward pass. Random numbers belong to the
prompt's seed, not to the batch: it gets the same completions however the prompts are spread over processes.

On a CPU a decode step takes as long in Python as in its operations: `next_logits` records these and repeats them.
"""
import warnings
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from grpo import attention
from grpo.attention import RoomyLayer, additive, select_rows
from grpo.types import Completion

MAX_SEQUENCES = 512  # decoded at a time; more are taken one slice after the other
BLOCK = 64  # tokens from one look for groups that are finished to the next
LOOK_EVERY = 8  # on an accelerator, tokens between two looks for ended completions: a look makes Python wait for it
recorded = WeakKeyDictionary()  # of each model a decode step, see `next_logits`


def rollouts(model, prompts: list[list[int]], group_size: int, *, max_tokens: int, stop: list[int],
             temperature: float = 1.0, min_tokens: int = 0, seeds: list[int] | None = None, decoder=None):
    """Yields groups of `group_size` completions, {place of the prompt: its completions}, those that have been finished
    since the last time, after every BLOCK tokens; temperature 0 is greedy and needs no `seeds`.

    No completion ends before `min_tokens` tokens. The model is in eval mode meanwhile: dropout is not part of the
    policy. `decoder` may be another one than `decode`.
    """
    was_training = model.training
    model.eval()
    step = max(1, MAX_SEQUENCES // group_size)
    for start in range(0, len(prompts), step):
        some = slice(start, start + step)
        uniforms = torch.cat([
            torch.rand(group_size, max_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in seeds[some]]) if temperature else None
        for decoded in filter(None, (decoder or decode)(
                model, prompts[some], group_size, max_tokens, stop, temperature, min_tokens, uniforms)):
            yield {start + place: [Completion(c.tokens.clone(), c.logps.clone(), c.ended) for c in group]
                   for place, group in decoded.items()}  # copies, which are fit for autograd
    model.train(was_training)


def sample(*arguments, **options) -> list[Completion]:
    """All completions of `rollouts`, group after group in the order of the prompts."""
    return in_order(rollouts(*arguments, **options))


def in_order(groups) -> list[Completion]:
    found = dict(pair for finished in groups for pair in finished.items())
    return [completion for place in sorted(found) for completion in found[place]]


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


# ------------------------------------------------------------------------------------------------- a step on a CPU

class LongerLayer(DynamicLayer):
    """A layer's keys and values (B, heads, T, D), of which the last token is to be written."""

    def __init__(self, keys, values):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, keys, values, *_, **__):
        self.keys[:, :, -1:], self.values[:, :, -1:] = keys, values
        return self.keys, self.values


class Step(torch.nn.Module):
    """A decode step as a function of tensors alone: token (B,), mask (B, 1, 1, T), see `additive`, position (B, 1) and
    each layer's keys and values to logits (B, V)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, token, mask, position, *states):
        cache = DynamicCache()
        cache.layers = [LongerLayer(keys, values) for keys, values in zip(states[::2], states[1::2])]
        return self.model(input_ids=token[:, None], attention_mask=mask, position_ids=position,
                          past_key_values=cache).logits[:, -1]


def next_logits(model, token, mask, position, cache) -> torch.Tensor:
    """Logits (B, V) after one more token (B,) of each row; mask (B, T) and position (B, 1) include it, `cache` will.

    On a CPU the model's operations are recorded once (by TorchScript) and repeated, for any B and T. They write to the
    cache's own tensors and read the parameters as they are now.
    """
    ordinary = model.config._attn_implementation == "packed" and all(type(c) is RoomyLayer for c in cache.layers)
    if ordinary:
        mask = additive(mask, model.dtype)
    if token.device.type != "cpu" or not ordinary:
        return model(input_ids=token[:, None], attention_mask=mask, position_ids=position,
                     past_key_values=cache).logits[:, -1]
    inputs = token, mask, position, *(state for layer in cache.layers for state in layer.longer(1))
    if model not in recorded:
        recorded[model] = record(Step(model), inputs)
    with torch.jit.optimized_execution(False):  # it would look for the best way for each T anew
        return (Step(model) if recorded[model] is None else recorded[model])(*inputs)


def record(step: Step, inputs):
    """The step as TorchScript; None if what it does depends on values, as the choice of an expert may."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            script = torch.jit.trace(step, inputs, check_trace=False)
        except ValueError:  # tracing refuses a model that holds one buffer twice, as longrope does
            return None
    about_shapes = __file__, attention.__file__, functional.__file__  # one token a row: always right
    doubts = [w for w in warned if w.category is torch.jit.TracerWarning and w.filename not in about_shapes]
    return None if doubts else script
