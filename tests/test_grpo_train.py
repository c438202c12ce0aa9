"""The loss, its gradient, the advantages and the order of the data, against float64 written out by hand."""

import math
import statistics
import time
from collections import Counter

import pytest
import torch

import grpo_train
from grpo import distributed
from grpo import report
from grpo_train import GRPO_step, epoch_order, group_advantages, pack, set_advantages
from grpo.policy import token_logps
from grpo.types import micro_batches


@pytest.fixture(autouse=True)
def constants(monkeypatch):
    for name, value in {"BETA": 0.04, "CLIP_LOW": 0.2, "CLIP_HIGH": 0.2}.items():
        monkeypatch.setattr(grpo_train, name, value)


def make_batch(lens, advantages, completions_in_step, ref_logps):
    rows = (
        torch.zeros(sum(lens) + len(lens), dtype=torch.long),
        torch.ones(len(lens), dtype=torch.long),
        torch.tensor(lens),
    )
    return {
        "rows": rows,
        "advantage": torch.tensor(advantages).repeat_interleave(rows[2]),
        "ref_logps": torch.tensor(ref_logps),
        "weight": torch.tensor([1 / (n * completions_in_step) for n in lens]).repeat_interleave(rows[2]),
    }


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
    ours, sums = GRPO_step(leaf, make_batch(lens, advantages, completions_in_step, ref_logps))
    ours.backward()
    assert ours.item() == pytest.approx(loss, rel=1e-6)
    assert leaf.grad.tolist() == pytest.approx(gradient, rel=1e-5)
    assert sums["count tokens"] == 8 and sums["clip_low_frac"] == sums["clip_high_frac"] == 0
    assert sums["kl"] == pytest.approx(sum(math.exp(r - p) - (r - p) - 1 for r, p in zip(ref_logps, logps)), rel=1e-5)
    assert sums["entropy"] == pytest.approx(-sum(logps), rel=1e-6)


def test_kl_is_zero_and_the_ratio_one_before_the_first_update():
    leaf = torch.tensor([-0.5, -1.5], requires_grad=True)
    loss, sums = GRPO_step(leaf, make_batch([2], [2.0], 1, leaf.tolist()))
    assert sums["kl"] == 0.0
    assert loss.item() == -2.0  # minus ratio x advantage, and the ratio is exactly 1


def test_a_filler_of_weight_zero_adds_nothing():
    leaf = torch.tensor([-0.5, -1.5], requires_grad=True)
    batch = make_batch([2], [2.0], 1, [-3.0, -3.0])
    loss, sums = GRPO_step(leaf, batch | {"weight": torch.zeros(2)})
    loss.backward()
    assert not leaf.grad.any()
    assert {name for name, value in sums.items() if value} == {"count sampler_ratio", "sampler_ratio"}


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
            objective += surrogate - beta * kl - entropy * frozen[t] * ratio
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
def test_every_variant_is_the_one_of_its_paper(monkeypatch, loss_type, importance, beta, entropy, other_sampler):
    constants = {
        "LOSS_TYPE": loss_type, "IMPORTANCE": importance, "BETA": beta, "ENTROPY_BONUS": entropy, "CLIP_LOW": 0.2,
        "CLIP_HIGH": 0.3, "MAX_COMPLETION_TOKENS": LIMIT, "PROMPTS_PER_STEP": 2, "GROUP_SIZE": 4, "IS_CAP": 1.2,
    }
    for name, value in constants.items():
        monkeypatch.setattr(grpo_train, name, value)
    logps, old, ref = random_logps(7, 1.0), random_logps(2, 1.0), random_logps(3)
    sampler = random_logps(4, 1.0) if other_sampler else old
    lens = torch.tensor(LENS)
    weights = torch.tensor(grpo_train.token_weights(LENS, STEP_TOKENS), dtype=torch.float64)
    batch = {
        "rows": (None, None, lens),
        "advantage": torch.tensor(ADVANTAGES, dtype=torch.float64).repeat_interleave(lens),
        "weight": weights.repeat_interleave(lens),
        "old_logps": torch.tensor(old, dtype=torch.float64),
        "ref_logps": torch.tensor(ref, dtype=torch.float64),
    } | ({"sampler_logps": torch.tensor(sampler, dtype=torch.float64)} if other_sampler else {})
    leaf = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
    loss, sums = GRPO_step(leaf, batch)
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
    assert sums["sampler_ratio"] == pytest.approx(sum(math.exp(p - q) for p, q in zip(old, sampler)), rel=1e-12)
    clipped = sums["clip_low_frac"], sums["clip_high_frac"], sums["clip_region_frac"]
    assert clipped == (low, high, low + high) and (importance == "sequence" or low and high)


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo"])
def test_every_variant_is_trls_on_the_same_tensors(monkeypatch, tiny_folder, tmp_path, loss_type, importance):
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
    weights = torch.tensor(grpo_train.token_weights(LENS, sum(LENS)), dtype=torch.float64)
    batch = {
        "rows": (None, None, lens), "advantage": advantages.repeat_interleave(lens), "old_logps": old, "ref_logps": ref,
        "weight": weights.repeat_interleave(lens),
    }
    our_loss = GRPO_step(ours, batch)[0]
    our_loss.backward()
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    assert ours.grad.tolist() == pytest.approx(theirs.grad.tolist(), rel=1e-6, abs=1e-12)


