"""GRPO (Group Relative Policy Optimization, DeepSeekMath, arXiv 2402.03300) in one loop.

    python ref_server.py                                        # first, in another terminal or on another GPU
    deepspeed grpo_train.py                                     # all GPUs, or one CPU process
    deepspeed --num_accelerators 2 grpo_train.py LR=2e-6        # two processes; any constant below as NAME=value
    python grpo_train.py                                        # one process, for a debugger

One step samples a group of completions for each prompt, rewards them, turns each group's rewards into advantages and
takes AdamW steps, usually one, on the clipped objective with a KL penalty towards the reference model. There is no
value model and no replay. Read `main()` first; `GRPO_step` is the loss, with the variants that have names of their own.
"""
import copy
import random
import secrets
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import deepspeed
import torch
import torch.distributed as dist
from tqdm import tqdm

from grpo import checkpoint
from grpo import distributed
from grpo import report
from grpo.constants import check_constants, override_constants
from grpo.evaluate import columns, evaluate, score, tally
from grpo.distributed import reduce
from grpo.reference import check_servers, renew_reference, request_logps
from grpo.policy import token_logps
from rewards import check_rewards, load_rewards, reward_correct, reward_format
from grpo.data import load_prompts
from grpo.policy import add_adapters, dtype_called, load_model, stop_ids, tokens_until
from grpo.sampling import open_sampler
from grpo.types import micro_batches, pack

# Model and data
MODEL = "examples/arithmetic/model"  # local folder or hub name
DTYPE = "auto"  # float32 on a CPU, bfloat16 on an accelerator; or either by name. AdamW's states are float32 always
DATASET = "examples/arithmetic/train.jsonl"  # .jsonl, .parquet, or hub name[:config[:split]]
EVAL_DATASET = "examples/arithmetic/heldout.jsonl"  # never trained on
QUESTION_COLUMN = "question"  # holds the problem, in both data sets; MATH has it in "problem"
SYSTEM_PROMPT = "First reason between <think> and </think>, then give the answer between <answer> and </answer>."
REWARDS = [reward_correct, reward_format]  # or (function, weight); added up; the first, above 0, counts as accuracy
REF_SERVER = "http://127.0.0.1:59875"  # several, separated by commas, share the work
OUTPUT_DIR = "runs/arithmetic"
SEED = 0

# Sampling
STEPS = 60  # updates
PROMPTS_PER_STEP = 16  # of the whole job, all processes together
GROUP_SIZE = 8  # completions for each prompt; more of them, better advantages: 8 to 64
MAX_PROMPT_TOKENS = 128  # longer prompts are left out
MAX_COMPLETION_TOKENS = 64  # 512 for GSM8K, thousands for competition mathematics
MIN_COMPLETION_TOKENS = 0  # EOS is not sampled before; for benchmarks
TEMPERATURE = 1.0  # of sampling and of every log-prob; below 1 explores less
SAMPLER = "auto"  # on a GPU "graph", if the model allows, else "transformers"; or "vllm", see README.md
VLLM_MEMORY = 0.4  # share of a GPU's memory that vLLM has while it samples
IS_CAP = 2.0  # upper limit of a token's weight, policy / sampler: the two round differently, vLLM most of all

# Loss
LOSS_TYPE = "grpo"  # how tokens are weighted: grpo, dr_grpo, dapo, bnpo, cispo; see `token_weights` and `GRPO_step`
IMPORTANCE = "token"  # the ratio of each "token", or of the whole "sequence" (GSPO)
ADVANTAGE_SCALE = "group"  # what divides advantages: the std of the "group", of the whole "batch", or "none" (Dr. GRPO)
BETA = 0.005  # weight of the KL penalty; 0 needs no reference server; DeepSeekMath used 0.04
REF_SYNC_EVERY = 0  # steps after which the reference becomes the policy (iterative GRPO); 0 leaves it frozen
REF_MIXUP_ALPHA = 1.0  # or mixes with it: alpha * policy + (1 - alpha) * reference
CLIP_LOW = 0.2  # the ratio is clipped to 1 - CLIP_LOW ...
CLIP_HIGH = 0.2  # ... 1 + CLIP_HIGH; DAPO: 0.28
ENTROPY_BONUS = 0.0  # weight of the entropy; 0.001 keeps a policy from settling too early
UPDATES_PER_BATCH = 1  # AdamW steps on each batch; only with more of them is there anything to clip
DROP_EQUAL_GROUPS = True  # leaves out groups whose rewards are all equal, and their KL term with them, to save time
MASK_TRUNCATED = False  # completions that were cut off teach nothing (DAPO's overlong filtering)

