"""DeepSpeed's engine: how it starts, the micro-batches it is given, and what it does at gradients that are not finite.
"""
import gc

import deepspeed
import torch
import torch.distributed as dist

from grpo.constants import explained, require
from grpo.distributed import of_all
from grpo.types import Group, MicroBatch, Prompt, Sample, in_batches, micro_batch, samples_of


def start_engine(module, config: dict):
    """`deepspeed.initialize`. An update with gradients that are not finite changes nothing, with any ZeRO stage."""
    require(config["zero_optimization"]["stage"] or not config["bf16"]["enabled"],
            "ZERO_STAGE=0: in bfloat16 DeepSpeed's first update is a quarter too small then: use 1")
    with explained("DeepSpeed cannot start with DS_CONFIG"):  # by its own checks, or by a tracker's
        engine = deepspeed.initialize(model=module.train(), config=config)[0]
    engine.basic_optimizer.register_step_pre_hook(drop_bad_gradients)
    engine.enable_backward_allreduce = dist.get_world_size() > 1 or engine.zero_optimization_stage() > 0
    if config["bf16"]["enabled"]:
        spread_masters(engine)
    engine.monitor.enabled = False  # for DeepSpeed's own events, which do not count steps
    gc.freeze()  # the garbage collector need not look at what is loaded: a few percent of a small model's step
    return engine


def spread_masters(engine) -> None:
    """Moves AdamW's float32 weights by less than what bfloat16 rounds away, each by a random number of its own.

    They start as weights in bfloat16, so a step changes none of these until it adds up to half the distance to the next
    one, 0.2 % of a weight: the first dozens of steps of GRPO, whose LR is small, would be lost. From random places, a
    step of a tenth of that distance takes a tenth of the weights over the edge, and on average nothing is lost.
    """
    masters = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3
    masters = masters or [one for group in engine.basic_optimizer.param_groups for one in group["params"]]
    random = torch.Generator(masters[0].device).manual_seed(dist.get_rank())
    for master in masters:
        for piece in master.data.split(2**24):  # all at once would need several times their memory
            distance = torch.exp2(piece.frexp().exponent - 8)  # from one weight in bfloat16 to the next
            moved = piece + distance * (torch.rand(piece.shape, generator=random, device=piece.device) - 0.5)
            piece.copy_(torch.where(moved.bfloat16() == piece, moved, piece))


def make_batches(groups: list[Group], budget: int, device) -> list[MicroBatch]:
    """Micro-batches of the groups' samples, of at most `budget` tokens each, see `types.split`.

    A backward pass may be a collective operation, so every process makes as many: those with fewer micro-batches get
    fillers, samples of weight zero.
    """
    batches = in_batches(samples_of(groups), budget)
    filler = Sample(Prompt([0]), torch.tensor([0]), torch.zeros(1), ended=True, advantages=torch.zeros(1))
    batches += [[filler]] * (max(1, *of_all(len(batches))) - len(batches))
    return [micro_batch(samples, device) for samples in batches]


def drop_bad_gradients(optimizer, *_) -> None:
    """Clears gradients that are not finite, so that the step changes nothing. ZeRO 1 to 3 skip it by themselves."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    optimizer.gradients_were_finite = torch.nn.utils.get_total_norm(grads).isfinite().item()
    if not optimizer.gradients_were_finite:
        optimizer.zero_grad()


def was_applied(engine) -> bool:
    """Whether the last update changed the weights."""
    return engine.was_step_applied() and engine.basic_optimizer.gradients_were_finite


def gradient_norm(engine) -> float:
    norm = engine.get_global_grad_norm()
    return float("nan" if norm is None else norm)


def set_lr(engine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
