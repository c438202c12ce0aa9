"""GRPO (Group Relative Policy Optimization, DeepSeekMath, arXiv 2402.03300) in one loop.

    python ref_server.py                                        # first, in another terminal or on another GPU
    deepspeed grpo_train.py                                     # all GPUs, or one CPU process
    deepspeed --num_accelerators 2 grpo_train.py LR=2e-6        # two processes; any constant below as NAME=value
    python grpo_train.py                                        # one process, for a debugger

One step samples a group of completions for each prompt, rewards them, turns each group's rewards into advantages, and
takes an AdamW step on the clipped objective with a KL penalty towards the reference model. There is no value model and
no replay. Read `main()` first; `GRPO_step` is the loss, with its variants. The shapes behind tensors: B samples of a
micro-batch, C completion tokens of all of them one after the other (`grpo/types.py`).

Where the defaults deviate from the paper:
- A group whose rewards are all equal is left out, with its KL and entropy terms (DROP_EQUAL_GROUPS=False keeps it).
- Advantages divide by the sample standard deviation plus 1e-4; the paper writes std without saying which.
- The sampler rounds differently than the policy: its tokens are weighted by min(policy / sampler, IS_CAP).
- One update a batch (UPDATES_PER_BATCH), so the ratio is 1 and nothing is clipped; the paper's experiments do the same.
- BETA is 0.005 for the embedded task; the paper's is 0.04. The learning rate warms up linearly.
"""
import sys
from typing import Literal

import torch

from grpo import checkpoint, distributed
from grpo.constants import Over, constants_of, override_constants, require
from grpo.data import load_prompts, pick
from grpo.engine import gradient_norm, make_batches, set_lr, start_engine, was_applied
from grpo.evaluate import evaluate
from grpo.memory import fitting_tokens
from grpo.metrics import Metrics, add_groups
from grpo.policy import Policy, dtype_called
from grpo.reference import Reference
from grpo.report import Log, trackers
from grpo.sampling import open_sampler
from grpo.scoring import Reward, check_rewards, load_rewards, score
from grpo.types import Group, MicroBatch, samples_of
from rewards import reward_correct, reward_format

# Model and data
MODEL = "examples/arithmetic/model"  # local folder or hub name
DTYPE = "auto"  # float32 on a CPU, bfloat16 on an accelerator; or either by name. AdamW's states are float32 always
TRUST_REMOTE_CODE = False  # True runs the Python files of MODEL, if it has any
DATASET = "examples/arithmetic/train.jsonl"  # .jsonl, .parquet, or hub name[:config[:split]]
EVAL_DATASET = "examples/arithmetic/heldout.jsonl"  # never trained on
QUESTION_COLUMN = "question"  # holds the problem, in both data sets; MATH has it in "problem"
SYSTEM_PROMPT = "First reason between <think> and </think>, then give the answer between <answer> and </answer>."
REWARDS = [reward_correct, reward_format]  # or (function, weight); added up. Accuracy: how often the first is above 0
REF_SERVER = "http://127.0.0.1:59875"  # several, separated by commas, share the work
OUTPUT_DIR = "runs/arithmetic"
SEED: Over(-1, 2**31 - 1) = 0

# Sampling
STEPS = 60  # each samples completions and makes UPDATES_PER_BATCH updates with them
PROMPTS_PER_STEP: Over(0, 2**20) = 16  # of the whole job, all processes together
GROUP_SIZE: Over(1, 2**16) = 8  # G: completions for each prompt; more of them, better advantages: 8 to 64
MAX_PROMPT_TOKENS = 128  # longer prompts are left out
MAX_COMPLETION_TOKENS: Over(0) = 64  # 512 for GSM8K, thousands for competition mathematics
MIN_COMPLETION_TOKENS = 0  # no completion ends before so many; for benchmarks
TEMPERATURE: Over(1e-6) = 1.0  # of sampling and of every log-prob; below 1 explores less
SAMPLER: Literal["auto", "transformers", "graph", "vllm"] = "auto"  # "graph" on a GPU, if it can; else "transformers"
VLLM_MEMORY = 0.4  # share of a GPU's memory that vLLM has while it samples
IS_CAP: Over(0) = 2.0  # upper limit of the weight policy / sampler: the two round differently, vLLM most

