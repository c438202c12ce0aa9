"""A decode step, on a CPU recorded once by TorchScript: there Python takes as long as the step's operations."""
import warnings
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from grpo import attention
from grpo.attention import RoomyLayer, additive

recorded = WeakKeyDictionary()  # each model's decode step, see `next_logits`


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
        except (ValueError, RuntimeError):  # longrope holds one buffer twice, LoRA on experts parametrizes weights
            return None
    about_shapes = __file__, attention.__file__, functional.__file__  # one token a row: always right
    doubts = [w for w in warned if w.category is torch.jit.TracerWarning and w.filename not in about_shapes]
    return None if doubts else script
