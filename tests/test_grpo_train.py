"""The loss, its gradient, the advantages and the order of the data, against float64 written out by hand."""

import math
import statistics
import time
from dataclasses import replace

import pytest
import torch

import grpo_train
from grpo.data import pick
from grpo.metrics import Metrics
from grpo.policy import token_logps
from grpo.types import Group, MicroBatch, Prompt, Sample, in_batches, micro_batch, split
from grpo_train import GRPO_step, group_advantages, set_advantages, set_token_weights
from grpo.scoring import Reward, score


@pytest.fixture(autouse=True)
def constants(monkeypatch):
    for name, value in {"BETA": 0.04, "CLIP_LOW": 0.2, "CLIP_HIGH": 0.2}.items():
        monkeypatch.setattr(grpo_train, name, value)


def batch_of(lens, advantages, weights, ref, old, sampler) -> MicroBatch:
    """A micro-batch for GRPO_step: a number for each completion, or for each token."""
    lens = torch.tensor(lens)
    advantages, weights = (torch.as_tensor(values).repeat_interleave(lens) for values in (advantages, weights))
    return MicroBatch([], None, None, lens, advantages, weights, sampler, old, ref)


def make_batch(lens, advantages, completions_in_step, ref_logps, sampler_logps=None):
    weights = torch.tensor([1 / (n * completions_in_step) for n in lens])
    sampler = torch.zeros(sum(lens)) if sampler_logps is None else torch.tensor(sampler_logps)
    return batch_of(lens, advantages, weights, torch.tensor(ref_logps), None, sampler)


def token_weights(lens, truncated=()) -> list[float]:
    """By `set_token_weights`, for completions of these lengths."""
    prompt = Prompt([1])
    samples = [Sample(prompt, torch.zeros(n, dtype=torch.long), torch.zeros(n), i not in truncated)
               for i, n in enumerate(lens)]
    set_token_weights([Group(prompt, samples)])
    return [sample.weight for sample in samples]


def test_loss_and_gradient_are_those_of_the_paper():
    # EOS alone, an ordinary completion, one cut off at the limit: to the loss they differ by their length alone.
    lens, advantages, completions_in_step = [1, 3, 4], [1.5, -0.7, 0.25], 8
    logps = [-0.1, -1.2, -0.4, -2.0, -0.3, -0.9, -1.1, -0.05]
    ref_logps = [-0.3, -1.0, -0.4, -1.5, -0.2, -1.9, -1.0, -0.07]
    loss, gradient, k = 0.0, [], 0
    for n, advantage in zip(lens, advantages):
        for _ in range(n):
            d = ref_logps[k] - logps[k]
            weight = 1 / n / completions_in_step
            loss += weight * (0.04 * (math.exp(d) - d - 1) - advantage)  # the ratio is 1
            gradient.append(weight * (0.04 * (1 - math.exp(d)) - advantage))
            k += 1
    leaf = torch.tensor(logps, requires_grad=True)
    ours, found = GRPO_step(leaf, make_batch(lens, advantages, completions_in_step, ref_logps, logps))
    ours.backward()
    assert ours.item() == pytest.approx(loss, rel=1e-6)
    assert leaf.grad.tolist() == pytest.approx(gradient, rel=1e-5)
    assert not found["clip_low_frac"].any() and not found["clip_high_frac"].any()
    kl = [math.exp(r - p) - (r - p) - 1 for r, p in zip(ref_logps, logps)]
    assert found["kl"].tolist() == pytest.approx(kl, rel=1e-5, abs=1e-7)
    assert found["entropy"].tolist() == pytest.approx([-logp for logp in logps], rel=1e-6)


def test_without_a_reference_the_kl_is_unknown_not_zero(monkeypatch):
    monkeypatch.setattr(grpo_train, "BETA", 0.0)
    leaf = torch.tensor([-0.5, -1.5], requires_grad=True)
    loss, found = GRPO_step(leaf, replace(make_batch([2], [2.0], 1, leaf.tolist(), leaf.tolist()), ref_logps=None))
    assert found["kl"].isnan().all() and loss.item() == -2.0


