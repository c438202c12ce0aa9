"""What supervised fine-tuning (sft.py) and reward models (preferences.py) share: the loop, its batches, the result."""
import json
import math
import shutil
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grpo.constants import explained, require  # noqa: E402
from grpo.data import pick  # noqa: E402
from grpo.engine import set_lr, start_engine, was_applied  # noqa: E402


def fine_tune(module, losses, steps: int, lr: float, warm_up: int, zero_stage=1) -> None:
    """AdamW. The rate is lr * (1 + cos(pi * step / steps)) / 2 after a linear start (SGDR, arXiv 1608.03983, eq. 5).

    `losses(engine, step)` yields this process's parts of the step's loss, as many as in the other processes.
    """
    bf16 = next(module.parameters()).dtype == torch.bfloat16
    engine = start_engine(module, {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": zero_stage},
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "weight_decay": 0, "torch_adam": True}},
    })
    for step in trange(steps, unit="step", disable=dist.get_rank() > 0):
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        set_lr(engine, lr * min(cosine, (step + 1) / max(1, warm_up)))
        for loss in losses(engine, step):
            engine.backward(loss * dist.get_world_size())  # DeepSpeed averages over processes
        engine.step()
        require(was_applied(engine), f"step {step + 1}: the gradients are not finite; LR={lr} is likely too high")
    module.eval()


def share(items: list, step: int, size: int, most: int, seed: int) -> list[list]:
    """This process's part of a step's `size` items, at most `most` in a batch. Each epoch has an order of its own."""
    rank, world = dist.get_rank(), dist.get_world_size()
    require(size % world == 0, f"BATCH_SIZE={size}: cannot be shared equally by {world} processes")
    numbers = range(step * size, (step + 1) * size)[rank::world]
    mine = [pick(items, number, seed) for number in numbers]
    return [mine[start : start + most] for start in range(0, len(mine), most)]


def save(folder: str, model, tokenizer, record: dict) -> None:
    """The folder with model, tokenizer and training.json, all of it or nothing; by all processes together."""
    unfinished = Path(f"{folder}.unfinished")
    whole = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with whole, explained(f"cannot write {folder}", OSError):
        if dist.get_rank() > 0:
            return
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        text = json.dumps(record, indent=1, default=str)
        (unfinished / "training.json").write_text(text)
        unfinished.rename(folder)
