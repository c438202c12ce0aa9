"""The micro-batch that fits is found before the first step, and a step never learns of it."""

import pytest
import torch
from conftest import ROOT, rows
from safetensors.torch import load_file

from grpo import memory, policy
from grpo.memory import fitting_tokens

SHORT_OF_MEMORY = """
import os, runpy, sys
sys.path.insert(0, {root!r})
import torch
from grpo import memory, policy
memory.memory_is_limited = lambda: True
limit, plain = int(os.environ["LIMIT"]), policy.token_logps
last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1  # the other has enough
def token_logps(model, tokens, *rest):
    if torch.is_grad_enabled() and len(tokens) > limit and last:
        raise torch.OutOfMemoryError("injected")
    return plain(model, tokens, *rest)
policy.token_logps = token_logps
sys.argv[0] = "grpo_train.py"
runpy.run_path("grpo_train.py", run_name="__main__")
"""


@pytest.fixture(autouse=True)
def limited(monkeypatch):
    monkeypatch.setattr(memory, "memory_is_limited", lambda: True)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "short_of_memory.py"
    path.write_text(SHORT_OF_MEMORY.format(root=str(ROOT)))
    return str(path)


TWO = ["deepspeed", "--num_accelerators", "2"]


def test_micro_batches_are_halved_until_the_longest_rows_fit_on_every_process(launch, few, tmp_path, script):
    few = [*few, "BETA=0", "EVAL_EVERY=0", "SAVE_EVERY=1", "WARMUP_STEPS=0", "PROMPTS_PER_STEP=4"]
    code, text = launch("grpo_train.py", *few, "STEPS=2", f"OUTPUT_DIR={tmp_path}/enough").wait()
    assert code == 0 and "do not fit" not in text, text
    for steps in 1, 2:  # the second run goes on where the first has ended
        code, text = launch(*TWO, "--master_port=29620", script, *few, f"STEPS={steps}", f"OUTPUT_DIR={tmp_path}/short",
                            env={"LIMIT": "700"}).wait()
        assert code == 0 and text.count("because 8192 do not fit into memory") == 1, text
    one, other = (load_file(tmp_path / name / "step_2/model.safetensors") for name in ("enough", "short"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4)
    one, other = (rows(tmp_path / name / "metrics.jsonl") for name in ("enough", "short"))
    for first, second in zip(one, other, strict=True):
        assert first.pop("kl", None) is None is second.pop("kl", None)  # there is no reference
        assert first == pytest.approx(second, rel=1e-3, abs=1e-6)


def test_a_row_that_does_not_fit_is_one_sentence(launch, few, tmp_path, script):
    code, text = launch(*TWO, "--master_port=29621", script, *few, "BETA=0", "EVAL_EVERY=0",
                        f"OUTPUT_DIR={tmp_path}/run", env={"LIMIT": "20"}).wait()
    assert code and "does not fit into memory: lower MAX_COMPLETION_TOKENS" in text and "Traceback" not in text, text
    assert "GRADIENT_CHECKPOINTING" in text and "ZERO_STAGE" in text and "LORA_RANK" in text


@pytest.mark.parametrize("limit, found", [(500, 500), (499, 250), (249, 125), (99, 61), (49, None)])
def test_how_often_it_is_halved(alone, tiny_folder, monkeypatch, limit, found):
    def token_logps(model, tokens, *rest):
        if len(tokens) > limit:
            raise torch.OutOfMemoryError("injected")
        return plain(model, tokens, *rest)

    plain = policy.token_logps
    monkeypatch.setattr(policy, "token_logps", token_logps)
    if found:
        assert fitting_tokens(policy.Policy(tiny_folder, 50), 500, 20, 30, 128, 1) == found
    else:
        with pytest.raises(SystemExit, match="a row of 50 tokens does not fit into memory"):
            fitting_tokens(policy.Policy(tiny_folder, 50), 500, 20, 30, 128, 1)


def test_the_trial_is_as_large_as_a_micro_batch_can_be_and_leaves_nothing(alone, tiny_folder, monkeypatch):
    tried, sizes = policy.Policy(tiny_folder, 50), []
    before = [parameter.clone() for parameter in tried.model.parameters()]
    plain = policy.token_logps
    monkeypatch.setattr(policy, "token_logps", lambda model, tokens, *rest: sizes.append(
        [len(tokens), *map(len, rest[:2])]) or plain(model, tokens, *rest))
    random = torch.random.get_rng_state()
    assert fitting_tokens(tried, 500, 20, 30, 128, 1) == 500 and sizes == [[500, 10, 10]]
    assert fitting_tokens(tried, 500, 20, 30, 4, 1) == 500 and sizes[1] == [200, 4, 4]  # a step has no more
    assert fitting_tokens(tried, 500, 600, 30, 128, 1) == 500 and sizes[2] == [630, 1, 1]  # a longer row alone
    assert fitting_tokens(tried, 500, 100, 30, 128, 3) == 500 and sizes[3] == [500, 4, 4]  # 3.8 rows: four of 125
    held, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: held.append(
        sizes[0] if options.get("dtype") == torch.uint8 else 0) or empty(*sizes, **options))
    for stage in range(4):  # one process: AdamW's states, and gradients that stay between two micro-batches
        assert memory.fits(tried, 1, 20, 10, stage)
        assert max(held) == (12 + 4) * sum(map(torch.numel, before))
        held.clear()
    assert all(torch.equal(one, other) for one, other in zip(before, tried.model.parameters()))
    assert all(parameter.grad is None for parameter in tried.model.parameters()) and not tried.model.training
    assert torch.equal(random, torch.random.get_rng_state())
