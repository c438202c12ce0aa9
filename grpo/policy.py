"""The policy's model: how it is loaded, and the one place where log-probs of given tokens are computed, `token_logps`.

Trainer, reference server and examples call it, so policy and reference agree to rounding until the first update.
Of the LM head GRPO needs one number for each token of a completion: `HeadLogps` never holds all the logits.
"""
import gc
import inspect
import sys
from bisect import bisect_left
from functools import lru_cache
from types import MethodType

import torch
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP

from grpo.attention import layout, pack_attention

LOGITS_PER_TILE = 2**26 if torch.accelerator.is_available() else 2**22  # alive at a time; 16 MB fit a CPU's cache
CHAT_TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}"
                 "{% if add_generation_prompt %}Assistant:{% endif %}")  # for base models that have none


# ------------------------------------------------------------------------------------------------- loading

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


# ------------------------------------------------------------------------------------------------- one kernel each

@lru_cache
def compiled(function):
    """A function of tensors as one kernel of a GPU, not one for each of its operations. Needs a C compiler."""
    return torch.compile(function, dynamic=True)


def rms_norm(norm, hidden):
    return functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def gate(gates, values):
    return functional.silu(gates) * values


def gated_mlp(mlp, hidden):
    return mlp.down_proj(compiled(gate)(mlp.gate_proj(hidden), mlp.up_proj(hidden)))


def fuse(model) -> None:
    """For a GPU: replaces RMS norms, gates of MLPs like Llama's and rotary embeddings by one kernel each, where
    transformers has five to ten. Norms with another formula stay (Gemma multiplies by 1 + weight). The rotary function
    is replaced in the model's file in transformers, so other models of that file get it too."""
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


# ------------------------------------------------------------------------------------------------- log-probs

def token_logps(model, tokens, prompt_lens, completion_lens, temperature=1.0):
    """Log-probs of the completion tokens under `model` at a temperature; packed rows in, packed log-probs out.

    tokens (N,) every row's prompt then its completion; prompt_lens, completion_lens (B,), all at least 1.
    Returns (sum(completion_lens),) float32, natural log, differentiable. No mask by token value anywhere, so EOS
    counts also where it doubles as padding. Rows are padded on the right, where a causal model never looks.
    """
    lens = prompt_lens + completion_lens
    position = torch.arange(int(lens.max()), device=tokens.device)
    is_token = position < lens[:, None]  # (B, L)
    is_completion = is_token & (position >= prompt_lens[:, None])
    rows = torch.zeros_like(is_token, dtype=torch.long).masked_scatter(is_token, tokens.long())
    where = layout(rows, prompt_lens, lens)
    embedding, replaced = tied(model)
    packed, inputs = model.config._attn_implementation == "packed", {"input_ids": rows}
    if packed:
        inputs = {"input_ids": rows[where.computed][None], "layout": where,
                  "position_ids": position.expand_as(rows)[where.computed][None],
                  "attention_mask": tokens.new_empty(1, 1, 0, 0)}  # for transformers not to make one of N x N
    hidden = functional_call(model.base_model, replaced, kwargs=inputs | {"use_cache": False}).last_hidden_state
    hidden = hidden[0] if packed else hidden[where.computed]  # (N, H)
    hidden = hidden[where.number[:, :-1][is_completion[:, 1:]]]  # (C, H): position t predicts token t + 1

    config, head = model.config.get_text_config(), model.get_output_embeddings()
    scale = getattr(config, "logit_scale", 1) / getattr(config, "logits_scaling", 1) / temperature  # Cohere, Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    weight, bias = head.weight if embedding is None else embedding, getattr(head, "bias", None)
    return HeadLogps.apply(hidden, weight, bias, rows[is_completion], scale, cap, LOGITS_PER_TILE)


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


def log_total(logits, scale) -> torch.Tensor:
    """log of the sum of exp(scale * logits) in each row (C,); on a CPU the logits (C, tile) are overwritten."""
    if logits.is_cuda:
        return compiled(log_sum_exp)(logits, scale)
    top = scale * logits.amax(1)
    logits = torch.add(-top[:, None], logits, alpha=scale, out=logits)
    return logits.exp_().sum(1).log() + top


def head_error(logits, total, place, inside, scale, cap, dtype) -> torch.Tensor:
    """The gradient of the logits (C, tile) without the factors of `scale` and of the row: softmax - one-hot."""
    if logits.is_cuda:
        return compiled(softmax_error)(logits, total, torch.where(inside, place[:, 0], -1), scale, cap, dtype)
    slope = 1 - (logits / cap).square() if cap else None
    probs = torch.add(-total[:, None], logits, alpha=scale, out=logits).exp_()
    error = probs.scatter_add_(1, place, -inside[:, None].float())
    if cap:
        error *= slope
    return error.to(dtype)


def log_sum_exp(logits, scale):
    return torch.logsumexp(scale * logits, 1)


def softmax_error(logits, total, place, scale, cap, dtype):
    hit = torch.arange(logits.shape[1], device=logits.device) == place[:, None]
    error = (scale * logits - total[:, None]).exp() - hit.float()
    return (error * (1 - (logits / cap).square()) if cap else error).to(dtype)


class HeadLogps(torch.autograd.Function):
    """Log-probs (C,) of `targets` (C,) after hidden (C, H), by the LM head: weight (V, H), bias (V,) or None.

    A tile of the vocabulary at a time, in the backward pass again, so that of the logits (C, V) only a tile is ever
    alive, and in the CPU's cache. Between the products of matrices all is in float32, whatever the weights are in.
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
            ctx.total = ctx.total.logaddexp(log_total(logits, scale))
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
            error = head_error(logits, ctx.total, place, inside, ctx.scale, ctx.cap, hidden.dtype)
            grad_hidden += error @ weight[tile]
            if grad_weight is not None:
                torch.mm(error.T, scaled, out=grad_weight[tile])
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