def test_the_entropy_bonus_has_the_gradient_of_the_entropy(monkeypatch):
    # over every token of a small vocabulary, weighted by its probability, the bonus' gradient is that of -sum p log p
    monkeypatch.setattr(grpo_train, "BETA", 0.0)
    monkeypatch.setattr(grpo_train, "ENTROPY_BONUS", 1.0)
    logits = torch.tensor([0.3, -1.2, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(0)
    entropy = torch.autograd.grad(-(logps.exp() * logps).sum(), logits, retain_graph=True)[0]
    batch = {"rows": (None, None, torch.ones(4, dtype=torch.long)), "advantage": torch.zeros(4)}
    loss = GRPO_step(logps, batch | {"weight": logps.exp().detach()})[0]
    assert torch.autograd.grad(-loss, logits)[0].tolist() == pytest.approx(entropy.tolist(), rel=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_what_divides_the_advantages(monkeypatch, scale):
    monkeypatch.setattr(grpo_train, "ADVANTAGE_SCALE", scale)
    rewards = [[1.0, -1.0, -1.0, 2.25], [0.0, 0.0, 1.0, 0.5], [0.1, 0.1, 0.1, 0.1]]
    batch_std = statistics.stdev([reward for group in rewards for reward in group])
    ours = group_advantages(torch.tensor(rewards, dtype=torch.float64), batch_std)
    for group, row in zip(rewards, ours.tolist()):
        divisor = {"group": statistics.stdev(group) + 1e-4, "batch": batch_std + 1e-4, "none": 1.0}[scale]
        assert row == pytest.approx([(r - statistics.mean(group)) / divisor for r in group], rel=1e-12, abs=1e-15)
    assert not ours[2].any()


def test_advantages_use_the_sample_standard_deviation_of_the_group():
    rewards = [[1.0, -1.0, -1.0, 2.25], [0.0, 0.0, 1.0, 0.5]]
    ours = group_advantages(torch.tensor(rewards, dtype=torch.float64))
    for group, row in zip(rewards, ours.tolist()):
        mean, std = statistics.mean(group), statistics.stdev(group)
        assert row == pytest.approx([(r - mean) / (std + 1e-4) for r in group], rel=1e-12)


def test_equal_rewards_give_no_advantage_whatever_the_rounding():
    assert not group_advantages(torch.full((3, 7), 0.1, dtype=torch.float64)).any()
    assert not group_advantages(torch.full((3, 7), 0.1)).any()


def test_process_supervision_gives_each_token_the_steps_that_end_at_or_after_it(tiny):
    # DeepSeekMath, section 4.1.3, by hand: three completions of a group, steps that end after so many characters
    _, tokenizer = tiny
    texts = ["12+34=46, 5", "1+1=3", "77"]
    steps = [[(3, 1.0), (8, -0.5), (11, 2.0)], [(5, -1.0)], []]
    outcomes, weight = [1.0, 0.0, 0.5], 0.25
    samples = [{"completion": torch.tensor(tokenizer(text).input_ids + [tokenizer.eos_token_id]), "outcome": outcome,
                "steps": [its_steps]} for text, outcome, its_steps in zip(texts, outcomes, steps)]
    set_advantages(samples, [weight], tokenizer, 1.0)

    rewards = [reward for its_steps in steps for _, reward in its_steps]
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    outcome_mean, outcome_std = statistics.mean(outcomes), statistics.stdev(outcomes)
    for sample, its_steps, outcome in zip(samples, steps, outcomes):
        pieces = [tokenizer.decode([token]) for token in sample["completion"].tolist()]
        expected, written = [], 0
        for piece in pieces:  # a token belongs to a step as long as it starts before the step's end
            later = sum((reward - mean) / (std + 1e-4) for end, reward in its_steps if end > written)
            expected.append((outcome - outcome_mean) / (outcome_std + 1e-4) + weight * later)
            written += len(piece)
        assert sample["advantage"].tolist() == pytest.approx(expected, rel=1e-6)
        assert expected[-1] == pytest.approx((outcome - outcome_mean) / (outcome_std + 1e-4))  # EOS ends no step


def test_without_steps_every_token_has_the_advantage_of_its_completion(tiny):
    samples = [{"completion": torch.zeros(n, dtype=torch.long), "outcome": outcome, "steps": [[]]}
               for n, outcome in ((1, 0.0), (3, 2.0))]
    set_advantages(samples, [1.0], tiny[1], 1.0)
    advantage = 1 / (math.sqrt(2) + 1e-4)
    assert samples[0]["advantage"].tolist() == pytest.approx([-advantage])
    assert samples[1]["advantage"].tolist() == pytest.approx([advantage] * 3)


def test_a_function_that_does_not_apply_is_left_out_of_the_mean():
    sums = {"reward": 6.0, "reward/a": 3.0, "count reward/a": 2, "reward/b": 0.0, "count reward/b": 0}
    means = report.means(sums, 4)
    assert means["reward"] == 1.5 and means["reward/a"] == 1.5 and math.isnan(means["reward/b"])
    assert means.keys() == {"reward", "reward/a", "reward/b"}


def test_the_samplers_ratio_is_a_mean_over_all_that_was_computed_and_no_0_without_a_signal(monkeypatch):
    leaf = torch.tensor([-0.5, -1.5], requires_grad=True)
    filler = make_batch([2], [2.0], 1, [-3.0, -3.0])
    filler |= {"weight": torch.zeros(2), "sampler_logps": torch.tensor([-0.4, -1.5])}
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)  # alone
    sums = report.means(distributed.reduce(GRPO_step(leaf, filler)[1]), 8)
    assert sums["sampler_ratio"] == pytest.approx((math.exp(-0.1) + 1) / 2, rel=1e-6) and sums["kl"] == 0


def test_timers_wait_for_the_accelerator(monkeypatch):
    seconds = Counter()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: time.sleep(0.05))
    with report.timed(seconds, "train"):
        pass
    assert seconds["train"] >= 0.05


def random_samples(tokenizer, count):
    generator = torch.Generator().manual_seed(1)
    lens = torch.randint(1, 9, (count, 2), generator=generator).tolist()
    return [
        {
            "prompt": torch.randint(len(tokenizer), (p,), generator=generator),
            "advantage": torch.full((c,), float(i % 4) - 1.5),
            "completion": torch.randint(len(tokenizer), (c,), generator=generator),
            "length": p + c,
            "weight": torch.full((c,), 1 / (c * count)),
        }
        for i, (p, c) in enumerate(lens)
    ]


def gradients(model, batches):
    model.zero_grad()
    for samples in batches:
        batch = {key: torch.cat([s[key] for s in samples]) for key in ("advantage", "weight")}
        batch |= {"rows": pack(samples), "ref_logps": torch.cat([s["ref"] for s in samples])}
        GRPO_step(token_logps(model, *batch["rows"]), batch)[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_micro_batch_size_does_not_change_the_update(tiny):
    model, tokenizer = tiny
    samples = random_samples(tokenizer, 12)
    for sample in samples:
        sample["ref"] = torch.full((len(sample["completion"]),), -5.0)
    whole = gradients(model, [samples])
    for budget in 1, 20, 40:
        batches = micro_batches(samples, budget)
        assert len(batches) > 1 and sum(map(len, batches)) == 12
        parts = gradients(model, batches)
        assert (parts - whole).norm() < 1e-5 * whole.norm()


def test_dropping_a_group_without_signal_changes_nothing_but_its_kl(tiny, monkeypatch):
    monkeypatch.setattr(grpo_train, "BETA", 0.0)
    model, tokenizer = tiny
    samples = random_samples(tokenizer, 8)
    for sample in samples:
        sample["ref"] = torch.zeros(len(sample["completion"]))
    for sample in samples[:4]:
        sample["advantage"] = torch.zeros(len(sample["completion"]))
    with_group, without = gradients(model, [samples]), gradients(model, [samples[4:]])
    assert (with_group - without).norm() < 1e-6 * without.norm()


def test_equal_groups_are_trained_on_for_their_kl_if_that_is_wanted(monkeypatch):
    # The paper's objective over two groups of two completions, one of them with equal rewards, term by term in float64.
    lens, ref = [3, 2, 4, 1], random_logps(3)[:10]
    logps, rewards = random_logps(7)[:10], [[1.0, 0.0], [0.5, 0.5]]
    monkeypatch.setattr(grpo_train, "PROMPTS_PER_STEP", 2)
    monkeypatch.setattr(grpo_train, "GROUP_SIZE", 2)
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64)).flatten()
    weights = grpo_train.token_weights(lens, sum(lens))
    whole = [{"advantage": advantage.repeat(n), "weight": torch.full((n,), weight, dtype=torch.float64),
              "place": slice(sum(lens[:i]), sum(lens[: i + 1]))}
             for i, (n, weight, advantage) in enumerate(zip(lens, weights, advantages))]
    losses = {}
    for drop in False, True:
        monkeypatch.setattr(grpo_train, "DROP_EQUAL_GROUPS", drop)
        kept = grpo_train.trained([whole[:2], whole[2:]])
        batch = {name: torch.cat([one[name] for one in kept]) for name in ("advantage", "weight")}
        parts = [torch.tensor(values, dtype=torch.float64) for values in (logps, ref)]
        ours, theirs = (torch.cat([part[one["place"]] for one in kept]) for part in parts)
        lengths = torch.tensor([len(one["advantage"]) for one in kept])
        losses[drop] = GRPO_step(ours, batch | {"rows": (None, None, lengths), "ref_logps": theirs})[0].item()
    expected, k = {False: 0.0, True: 0.0}, 0
    for i, (n, advantage) in enumerate(zip(lens, advantages.tolist())):
        for t in range(k, k + n):
            d = ref[t] - logps[t]
            term = (0.04 * (math.exp(d) - d - 1) - advantage) / n / 4
            expected[False] += term
            expected[True] += term if i < 2 else 0
        k += n
    assert losses == pytest.approx(expected, rel=1e-12) and losses[False] != losses[True]


def test_micro_batches_keep_to_the_budget_and_lose_no_row():
    rows = [{"length": n, "i": i} for i, n in enumerate([5, 90, 7, 30, 30, 1, 200])]
    batches = micro_batches(rows, 100)
    assert sorted(row["i"] for batch in batches for row in batch) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(row["length"] for row in batch) <= 100
    assert [row["length"] for row in batches[0]] == [200]  # the largest first, so that a lack of memory shows at once


def test_every_epoch_has_every_row_once_in_an_order_of_its_own():
    first, second = epoch_order(0, 50), epoch_order(1, 50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second and first == epoch_order(0, 50)