# Loss
LOSS_TYPE: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo"] = "grpo"  # token weights; cispo: the surrogate too
IMPORTANCE: Literal["token", "sequence"] = "token"  # the ratio of each token, or of the whole sequence (GSPO)
ADVANTAGE_SCALE: Literal["group", "batch", "none"] = "group"  # whose std divides advantages; "none" for Dr. GRPO
BETA = 0.005  # beta: weight of the KL penalty; 0 needs no reference server; DeepSeekMath used 0.04
REF_SYNC_EVERY = 0  # steps after which the reference becomes the policy (iterative GRPO); 0 leaves it frozen
REF_MIXUP_ALPHA: Over(0, 1) = 1.0  # or mixes with it: alpha * policy + (1 - alpha) * reference
CLIP_LOW = 0.2  # the ratio is clipped to 1 - CLIP_LOW ...
CLIP_HIGH = 0.2  # ... 1 + CLIP_HIGH; DAPO: 0.28
ENTROPY_BONUS = 0.0  # weight of the entropy; 0.001 keeps a policy from settling too early
UPDATES_PER_BATCH: Over(0) = 1  # AdamW steps on each batch; only with more of them is there anything to clip
DROP_EQUAL_GROUPS = True  # leaves out groups whose rewards are all equal, with their KL and entropy terms, to save time
MASK_TRUNCATED = False  # completions that were cut off teach nothing (DAPO's overlong filtering)

# Optimizer and memory
LR = 5e-5  # 1e-6 for pre-trained models with full fine-tuning
WARMUP_STEPS = 10  # linear; without it Adam's first steps can ruin the model
MAX_GRAD_NORM = 1.0
MAX_SKIPPED_STEPS: Over(0) = 5  # the run ends after so many in a row whose gradients are not finite
MICRO_BATCH_TOKENS = 8192  # rows x longest row of a forward and backward pass; on a GPU it is halved at the start until
# the longest rows fit. It changes memory, not the update (nor in bfloat16, where gradients add up in bfloat16, if a
# process has less than some 100 micro-batches). 1.5B parameters need 2 MB for each token, without checkpointing
GRADIENT_CHECKPOINTING = False  # less memory for activations, a third more time
ZERO_STAGE: Literal[0, 1, 2, 3] = 1  # DeepSpeed splits over the GPUs 1 optimizer states, 2 gradients too, 3 weights too
LORA_RANK = 0  # of adapters that are trained instead of the weights; 0: no adapters. LoRA wants 10 times the LR

# Logging
EVAL_EVERY = 10  # steps, and at the start and the end; 0 turns it off
SAVE_EVERY = 30  # steps, and at the end; 0 turns it off
KEEP_CHECKPOINTS = 2  # the newest; 0 keeps all of them
TRACKERS = []  # any of tensorboard, wandb, csv: what metrics.jsonl holds, also there
RESUME = True  # the same command continues an interrupted run; False refuses a folder that holds one

if __name__ == "__main__":
    override_constants(__name__, sys.argv[1:])

DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants a number; micro-batches differ in size
    "managed_gradient_accumulation": False,  # backward() adds gradients up until step(), however many micro-batches
    "gradient_clipping": MAX_GRAD_NORM,
    "zero_optimization": {"stage": ZERO_STAGE, "overlap_comm": False, "reduce_bucket_size": 50_000_000},
    "bf16": {"enabled": dtype_called(DTYPE) == torch.bfloat16},
    "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0, "torch_adam": True, "fused": True}},
    **trackers(TRACKERS, OUTPUT_DIR),
}


# ------------------------------------------------------------------------------------------------- GRPO

def group_advantages(rewards: list[float], batch_std: float | None = None) -> torch.Tensor:
    """(r - mean) / (std + 1e-4) of a group's rewards (G,), sample standard deviation; DeepSeekMath, section 4.1.2.

    NaN means that no reward function applied: mean and std leave it out, and its advantage is 0.
    `batch_std` takes the place of the group's; with ADVANTAGE_SCALE "none" nothing divides (Dr. GRPO, 2503.20783).
    """
    rewards = torch.tensor(rewards, dtype=torch.float64)
    judged = rewards[~rewards.isnan()]
    if len(judged.unique()) < 2:
        return torch.zeros_like(rewards)  # exactly, whatever the rounding of the mean
    advantages = rewards - judged.mean()  # section 4.1.2: r - mean
    if ADVANTAGE_SCALE != "none":
        advantages /= (judged.std() if batch_std is None else batch_std) + 1e-4  # section 4.1.2: std
    return advantages.nan_to_num()