# Optimizer and memory
LR = 5e-5  # 1e-6 for pre-trained models with full fine-tuning
WARMUP_STEPS = 10  # linear; without it Adam's first steps can ruin the model
MAX_GRAD_NORM = 1.0
MAX_SKIPPED_STEPS = 5  # in a row, because their gradients are not finite; then the run ends
MICRO_BATCH_TOKENS = 8192  # of one forward and backward pass, with padding; halved at the start until the longest rows
# fit. It changes memory, not the update: without checkpointing 1.5B parameters keep 2 MB of activations a token
GRADIENT_CHECKPOINTING = False  # less memory for activations, a third more time
ZERO_STAGE = 1  # DeepSpeed: 0 splits nothing over the GPUs, 1 optimizer states, 2 gradients too, 3 weights too
LORA_RANK = 0  # of the adapters that are trained instead of the weights; 0 trains these; LoRA wants 10 times the LR

# Logging
EVAL_EVERY = 10  # steps, and at the start and the end; 0 turns it off
SAVE_EVERY = 30  # steps, and at the end; 0 turns it off
KEEP_CHECKPOINTS = 2  # the newest; 0 keeps all of them
TRACKERS = []  # any of tensorboard, wandb, csv: what metrics.jsonl holds, also there
RESUME = True  # the same command continues an interrupted run; False refuses a folder that holds one

if __name__ == "__main__":
    override_constants(globals(), sys.argv[1:])

DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "managed_gradient_accumulation": False,  # the number of micro-batches differs from step to step
    "gradient_clipping": MAX_GRAD_NORM,
    "zero_optimization": {"stage": ZERO_STAGE, "overlap_comm": False, "reduce_bucket_size": 50_000_000},
    "bf16": {"enabled": dtype_called(DTYPE) == torch.bfloat16},
    "optimizer": {"type": "AdamW", "params": {"lr": LR, "betas": (0.9, 0.999), "weight_decay": 0, "torch_adam": True,
                                               "fused": True}},
    "tensorboard": {"enabled": "tensorboard" in TRACKERS, "output_path": OUTPUT_DIR, "job_name": "tensorboard"},
    "wandb": {"enabled": "wandb" in TRACKERS, "project": "grpo", "group": OUTPUT_DIR},
    "csv_monitor": {"enabled": "csv" in TRACKERS, "output_path": OUTPUT_DIR, "job_name": "csv"},
}

requests = ThreadPoolExecutor(8)  # to the reference server


