"""The recipes of docs/recipes.md: their losses by hand, what they select, and each of them run from end to end."""

import json
import math
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from examples import preferences, rejection_sample, sft, steps
from grpo.data import load_prompts
from grpo.policy import load_model, token_logps
from grpo.scoring import load_rewards
from rewards import reward_correct, reward_format

PROMPT = "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
GOOD = "<think>\n2 + 3 = 5\n</think>\n<answer>5</answer>"


def write(path, objects) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in objects))
    return str(path)


# ------------------------------------------------------------------------------------------------- supervised


def test_the_supervised_loss_is_the_mean_over_all_tokens_of_the_step(tiny, tmp_path):
    model, tokenizer = tiny
    data = [{"question": f"What is {n} + 1?", "solution": "so " * n + str(n + 1)} for n in range(1, 6)]
    prompts = load_prompts(write(tmp_path / "data.jsonl", data), tokenizer, "Add.", 128)
    samples = [sft.written(prompt, prompt.columns["solution"], tokenizer) for prompt in prompts]
    expected, count = 0.0, 0
    exact = AutoTokenizer.from_pretrained(tokenizer.name_or_path), type(model).from_pretrained(model.name_or_path)
    for prompt, row in zip(prompts, data):
        start = exact[0](prompt.text, add_special_tokens=False).input_ids
        solution = exact[0](row["solution"], add_special_tokens=False).input_ids + [exact[0].eos_token_id]
        logits = exact[1].double()(torch.tensor([start + solution])).logits[0]
        logps = logits.log_softmax(-1)[len(start) - 1 : -1]
        expected -= sum(logps[place, token].item() for place, token in enumerate(solution))
        count += len(solution)
    tokens = sum(len(one.tokens) for one in samples)
    parts = [sft.supervised_loss(lambda *packed: token_logps(model, *packed), some, tokens).item()
             for some in (samples[:2], samples[2:])]  # fmt: skip
    assert tokens == count and sum(parts) == pytest.approx(expected / count, rel=1e-5)


def test_fine_tuning_lowers_the_held_out_loss_and_leaves_a_whole_folder(launch, tiny_folder, tmp_path):
    data = write(tmp_path / "data.jsonl", [{"question": f"{n} + 1?", "working": str(n + 1)} for n in range(30)])
    arguments = ["examples/sft.py", f"MODEL={tiny_folder}", f"DATASET={data}", "SOLUTION_COLUMN=working", "LR=1e-3",
                 "STEPS=8", "MICRO_BATCH=5", f"OUTPUT_DIR={tmp_path}/sft"]  # fmt: skip
    code, text = launch(*arguments).wait()
    assert code == 0, text
    record = json.loads((tmp_path / "sft/training.json").read_text())
    before, after = record["heldout_loss"]
    assert after < 0.8 * before and record["solutions"] == 27
    model, tokenizer = load_model(str(tmp_path / "sft"), 64)
    assert tokenizer("1").input_ids and not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "q"}, "row 1: no text in SOLUTION_COLUMN=solution"),
        ({"question": "q", "solution": None}, "row 1: no text in SOLUTION_COLUMN=solution"),
        ({"question": "q", "solution": "long " * 200}, "0 of 2 rows have at most MAX_TOKENS=100 tokens"),
    ],
)
def test_solutions_that_cannot_be_read_are_one_sentence(tiny, tmp_path, monkeypatch, row, message):
    monkeypatch.setattr(sft, "DATASET", write(tmp_path / "data.jsonl", [row] * 2))
    monkeypatch.setattr(sft, "MAX_TOKENS", 100)
    with pytest.raises(SystemExit, match=message):
        sft.read_solutions(tiny[1])


def test_the_clean_solutions_are_right_in_every_step(embedded):
    data = rows(embedded / "train.jsonl")[:200]
    written = [steps.solution(row) for row in data]
    assert set(reward_correct(written, answer=[row["answer"] for row in data])) == {1.0}
    assert set(reward_format(written)) == {1.25}
    for values in steps.reward_steps(written, [row["question"] for row in data]):
        assert [value for _, value in values] == [1.0] * 4


# ------------------------------------------------------------------------------------------------- rejection sampling


def answered(completion, prompt=PROMPT, **changes) -> dict:
    """A row of evaluation.jsonl."""
    row = {"model": "m", "problem": 1, "sample": 1, "prompt": prompt, "columns": {"question": "q", "answer": "5"},
           "completion": completion, "accuracy": True, "reward": 2.25, "tokens": 20, "cut_off": False, "format": True,
           "rewards": {}}  # fmt: skip
    return row | changes


