"""What GRPO can do with less work than a general trainer: attention, its cache, a decode step, the LM head.

The rows of a batch differ in length, and those of a group begin with the same prompt. As a rectangle, half of what the
linear layers compute could be padding and prompts again. So the model is given every token once, as one long row, and
only inside attention they are rows again: `layout` says where. transformers calls `attention` in every layer.

Of the LM head GRPO needs one number for each token of a completion: `HeadLogps` never holds all the logits.

On a CPU a decode step takes as long in Python as in its operations: `next_logits` records these and repeats them.
"""
import inspect
import sys
import warnings
from functools import lru_cache
from types import MethodType
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaMLP

recorded = WeakKeyDictionary()  # of each model a decode step, see `next_logits`
SIMILAR = 0.7  # attention pads rows to the longest of those that are at least so long, relative to the first


class Layout(NamedTuple):
    """Which tokens of the rows are computed, N in all, and where attention finds them."""
    computed: torch.Tensor  # (B, L) bool: of equal prompts only the first
    number: torch.Tensor  # (B, L): a token's place among those computed
    parts: list[torch.Tensor]  # `number`, cut into rows of similar length, without most of the padding
    places: torch.Tensor  # (N,): where the parts, flattened, have each computed token


def layout(rows, prompt_lens, lens) -> Layout:
    """For rows (B, L) of so many tokens (B,), of which so many are the prompt; at its best with the longest first."""
    position = torch.arange(rows.shape[1], device=rows.device)
    is_prompt, first = position < prompt_lens[:, None], {}
    owner = [first.setdefault(tuple(row[:n]), i) for i, (row, n) in enumerate(zip(rows.tolist(), prompt_lens.tolist()))]
    owner = torch.tensor(owner, device=rows.device)  # (B,), the row where a row's prompt is computed
    is_first = owner == torch.arange(len(rows), device=rows.device)
    computed = (position < lens[:, None]) & (~is_prompt | is_first[:, None])
    number = computed.flatten().cumsum(0).view_as(rows) - 1
    number = torch.where(is_prompt, number[owner], number)

    lens, cuts = lens.tolist(), [0]
    for row, length in enumerate(lens):
        if length < SIMILAR * lens[cuts[-1]]:
            cuts.append(row)
    parts = [(slice(start, end), slice(max(lens[start:end]))) for start, end in zip(cuts, [*cuts[1:], len(lens)])]
    places = torch.cat([computed[part].flatten() for part in parts]).nonzero()[:, 0]
    return Layout(computed, number, [number[part] for part in parts], places)


def attention(module, query, key, value, attention_mask, layout=None, sliding_window=None, **options):
    """As transformers calls it: query (B, heads, T, D), key and value (B, key heads, S, D) -> ((B, T, heads, D), None).

    With a `layout` B is 1, and T = S are the tokens that are computed, of all rows.
    """
    if layout is not None:
        flat = [tensor[0].transpose(0, 1).flatten(1) for tensor in (query, key, value)]  # (N, heads x D)
        packed, widths, outputs = torch.cat(flat, 1), [tensor.shape[1] for tensor in flat], []
        for part in layout.parts:  # (rows, length)
            # An embedding's backward pass sums the gradients of a shared token in a fixed order, on a GPU too. It sorts
            # the places for that, so query, key and value are taken at once.
            found = functional.embedding(part, packed).split(widths, 2)
            states = [tensor.unflatten(2, (like.shape[1], -1)).transpose(1, 2)  # (rows, heads, length, D)
                      for tensor, like in zip(found, (query, key, value))]
            mask, length = None, part.shape[1]  # a causal model never looks at the padding, which is on the right
            if sliding_window and length > sliding_window:
                position = torch.arange(length, device=part.device)
                distance = position[:, None] - position
                mask = ((0 <= distance) & (distance < sliding_window))[None, None]
            output, _ = sdpa_attention_forward(module, *states, mask, **options)
            outputs.append(output.flatten(2).flatten(0, 1))
        output = torch.cat(outputs).index_select(0, layout.places)  # none twice, so here nothing has to be sorted
        return output.unflatten(1, (query.shape[1], -1))[None], None
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    # One new token for each row: heads with the same keys are as good as several queries, and no key is copied.
    query = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    output = functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=options["scaling"])
    return output.flatten(1, 2)[:, None], None


def pack_attention(model) -> None:
    """From now on `model` attends as above, if nothing but ordinary attention lets its tokens see each other."""
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    ordinary = model._supports_attention_backend and not model._is_stateful
    if ordinary and model.config._attn_implementation == "sdpa" and layers <= {"full_attention", "sliding_attention"}:
        model.set_attn_implementation("packed")


