"""The embedded task: deterministic, written whole or not at all, the same when it is loaded again."""

import json
import random
import signal
import subprocess
import sys

import arithmetic
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo_train
from rewards import reward_correct, reward_format


def build(folder, *constants):
    subprocess.run(
        [
            sys.executable,
            "examples/arithmetic.py",
            f"OUTPUT_DIR={folder}",
            "WARMUP_STEPS=3",
            "TRAIN_PROBLEMS=50",
            "HELDOUT_PROBLEMS=20",
            *constants,
        ],
        cwd=ROOT,
        check=True,
        timeout=120,
    )


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_files(tmp_path):
    build(tmp_path / "a")
    build(tmp_path / "b")
    build(tmp_path / "c", "SEED=1")
    a, b, c = (content(tmp_path / name) for name in "abc")
    assert (
        a == b and a["train.jsonl"] != c["train.jsonl"] and a["model/model.safetensors"] != c["model/model.safetensors"]
    )
    questions = [
        json.loads(line)["question"] for name in ("train", "heldout") for line in a[f"{name}.jsonl"].splitlines()
    ]
    assert len(set(questions)) == 70


def test_an_interrupted_build_leaves_nothing(launch, tmp_path):
    for number in signal.SIGINT, signal.SIGKILL:
        process = launch("examples/arithmetic.py", f"OUTPUT_DIR={tmp_path}/task")
        process.wait_for("supervised warm-up: +[1-9]")
        process.popen.send_signal(number)
        assert process.wait(60)[0] != 0
        assert not (tmp_path / "task").exists()


def test_saved_and_loaded_again_it_gives_the_same_ids_and_logits(tmp_path):
    problems = arithmetic.make_problems(100, random.Random(0))
    tokenizer = arithmetic.make_tokenizer(problems)
    model = arithmetic.make_model(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokenizer_again = AutoTokenizer.from_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for text in [problems[0]["solution"], problems[1]["question"], "<think>\n12,345 + héllo\n\n </think>  <|im_end|>"]:
        ids = tokenizer(text).input_ids
        assert ids == tokenizer_again(text).input_ids and tokenizer_again.decode(ids) == text
        assert torch.equal(model(torch.tensor([ids])).logits, again(torch.tensor([ids])).logits)
    assert tokenizer.chat_template == tokenizer_again.chat_template
    assert len(tokenizer("<think></think><answer></answer>").input_ids) == 4


def test_answers_are_right_and_some_solutions_are_not():
    problems = arithmetic.make_problems(300, random.Random(0))
    for problem in problems:
        assert eval(problem["question"].removeprefix("What is ").removesuffix("?")) == int(problem["answer"])
    rewards = reward_correct([p["solution"] for p in problems], answer=[p["answer"] for p in problems])
    assert 0.2 < rewards.count(1.0) / 300 < 0.7
    assert set(reward_format([p["solution"] for p in problems])) == {1.25}


def test_the_system_prompt_is_the_trainers():
    assert arithmetic.SYSTEM_PROMPT == grpo_train.SYSTEM_PROMPT