def test_rejection_sampling_keeps_what_is_right_well_formed_and_new():
    loop = "<think>\n" + "2 + 3 = 5 and so " * 20 + "\n</think>\n<answer>5</answer>"
    hostile = [
        answered("wrong", accuracy=False),
        answered("not judged", accuracy=None),
        answered("bad form", format=False),
        answered("form not judged", format=None),
        answered("cut off", cut_off=True),
        answered(loop),
        answered("broken \ufffd letter"),
        answered("half a letter \ud83d"),
    ]
    same = [answered(GOOD), answered(GOOD), answered(GOOD.replace(" ", "  ") + "\n"), answered(GOOD, model="other")]
    assert rejection_sample.select(hostile) == []
    kept = rejection_sample.select([*hostile, *same, *hostile])
    assert kept == [{"question": "q", "answer": "5", "prompt": PROMPT, "solution": GOOD}]


def test_at_most_so_many_of_a_question_are_kept_and_of_every_question():
    written = [answered(GOOD + " " * (n % 2) + str(n), prompt=f"p{n % 3}", problem=n) for n in range(12)]
    kept = rejection_sample.select(written)
    assert [row["prompt"] for row in kept] == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert len({(row["prompt"], row["solution"]) for row in kept}) == 6
    assert kept == rejection_sample.select(written)
    without_format = [{key: value for key, value in row.items() if key != "format"} for row in written]
    assert len(rejection_sample.select(without_format)) == 6  # no reward function judged the form


def test_lines_and_tags_in_completions_survive_the_file(tmp_path, monkeypatch, tiny, capsys):
    wild = '<think>\u2028"\\n\0é数\n</think>\n<answer>5</answer><|im_start|>'
    monkeypatch.setattr(rejection_sample, "EVALUATION", write(tmp_path / "e.jsonl", [answered(wild)]))
    monkeypatch.setattr(rejection_sample, "SOLUTIONS", str(tmp_path / "new/kept.jsonl"))
    rejection_sample.main()
    assert "1 of 1 completions, for 1 of 1 questions" in capsys.readouterr().out
    [prompt] = load_prompts(str(tmp_path / "new/kept.jsonl"), tiny[1], "another system prompt", 128)
    assert prompt.text == PROMPT and prompt.columns["solution"] == wild


def test_nothing_to_keep_and_another_file_are_sentences(tmp_path, monkeypatch):
    for data, message in ([answered("", accuracy=False)], "none of 1 completions is right"), ([{}], "is no evaluation"):
        monkeypatch.setattr(rejection_sample, "EVALUATION", write(tmp_path / "e.jsonl", data))
        with pytest.raises(SystemExit, match=message):
            rejection_sample.main()


# ------------------------------------------------------------------------------------------------- preferences


def test_the_bradley_terry_loss_and_its_gradient():
    pairs = [(0.0, 0.0), (1.5, -0.25), (-2.0, 3.0), (30.0, -30.0), (-400.0, 400.0)]
    better, worse = (torch.tensor(part, dtype=torch.float64, requires_grad=True) for part in zip(*pairs))
    losses = preferences.bradley_terry(better, worse)
    losses.sum().backward()
    for place, (b, w) in enumerate(pairs):
        difference = b - w
        loss = math.log1p(math.exp(-difference)) if difference > -700 else -difference
        slope = 1 / (1 + math.exp(difference))  # 1 - sigmoid: the chance that the worse one wins
        assert losses[place].item() == pytest.approx(loss, rel=1e-12)
        assert better.grad[place].item() == pytest.approx(-slope, rel=1e-12)
        assert worse.grad[place].item() == pytest.approx(slope, rel=1e-12)


def judged(rewards: dict, prompt: str) -> list[dict]:
    return [answered(text, prompt=prompt, reward=reward) for text, reward in rewards.items()]


def test_pairs_are_of_one_question_and_ordered_by_the_rule():
    data = sum((judged({f"a{n}": 1.0, f"b{n}": -1.0, f"c{n}": 1.0, f"d{n}": None}, f"p{n} ") for n in range(20)), [])
    data += judged({"same": 1.0, "equal": 1.0}, "no pair ")
    train, heldout = preferences.pairs_of(data + data)
    assert len(train) == 32 and len(heldout) == 4  # two of each question, and one of every fifth, held out
    for better, worse in train + heldout:
        prompt, text = better.split(" ")
        assert text[0] in "ac" and worse == f"{prompt} b{text[1:]}"
    assert {pair.better.split()[0] for pair in heldout} == {"p0", "p5", "p10", "p15"}
    assert not {pair.worse for pair in train} & {pair.worse for pair in heldout}
    assert preferences.pairs_of(data) == (train, heldout)


