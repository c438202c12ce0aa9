"""Samples of prompts, by the policy's own modules in transformers: the default on a CPU.

A prompt is prefilled once for its whole group, a finished sequence leaves the batch (on a GPU within 8 tokens), and
each token's log-prob comes along at no extra forward pass. The random numbers belong to the prompt's seed, not to the
batch: a prompt gets the same samples however the prompts are spread over processes.
"""
import torch
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from grpo.attention import RoomyLayer, select_rows
from grpo.sampling.script import next_logits
from grpo.types import Group, Prompt, Sample

BLOCK = 64  # tokens from one look for finished groups to the next
LOOK_EVERY = 8  # on an accelerator, tokens between two looks for ended sequences: a look makes Python wait for it


class Written:
    """What B = prompts x group_size sequences have written so far."""

    def __init__(self, prompts: list[Prompt], group_size: int, max_tokens: int, device):
        count = len(prompts) * group_size
        self.prompts, self.group_size, self.handed_out = prompts, group_size, set()
        self.tokens = torch.zeros(count, max_tokens, dtype=torch.long, device=device)
        self.logps = torch.zeros(count, max_tokens, device=device)
        self.lengths = torch.full((count,), max_tokens, device=device)
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)

    def finished(self, rows) -> list[Group]:
        """The groups that were finished since the last call; of the others `rows` (B,) are still being written."""
        writing, groups = set((rows // self.group_size).tolist()), []
        for place, prompt in enumerate(self.prompts):
            if place not in writing | self.handed_out:
                self.handed_out.add(place)
                mine = slice(place * self.group_size, (place + 1) * self.group_size)
                parts = (part[mine].cpu() for part in (self.tokens, self.logps, self.lengths, self.ended))
                groups.append(Group(prompt, [
                    Sample(prompt, tokens[:length].clone(), logps[:length].clone(), bool(ended))
                    for tokens, logps, length, ended in zip(*parts)]))
        return groups


@torch.no_grad()
def decode(model, prompts, group_size, max_tokens, stop, temperature, min_tokens, uniforms):
    """Yields lists of finished groups, perhaps empty; uniforms (B, max_tokens) in [0, 1), B = prompts x group_size.

    At temperature 0 it is greedy and needs none. No sample ends, with one of the `stop` ids, before `min_tokens`.
    """
    logits, mask, position, cache = prefill(model, prompts, group_size, max_tokens)
    device, longest = model.device, mask.shape[1] - max_tokens
    stop, look = torch.tensor(stop, device=device), LOOK_EVERY if device.type != "cpu" else 1
    written = Written(prompts, group_size, max_tokens, device)
    rows = torch.arange(len(logits), device=device)  # the sequences that are still being written
    uniforms = uniforms.to(device) if temperature else None
    for t in range(max_tokens):
        logits = logits.float().div_(temperature or 1)
        if t < min_tokens - 1:
            logits[:, stop] = -torch.inf
        token, logp = draw(logits, uniforms[rows, t] if temperature else None)  # eq. 3: o ~ pi_old
        written.tokens[rows, t], written.logps[rows, t] = token, logp
        stopped = torch.isin(token, stop) & ~written.ended[rows]
        written.lengths[rows] = torch.where(stopped, t + 1, written.lengths[rows])
        written.ended[rows] |= stopped
        if t % look == look - 1 and (gone := written.ended[rows]).any():
            live = (~gone).nonzero()[:, 0]
            going = torch.arange(len(live), device=device)  # the last rows take the places of those that ended
            going[gone[: len(live)]] = live[live >= len(live)]
            select_rows(cache, going)
            rows, token, mask, position = rows[going], token[going], mask[going], position[going]
        last = len(rows) == 0 or t == max_tokens - 1
        if last or t % BLOCK == BLOCK - 1:
            yield written.finished(rows[:0] if last else rows)
        if last:
            break
        end = longest + t + 1
        logits = next_logits(model, token, mask[:, :end], position[:, end - 1 : end], cache)


def padded(prompts, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (prompts, L), padded on the left."""
    longest = max(len(prompt.ids) for prompt in prompts)
    gaps = [longest - len(prompt.ids) for prompt in prompts]
    ids = torch.tensor([[0] * gap + prompt.ids for gap, prompt in zip(gaps, prompts)], device=device)
    return ids, (torch.arange(longest, device=device) >= torch.tensor(gaps, device=device)[:, None]).long()


def prefill(model, prompts, group_size, max_tokens):
    """Logits (B, V) after the prompts, mask and position (B, L + max_tokens) of all tokens, and the cache of L."""
    ids, mask = padded(prompts, model.device)
    longest, mask = ids.shape[1], functional.pad(mask, (0, max_tokens), value=1)
    position = mask.cumsum(1).sub(1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    logits = model(input_ids=ids, attention_mask=mask[:, :longest], position_ids=position[:, :longest],
                   past_key_values=cache, logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(group_size)
    return *(tensor.repeat_interleave(group_size, 0) for tensor in (logits, mask, position)), cache


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