def set_advantages(groups: list[Group], rewards: list[Reward]) -> None:
    """Sets the advantage of each token (T,) of the groups' samples.

    All tokens of a completion get that of its `outcome`, normalised in the group. A function that rewards steps adds to
    it, for process supervision (DeepSeekMath, section 4.1.3): its rewards are normalised over all steps of the group,
    and each token gets the sum of those whose steps end at or after it, times the function's weight. ADVANTAGE_SCALE
    "batch" changes outcomes only.
    """
    outcomes = [one.outcome for one in samples_of(groups)]
    batch_std = distributed.std(outcomes) if ADVANTAGE_SCALE == "batch" else None
    for group in groups:
        advantages = group_advantages([one.outcome for one in group.samples], batch_std)
        for one, advantage in zip(group.samples, advantages.tolist()):
            one.advantages = torch.full((len(one.tokens),), advantage)  # section 4.1.2: A, the same for all tokens
        for place, reward in enumerate(rewards):  # one that rewards no steps adds nothing
            steps = [(one, end, value) for one in group.samples for end, value in one.steps[place]]  # section 4.1.3: R
            advantages = group_advantages([value for _, _, value in steps])
            for (one, end, _), advantage in zip(steps, advantages.tolist()):
                one.advantages[:end] += reward.weight * advantage  # section 4.1.3: sum over index(j) >= t


def set_token_weights(groups: list[Group]) -> None:
    """Sets what a token of each sample weighs in the loss: all the normalising there is, so that the losses and
    gradients of micro-batches and processes add up to those of the step, however it is split.

    grpo: 1 / (length * completions), the mean over a completion's tokens, then over completions (DeepSeekMath, eq. 3).
    dr_grpo: 1 / (MAX_COMPLETION_TOKENS * completions), no preference for short ones (arXiv 2503.20783, section 3.2).
    dapo, bnpo, cispo: 1 / (tokens of the step), the mean over all of them (DAPO, arXiv 2503.14476, eq. 12).
    """
    counted = [one for one in samples_of(groups) if one.ended or not MASK_TRUNCATED]
    completions = PROMPTS_PER_STEP * GROUP_SIZE
    all_tokens = distributed.reduce([sum(len(one.tokens) for one in counted)])[0]
    for one in counted:
        divisors = {"grpo": len(one.tokens) * completions, "dr_grpo": MAX_COMPLETION_TOKENS * completions}
        one.weight = 1 / divisors.get(LOSS_TYPE, all_tokens)  # eq. 3: 1/G, 1/length; the others: 1 / all tokens


