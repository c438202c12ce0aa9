"""Samples of prompts, by the policy's own modules in transformers and a decoding loop of our own: the default.

What prompts begin with is computed once, a prompt once for its whole group; finished sequences leave the batch; each
token's log-prob comes along at no extra forward pass. The random numbers belong to the prompt's seed, not to the batch:
a prompt gets the same samples however the prompts are spread over processes.
"""
import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from grpo.attention import layout
from grpo.sampling.step import masks, next_logits, windows
from grpo.types import Group, Prompt, Sample

BLOCK = 64  # tokens from one look for finished groups to the next, and the cache's first room; later rooms double it
ROOM = 256  # the first room of a recorded step: recording takes as long as a dozen of its repetitions
LOOK_EVERY = 8  # on an accelerator, tokens between two looks for ended sequences: a look makes Python wait for it


class Written:
    """What B = prompts x group_size sequences have written so far; they end with one of the `stop` ids."""

    def __init__(self, prompts: list[Prompt], group_size: int, max_tokens: int, stop: list[int], device):
        count = len(prompts) * group_size
        self.prompts, self.group_size, self.handed_out = prompts, group_size, set()
        self.stop = torch.tensor(stop, dtype=torch.long, device=device)
        self.tokens = torch.zeros(count, max_tokens, dtype=torch.long, device=device)
        self.logps = torch.zeros(count, max_tokens, device=device)
        self.lengths = torch.full((count,), max_tokens, device=device)
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)

    def add(self, rows, start: int, tokens, logps) -> None:
        """The tokens (rows, T), from `start` on, of some of the sequences. What follows a stop does not count."""
        self.tokens[rows, start : start + tokens.shape[1]] = tokens
        self.logps[rows, start : start + tokens.shape[1]] = logps
        stops = torch.isin(tokens, self.stop)
        stopped = stops.any(1) & ~self.ended[rows]
        first = start + 1 + stops.int().argmax(1)
        self.lengths[rows] = torch.where(stopped, first, self.lengths[rows])
        self.ended[rows] |= stopped

    def finished(self, writing) -> list[Group]:
        """The groups that were finished since the last call; sequences of the others are still being written."""
        unfinished, groups = set((writing // self.group_size).tolist()), []
        for place, prompt in enumerate(self.prompts):
            if place not in unfinished | self.handed_out:
                self.handed_out.add(place)
                mine = slice(place * self.group_size, (place + 1) * self.group_size)
                parts = (part[mine].cpu() for part in (self.tokens, self.logps, self.lengths, self.ended))
                groups.append(Group(prompt, [
                    Sample(prompt, tokens[:length].clone(), logps[:length].clone(), bool(ended))
                    for tokens, logps, length, ended in zip(*parts)]))
        return groups


@torch.no_grad()
def decode(model, prompts, group_size, max_tokens, stop, temperature, min_tokens, uniforms, record=None):
    """Yields lists of finished groups, perhaps empty; uniforms (B, max_tokens) in [0, 1), B = prompts x group_size.

    At temperature 0 it is greedy and needs none. No sample ends, with one of the `stop` ids, before `min_tokens`.
    A step reads no value. With `record` its shapes are fixed too, so that it can become a CUDA graph, see `graph.py`;
    without, it sees one more token of the cache each time. When the room in the cache is full, or too many sequences
    have ended, these leave, and the others get more room.
    """
    device, waits = model.device, record or model.device.type != "cpu"  # Python for the device, when it reads a value
    logits, mask, position, states = prefill(model, prompts, max_tokens)
    longest, limits = mask.shape[1] - max_tokens, windows(model).values()
    written = Written(prompts, group_size, max_tokens, stop, device)
    rows = torch.arange(len(prompts) * group_size, device=device)  # the sequences that are in the batch
    uniforms = uniforms.to(device) if temperature else None

    def next_token():  # of each row; start, room, place, uniform, tokens, logps, mask, ... are those of the loop below
        scores = logits.float() / (temperature or 1)
        scores[:, written.stop] -= 1e30 * (start + place < min_tokens - 1)
        token, logp = draw(scores, uniform.index_select(1, place)[:, 0] if temperature else None)  # eq. 3: o ~ pi_old
        tokens.index_copy_(1, place, token[:, None])
        logps.index_copy_(1, place, logp[:, None])
        here, end = longest + start + place, longest + (start + room if record else count + 1)
        if record or count + 1 < max_tokens:
            seen = masks(limits, model.dtype, mask[:, :end], here)
            logits.copy_(next_logits(model, token, position.index_select(1, here), here, seen,
                                     *(state[:, :, :end] for state in states)))
        place.add_(1)

    # tokens of each so far, and where to find each row: at first the prompts, then the batch before
    count, places = 0, rows // group_size
    while len(rows) and count < max_tokens:
        start, room, live = count, min(max(ROOM if record else BLOCK, count), max_tokens - count), rows
        logits, mask, position = (tensor[places] for tensor in (logits, mask, position))
        for layer, state in enumerate(states):  # one after the other, because together they are twice the memory
            states[layer] = functional.pad(state[places, :, : longest + count], (0, 0, 0, room))
        tokens = torch.zeros(len(rows), room, dtype=torch.long, device=device)
        logps, place = torch.zeros(len(rows), room, device=device), torch.zeros(1, dtype=torch.long, device=device)
        uniform = uniforms[rows, start : start + room] if temperature else None
        again, look, enough = next_token, LOOK_EVERY if waits else 1, 1 / 2 if waits else 7 / 8
        while count < start + room and len(live) > enough * len(rows):
            new = slice(count - start, min(count - start + look, room))
            for _ in range(new.start, new.stop):
                again()
                count += 1
                if record and again is next_token and room > 1:
                    again = record(next_token)  # after one that compiles and allocates what a recording cannot
            written.add(rows, start + new.start, tokens[:, new], logps[:, new])
            live = rows[~written.ended[rows]] if count < max_tokens else rows[:0]
            if count % BLOCK == 0 or not len(live):
                yield written.finished(live)
        places = (~written.ended[rows]).nonzero()[:, 0]
        rows = rows[places]


def prefill(model, prompts, max_tokens):
    """Logits (P, V) after the P prompts, mask and position (P, L + max_tokens) of all tokens, and of L tokens each
    layer's keys and values (P, heads, L, D); the prompts are padded on the left."""
    lens = torch.tensor([len(prompt.ids) for prompt in prompts]).to(model.device)
    rows = pad_sequence([torch.tensor(prompt.ids) for prompt in prompts], batch_first=True).to(model.device)
    where, longest = layout(rows, lens), rows.shape[1]
    cache = DynamicCache()  # all the keys, in layers with a sliding window too
    last = where.number.gather(1, lens[:, None] - 1)[:, 0]
    logits = model(**where.one_row(), past_key_values=cache, logits_to_keep=last).logits[0]
    position = torch.arange(longest + max_tokens, device=model.device) - (longest - lens)[:, None]  # all end at L
    mask, position = position >= 0, position.clamp(min=0)
    number, states = where.number.gather(1, position[:, :longest]), []
    while cache.layers:  # one after the other, because together they would be there twice
        layer = cache.layers.pop(0)
        states += [state[0][:, number].transpose(0, 1) for state in (layer.keys, layer.values)]
    return logits, mask, position, states


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
    block, uniform = at_quantile(sums, uniform)
    place, _ = at_quantile(blocks[torch.arange(len(block), device=block.device), block], uniform)
    token = block * size + place
    total = sums.sum(-1, dtype=torch.float64)  # 1, but for what softmax loses where it adds 150,000 up in float32
    return token, (probs.gather(1, token[:, None])[:, 0] / total).log().float()


def at_quantile(weights, uniform):
    """Indices (B,) in weights (B, N) that uniform (B,) points at, and where within each, again in [0, 1)."""
    ends = weights.cumsum(-1, dtype=torch.float64)
    target = uniform[:, None] * ends[:, -1:]
    index = torch.searchsorted(ends, target, right=True).clamp_(max=weights.shape[1] - 1)  # if they are no numbers
    size = weights.gather(1, index)
    inside = (target - ends.gather(1, index) + size) / size
    return index[:, 0], inside[:, 0].clamp(0, 1 - 2**-52)  # rounding must not lead to what has no weight