@pytest.mark.parametrize(
    "replay, old, expected", [(0.1, 95, 10), (0.1, 120, 12), (0.0, 95, 0), (1.0, 95, 95), (0.1, 0, 0)]
)
def test_replay_is_exactly_its_share(monkeypatch, replay, old, expected):
    monkeypatch.setattr(preferences, "REPLAY", replay)
    new_pairs = [preferences.Pair(f"new {n}", "x") for n in range(7)]
    old_pairs = [preferences.Pair(f"old {n}", "x") for n in range(old)]
    found = preferences.with_replay(new_pairs, old_pairs)
    assert found[:7] == new_pairs and len(found) == len(set(found)) == 7 + expected
    assert set(found[7:]) <= set(old_pairs)


def test_a_reward_model_learns_the_rule_and_is_a_reward_by_its_folder(launch, tiny_folder, tmp_path):
    """Here the better completion is the one that ends in a 1."""
    data = sum((judged({f"{n} is 1": 1.0, f"{n} is 2": 0.0}, f"p{n} ") for n in range(60)), [])
    evaluation = write(tmp_path / "evaluation.jsonl", data)
    arguments = ["examples/preferences.py", f"MODEL={tiny_folder}", f"EVALUATION={evaluation}", "LR=1e-3", "STEPS=15",
                 f"OUTPUT_DIR={tmp_path}/judge"]  # fmt: skip
    code, text = launch(*arguments).wait()
    assert code == 0, text
    record = json.loads((tmp_path / "judge/training.json").read_text())
    assert record["after"][evaluation]["value"] == 1.0 > record["before"][evaluation]["value"]
    assert (record["pairs"], record["replayed"]) == (48, 0)
    [reward] = load_rewards([f"0.5*{tmp_path}/judge"])
    assert (reward.name, reward.weight) == ("judge", 0.5)
    right, wrong = reward.function(["3 is 1", "3 is 2"], prompts=["p3 ", "p3 "])
    assert right > wrong
    shutil.rmtree(tmp_path / "judge")
    (tmp_path / "judge").mkdir()
    with pytest.raises(SystemExit, match="no reward function .*judge .*the folder of a reward model"):
        load_rewards([f"{tmp_path}/judge"])


# ------------------------------------------------------------------------------------------------- from end to end

GRPO = "PROMPTS_PER_STEP=4 GROUP_SIZE=8 EVAL_EVERY=0 WARMUP_STEPS=0"