@lru_cache
def compiled(function):
    """A function of tensors as one kernel of a GPU, not one for each of its operations."""
    return torch.compile(function, dynamic=True)


def rms_norm(norm, hidden):
    return functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def gate(gates, values):
    return functional.silu(gates) * values


def gated_mlp(mlp, hidden):
    return mlp.down_proj(compiled(gate)(mlp.gate_proj(hidden), mlp.up_proj(hidden)))


def fuse(model) -> None:
    """For a GPU: from now on `model`, and others of its file in transformers, take one kernel instead of five to ten
    for RMS norms (where the formula is the same: that of Gemma multiplies by 1 + weight), for the gate of an MLP that
    is written as Llama's, and for rotary embeddings."""
    like_llama = inspect.getsource(LlamaMLP.forward)
    for module in model.modules():
        kind = type(module)
        if kind.__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = MethodType(rms_norm, module)
        if kind.__name__.endswith("MLP") and "SiLU" in type(getattr(module, "act_fn", None)).__name__ and (
                inspect.getsource(kind.forward) == like_llama):
            module.forward = MethodType(gated_mlp, module)
    file = sys.modules[type(model).__module__]
    rotary = getattr(file, "apply_rotary_pos_emb", None)
    if rotary and not hasattr(rotary, "_torchdynamo_orig_callable"):
        file.apply_rotary_pos_emb = compiled(rotary)


AttentionInterface.register("packed", attention)
AttentionMaskInterface.register("packed", sdpa_mask)


