"""The LM head as log-probs of given tokens: a tile of the vocabulary at a time, never all the logits at once."""
from functools import lru_cache

import torch
from torch.nn import functional

LOGITS_PER_TILE = 2**26 if torch.accelerator.is_available() else 2**22  # alive at a time; 16 MB fit a CPU's cache


@lru_cache
def compiled(function):
    """A function of tensors as one kernel of a GPU, not one for each of its operations. Needs a C compiler."""
    return torch.compile(function, dynamic=True)


def head_logps(model, hidden, targets, temperature=1.0):
    """Log-probs (C,) float32 of `targets` (C,) at a temperature, from the last hidden states (C, H) before them."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    scale = (getattr(config, "logit_scale", None) or 1) / getattr(config, "logits_scaling", 1)  # Cohere, Granite
    scale *= getattr(config, "lm_head_multiplier", 1) / temperature  # Falcon-H1
    caps = "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"  # Gemma, RecurrentGemma, xLSTM
    cap = next(filter(None, (getattr(config, name, None) for name in caps)), None)
    hidden = hidden.to(head.weight.dtype)  # Mamba's are in float32
    return HeadLogps.apply(hidden, head.weight, getattr(head, "bias", None), targets, scale, cap, LOGITS_PER_TILE)


def log_total(logits, scale) -> torch.Tensor:
    """log of the sum of exp(scale * logits) in each row (C,); on a CPU the logits (C, tile) are overwritten."""
    if logits.is_cuda:
        return compiled(log_sum_exp)(logits, scale)
    top = scale * logits.amax(1)
    logits = torch.add(-top[:, None], logits, alpha=scale, out=logits)
    return logits.exp_().sum(1).log() + top


def head_error(logits, total, place, inside, scale, cap, dtype) -> torch.Tensor:
    """softmax - one-hot: the gradient of -log-prob by the logits (C, tile), without the factors of `scale` and of the
    row. On a CPU the logits are overwritten."""
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
        return logps - ctx.total  # eq. 3: log pi

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
