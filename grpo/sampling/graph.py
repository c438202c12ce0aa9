"""A CUDA graph as the sampler: `SAMPLER="graph"`, for GPUs, where Python between two tokens costs more than the tokens.

A decode step launches hundreds of small kernels, and a GPU waits for most of them. Here a step has fixed shapes and
reads no value back, so that the GPU records it once and repeats it, until the room in the cache is full or half of the
completions have ended. Then these leave, the others get twice the room, and the step is recorded again. The random
numbers are those of `transformers.decode`, and so are the completions, to rounding. Without CUDA the steps are computed
one by one.
"""
import torch
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from grpo.attention import RoomyLayer, additive
from grpo.sampling.transformers import BLOCK, Written, draw, prefill


class FixedLayer(DynamicLayer):
    """A layer's keys and values (B, heads, T, D), which do not grow by themselves; `place` (1,) is the next token's."""

    def __init__(self, layer: RoomyLayer):
        super().__init__()
        self.keys, self.values = layer.keys[:, :, : layer.tokens], layer.values[:, :, : layer.tokens]
        self.is_initialized, self.place = True, None

    def update(self, keys, values, *_, **__):
        self.keys.index_copy_(2, self.place, keys)
        self.values.index_copy_(2, self.place, values)
        return self.keys, self.values


def obstacle(model) -> str:
    """Why a graph cannot decode this model: what it would need. Empty if it can."""
    if model.config._attn_implementation != "packed":
        return "a model whose attention transformers lets others compute"
    if any(name.endswith("experts") for name, _ in model.named_modules()):
        return "a model without experts, whose choice is a value"
    if not all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return "a model with full attention in every layer"
    kinds = " ".join(str(getattr(module, "rope_type", "")) for module in model.modules())
    if "dynamic" in kinds or "longrope" in kinds:
        return "rotary embeddings that do not depend on the largest position, as dynamic ones and longrope do"
    return ""


newest = None  # the CUDA graph that was recorded last; its memory serves the next one too
side = None  # the stream on which graphs are recorded; another one each time would have workspaces of its own


def record(step):
    """The step as a CUDA graph: a function that repeats it.

    Like `torch.cuda.graph`, but it keeps the allocator's cache while the GPU has room, because training would have to
    allocate that memory again. In a recording the allocator cannot free what it has cached.
    """
    global newest, side
    free, total = torch.cuda.mem_get_info()
    if free < total / 10:
        torch.cuda.empty_cache()
    graph, side = torch.cuda.CUDAGraph(), side or torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.capture_begin(newest and newest.pool(), capture_error_mode="thread_local")
        try:
            step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    newest = graph
    return graph.replay


@torch.no_grad()
def decode(model, prompts, group_size, max_tokens, stop, temperature, min_tokens, uniforms):
    """As `transformers.decode`. SystemExit if the model needs something that a graph cannot repeat, see `obstacle`."""
    if reason := obstacle(model):
        raise SystemExit(f"SAMPLER=graph wants {reason}: use SAMPLER=transformers")
    logits, mask, position, cache = prefill(model, prompts, group_size, max_tokens)
    cache.layers = [FixedLayer(layer) for layer in cache.layers]
    device, longest = model.device, mask.shape[1] - max_tokens
    stop = torch.tensor(stop, device=device)
    uniforms = uniforms.to(device) if temperature else None
    written = Written(prompts, group_size, max_tokens, device)
    rows = torch.arange(len(logits), device=device)  # the sequences that are still being written

    def step():
        scores = logits.float() / (temperature or 1)
        scores[:, stop] -= 1e30 * (start + place < min_tokens - 1)
        token, logp = draw(scores, uniform.index_select(1, place)[:, 0] if temperature else None)
        drawn.index_copy_(1, place, token[:, None])
        drawn_logps.index_copy_(1, place, logp[:, None])
        here = longest + start + place
        for layer in cache.layers:
            layer.place = here
        logits.copy_(model(input_ids=token[:, None], attention_mask=additive(seen & (columns <= here), model.dtype),
                           position_ids=position.index_select(1, here), past_key_values=cache).logits[:, -1])
        place.add_(1)

    count, live = 0, rows  # tokens of each completion so far
    while len(live) and count < max_tokens:
        start, room = count, min(max(BLOCK, count), max_tokens - count)
        for layer in cache.layers:
            layer.keys, layer.values = (functional.pad(old[:, :, : longest + start], (0, 0, 0, room))
                                        for old in (layer.keys, layer.values))
        seen = mask[:, : longest + start + room] > 0
        columns, place = torch.arange(seen.shape[1], device=device), torch.zeros(1, dtype=torch.long, device=device)
        uniform = uniforms[rows, start : start + room] if temperature else None
        drawn, drawn_logps = (part[rows, start : start + room] for part in (written.tokens, written.logps))
        again, live = step, rows
        while count < start + room and 2 * len(live) > len(rows):
            for _ in range(min(BLOCK, start + room - count)):
                again()
                count += 1
                if again is step and device.type == "cuda" and room > 1:
                    again = record(step)  # after a first step, which compiles and allocates what a recording cannot
            written.tokens[rows, start : start + room] = drawn
            written.logps[rows, start : start + room] = drawn_logps
            stops = torch.isin(drawn[:, : count - start], stop)
            stopped = stops.any(1)
            written.lengths[rows[stopped]] = start + 1 + stops[stopped].int().argmax(1)
            written.ended[rows[stopped]] = True
            live = rows[~stopped] if count < max_tokens else rows[:0]
            yield written.finished(live)
        going = (~stopped).nonzero()[:, 0]
        cache.batch_select_indices(going)
        rows, logits, mask, position = rows[going], logits[going], mask[going], position[going]