@pytest.fixture(scope="module")
def questions(embedded, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("questions")
    data = rows(embedded / "train.jsonl")
    return [f"MODEL={embedded}/model", "DATASET=" + write(folder / "train.jsonl", data[:40]),
            "EVAL_DATASET=" + write(folder / "heldout.jsonl", data[40:50])]  # fmt: skip


@pytest.fixture
def recipe(launch, tmp_path, tmp_path_factory):
    """recipe(program, arguments) runs one, with a `python` whose imports are there already."""
    path = tmp_path_factory.mktemp("s") / "s"  # a socket's path is at most 107 characters long
    server = launch("tests/fork_server.py", path)
    server.wait_until(path.exists)
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {ROOT}/tests/fork_server.py {path} "$@"\n')
    python.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def start(*arguments):
        return launch(*arguments, f"PORT={port}", env={"PATH": f"{python.parent}:{os.environ['PATH']}"}).wait(120)

    return start


def test_the_four_stages_run_and_go_on_where_they_ended(recipe, questions, tmp_path):
    folder = tmp_path / "r1"
    train = Path(questions[1].removeprefix("DATASET="))
    solved = [row | {"solution": steps.solution(row)} for row in rows(train)]
    command = ["examples/r1.sh", *questions, "SOLUTIONS=" + write(tmp_path / "solutions.jsonl", solved),
               f"OUTPUT_DIR={folder}", "COLD_STEPS=2", "RL_STEPS=2", "SFT_STEPS=2", "JUDGE_STEPS=2", "LAST_STEPS=1",
               "EVAL_SAMPLES=2", f"GRPO={GRPO}"]  # fmt: skip
    code, text = recipe(*command)
    assert code == 0, text
    kept = rows(folder / "c_sampled/kept.jsonl")
    written, answers = zip(*((row["solution"], row["answer"]) for row in kept))
    assert set(reward_correct(written, answer=answers)) == {1.0} and set(reward_format(written)) == {1.25}
    last = json.loads((folder / "d_rl/run/run.json").read_text())
    assert last["REWARDS"] == ["reward_correct", "reward_format", f"0.5*{folder}/d_rl/judge"]
    assert last["MODEL"] == f"{folder}/c_sampled/model"
    assert "reward/judge" in rows(folder / "d_rl/run/metrics.jsonl")[1]
    made_from = {name: json.loads((folder / name / "model/training.json").read_text())["MODEL"]
                 for name in ("a_cold_start", "c_sampled")}  # fmt: skip
    assert set(made_from.values()) == {questions[0].removeprefix("MODEL=")}
    table = text.split("\n\n")[-2]
    assert table.split("\n")[0].split() == ["start", "a_cold_start", "b_rl", "c_sampled", "d_rl", "only_rl"]
    assert "accuracy, greedy" in table and "reward_steps, sampled" in table and (folder / "stages.png").exists()

    shutil.rmtree(folder / "d_rl/judge")  # as if it had been killed there, and at the end
    shutil.rmtree(folder / "heldout_3")
    code, again = recipe(*command)
    assert code == 0, again
    assert [line for line in again.splitlines() if line.startswith("===")] == [
        "=== reward model", f"=== completions: {folder}/heldout_3"]
    assert again.split("\n\n")[-2:] == text.split("\n\n")[-2:]  # the same table

    code, text = recipe(*command, "LR=1e-4")
    assert code == 1 and "holds another run of this recipe" in text and "LR=1e-4" in text
    code, text = recipe(*command, "STEPS=1")
    assert code == 1 and "unknown constant STEPS=1: write NAME=value with one of MODEL DATASET" in text


def test_a_stage_that_fails_is_named_with_the_reason(recipe, questions, tmp_path):
    code, text = recipe("examples/r1.sh", *questions, f"OUTPUT_DIR={tmp_path}/r1", "SOLUTIONS=absent.jsonl")
    assert code == 1 and "cannot read the data set absent.jsonl" in text
    assert text.endswith(f"fine-tuning: {tmp_path}/r1/a_cold_start/model failed or was stopped, see above; the same "
                         "command goes on there\n")  # fmt: skip


def test_the_iterations_run_with_replay_and_both_controls(recipe, questions, tmp_path):
    folder = tmp_path / "iterative"
    command = ["python", "examples/iterative.py", *questions, f"OUTPUT_DIR={folder}", "ITERATIONS=2", "STEPS=2",
               "JUDGE_STEPS=2", "SAMPLES=4", "EVAL_SAMPLES=2", "ANNOTATOR=examples.steps:reward_steps",
               f"GRPO={GRPO}"]  # fmt: skip
    code, text = recipe(*command)
    assert code == 0, text
    records = {name: json.loads((folder / name / "training.json").read_text())
               for name in ("judge_1", "judge_2", "judge_2_without_replay")}  # fmt: skip
    old = records["judge_1"]["pairs"]
    assert [record["replayed"] for record in records.values()] == [0, round(0.1 * old), 0]
    assert records["judge_2"]["MODEL"] == records["judge_2_without_replay"]["MODEL"] == f"{folder}/judge_1"
    first = str(folder / "pairs_1/evaluation.jsonl")
    assert records["judge_2"]["before"][first] == records["judge_1"]["after"][first]
    runs = {name: json.loads((folder / name / "run.json").read_text()) for name in ("policy_1", "policy_2", "frozen_2")}
    assert [(run["MODEL"], run["REWARDS"]) for run in runs.values()] == [
        (questions[0].removeprefix("MODEL="), [f"{folder}/judge_1"]),
        (f"{folder}/policy_1/step_2", [f"{folder}/judge_2"]),
        (f"{folder}/policy_1/step_2", [f"{folder}/judge_1"])]  # fmt: skip
    for name in runs:  # the reference is the policy that the iteration starts from
        assert rows(folder / name / "metrics.jsonl")[1]["kl"] == pytest.approx(0, abs=1e-5)
    policy = AutoModelForSequenceClassification.from_pretrained(questions[0].removeprefix("MODEL="), num_labels=1)
    judge = AutoModelForSequenceClassification.from_pretrained(folder / "judge_1")
    change = (policy.model.embed_tokens.weight - judge.model.embed_tokens.weight).abs().max().item()
    assert 0 < change < 2e-3  # two steps away from the policy's own weights
    assert "iteration 2" in text and (folder / "iterations.png").exists()

    shutil.rmtree(folder / "judge_2")
    shutil.rmtree(folder / "heldout_2")
    code, again = recipe(*command)
    assert code == 0 and again.split("\n\n")[-2:] == text.split("\n\n")[-2:]
    assert [line for line in again.splitlines() if line.startswith("===")] == [
        f"=== reward model: {folder}/judge_2", f"=== completions: {folder}/heldout_2"]  # fmt: skip
    code, text = recipe(*command, "REPLAY=0.5")
    assert code == 1 and "holds another run: choose another (REPLAY=0.1 there)" in text