class Policy(torch.nn.Module):
    """The model as a function from packed rows to log-probs, so that DeepSpeed sees the whole forward pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *rows):
        return token_logps(self.model, *rows, TEMPERATURE)


# ------------------------------------------------------------------------------------------------- GRPO

@lru_cache(maxsize=2)
def epoch_order(epoch: int, size: int) -> list[int]:
    return random.Random(f"{SEED} {epoch}").sample(range(size), size)


def group_advantages(rewards: torch.Tensor, batch_std: float | None = None) -> torch.Tensor:
    """(r - mean) / (std + 1e-4) in each group (P, G), sample standard deviation; DeepSeekMath, section 4.1.2.

    ADVANTAGE_SCALE "batch" divides by `batch_std` where it is given, "none" by nothing (Dr. GRPO, arXiv 2503.20783).
    """
    std = rewards.std(1, keepdim=True) if batch_std is None or ADVANTAGE_SCALE == "group" else batch_std
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (1 if ADVANTAGE_SCALE == "none" else std + 1e-4)
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return advantages.masked_fill(equal, 0.0)  # exactly, whatever the rounding of the mean


def token_weights(lengths: list[int], tokens_in_step: float) -> list[float]:
    """A token's weight in the loss, for completions of these lengths: all the normalising there is, so that the losses
    and gradients of micro-batches and processes add up to those of the step, however it is split.

    grpo: 1 / (length * completions), the mean over a completion's tokens, then over completions (DeepSeekMath, eq. 3).
    dr_grpo: 1 / (MAX_COMPLETION_TOKENS * completions), no preference for short ones (arXiv 2503.20783, section 3.2).
    dapo, bnpo, cispo: 1 / (tokens of the step), the mean over all of them (DAPO, arXiv 2503.14476, eq. 12).
    A length of 0 is that of a completion that teaches nothing.
    """
    completions = PROMPTS_PER_STEP * GROUP_SIZE
    for_all = MAX_COMPLETION_TOKENS * completions if LOSS_TYPE == "dr_grpo" else max(1, tokens_in_step)
    return [1 / (length * completions if LOSS_TYPE == "grpo" else for_all) if length else 0.0 for length in lengths]


def set_advantages(samples: list[dict], weights, tokenizer, batch_std: float | None = None) -> None:
    """The advantage of each token (T,) of a group's samples.

    That of the completion's `outcome`, normalised in the group; and for each reward function that judges steps
    ([(end_character, reward), ...] in `steps`) its weight times the sum of the rewards, normalised over all steps of
    the group, of the steps that end at or after the token: process supervision, DeepSeekMath, section 4.1.3.
    """
    outcomes = torch.tensor([[sample_["outcome"] for sample_ in samples]], dtype=torch.float64)
    for sample_, advantage in zip(samples, group_advantages(outcomes, batch_std)[0].tolist()):
        sample_["advantage"] = torch.full((len(sample_["completion"]),), advantage)
    for function, weight in enumerate(weights):
        flat = [(sample_, *step) for sample_ in samples for step in sample_["steps"][function]]
        rewards = torch.tensor([[reward for *_, reward in flat]], dtype=torch.float64)
        for (sample_, end, _), advantage in zip(flat, group_advantages(rewards)[0].tolist() if flat else []):
            sample_["advantage"][: tokens_until(tokenizer, sample_["completion"], end)] += weight * advantage


def has_signal(group: list[dict]) -> bool:
    """Whether an advantage of the group's samples is not zero, so that its rewards have something to teach."""
    return any(sample_["advantage"].any() for sample_ in group)


def trained(groups: list[list[dict]]) -> list[dict]:
    """The samples that are trained on: all, or with DROP_EQUAL_GROUPS those of groups with a signal."""
    return [sample_ for group in groups if has_signal(group) or not DROP_EQUAL_GROUPS for sample_ in group]