def GRPO_step(logps: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a micro-batch from the policy's log-probs (C,) of its completion tokens, and statistics (C,) to log.
    The update is the loop's. The first call stores these log-probs in the micro-batch as `old_logps`.

    loss = sum of weight * (BETA * (exp(d) - d - 1) - surrogate), d = ref_logps - logps; DeepSeekMath, eq. 3 and 4.
    surrogate = min(ratio * A, clip(ratio) * A); ratio = exp(logps - old_logps), or its geometric mean over the
    completion if IMPORTANCE is "sequence" (GSPO, arXiv 2507.18071, eq. 5 and 7).
    The sampler computes with other kernels: surrogate * min(exp(old_logps - sampler_logps), IS_CAP), the factor as a
    constant; truncated importance sampling (Ionides 2008; for language models Yao et al. 2025).
    cispo: surrogate = clip(ratio) * A * logps, the ratio as a constant (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).
    ENTROPY_BONUS adds -logps * ratio, these logps as a constant, the ratio each token's: in expectation its gradient is
    the entropy's.

    A statistic is one line in the dict: metrics.jsonl has its mean over the tokens that are trained on.
    """
    advantages, lens = batch.advantages, batch.completion_lens  # (C,), (B,)
    logps = logps.where(batch.weights > 0, batch.sampler_logps)  # what teaches nothing must not become inf * 0
    if batch.old_logps is None:
        batch.old_logps = logps.detach()  # eq. 3: pi_old, the same policy until the first update
    log_ratio = logps - batch.old_logps  # (C,)
    if IMPORTANCE == "sequence":
        log_ratio = torch.segment_reduce(log_ratio, "mean", lengths=lens).repeat_interleave(lens)
    ratio = log_ratio.exp()  # eq. 3: ratio
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)  # eq. 3: clip
    surrogate = torch.min(ratio * advantages, clipped * advantages)  # eq. 3: min
    if LOSS_TYPE == "cispo":
        surrogate = clipped.detach() * advantages * logps
    sampler_ratio = (batch.old_logps - batch.sampler_logps).exp()
    surrogate = surrogate * sampler_ratio.clamp(max=IS_CAP)
    d = batch.ref_logps - logps if BETA else 0 * logps  # eq. 4: log-ratio
    kl = torch.expm1(d) - d  # eq. 4: KL
    objective = surrogate - BETA * kl - ENTROPY_BONUS * logps.detach() * (logps - batch.old_logps).exp()  # eq. 3: beta
    loss = -(objective * batch.weights).sum()  # eq. 3: sums

    low = (ratio < 1 - CLIP_LOW) & (advantages < 0)
    high = (ratio > 1 + CLIP_HIGH) & (advantages > 0)
    return loss, {"kl": kl if BETA else kl / 0, "entropy": -logps, "clip_low_frac": low, "clip_high_frac": high,
                  "clip_region_frac": low | high, "sampler_ratio": sampler_ratio}


# ------------------------------------------------------------------------------------------------- the loop

def groups_to_train_on(groups: list[Group]) -> list[Group]:
    """The groups that are trained on: all, or with DROP_EQUAL_GROUPS those with a signal."""
    return [group for group in groups if group.has_signal() or not DROP_EQUAL_GROUPS]


def main():
    rank, world = distributed.start()
    require(PROMPTS_PER_STEP % world == 0, f"{PROMPTS_PER_STEP=}: cannot be shared equally by {world} processes")
    require(BETA or not REF_SYNC_EVERY, f"{REF_SYNC_EVERY=}: with BETA=0 there is no reference")
    require(MIN_COMPLETION_TOKENS <= MAX_COMPLETION_TOKENS, f"{MIN_COMPLETION_TOKENS=} is over the limit")
    last, run = checkpoint.begin(OUTPUT_DIR, constants_of(__name__) | {"PROCESSES": world}, RESUME)
    # policy.module is trained, policy.model samples: two sets of modules with the same parameters
    policy = Policy(MODEL, MAX_PROMPT_TOKENS + MAX_COMPLETION_TOKENS, DTYPE, TEMPERATURE, LORA_RANK, SEED,
                    GRADIENT_CHECKPOINTING, TRUST_REMOTE_CODE)
    tokenizer, rewards = policy.tokenizer, load_rewards(REWARDS)
    settings = tokenizer, SYSTEM_PROMPT, MAX_PROMPT_TOKENS, QUESTION_COLUMN, policy.vocab_size
    train = load_prompts(DATASET, *settings)
    heldout = load_prompts(EVAL_DATASET, *settings) if EVAL_EVERY and EVAL_DATASET else []
    check_rewards(rewards, tokenizer, train, heldout)
    checkpoint.rehearse(policy, OUTPUT_DIR, REF_SYNC_EVERY)
    sampler = open_sampler(SAMPLER, policy, MAX_COMPLETION_TOKENS, VLLM_MEMORY)
    longest, rows = max(len(one.ids) for one in train), PROMPTS_PER_STEP * GROUP_SIZE // world
    # on a CPU MICRO_BATCH_TOKENS itself
    budget = fitting_tokens(policy, MICRO_BATCH_TOKENS, longest, MAX_COMPLETION_TOKENS, rows, ZERO_STAGE)
    reference = Reference(REF_SERVER, TEMPERATURE, budget, policy.fingerprint) if BETA else None
    if REF_SYNC_EVERY:
        reference.renew(policy, OUTPUT_DIR, f"{run}-{last}", alpha=0 if last else 1, patience=25)
    if reference and not (REF_SYNC_EVERY and last):
        reference.check(policy, train[0].ids)
    engine = start_engine(policy.module, DS_CONFIG)
    log, skipped = Log(OUTPUT_DIR, engine.monitor, last, STEPS), 0
    if last:
        checkpoint.load(engine, OUTPUT_DIR, last)
    else:
        log.write({"step": 0} | evaluate(sampler, heldout, rewards, tokenizer, Metrics(1, STEPS)))
    distributed.stop_at_signals()

    for step in range(last + 1, STEPS + 1):  # algorithm 1: M
        metrics = Metrics(step, STEPS)

        # 1. This process's prompts. Step and SEED fix them and their seeds, so resuming needs no data state.
        numbers = range((step - 1) * PROMPTS_PER_STEP, step * PROMPTS_PER_STEP)[rank::world]
        prompts = [pick(train, number, SEED) for number in numbers]  # eq. 3: q ~ P(Q)
        seeds = [SEED << 32 | number for number in numbers]

        # 2. Rollouts. Finished groups are rewarded and sent to the reference while longer ones are being sampled.
        groups = []
        # eq. 3: G outputs for each question
        for finished in sampler(prompts, GROUP_SIZE, TEMPERATURE, seeds, MIN_COMPLETION_TOKENS):
            metrics.lap("sample")  # the time up to here
            score(finished, rewards, tokenizer, metrics)  # sets text, rewards, reward and outcome of the samples
            if reference:
                reference.request(groups_to_train_on(finished))  # in other threads; awaited in 5
            groups += finished
            metrics.lap("reward")
        groups.sort(key=lambda group: prompts.index(group.prompt))  # they finish in any order
        metrics.lap("sample")

        # 3. Advantages and token weights: what depends on the whole step, over all processes.
        set_advantages(groups, rewards)
        set_token_weights(groups)

        # 4. Micro-batches of the groups that have something to teach, equally many on every process.
        batches = make_batches(groups_to_train_on(groups), budget, engine.device)

        # 5. The update. Losses are sums, so it does not matter how the step is split.
        set_lr(engine, lr := LR * min(1, step / max(1, WARMUP_STEPS)))
        for _ in range(UPDATES_PER_BATCH):  # algorithm 1: mu
            for batch in batches:
                logps = engine(batch.tokens, batch.prompt_lens, batch.completion_lens)  # (C,), TokenLogps.forward
                if reference:
                    reference.collect(batch, metrics)  # the server has been at work meanwhile
                loss, stats = GRPO_step(logps, batch)
                engine.backward(loss * world)  # eq. 3: gradient; DeepSpeed averages over processes
                metrics.add("loss", loss / UPDATES_PER_BATCH)
                metrics.add_tokens(stats, batch.weights > 0)
            engine.step()
            metrics.add("skipped_updates", (not was_applied(engine)) / world)
        metrics.lap("train", wait=True)

        # 6. Metrics, evaluation, renewal of the reference, checkpoint.
        add_groups(metrics, groups, rewards)
        row = metrics.row(lr=lr, grad_norm=gradient_norm(engine))
        if EVAL_EVERY and (step % EVAL_EVERY == 0 or step == STEPS):
            row |= evaluate(sampler, heldout, rewards, tokenizer, Metrics(step + 1, STEPS))
        log.write(row, groups[0], rewards)
        if REF_SYNC_EVERY and step % REF_SYNC_EVERY == 0:  # algorithm 1: I
            reference.renew(policy, OUTPUT_DIR, f"{run}-{step}", REF_MIXUP_ALPHA)
        stop = any(distributed.of_all(distributed.stopping.is_set()))
        if stop or SAVE_EVERY and (step % SAVE_EVERY == 0 or step == STEPS):
            checkpoint.save(engine, policy, OUTPUT_DIR, step, KEEP_CHECKPOINTS)
        skipped = skipped + 1 if row["skipped_updates"] else 0
        require(skipped < MAX_SKIPPED_STEPS, f"step {step}: the loss or its gradients were not finite, {skipped} times "
                f"in a row. Likely: {LR=} is too high, {TEMPERATURE=} too low, or {MODEL=} broken")
        if stop:
            break
    log.close()


if __name__ == "__main__":
    distributed.run(main)