def test_kl_is_zero_and_the_ratio_one_before_the_first_update():
    leaf = torch.tensor([-0.5, -1.5], requires_grad=True)
    loss, found = GRPO_step(leaf, make_batch([2], [2.0], 1, leaf.tolist(), leaf.tolist()))
    assert not found["kl"].any()
    assert loss.item() == -2.0  # minus ratio x advantage, and the ratio is exactly 1


def test_a_filler_of_weight_zero_adds_nothing(alone):
    leaf = torch.tensor([-0.5, -150.0], requires_grad=True)  # exp of 150 is infinite in float32
    batch = replace(make_batch([2], [2.0], 1, [0.0, 0.0]), weights=torch.zeros(2))
    loss, found = GRPO_step(leaf, batch)
    loss.backward()
    assert not leaf.grad.any() and not loss
    batch = replace(batch, **dict.fromkeys(["old_logps", "sampler_logps", "ref_logps"], torch.tensor([-400.0, -400.0])))
    later, _ = GRPO_step(leaf, batch)  # another update, when the ratio of what is masked is infinite
    later.backward()
    assert not leaf.grad.any() and not later
    metrics = Metrics()
    metrics.add_tokens(found, batch.weights > 0)
    assert not any(metrics.totals.values()) and not any(metrics.counts.values())
    assert all(math.isnan(mean) for mean in metrics.reduced().values())  # no number, and no 0


# ------------------------------------------------------------------------------------------------- the variants

LENS, LIMIT, COMPLETIONS = [1, 3, 4, 2], 6, 8  # of completions here; the longest allowed; of completions in the step
ADVANTAGES = [1.5, -0.7, 0.25, -2.0]
STEP_TOKENS = 21


def random_logps(seed, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    return (-0.1 - scale * torch.rand(sum(LENS), generator=generator, dtype=torch.float64)).tolist()


def by_the_papers(logps, frozen, old, sampler, ref, loss_type, importance, beta, entropy):
    """The loss as the papers write it: sums over completions i and tokens t. `frozen` are logps as constants; `sampler`
    are the log-probs that the tokens were drawn with, and the correction for them is cut off at 1.2."""
    total, k = 0.0, 0
    for length, advantage in zip(LENS, ADVANTAGES):
        tokens = range(k, k + length)
        k += length
        sequence_ratio = math.exp(sum(logps[t] - old[t] for t in tokens) / length)
        constant_sequence_ratio = math.exp(sum(frozen[t] - old[t] for t in tokens) / length)
        objective = 0.0
        for t in tokens:
            ratio = math.exp(logps[t] - old[t]) if importance == "token" else sequence_ratio
            constant = math.exp(frozen[t] - old[t]) if importance == "token" else constant_sequence_ratio
            if loss_type == "cispo":
                surrogate = min(max(constant, 0.8), 1.3) * advantage * logps[t]
            else:
                surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)
            surrogate *= min(math.exp(old[t] - sampler[t]), 1.2)
            kl = math.exp(ref[t] - logps[t]) - (ref[t] - logps[t]) - 1
            objective += surrogate - beta * kl - entropy * frozen[t] * math.exp(logps[t] - old[t])
        if loss_type == "grpo":
            total -= objective / length / COMPLETIONS
        elif loss_type == "dr_grpo":
            total -= objective / LIMIT / COMPLETIONS
        else:
            total -= objective / STEP_TOKENS
    return total


