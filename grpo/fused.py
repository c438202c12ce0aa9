"""One kernel of a GPU where transformers launches five to ten: RMS norms, gates of MLPs, rotary embeddings."""
import inspect
import sys
from types import MethodType

from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaMLP

from grpo.head import compiled


def rms_norm(norm, hidden):
    return functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def gate(gates, values):
    return functional.silu(gates) * values


def gated_mlp(mlp, hidden):
    return mlp.down_proj(compiled(gate)(mlp.gate_proj(hidden), mlp.up_proj(hidden)))


def fuse(model) -> None:
    """Replaces the model's RMS norms, gates of MLPs like Llama's, and rotary embeddings.

    Norms with another formula stay (Gemma multiplies by 1 + weight). The rotary function is replaced in the model's
    file in transformers, so other models of that file get it too.
    """
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
