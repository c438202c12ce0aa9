"""A CUDA graph as the sampler: `SAMPLER="graph"`, for GPUs, where Python between two tokens costs more than the tokens.

    completions = sample(model, prompts, group_size, ..., decoder=graph_sampler.decode)

A decode step launches hundreds of small kernels, and a GPU waits for most of them. Here a step has fixed shapes and
reads no value back, so that the GPU records it once and repeats it. That holds for BLOCK tokens; then completions that
have ended leave, the cache gets room for the next ones, and the step is recorded again. The random numbers are those of
`sampler.decode`, and so are the completions, to rounding. Without CUDA the steps are computed one by one.
"""
import torch
from torch.nn import functional
from transformers.cache_utils import DynamicLayer

from layers import RoomyLayer, additive
from sampler import BLOCK, blank, draw, finished, prefill


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


newest = None  # the CUDA graph that was recorded last; its memory serves the next one too
side = None  # the stream on which graphs are recorded; another one each time would have workspaces of its own


def record(step):
    """The step as a CUDA graph: a function that repeats it.

    As `torch.cuda.graph`, which empties the allocator's cache each time, and training would have to ask for it again.
    """
    global newest, side
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


@torch.inference_mode()
def decode(model, prompts, group_size, max_tokens, stop, temperature, min_tokens, uniforms):
    """As `sampler.decode`. SystemExit if the model has layers with another cache than one of all tokens, or rotary
    embeddings that depend on the largest position: a graph cannot ask for it."""
    logits, mask, position, cache = prefill(model, prompts, group_size, max_tokens)
    if not all(type(layer) is RoomyLayer for layer in cache.layers):
        raise SystemExit("SAMPLER=graph wants a model with full attention in every layer: use SAMPLER=transformers")
    kinds = {str(getattr(module, "rope_type", "")) for module in model.modules()}
    if found := [kind for kind in kinds if "dynamic" in kind or "longrope" in kind]:
        raise SystemExit(f"SAMPLER=graph wants rotary embeddings that do not change with the length, MODEL has {found[0]}: "
                         "use SAMPLER=transformers")
    cache.layers = [FixedLayer(layer) for layer in cache.layers]
    device, longest = model.device, mask.shape[1] - max_tokens
    stop = torch.tensor(stop, device=device)
    uniforms = uniforms.to(device) if temperature else None
    written = tokens, logps, lengths, ended = blank(len(logits), max_tokens, device)
    rows, told = torch.arange(len(logits), device=device), set()  # the completions that are still being written

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

    for start in range(0, max_tokens, BLOCK):
        size = min(BLOCK, max_tokens - start)
        for layer in cache.layers:
            layer.keys, layer.values = (functional.pad(old, (0, 0, 0, size)) for old in (layer.keys, layer.values))
        seen = mask[:, : longest + start + size] > 0
        columns, place = torch.arange(seen.shape[1], device=device), torch.zeros(1, dtype=torch.long, device=device)
        uniform = uniforms[rows, start : start + size] if temperature else None
        drawn, drawn_logps = tokens[rows, start : start + size], logps[rows, start : start + size]
        step()  # also prepares what must not be prepared while a graph is recorded
        again = record(step) if device.type == "cuda" and size > 1 else step
        for _ in range(size - 1):
            again()

        tokens[rows, start : start + size], logps[rows, start : start + size] = drawn, drawn_logps
        stops = torch.isin(drawn, stop)
        stopped = stops.any(1)
        live = (~stopped).nonzero()[:, 0]
        lengths[rows[stopped]], ended[rows[stopped]] = start + 1 + stops[stopped].int().argmax(1), True
        last = len(live) == 0 or start + size == max_tokens
        yield finished(written, group_size, rows[:0] if last else rows[live], told)
        if last:
            break
        cache.batch_select_indices(live)
        rows, logits, mask, position = rows[live], logits[live], mask[live], position[live]