@pytest.mark.parametrize("beta, entropy, other_sampler", [(0.0, 0.0, False), (0.04, 0.0, True), (0.04, 0.1, False)])
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo"])
def test_every_variant_is_the_one_of_its_paper(alone, monkeypatch, loss_type, importance, beta, entropy, other_sampler):
    constants = {
        "LOSS_TYPE": loss_type, "IMPORTANCE": importance, "BETA": beta, "ENTROPY_BONUS": entropy, "CLIP_LOW": 0.2,
        "CLIP_HIGH": 0.3, "MAX_COMPLETION_TOKENS": LIMIT, "PROMPTS_PER_STEP": 2, "GROUP_SIZE": 4, "IS_CAP": 1.2,
    }
    for name, value in constants.items():
        monkeypatch.setattr(grpo_train, name, value)
    logps, old, ref = random_logps(7, 1.0), random_logps(2, 1.0), random_logps(3)
    sampler = random_logps(4, 1.0) if other_sampler else old
    elsewhere = [STEP_TOKENS - sum(LENS)]  # the tokens of the step's other completions
    weights = torch.tensor(token_weights([*LENS, *elsewhere])[: len(LENS)], dtype=torch.float64)
    tensors = (torch.tensor(values, dtype=torch.float64) for values in (ref, old, sampler))
    batch = batch_of(LENS, torch.tensor(ADVANTAGES, dtype=torch.float64), weights, *tensors)
    leaf = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
    loss, found = GRPO_step(leaf, batch)
    loss.backward()
    arguments = (logps, old, sampler, ref, loss_type, importance, beta, entropy)
    assert loss.item() == pytest.approx(by_the_papers(logps, *arguments), rel=1e-12)

    differences, h = [], 1e-6
    for t in range(len(logps)):
        up, down = ([x + sign * h * (i == t) for i, x in enumerate(logps)] for sign in (1, -1))
        differences.append((by_the_papers(up, *arguments) - by_the_papers(down, *arguments)) / (2 * h))
    assert leaf.grad.tolist() == pytest.approx(differences, rel=1e-6, abs=1e-9)

    ratios = [math.exp(p - q) for p, q in zip(logps, old)]
    if importance == "sequence":
        parts = torch.tensor(logps).sub(torch.tensor(old)).split(LENS)
        ratios = [part.mean().exp().item() for part in parts for _ in part]
    advantages = [advantage for advantage, length in zip(ADVANTAGES, LENS) for _ in range(length)]
    low = sum(r < 0.8 and a < 0 for r, a in zip(ratios, advantages))
    high = sum(r > 1.3 and a > 0 for r, a in zip(ratios, advantages))
    sampler_ratio = [math.exp(p - q) for p, q in zip(old, sampler)]
    assert found["sampler_ratio"].tolist() == pytest.approx(sampler_ratio, rel=1e-12)
    clipped = tuple(found[f"clip_{name}_frac"].sum() for name in ("low", "high", "region"))
    assert clipped == (low, high, low + high) and (importance == "sequence" or low and high)


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo"])
def test_every_variant_is_trls_on_the_same_tensors(alone, monkeypatch, tiny_folder, tmp_path, loss_type, importance):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    clip_low = 1.0 if loss_type == "cispo" else 0.2  # TRL's cispo has no lower bound
    constants = {
        "LOSS_TYPE": loss_type, "IMPORTANCE": importance, "BETA": 0.04, "CLIP_LOW": clip_low, "CLIP_HIGH": 0.3,
        "MAX_COMPLETION_TOKENS": LIMIT, "PROMPTS_PER_STEP": 1, "GROUP_SIZE": len(LENS),
    }
    for name, value in constants.items():
        monkeypatch.setattr(grpo_train, name, value)
    config = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, use_cpu=True, bf16=False,
        loss_type=loss_type, importance_sampling_level=importance, beta=0.04, epsilon=0.2, report_to=[],
        epsilon_high=1.3 if loss_type == "cispo" else 0.3,  # TRL's cispo bounds the ratio itself
        use_bias_correction_kl=False, max_completion_length=LIMIT,
    )
    trainer = trl.GRPOTrainer(
        model=tiny_folder, reward_funcs=lambda completions, **columns: [0.0] * len(completions), args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": "1+1"}] * 4),
    )
    trainer.model.eval()  # the whole batch in one piece, as the step is here
    lens = torch.tensor(LENS)
    real = torch.arange(max(LENS)) < lens[:, None]  # (B, T)

    def padded(values):
        return torch.zeros(real.shape, dtype=torch.float64).masked_scatter(real, values)

    old, ref = (torch.tensor(random_logps(seed, 1.0), dtype=torch.float64) for seed in (2, 3))
    theirs, ours = (torch.tensor(random_logps(7, 1.0), dtype=torch.float64, requires_grad=True) for _ in range(2))
    advantages, some = torch.tensor(ADVANTAGES, dtype=torch.float64), torch.ones(len(LENS), 1, dtype=torch.long)
    monkeypatch.setattr(
        trainer, "_get_per_token_logps_and_entropies", lambda *a, **k: (padded(theirs), padded(-theirs.detach()), None)
    )
    inputs = {
        "prompt_ids": some, "prompt_mask": some, "completion_ids": real.long(), "completion_mask": real.long(),
        "advantages": advantages, "old_per_token_logps": padded(old), "ref_per_token_logps": padded(ref),
        "num_items_in_batch": torch.tensor(sum(LENS)),
    }
    their_loss = trainer._compute_loss(trainer.model, inputs)
    their_loss.backward()
    weights = torch.tensor(token_weights(LENS), dtype=torch.float64)
    our_loss = GRPO_step(ours, batch_of(LENS, advantages, weights, ref, old, old))[0]
    our_loss.backward()
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    assert ours.grad.tolist() == pytest.approx(theirs.grad.tolist(), rel=1e-6, abs=1e-12)


