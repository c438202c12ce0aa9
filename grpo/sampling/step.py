"""A decode step: the next logits of all sequences, as a function of tensors.

Python between two tokens costs more than the tokens. So a CPU records the step once, by TorchScript; a GPU, which
launches hundreds of small kernels for it, by a CUDA graph, see `graph.py`.
"""
import sys
import warnings
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer

from grpo import attention

traced = WeakKeyDictionary()  # each model's step on a CPU, see `next_logits`


class FixedLayer(DynamicLayer):
    """A layer's keys and values (B, heads, T, D), which do not grow by themselves; `place` (1,) is the next token's."""

    def __init__(self, keys, values, place):
        super().__init__()
        self.keys, self.values, self.place, self.is_initialized = keys, values, place, True

    def update(self, keys, values, *_, **__):
        self.keys.index_copy_(2, self.place, keys)
        self.values.index_copy_(2, self.place, values)
        return self.keys, self.values


def windows(model) -> dict[str, int]:
    """How far back each kind of the model's layers looks, in tokens."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    known = {"full_attention": sys.maxsize, "sliding_attention": window}
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    return {kind: known[kind] for kind in kinds}


class Step(torch.nn.Module):
    """token (B,), position (B, 1), place (1,) of this token in the cache, `masks`, and each layer's keys and values
    to logits (B, V)."""

    def __init__(self, model):
        super().__init__()
        self.model, self.kinds = model, windows(model)

    def forward(self, token, position, place, masks, *states):
        cache = DynamicCache()
        cache.layers = [FixedLayer(keys, values, place) for keys, values in zip(states[::2], states[1::2])]
        return self.model(
            input_ids=token[:, None], attention_mask=dict(zip(self.kinds, masks)) if len(masks) > 1 else masks[0],
            position_ids=position, past_key_values=cache).logits[:, -1]


def next_logits(model, *inputs) -> torch.Tensor:
    """What `Step` says. On a CPU its operations are recorded once and repeated, for any B and T. They write to the
    cache's own tensors and read the parameters as they are now."""
    if inputs[0].device.type == "cpu" and model not in traced:
        traced[model] = trace(Step(model), inputs)
    with torch.jit.optimized_execution(False):  # it would look for the best way for each T anew
        return (traced.get(model) or Step(model))(*inputs)


def trace(step: Step, inputs):
    """The step as TorchScript; None if what it does depends on values, as the choice of an expert may."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            script = torch.jit.trace(step, inputs, check_trace=False)
        except (ValueError, RuntimeError):  # longrope holds one buffer twice, LoRA on experts parametrizes weights
            return None
    about_shapes = __file__, attention.__file__, functional.__file__  # one token a row: always right
    doubts = [w for w in warned if w.category is torch.jit.TracerWarning and w.filename not in about_shapes]
    return None if doubts else script


def masks(limits, dtype, seen, here) -> tuple[torch.Tensor, ...]:
    """For each kind of layer, see `windows`, what a token at `here` (1,) looks at, as attention adds it to its scores.

    seen (B, T) says what is a token; (B, 1, 1, T), 0 or -inf. Made once a step, because each layer would otherwise
    convert the mask again. Rows have room for a multiple of 8 numbers, because a GPU's attention would otherwise copy
    the mask in each layer.
    """
    before, found = here - torch.arange(seen.shape[1], device=seen.device), []
    for window in limits:
        looks = seen & (0 <= before) & (before < window)
        room = torch.zeros(len(seen), 1, 1, -(-seen.shape[1] // 8) * 8, dtype=dtype, device=seen.device)
        found.append(room[..., : seen.shape[1]].masked_fill_(~looks[:, None, None], -torch.inf))
    return tuple(found)
