"""What must hold in bfloat16 on a CUDA GPU. Skipped without one; `make test` runs it by itself:

ON_GPU=1 python -m pytest -s tests/test_gpu.py    # prints the figures it judges
"""

import copy

import arithmetic
import pytest
import torch
from conftest import rows

from grpo.sampling import graph as graph_sampler
from grpo.policy import token_logps
from grpo.data import load_prompts
from grpo.policy import load_model, stop_ids
from grpo.sampling import sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and ON_GPU=1 to see it")
DECODERS = {"transformers": None, "graph": graph_sampler.decode}


@pytest.fixture(scope="module")
def policy(embedded):
    return load_model(str(embedded / "model"), 192)


@pytest.fixture(scope="module")
def prompts(policy, embedded):
    """Of different lengths, so that there is padding."""
    found = load_prompts(str(embedded / "train.jsonl"), policy[1], arithmetic.SYSTEM_PROMPT, 128)[:16]
    return [row.ids[i % 7 :] for i, row in enumerate(found)]


def completions_of(model, tokenizer, prompts, sampler):
    return sample(model, prompts, 8, max_tokens=64, stop=stop_ids(model, tokenizer), seeds=list(range(len(prompts))),
                  decode=DECODERS[sampler])


def packed(prompts, completions):
    pairs = [(torch.tensor(prompts[i // 8]), completion.tokens) for i, completion in enumerate(completions)]
    lens = torch.tensor([[len(prompt), len(tokens)] for prompt, tokens in pairs]).T
    return [tensor.cuda() for tensor in (torch.cat([part for pair in pairs for part in pair]), *lens)]


def rms(difference) -> float:
    return difference.double().square().mean().sqrt().item()


def test_both_samplers_draw_the_same_completions_in_float32(policy, prompts):
    model = copy.deepcopy(policy[0]).float()
    eager, graph = (completions_of(model, policy[1], prompts, name) for name in DECODERS)
    assert len({len(completion.tokens) for completion in eager}) > 4
    for one, other in zip(eager, graph, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist() and one.ended == other.ended
        torch.testing.assert_close(one.sampler_logps, other.sampler_logps, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sampler", DECODERS)
def test_log_probs_in_bfloat16_are_right_to_its_rounding(policy, prompts, sampler):
    model, tokenizer = policy
    assert model.dtype == torch.bfloat16
    completions = completions_of(model, tokenizer, prompts, sampler)
    inputs = packed(prompts, completions)
    drawn = torch.cat([completion.sampler_logps for completion in completions]).cuda()
    with torch.no_grad():
        trainer = token_logps(model, *inputs)
        exact = token_logps(copy.deepcopy(model).double(), *inputs)
    print(f"\n{sampler}: sampler - trainer {rms(drawn - trainer):.4f} rms, "
          f"trainer - float64 {rms(trainer - exact):.4f} rms")
    assert trainer.dtype == torch.float32 and not drawn.isnan().any() and not trainer.isnan().any()
    assert rms(trainer - exact) < 0.05 and rms(drawn - exact) < 0.05


@pytest.mark.parametrize("sampler", DECODERS)
def test_the_first_update_starts_at_the_reference(launch, embedded, tmp_path, sampler):
    server = launch("ref_server.py", f"MODEL={embedded}/model", "PORT=0").wait_for(r"http://127.0.0.1:\d+", 120)[0]
    code, text = launch(
        "grpo_train.py", f"MODEL={embedded}/model", f"DATASET={embedded}/train.jsonl", f"OUTPUT_DIR={tmp_path}/run",
        f"REF_SERVER={server}", f"SAMPLER={sampler}", "STEPS=2", "EVAL_EVERY=0", "SAVE_EVERY=0").wait(200)
    assert code == 0, text
    first, second = rows(tmp_path / "run/metrics.jsonl")[1:]
    print(f"\n{sampler}: KL {first['kl']:.1e}, sampler_ratio {first['sampler_ratio']:.5f}")
    assert 0 <= first["kl"] < 5e-4 and abs(first["sampler_ratio"] - 1) < 0.01
    assert second["kl"] > 0 and second["skipped_updates"] == 0 and None not in second.values()


def test_every_zero_stage_makes_the_same_update(launch, embedded, tmp_path):
    turns = []
    for stage in 1, 2, 3:
        turns += ["--", f"OUTPUT_DIR={tmp_path}/{stage}", f"ZERO_STAGE={stage}"]
    code, text = launch(
        "tests/in_turn.py", f"MODEL={embedded}/model", f"DATASET={embedded}/train.jsonl", "STEPS=2", "BETA=0",
        "WARMUP_STEPS=0", "EVAL_EVERY=0", "SAVE_EVERY=0", *turns).wait(300)
    assert code == 0, text
    found = [rows(tmp_path / f"{stage}/metrics.jsonl")[1:] for stage in (1, 2, 3)]
    for first, second in found:
        assert first["grad_norm"] == pytest.approx(found[0][0]["grad_norm"], rel=0.02)
        assert first["skipped_updates"] == second["skipped_updates"] == 0 and None not in second.values()