def test_the_entropy_bonus_has_no_less_of_it_in_a_ratio_of_sequences(monkeypatch):
    """Of all 16 texts of two independent tokens, weighted by their probability."""
    for name, value in {"BETA": 0.0, "ENTROPY_BONUS": 1.0, "IMPORTANCE": "sequence"}.items():
        monkeypatch.setattr(grpo_train, name, value)
    logits = torch.tensor([0.3, -1.2, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(0)
    entropy = torch.autograd.grad(-(logps.exp() * logps).sum(), logits, retain_graph=True)[0]
    texts = torch.cartesian_prod(torch.arange(4), torch.arange(4))  # (16, 2)
    chosen = logps[texts]
    batch = batch_of([2] * 16, torch.zeros(16), chosen.detach().sum(1).exp(), None, None, chosen.detach().flatten())
    loss = GRPO_step(chosen.flatten(), batch)[0]
    assert torch.autograd.grad(-loss, logits)[0].tolist() == pytest.approx((2 * entropy).tolist(), rel=1e-12)


def test_the_entropy_bonus_has_the_gradient_of_the_entropy(monkeypatch):
    # over every token of a small vocabulary, weighted by its probability, the bonus' gradient is that of -sum p log p
    monkeypatch.setattr(grpo_train, "BETA", 0.0)
    monkeypatch.setattr(grpo_train, "ENTROPY_BONUS", 1.0)
    logits = torch.tensor([0.3, -1.2, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(0)
    entropy = torch.autograd.grad(-(logps.exp() * logps).sum(), logits, retain_graph=True)[0]
    batch = batch_of([1, 1, 1, 1], torch.zeros(4), logps.exp().detach(), None, None, logps.detach())
    loss = GRPO_step(logps, batch)[0]
    assert torch.autograd.grad(-loss, logits)[0].tolist() == pytest.approx(entropy.tolist(), rel=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_what_divides_the_advantages(monkeypatch, scale):
    monkeypatch.setattr(grpo_train, "ADVANTAGE_SCALE", scale)
    rewards = [[1.0, -1.0, -1.0, 2.25], [0.0, 0.0, 1.0, 0.5], [0.1, 0.1, 0.1, 0.1]]
    batch_std = statistics.stdev([reward for group in rewards for reward in group])
    ours = [group_advantages(group, batch_std if scale == "batch" else None).tolist() for group in rewards]
    for group, row in zip(rewards, ours):
        divisor = {"group": statistics.stdev(group) + 1e-4, "batch": batch_std + 1e-4, "none": 1.0}[scale]
        assert row == pytest.approx([(r - statistics.mean(group)) / divisor for r in group], rel=1e-12, abs=1e-15)
    assert not any(ours[2])


def test_the_batchs_deviation_is_that_of_all_processes_samples(alone):
    values = [1.0, -1.0, -1.0, 2.25, 0.0, 0.5]
    assert grpo_train.distributed.std(values) == pytest.approx(statistics.stdev(values), rel=1e-12)


def test_advantages_use_the_sample_standard_deviation_of_the_group():
    rewards = [[1.0, -1.0, -1.0, 2.25], [0.0, 0.0, 1.0, 0.5]]
    for group in rewards:
        row = group_advantages(group).tolist()
        mean, std = statistics.mean(group), statistics.stdev(group)
        assert row == pytest.approx([(r - mean) / (std + 1e-4) for r in group], rel=1e-12)


def test_equal_rewards_give_no_advantage_whatever_the_rounding():
    for count in 1, 3, 7, 10:
        assert group_advantages([0.1] * count).tolist() == [0.0] * count


def test_process_supervision_gives_each_token_the_steps_that_end_at_or_after_it(tiny):
    # DeepSeekMath, section 4.1.3, by hand: three completions of a group, steps that end after so many characters
    _, tokenizer = tiny
    texts = ["12+34=46, 5", "1+1=3", "77"]
    steps = [[(3, 1.0), (8, -0.5), (11, 2.0)], [(5, -1.0)], []]
    outcomes, weight = [1.0, 0.0, 0.5], 0.25
    tokens = [torch.tensor(tokenizer(text).input_ids + [tokenizer.eos_token_id]) for text in texts]
    samples = [Sample(Prompt([1]), ids, torch.zeros(len(ids)), True) for ids in tokens]

    def judge_steps(completions, **columns):
        assert completions == texts
        return steps

    def judge_outcomes(completions, **columns):
        return outcomes

    group, rewards = Group(samples[0].prompt, samples), [
        Reward(judge_steps, weight, "steps"), Reward(judge_outcomes, 1.0, "outcomes")]
    score([group], rewards, tokenizer, Metrics())
    set_advantages([group], rewards)

    rewards = [reward for its_steps in steps for _, reward in its_steps]
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    outcome_mean, outcome_std = statistics.mean(outcomes), statistics.stdev(outcomes)
    for sample, its_steps, outcome in zip(samples, steps, outcomes):
        pieces = [tokenizer.decode([token]) for token in sample.tokens.tolist()]
        expected, written = [], 0
        for piece in pieces:  # a token belongs to a step as long as it starts before the step's end
            later = sum((reward - mean) / (std + 1e-4) for end, reward in its_steps if end > written)
            expected.append((outcome - outcome_mean) / (outcome_std + 1e-4) + weight * later)
            written += len(piece)
        assert sample.advantages.tolist() == pytest.approx(expected, rel=1e-6)
        assert expected[-1] == pytest.approx((outcome - outcome_mean) / (outcome_std + 1e-4))  # EOS ends no step


def test_without_steps_every_token_has_the_advantage_of_its_completion():
    samples = [Sample(Prompt([1]), torch.zeros(n, dtype=torch.long), torch.zeros(n), True, outcome=outcome, steps=[[]])
               for n, outcome in ((1, 0.0), (3, 2.0))]
    set_advantages([Group(samples[0].prompt, samples)], [Reward(len, 1.0, "len")])
    advantage = 1 / (math.sqrt(2) + 1e-4)
    assert samples[0].advantages.tolist() == pytest.approx([-advantage])
    assert samples[1].advantages.tolist() == pytest.approx([advantage] * 3)


def test_what_a_function_without_weight_says_of_steps_is_no_signal(tiny):
    prompt, (_, tokenizer) = Prompt([1]), tiny
    ids = torch.tensor(tokenizer("1+1=3").input_ids)
    samples = [Sample(prompt, ids, torch.zeros(len(ids)), False) for _ in range(2)]

    def steps(completions, **columns):
        return [[(3, 1.0)], [(3, -1.0)]]

    for weight in 0.0, 0.5:
        group = Group(prompt, [replace(sample, rewards=[], steps=[]) for sample in samples])
        rewards = [Reward(steps, weight, "steps")]
        score([group], rewards, tokenizer, Metrics())
        set_advantages([group], rewards)
        assert group.has_signal() == (weight > 0) == any(sample.advantages.any() for sample in group.samples)


def test_an_outcome_that_no_function_judged_is_no_part_of_the_group_even_if_steps_were(tiny):
    prompt, (_, tokenizer) = Prompt([1]), tiny
    ids = torch.tensor(tokenizer("1+1=3").input_ids)
    group = Group(prompt, [Sample(prompt, ids, torch.zeros(len(ids)), False) for _ in range(3)])
    rewards = [Reward(lambda completions, **columns: [1.0, None, 3.0], 1.0, "outcomes"),
               Reward(lambda completions, **columns: [[(5, 0.5)]] * 3, 1.0, "steps")]
    score([group], rewards, tokenizer, Metrics())
    set_advantages([group], rewards)
    assert [sample.reward for sample in group.samples] == [1.5, 0.5, 3.5]
    expected = [-1 / (math.sqrt(2) + 1e-4), 0.0, 1 / (math.sqrt(2) + 1e-4)]
    assert [sample.advantages[0].item() for sample in group.samples] == pytest.approx(expected)


def test_a_completion_without_any_step_is_not_judged_by_that_function(tiny):
    prompt, (_, tokenizer) = Prompt([1]), tiny
    ids = torch.tensor(tokenizer("1+1=3").input_ids)
    group = Group(prompt, [Sample(prompt, ids, torch.zeros(len(ids)), False) for _ in range(4)])
    rewards = [Reward(lambda completions, **columns: [1.0, 3.0, None, None], 1.0, "outcomes"),
               Reward(lambda completions, **columns: [[], [], [(3, 0.0)], []], 1.0, "steps")]
    score([group], rewards, tokenizer, Metrics())
    set_advantages([group], rewards)
    assert [sample.reward for sample in group.samples] == [1.0, 3.0, 0.0, 0.0]
    expected = [-1 / (math.sqrt(2) + 1e-4), 1 / (math.sqrt(2) + 1e-4), 0.0, 0.0]  # the last two have no outcome
    assert [sample.advantages[0].item() for sample in group.samples] == pytest.approx(expected)


def test_what_a_reward_function_logs_replaces_no_number_of_ours(alone):
    metrics = Metrics(step=7)
    metrics.add("loss", 0.5)
    for name in "step", "lr", "loss", "seconds", "mine":
        metrics.log(name, 99.0)
    row = metrics.row(lr=0.1)
    assert (row["step"], row["lr"], row["loss"], row["mine"]) == (7, 0.1, 0.5, 99.0) and row["seconds"] < 9


def test_a_mean_is_over_what_was_counted_and_without_a_count_it_is_a_sum(alone):
    metrics = Metrics()
    for total, count in (3.0, 2), (1.0, 6):
        metrics.add("mean", total, count)
        metrics.add("sum", total)
    metrics.add("nothing", 0.0, 0)
    metrics.add("exact", 2.0**24 + 1)
    metrics.add_tokens({"kl": torch.tensor([1.0, math.nan, 4.0])}, torch.tensor([True, False, True]))
    found = metrics.reduced()
    assert found["exact"] == 2**24 + 1
    assert found["mean"] == 0.5 and found["sum"] == 4.0 and math.isnan(found["nothing"]) and found["kl"] == 2.5


def test_timers_wait_for_the_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: time.sleep(0.05))
    metrics = Metrics()
    metrics.lap("sample")
    metrics.lap("train", wait=True)
    assert metrics.seconds["seconds_train"] >= 0.05 > metrics.seconds["seconds_sample"]


def random_samples(tokenizer, count):
    generator = torch.Generator().manual_seed(1)
    samples = []
    for i, (p, c) in enumerate(torch.randint(1, 9, (count, 2), generator=generator).tolist()):
        prompt = Prompt(torch.randint(len(tokenizer), (p,), generator=generator).tolist())
        tokens = torch.randint(len(tokenizer), (c,), generator=generator)
        samples.append(Sample(prompt, tokens, torch.zeros(c), True, weight=1 / (c * count),
                              advantages=torch.full((c,), float(i % 4) - 1.5)))
    return samples


def gradients(model, batches, ref=-5.0):
    model.zero_grad()
    for samples in batches:
        batch = micro_batch(samples, "cpu")
        logps = token_logps(model, batch.tokens, batch.prompt_lens, batch.completion_lens)
        batch.ref_logps, batch.sampler_logps = torch.full_like(logps, ref), logps.detach()
        GRPO_step(logps, batch)[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_micro_batch_size_does_not_change_the_update(tiny):
    model, tokenizer = tiny
    samples = random_samples(tokenizer, 12)
    whole = gradients(model, [samples])
    for budget in 1, 20, 40:
        batches = in_batches(samples, budget)
        assert len(batches) > 1 and sum(map(len, batches)) == 12
        parts = gradients(model, batches)
        assert (parts - whole).norm() < 1e-5 * whole.norm()


def test_dropping_a_group_without_signal_changes_nothing_but_its_kl(tiny, monkeypatch):
    monkeypatch.setattr(grpo_train, "BETA", 0.0)
    model, tokenizer = tiny
    samples = random_samples(tokenizer, 8)
    for sample in samples[:4]:
        sample.advantages = torch.zeros(len(sample.tokens))
    with_group, without = gradients(model, [samples]), gradients(model, [samples[4:]])
    assert (with_group - without).norm() < 1e-6 * without.norm()


def test_equal_groups_are_trained_on_for_their_kl_if_that_is_wanted(alone, monkeypatch):
    # The paper's objective over two groups of two completions, one of them with equal rewards, term by term in float64.
    lens, ref = [3, 2, 4, 1], random_logps(3)[:10]
    logps, rewards = random_logps(7)[:10], [[1.0, 0.0], [0.5, 0.5]]
    monkeypatch.setattr(grpo_train, "PROMPTS_PER_STEP", 2)
    monkeypatch.setattr(grpo_train, "GROUP_SIZE", 2)
    samples = [Sample(Prompt([1]), torch.arange(sum(lens[:i]), sum(lens[: i + 1])), torch.zeros(n), True,
                      outcome=outcome, steps=[[]]) for i, (n, outcome) in enumerate(zip(lens, sum(rewards, [])))]
    groups = [Group(samples[0].prompt, samples[:2]), Group(samples[2].prompt, samples[2:])]
    set_advantages(groups, {len: 1.0})
    set_token_weights(groups)
    losses, parts = {}, [torch.tensor(values, dtype=torch.float64) for values in (logps, ref)]
    for drop in False, True:
        monkeypatch.setattr(grpo_train, "DROP_EQUAL_GROUPS", drop)
        kept = [sample for group in grpo_train.groups_to_train_on(groups) for sample in group.samples]
        ours, theirs = (torch.cat([part[sample.tokens] for sample in kept]) for part in parts)
        advantages = torch.tensor([sample.advantages[0] for sample in kept], dtype=torch.float64)
        weights = torch.tensor([sample.weight for sample in kept], dtype=torch.float64)
        batch = batch_of([len(sample.tokens) for sample in kept], advantages, weights, theirs, None, ours)
        losses[drop] = GRPO_step(ours, batch)[0].item()
    advantage = 0.5 / (math.sqrt(0.5) + 1e-4)
    expected, k = {False: 0.0, True: 0.0}, 0
    for i, (n, advantage) in enumerate(zip(lens, [advantage, -advantage, 0.0, 0.0])):
        for t in range(k, k + n):
            d = ref[t] - logps[t]
            term = (0.04 * (math.exp(d) - d - 1) - advantage) / n / 4
            expected[False] += term
            expected[True] += term if i < 2 else 0
        k += n
    assert losses == pytest.approx(expected, rel=1e-6) and losses[False] != losses[True]


def test_a_completion_that_was_cut_off_weighs_nothing_with_mask_truncated(alone, monkeypatch):
    monkeypatch.setattr(grpo_train, "LOSS_TYPE", "dapo")
    assert token_weights([3, 2, 5], truncated=[2]) == [0.1] * 3
    monkeypatch.setattr(grpo_train, "MASK_TRUNCATED", True)
    assert token_weights([3, 2, 5], truncated=[2]) == [0.2, 0.2, 0.0]


def test_micro_batches_keep_to_the_budget_and_lose_no_row():
    lengths = [5, 90, 7, 30, 30, 1, 200]
    batches = split(lengths, 100)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 100
        assert lengths[batch[0]] == max(lengths[index] for index in batch)
    assert batches[0] == [6]  # the largest first, so that a lack of memory shows at once


def test_a_group_whose_rows_are_of_similar_length_stays_together():
    lengths = [70, 100, 65, 90, 80, 66, 101, 95, 1000]  # two groups of four, and a row of another
    assert [sorted(batch) for batch in split(lengths, 404)] == [[8], [0, 1, 2, 3], [4, 5, 6, 7]]


def test_every_epoch_has_every_row_once_in_an_order_of_its_own():
    prompts = [Prompt([number]) for number in range(50)]
    first, second = ([pick(prompts, number, 0) for number in numbers] for numbers in (range(50), range(50, 100)))
    assert set(first) == set(second) == set(prompts)
    assert first != second and first == [pick(prompts, number, 0) for number in range(50)]