class RoomyLayer(DynamicLayer):
    """A layer's keys and values (B, heads, T, D) with room for more tokens: another token does not copy all of them."""
    tokens, block = 0, 64

    def get_seq_length(self) -> int:
        return self.tokens

    def update(self, keys, values, *_, **__):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        states = self.longer(keys.shape[2])
        for state, new in zip(states, (keys, values)):
            state[:, :, -keys.shape[2] :] = new
        return states

    def longer(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values with `count` more tokens at their end, which are still to be written."""
        self.tokens += count
        if (missing := self.tokens - self.keys.shape[2]) > 0:
            self.keys, self.values = (functional.pad(tensor, (0, 0, 0, missing + self.block))
                                      for tensor in (self.keys, self.values))
        return self.keys[:, :, : self.tokens], self.values[:, :, : self.tokens]


def select_rows(cache, rows) -> None:
    """Of the cache's rows only these (B,), in this order. A RoomyLayer copies none that keeps its place."""
    moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
    source = rows[moved]
    for layer in cache.layers:
        if type(layer) is RoomyLayer:
            for states in layer.keys, layer.values:
                states[moved] = states[source]
            layer.keys, layer.values = layer.keys[: len(rows)], layer.values[: len(rows)]
        else:
            layer.batch_select_indices(rows)


def additive(mask, dtype) -> torch.Tensor:
    """A mask (B, T) as attention adds it to its scores, (B, 1, 1, T): 0 or -inf. Else every layer would make it anew;
    rows start at multiples of 8 numbers, or every layer would copy it on a GPU."""
    room = torch.zeros(len(mask), 1, 1, -(-mask.shape[1] // 8) * 8, dtype=dtype, device=mask.device)
    return room[..., : mask.shape[1]].masked_fill_(mask[:, None, None] == 0, -torch.inf)


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
        except ValueError:  # the model holds a buffer twice, as longrope does, which it also reads values for
            return None
    about_shapes = __file__, functional.__file__  # one token a row, so many entries of the vocabulary: always right
    doubts = [w for w in warned if w.category is torch.jit.TracerWarning and w.filename not in about_shapes]
    return None if doubts else script


class UsedTwice(torch.autograd.Function):
    """An embedding (V, H) that is the LM head too: one for the head, one for the body. The body's gradient, of few
    tokens, is added to the head's, in the order of a dense one; another (V, H) would be the peak of the memory."""

    @staticmethod
    def forward(ctx, weight):
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad_head, grad_body):
        tokens, place = grad_body._indices()[0].unique(return_inverse=True)
        sums = torch.ops.aten.embedding_dense_backward(grad_body._values(), place, len(tokens), -1, False)
        return grad_head.index_add_(0, tokens, sums)


def tied(model) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """An embedding that is trained, and is the LM head too: itself for the head, and by its name for the body's call.

    Nothing for other models, and with ZeRO 3, where a module's parameters are there only while it is at work.
    """
    weight = next(model.get_output_embeddings().parameters())
    trained = torch.is_grad_enabled() and weight.requires_grad and not hasattr(weight, "ds_id")
    for name, parameter in model.base_model.named_parameters() if trained else ():
        if parameter is weight:
            model.get_input_embeddings().sparse = True  # its gradient
            for_head, for_body = UsedTwice.apply(weight)
            return for_head, {name: for_body}
    return None, {}


def log_total(logits, scale):
    return torch.logsumexp(scale * logits, 1)


def head_error(logits, total, place, scale, cap, dtype):
    """What `HeadLogps.backward` computes in place for a CPU, where passes over what is in its cache cost little."""
    hit = torch.arange(logits.shape[1], device=logits.device) == place[:, None]
    error = (scale * logits - total[:, None]).exp() - hit.float()
    return (error * (1 - (logits / cap).square()) if cap else error).to(dtype)


class HeadLogps(torch.autograd.Function):
    """Log-probs (C,) of `targets` (C,) after hidden (C, H), by the LM head: weight (V, H), bias (V,) or None.

    A tile of the vocabulary at a time, in the backward pass again, so that of the logits (C, V) only a tile is ever
    alive, and in the CPU's cache. Everything but the products of matrices is in float32, whatever the weights are in.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, cap, logits_per_tile):
        ctx.save_for_backward(hidden, weight, bias, targets)
        multiple = 128 if hidden.is_cuda else 1  # the fast kernels of a GPU take no other numbers of columns
        tile_size = logits_per_tile // max(1, len(hidden)) // multiple * multiple
        ctx.scale, ctx.cap, ctx.tile_size = scale, cap, max(multiple, tile_size)
        logps = hidden.new_zeros(len(hidden), dtype=torch.float32)
        ctx.total = logps - torch.inf  # log of the sum of exp(scale * logits)
        for _, logits, place, inside in HeadLogps.tiles(ctx, hidden, weight, bias, targets):
            logps += scale * logits.gather(1, place)[:, 0] * inside
            if hidden.is_cuda:
                ctx.total = ctx.total.logaddexp(compiled(log_total)(logits, scale))
                continue
            top = scale * logits.amax(1)
            logits = torch.add(-top[:, None], logits, alpha=scale, out=logits)
            ctx.total = ctx.total.logaddexp(logits.exp_().sum(1).log() + top)
        return logps - ctx.total

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, targets = ctx.saved_tensors
        grad = -ctx.scale * grad[:, None]
        # A factor that all logits of a row share is multiplied in at the ends, not in a pass over the logits.
        scaled, grad_hidden = (grad * hidden).to(hidden.dtype), torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight, grad_bias = (torch.empty_like(tensor) if needed else None
                                  for tensor, needed in zip((weight, bias), ctx.needs_input_grad[1:3]))
        for tile, logits, place, inside in HeadLogps.tiles(ctx, hidden, weight, bias, targets):
            if hidden.is_cuda:
                where = torch.where(inside, place[:, 0], -1)
                error = compiled(head_error)(logits, ctx.total, where, ctx.scale, ctx.cap, hidden.dtype)
            else:
                slope = 1 - (logits / ctx.cap).square() if ctx.cap else None
                probs = torch.add(-ctx.total[:, None], logits, alpha=ctx.scale, out=logits).exp_()
                error = probs.scatter_add_(1, place, -inside[:, None].float())
                if ctx.cap:
                    error *= slope
            rounded = error.to(hidden.dtype)
            grad_hidden += rounded @ weight[tile]
            if grad_weight is not None:
                torch.mm(rounded.T, scaled, out=grad_weight[tile])
            if grad_bias is not None:
                grad_bias[tile] = grad[:, 0] @ error.float()
        return (grad * grad_hidden).to(hidden.dtype), grad_weight, grad_bias, None, None, None, None

    @staticmethod
    def tiles(ctx, hidden, weight, bias, targets):
        """For each tile of the vocabulary: its slice, its logits (C, tile) before `scale`, and where among them each
        target is, (C, 1), if it is inside, (C,)."""
        for start in range(0, len(weight), ctx.tile_size):
            tile = slice(start, start + ctx.tile_size)
            if hidden.is_cuda and hidden.dtype == torch.bfloat16:  # not rounded to bfloat16; a CPU cannot do that
                logits = torch.mm(hidden, weight[tile].T, out_dtype=torch.float32)
                logits = logits if bias is None else logits.add_(bias[tile])
            else:
                logits = functional.linear(hidden, weight[tile], None if bias is None else bias[tile]).float()
            if ctx.cap:
                logits = ctx.cap * torch.tanh(logits / ctx.cap)
            place = targets - start
            inside = (0 <= place) & (place < logits.shape[1])
            yield tile, logits, place.clamp(0, logits.shape[1] - 1)[:, None], inside