def GRPO_step(logps: torch.Tensor, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a micro-batch from the policy's log-probs (C,) of its completion tokens, and sums over these to log.

    batch: rows (see `pack`), advantage (C,), weight (C,) (see `token_weights`), sampler_logps (C,), ref_logps (C,) if
    BETA, and old_logps (C,) of the policy that sampled, if it is no longer this one.
    loss = sum of weight * (BETA * (exp(d) - d - 1) - surrogate), d = ref_logps - logps; DeepSeekMath, eq. 3 and 4.
    surrogate = min(ratio * A, clip(ratio) * A); ratio = exp(logps - old_logps), or its geometric mean over the
    completion if IMPORTANCE is "sequence" (GSPO, arXiv 2507.18071, eq. 5 and 7).
    The sampler computes with other kernels: surrogate * min(exp(old_logps - sampler_logps), IS_CAP), the factor as a
    constant; truncated importance sampling (Ionides 2008; for language models Yao et al. 2025).
    cispo: surrogate = clip(ratio) * A * logps, the ratio as a constant (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).
    ENTROPY_BONUS adds -logps * ratio, these logps as a constant: in expectation its gradient is the entropy's.
    """
    advantage, weight, lens = batch["advantage"], batch["weight"], batch["rows"][2]
    old_logps = batch.get("old_logps", logps.detach())
    log_ratio = logps - old_logps
    if IMPORTANCE == "sequence":
        log_ratio = torch.segment_reduce(log_ratio, "mean", lengths=lens).repeat_interleave(lens)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    surrogate = torch.min(ratio * advantage, clipped * advantage)
    if LOSS_TYPE == "cispo":
        surrogate = clipped.detach() * advantage * logps
    sampler_ratio = (old_logps - batch.get("sampler_logps", old_logps)).exp()
    surrogate = surrogate * sampler_ratio.clamp(max=IS_CAP)
    ref_log_ratio = batch["ref_logps"] - logps if BETA else torch.zeros_like(logps)
    kl = torch.expm1(ref_log_ratio) - ref_log_ratio
    loss = ((BETA * kl - surrogate + ENTROPY_BONUS * logps.detach() * ratio) * weight).sum()

    real = weight > 0
    low, high = real & (ratio < 1 - CLIP_LOW) & (advantage < 0), real & (ratio > 1 + CLIP_HIGH) & (advantage > 0)
    sums = {"loss": loss, "count tokens": real.sum(), "kl": kl[real].sum(), "entropy": -logps[real].sum(),
            "clip_low_frac": low.sum(), "clip_high_frac": high.sum(), "clip_region_frac": (low | high).sum(),
            "count sampler_ratio": torch.tensor(len(logps)), "sampler_ratio": sampler_ratio.double().sum()}
    return loss, {name: value.detach().double() for name, value in sums.items()}  # on the device until the step's end


# ------------------------------------------------------------------------------------------------- around the loop

def judge(finished: dict, prompts, groups, rewards, tokenizer, reference) -> None:
    """Puts groups of completions, by the prompt's place, as samples with rewards and advantages into `groups`.

    The reference log-probs of those with a signal are on the way then, and in the end what `ref_logps` returns.
    """
    rows, completions = zip(*((prompts[place], one) for place, group in finished.items() for one in group))
    samples = score(rewards, rows, completions, tokenizer)
    judged = [samples[start : start + GROUP_SIZE] for start in range(0, len(samples), GROUP_SIZE)]
    for place, group in zip(finished, judged):
        set_advantages(group, rewards.values(), tokenizer)
        groups[place] = group
    for batch in micro_batches(trained(judged), MICRO_BATCH_TOKENS) if BETA else []:
        answer = requests.submit(request_logps, REF_SERVER, *pack(batch), TEMPERATURE, reference)
        for number, sample_ in enumerate(batch):
            sample_["ref_logps"] = lambda answer=answer, number=number: answer.result()[number]


def make_batches(samples: list[dict], kept: list[dict], device) -> list[dict]:
    """Micro-batches for `GRPO_step` of the samples that are kept.

    Each backward pass may be a collective operation, so every process makes as many: those with fewer micro-batches
    fill up with one of weight zero, to which any reference is as good.
    """
    batches = micro_batches(kept, MICRO_BATCH_TOKENS)
    most = reduce({"batches": len(batches)}, dist.ReduceOp.MAX)["batches"]
    filler = min(samples, key=lambda sample_: sample_["length"])
    nothing = {"weight": 0 * filler["weight"], "ref_logps": lambda: filler["sampler_logps"]}
    batches += [[filler | nothing]] * int(max(1, most) - len(batches))
    return [{"samples": batch, "rows": [tensor.to(device) for tensor in pack(batch)],
             **{name: torch.cat([sample_[name] for sample_ in batch]).to(device)
                for name in ("advantage", "weight", "sampler_logps")}}
            for batch in batches]


def add_gradients(engine, batches: list[dict], seconds: Counter) -> Counter:
    """The gradients of the step's loss: sums to log."""
    sums = Counter()
    for batch in batches:
        logps = engine(*batch["rows"])
        if BETA and "ref_logps" not in batch:
            with report.timed(seconds, "ref_wait", wait=False):  # the server was at work during the forward pass
                batch["ref_logps"] = torch.cat([one["ref_logps"]() for one in batch["samples"]]).to(engine.device)
        loss, batch_sums = GRPO_step(logps, batch)
        engine.backward(loss * dist.get_world_size())  # DeepSpeed takes the mean over processes, the loss is a sum
        batch.setdefault("old_logps", logps.detach())
        sums.update(batch_sums)
    return sums


def spread(values: torch.Tensor) -> float:
    """The sample standard deviation over all processes."""
    mean = reduce({"sum": values.sum()})["sum"] / (PROMPTS_PER_STEP * GROUP_SIZE)
    return (reduce({"sum": (values - mean).square().sum()})["sum"] / (PROMPTS_PER_STEP * GROUP_SIZE - 1)) ** 0.5


def fitting_tokens(model, prompt_tokens: int, rows_a_step: int, world: int) -> int:
    """MICRO_BATCH_TOKENS, or its half, quarter, ... with which the largest micro-batch fits into memory everywhere.

    It tries a forward and a backward pass of rows as long as they can be, before DeepSpeed has the model: a process
    that lacks memory leaves no other waiting. Placeholders stand for what DeepSpeed will hold beside them: AdamW's
    states, and with ZeRO 0 and 1 whole gradients. SystemExit if one row does not fit.
    """
    policy, length, budget = Policy(model).train(), prompt_tokens + MAX_COMPLETION_TOKENS, MICRO_BATCH_TOKENS
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    states = 12 * sum(parameter.numel() for parameter in trained) // (world if ZERO_STAGE else 1)  # bytes
    vocab, generator = model.config.get_text_config().vocab_size, torch.Generator().manual_seed(SEED)
    while True:
        count, hooks, failed = min(max(1, -(-budget // length)), rows_a_step), [], False
        row = length if count == 1 else min(length, budget // count)
        prompt = min(prompt_tokens, row - 1)
        tokens = torch.randint(vocab, (count * row,), generator=generator)
        rows = tokens, torch.full((count,), prompt), torch.full((count,), row - prompt)
        try:
            placeholder = torch.empty(states, dtype=torch.uint8, device=model.device)
            for parameter in trained if ZERO_STAGE < 2 else []:
                parameter.grad = torch.zeros_like(parameter)
            hooks = [parameter.register_post_accumulate_grad_hook(drop_gradient)
                     for parameter in trained if ZERO_STAGE >= 2]
            (0 * policy(*(tensor.to(model.device) for tensor in rows)).sum()).backward()
        except torch.OutOfMemoryError:
            failed = True
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
        placeholder = None
        if not reduce({"failed": failed}, dist.ReduceOp.MAX)["failed"]:
            policy.eval()
            return budget
        if count == 1:
            raise SystemExit(f"a row of {length} tokens does not fit into memory: lower MAX_COMPLETION_TOKENS, or set "
                             "GRADIENT_CHECKPOINTING=True, a higher ZERO_STAGE, or LORA_RANK")
        budget = count * row // 2
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def drop_gradient(parameter) -> None:
    parameter.grad = None


def drop_bad_gradients(optimizer, *_) -> None:
    """Before the optimizer's step, which changes nothing then. ZeRO 1 to 3 do not come so far with bad gradients."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    optimizer.gradients_were_finite = torch.nn.utils.get_total_norm(grads).isfinite().item()
    if not optimizer.gradients_were_finite:
        optimizer.zero_grad()


def main():
    global MICRO_BATCH_TOKENS
    rank, world = distributed.start()
    check_constants(globals(), world)
    last = checkpoint.begin(OUTPUT_DIR, globals() | {"PROCESSES": world}, RESUME) if rank == 0 else 0
    last, run = map(int, reduce({"last": last, "run": secrets.randbits(48) if rank == 0 else 0}).values())
    checkpoint.see(OUTPUT_DIR)
    model, tokenizer = load_model(MODEL, MAX_PROMPT_TOKENS + MAX_COMPLETION_TOKENS, DTYPE)
    rewards, limits = load_rewards(REWARDS), {"max_tokens": MAX_COMPLETION_TOKENS, "stop": stop_ids(model, tokenizer)}
    train, heldout = (load_prompts(name, tokenizer, SYSTEM_PROMPT, MAX_PROMPT_TOKENS, QUESTION_COLUMN) if name else []
                      for name in (DATASET, EVAL_DATASET if EVAL_EVERY else ""))
    for rows in filter(None, (train, heldout)):
        check_rewards(rewards, columns(rows))
    if BETA and rank == 0 and not REF_SYNC_EVERY:
        check_servers(REF_SERVER, model, MODEL, train[0]["ids"])
    whole = add_adapters(model, LORA_RANK, SEED) if LORA_RANK else model
    if GRADIENT_CHECKPOINTING:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    asked, MICRO_BATCH_TOKENS = MICRO_BATCH_TOKENS, fitting_tokens(
        model, max(len(prompt["ids"]) for prompt in train), PROMPTS_PER_STEP // world * GROUP_SIZE, world)
    if rank == 0 and MICRO_BATCH_TOKENS < asked:
        print(f"MICRO_BATCH_TOKENS={MICRO_BATCH_TOKENS}, because {asked} do not fit into memory", flush=True)
    # For sampling and saving: the same parameters in modules without DeepSpeed's hooks. With hooks, and ZeRO 3, all
    # processes would have to make as many forward passes, but the longest completion is not everywhere the same.
    whole = copy.deepcopy(whole, {id(parameter): parameter for parameter in model.parameters()})
    gathered = partial(deepspeed.zero.GatheredParameters, list(model.parameters()))
    rollouts, ready = open_sampler(
        SAMPLER, whole, gathered, MODEL, MAX_PROMPT_TOKENS + MAX_COMPLETION_TOKENS, VLLM_MEMORY)
    engine = deepspeed.initialize(model=Policy(model).train(), config=DS_CONFIG)[0]
    engine.basic_optimizer.register_step_pre_hook(drop_bad_gradients)
    engine.enable_backward_allreduce = world > 1 or ZERO_STAGE > 0  # alone there is nothing to add up
    engine.monitor.enabled = False  # for DeepSpeed's own events, which count something else than steps
    reference, skipped = None, 0
    if last:
        checkpoint.load(engine, OUTPUT_DIR, last)
    else:
        metrics = {"step": 0}
        if EVAL_EVERY:
            with ready():
                metrics |= evaluate(rollouts, tokenizer, rewards, heldout, **limits)
        if rank == 0:
            report.log(OUTPUT_DIR, metrics, engine.monitor)
    if REF_SYNC_EVERY:
        renew = partial(renew_reference, REF_SERVER, OUTPUT_DIR, whole, gathered)
        reference = renew(f"{run}-{last}", alpha=0 if last else 1, patience=25)

    distributed.stop_at_signals()
    progress = tqdm(desc="GRPO", initial=last, total=STEPS, disable=rank > 0)
    for step in range(last + 1, STEPS + 1):
        started, seconds, sums = time.perf_counter(), Counter(), Counter()

        # 1. This process' share of the step's prompts. A prompt's number fixes its place in the data and its seed.
        numbers = range((step - 1) * PROMPTS_PER_STEP, step * PROMPTS_PER_STEP)[rank::world]
        prompts = [train[epoch_order(n // len(train), len(train))[n % len(train)]] for n in numbers]

        # 2. A group of completions for each prompt. Finished groups are rewarded before the others are complete.
        groups = [None] * len(prompts)
        with report.timed(seconds, "sample"), ready():
            for finished in rollouts(
                    [prompt["ids"] for prompt in prompts], GROUP_SIZE, temperature=TEMPERATURE,
                    min_tokens=MIN_COMPLETION_TOKENS, seeds=[SEED << 32 | n for n in numbers], **limits):
                with report.timed(seconds, "reward", wait=False):
                    judge(finished, prompts, groups, rewards, tokenizer, reference)
        seconds["sample"] -= seconds["reward"]
        samples = [sample_ for group in groups for sample_ in group]

        # 3. What depends on all of the step: how much a token weighs, and the batch's standard deviation.
        lengths = [len(one["completion"]) if one["ended"] or not MASK_TRUNCATED else 0 for one in samples]
        weights = token_weights(lengths, reduce({"tokens": sum(lengths)})["tokens"])
        for sample_, weight in zip(samples, weights):
            sample_["weight"] = torch.full_like(sample_["advantage"], weight)
        if ADVANTAGE_SCALE == "batch":
            batch_std = spread(torch.tensor([one["outcome"] for one in samples], dtype=torch.float64))
            for group in groups:
                set_advantages(group, rewards.values(), tokenizer, batch_std)

        # 4. Micro-batches of the groups that have something to teach.
        kept = trained(groups)
        batches = make_batches(samples, kept, engine.device)

        # 5. The updates: gradients, micro-batch by micro-batch, then AdamW's step.
        for group in engine.optimizer.param_groups:
            group["lr"] = LR * min(1, step / max(1, WARMUP_STEPS))
        with report.timed(seconds, "train"):
            for _ in range(UPDATES_PER_BATCH):
                sums.update(add_gradients(engine, batches, seconds))
                engine.step()
                applied = engine.was_step_applied() and engine.basic_optimizer.gradients_were_finite
                sums["skipped_updates"] += rank == 0 and not applied
        seconds["train"] -= seconds["ref_wait"]
        sums["loss"] /= UPDATES_PER_BATCH

        # 6. What there is to say about it.
        totals = torch.tensor([[one["total"] for one in group] for group in groups], dtype=torch.float64)
        sums.update(tally(rewards, samples), reward_std=totals.std(1).sum() * GROUP_SIZE,
                    advantage_zero_groups=sum(not has_signal(group) for group in groups),
                    stop=distributed.stopping.is_set())
        sums["completion_tokens_total"] = sums["completion_tokens_mean"]
        metrics = {"step": step, "lr": group["lr"], **report.means(reduce(sums), len(samples) * world),
                   "grad_norm": float("nan" if (norm := engine.get_global_grad_norm()) is None else norm),
                   "peak_memory_mb": report.peak_memory_mb(), "seconds": time.perf_counter() - started,
                   **{f"seconds_{name}": seconds[name] for name in ("sample", "reward", "ref_wait", "train")}}
        stop_asked = metrics.pop("stop") > 0
        if EVAL_EVERY and (step % EVAL_EVERY == 0 or step == STEPS):
            with ready():
                metrics |= evaluate(rollouts, tokenizer, rewards, heldout, **limits)
        if rank == 0:
            report.log(OUTPUT_DIR, metrics, engine.monitor)
            report.write(OUTPUT_DIR, "completions", [
                {"step": step, "prompt": prompts[0]["text"], "completion": one["text"],
                 "advantage": one["advantage"].mean().item(),
                 **{function.__name__: value for function, value in zip(rewards, one["rewards"])}}
                for one in groups[0]])
            progress.set_postfix_str(report.one_line(metrics), refresh=False)
            progress.update()
        if REF_SYNC_EVERY and step % REF_SYNC_EVERY == 0:
            reference = renew(f"{run}-{step}", alpha=REF_MIXUP_ALPHA)
        if stop_asked or SAVE_EVERY and (step % SAVE_EVERY == 0 or step == STEPS):
            checkpoint.save(engine, whole, gathered, tokenizer, OUTPUT_DIR, step, KEEP_CHECKPOINTS, rank)
        skipped = skipped + 1 if metrics["skipped_updates"] else 0
        if skipped == MAX_SKIPPED_STEPS:
            raise SystemExit(f"step {step}: the loss or its gradients were not finite, {skipped} times in a row. "
                             f"Likely: LR={LR} is too high, TEMPERATURE={TEMPERATURE} too low, or MODEL={MODEL} broken")
        if stop_asked:
            break
    progress.close()
    if rank == 0:
        report.show(OUTPUT_DIR)


if __name__ == "__main__":
    distributed.run(main)
