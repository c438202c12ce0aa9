"""The largest micro-batch that fits into memory, found before training starts: a step never runs out of memory."""
import torch
import torch.distributed as dist

from grpo.constants import require
from grpo.distributed import of_all

memory_is_limited = torch.accelerator.is_available  # a CPU's is not: the system swaps, or kills without a word


def fitting_tokens(policy, budget: int, prompt_tokens: int, completion_tokens: int, samples: int,
                   zero_stage: int) -> int:
    """`budget` tokens, or its half, quarter, ... with which the largest micro-batch fits into every process's memory.

    The largest rows have `prompt_tokens` and `completion_tokens`; a process trains at most `samples` a step. Called
    before DeepSpeed has the model, so that a process without memory leaves no other waiting. SystemExit if a single
    row does not fit.
    """
    asked, length = budget, prompt_tokens + completion_tokens
    while memory_is_limited():
        count = min(max(1, -(-budget // length)), samples)
        row = length if count == 1 else min(length, budget // count)
        if all(of_all(fits(policy, count, row, min(prompt_tokens, row - 1), zero_stage))):
            break
        require(count > 1, f"a row of {length} tokens does not fit into memory: lower MAX_COMPLETION_TOKENS, or set "
                           "GRADIENT_CHECKPOINTING=True, a higher ZERO_STAGE, or LORA_RANK")
        budget = count * row // 2
        torch.cuda.empty_cache()
    if budget < asked and dist.get_rank() == 0:
        print(f"MICRO_BATCH_TOKENS={budget}, because {asked} do not fit into memory", flush=True)
    return budget


def fits(policy, count: int, length: int, prompt_length: int, zero_stage: int) -> bool:
    """Whether a forward and a backward pass of `count` rows fit beside what DeepSpeed will hold.

    That is 12 bytes of AdamW's states for each parameter, split over processes from ZeRO 1 on, and gradients, split
    from ZeRO 2 on; and on a GPU a twentieth of it, for a graph of the sampler, for NCCL, and a server beside.
    """
    model = policy.module.train().model
    trained = [one for one in model.parameters() if one.requires_grad]
    states = 12 * sum(one.numel() for one in trained) // (dist.get_world_size() if zero_stage else 1)
    gradients = sum(one.nbytes for one in trained) // (dist.get_world_size() if zero_stage > 1 else 1)
    spare = torch.cuda.mem_get_info(model.device)[1] // 20 if model.device.type == "cuda" else 0
    hooks = [one.register_post_accumulate_grad_hook(drop_gradient) for one in trained]
    tokens = torch.randint(model.config.get_text_config().vocab_size, (count * length,),
                           generator=torch.Generator().manual_seed(0))
    lens = torch.full((count,), prompt_length), torch.full((count,), length - prompt_length)
    try:
        placeholder = torch.empty(states + gradients + spare, dtype=torch.uint8, device=model.device)  # noqa: F841
        policy.module(*(tensor.to(model.device) for tensor in (tokens, *lens))).sum().backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        policy.module.eval()
        if model.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats()  # `peak_memory_mb` is the training's
        for hook in hooks:
            hook.remove()


def drop_gradient(parameter) -> None:
    parameter.grad = None
