"""SAMPLER="vllm", real vLLM: tokens and log-probs are those of transformers, before and after an update; it learns."""

import json

import pytest
import torch
from conftest import ROOT

from grpo import distributed
from grpo.data import load_prompts
from grpo.policy import Policy, load_model, stop_ids, token_logps
from grpo.sampling import sample
from grpo.types import Prompt, pack

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm", exc_type=ImportError)


@pytest.fixture(scope="module", params=["arithmetic", "smollm2"])
def folder(request, embedded):
    found = ROOT / "examples" / request.param
    if not found.exists():
        pytest.skip(f"python examples/{request.param}.py makes the model")
    return found


@pytest.fixture(scope="module")
def policy(folder, engine):
    model, tokenizer = engine.policy.model, engine.policy.tokenizer
    prompts = [row.ids for row in load_prompts(str(folder / "heldout.jsonl"), tokenizer, "Think.", 128)[:16]]
    return model, prompts, stop_ids(model, tokenizer)


@pytest.fixture(scope="module")
def engine(folder):
    from grpo.sampling.vllm import Engine

    distributed.start()
    return Engine(Policy(str(folder / "model"), 128 + 64, "float32"), 0.4)


def draw(engine, prompts, group_size, **options):
    """The samples of the engine's groups, in the order of the prompts."""
    prompts = [Prompt(ids) for ids in prompts]
    found = {id(group.prompt): group.samples for groups in engine.rollouts(prompts, group_size, **options)
             for group in groups}
    return [sample for prompt in prompts for sample in found[id(prompt)]]


def update(model):
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    ids = torch.randint(model.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_tokens_and_log_probs_before_and_after_an_update(policy, engine):
    model, prompts, stop = policy
    options = {"max_tokens": 40, "stop": stop}
    greedy = []
    for _ in range(2):
        expected = sample(model, prompts, 1, temperature=0, **options)
        found = draw(engine, prompts, 1, temperature=0, **options)
        drawn = draw(engine, prompts, 3, temperature=0.7, seeds=list(range(16)), **options)
        assert [c.tokens.tolist() for c in found] == [c.tokens.tolist() for c in expected]
        assert [c.ended for c in found] == [c.ended for c in expected]
        with torch.no_grad():
            logps = token_logps(model, *pack(drawn), temperature=0.7)
        assert (torch.cat([c.sampler_logps for c in drawn]) - logps).abs().max() < 1e-4
        greedy.append([c.tokens.tolist() for c in found])
        update(model)
    assert greedy[0] != greedy[1]  # else the update was too small to tell old weights from new ones


def test_a_prompt_has_the_same_completions_in_any_batch(policy, engine):
    model, prompts, stop = policy
    options = {"max_tokens": 24, "min_tokens": 8, "stop": stop, "temperature": 2.0}
    together = draw(engine, prompts[:4], 4, seeds=[5, 6, 7, 8], **options)
    alone = draw(engine, prompts[2:3], 4, seeds=[7], **options)
    texts = [tuple(completion.tokens.tolist()) for completion in together]
    assert [tuple(completion.tokens.tolist()) for completion in alone] == texts[8:12]
    assert len(set(texts)) == 16 and min(map(len, texts)) >= 8
    assert all(completion.ended == (completion.tokens[-1].item() in stop) for completion in together)


OPEN = """
import sys, vllm
llm = vllm.LLM(sys.argv[1], enforce_eager=True, dtype="float32", max_model_len=192)
prompts = [{"prompt_token_ids": ids} for ids in eval(sys.argv[2])]
print([list(a.outputs[0].token_ids) for a in llm.generate(prompts, vllm.SamplingParams(temperature=0, max_tokens=40))])
"""


def test_a_run_learns_and_its_checkpoint_opens_in_vllm(folder, policy, tmp_path, launch):
    learns = folder.name == "arithmetic"
    few = "REWARDS=reward_len", "STEPS=2", "EVAL_EVERY=0", "PROMPTS_PER_STEP=2", "GROUP_SIZE=4", "WARMUP_STEPS=0"
    trainer = launch(
        "grpo_train.py", "SAMPLER=vllm", "BETA=0", f"OUTPUT_DIR={tmp_path}/run", f"MODEL={folder}/model",
        f"DATASET={folder}/train.jsonl", f"EVAL_DATASET={folder}/heldout.jsonl",
        *(("STEPS=16", "EVAL_EVERY=8") if learns else few))
    code, said = trainer.wait(500)
    assert code == 0, said
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert not learns or rows[0]["eval_accuracy"] < 0.3 and rows[-1]["eval_accuracy"] > 0.8
    assert all(0 < abs(row["sampler_ratio"] - 1) < 1e-3 for row in rows[1:])

    _, prompts, stop = policy
    last = tmp_path / f"run/step_{rows[-1]['step']}"
    model, _ = load_model(str(last))
    expected = [c.tokens.tolist() for c in sample(model, prompts, 1, temperature=0, max_tokens=40, stop=stop)]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    reader = launch("-c", OPEN, str(last), str(prompts), env=environment)
    code, said = reader.wait(300)
    assert code == 0 and str(expected) in said, said
