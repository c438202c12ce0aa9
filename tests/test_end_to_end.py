"""Real launches: the server, the deepspeed launcher, one and two processes, and what is left on the disk."""

import json
import subprocess
import sys
from itertools import chain

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo_train
from conftest import rows
from grpo import checkpoint, distributed
from grpo.constants import override_constants
from grpo.policy import Policy
from grpo.report import trackers

METRICS = set(
    """step reward reward_std reward/reward_correct reward/reward_format advantage_zero_groups kl loss entropy
    clip_low_frac clip_high_frac grad_norm lr completion_tokens_mean completion_tokens_total truncated_frac seconds
    seconds_sample seconds_ref_wait seconds_reward seconds_train peak_memory_mb accuracy""".split()
)
TEXTS = "prompt", "completion"
EVALUATION = {"eval_accuracy", "eval_tokens_mean", "eval_reward", "eval_truncated_frac"}


def data(embedded):
    return [f"MODEL={embedded}/model", f"DATASET={embedded}/train.jsonl", f"EVAL_DATASET={embedded}/heldout.jsonl"]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(folder):
    return torch.cat([p.detach().double().flatten() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()])


def test_the_main_job_learns_and_leaves_what_it_promises(launch, embedded, tmp_path):
    server = launch("ref_server.py", f"MODEL={embedded}/model", "PORT=0")
    url = server.wait_for(r"http://127.0.0.1:\d+")[0]
    run = launch(
        "deepspeed",
        "--num_accelerators",
        "1",
        "grpo_train.py",
        *data(embedded),
        f"REF_SERVER={url}",
        f"OUTPUT_DIR={tmp_path}/run",
        "STEPS=20",
        "SAVE_EVERY=12",
    )
    code, text = run.wait(400)
    assert code == 0, text
    assert "reward " in text and "held-out accuracy, greedy" in text and "before" in text

    history = read(tmp_path / "run/metrics.jsonl")
    assert [metrics["step"] for metrics in history] == list(range(21))
    assert all(METRICS <= metrics.keys() for metrics in history[1:])
    assert [m["step"] for m in history if EVALUATION <= m.keys()] == [0, 10, 20]
    assert history[0]["eval_accuracy"] <= 0.5 and history[20]["eval_accuracy"] >= 0.9
    assert 0 <= history[1]["kl"] < 1e-6 < history[20]["kl"]
    assert history[1]["lr"] == pytest.approx(grpo_train.LR / 10) and history[20]["lr"] == grpo_train.LR

    completions = read(tmp_path / "run/completions.jsonl")
    assert len(completions) == 20 * grpo_train.GROUP_SIZE
    assert {"step", "prompt", "completion", "advantage", "reward_correct", "reward_format"} == completions[0].keys()
    assert (tmp_path / "run/reward.png").read_bytes().startswith(b"\x89PNG")
    for step in 12, 20:
        AutoModelForCausalLM.from_pretrained(tmp_path / f"run/step_{step}")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / f"run/step_{step}")
        assert tokenizer.chat_template and tokenizer("<think>").input_ids == [
            tokenizer.convert_tokens_to_ids("<think>")
        ]
    assert not list(tmp_path.glob("run/*.unfinished"))

    again = launch("grpo_train.py", *data(embedded), f"OUTPUT_DIR={tmp_path}/run", "SEED=1")
    code, text = again.wait()
    assert code == 1 and "holds another run" in text and "Traceback" not in text
    assert read(tmp_path / "run/metrics.jsonl") == history


def test_process_supervision_alone_teaches_the_embedded_task(launch, embedded, tmp_path):
    # a reward for each written step and none for the answer, which is only logged
    run = launch(
        "grpo_train.py",
        *data(embedded),
        "REWARDS=0*reward_correct,examples.steps:reward_steps",
        f"OUTPUT_DIR={tmp_path}",
        "BETA=0",
        "STEPS=20",
        "SAVE_EVERY=0",
    )
    code, text = run.wait(400)
    assert code == 0, text
    history = read(tmp_path / "metrics.jsonl")
    assert history[0]["eval_accuracy"] <= 0.5 and history[20]["eval_accuracy"] >= 0.9
    assert history[20]["reward"] == history[20]["reward/reward_steps"] > history[1]["reward/reward_steps"]
    assert history[20]["kl"] is None  # there is no reference


IN_BLOCKS = """
import runpy, sys
from grpo.sampling import transformers as sampler
sampler.BLOCK = int(sys.argv[1])
sys.argv[:2] = ["grpo_train.py"]
runpy.run_path("grpo_train.py", run_name="__main__")
"""
COUNTED = """
def count(completions, **columns):
    with open({file!r}, "a") as file:
        print(len(completions), file=file)
    return [float(len(completion)) for completion in completions]
"""


def test_what_is_judged_while_others_are_written_is_judged_alike(launch, embedded, tmp_path):
    server = launch("ref_server.py", f"MODEL={embedded}/model", "PORT=0")
    url = server.wait_for(r"http://127.0.0.1:\d+")[0]
    found, calls = [], []
    for block in "1000", "1":
        folder = tmp_path / block
        folder.mkdir()
        (folder / "counted.py").write_text(COUNTED.format(file=str(folder / "calls.txt")))
        code, text = launch(
            "-c", IN_BLOCKS, block, *data(embedded), f"REF_SERVER={url}", f"OUTPUT_DIR={folder}/run", "STEPS=2",
            "REWARDS=reward_correct,0.01*counted:count", "WARMUP_STEPS=0", "BETA=0.1", "EVAL_EVERY=0", "SAVE_EVERY=0",
            "ADVANTAGE_SCALE=batch", "LOSS_TYPE=dapo", "MASK_TRUNCATED=True", "MAX_COMPLETION_TOKENS=64",
            env={"PYTHONPATH": str(folder)}).wait(100)
        assert code == 0, text
        found.append([rows(folder / "run" / name) for name in ("metrics.jsonl", "completions.jsonl")])
        calls.append([int(line) for line in (folder / "calls.txt").read_text().split()][1:])  # after the trial
    assert len(calls[0]) == 2 and len(calls[1]) > 4 and sum(calls[0]) == sum(calls[1]) == 2 * 16 * 8
    _, first, second = found[1][0]
    assert 0 <= first["kl"] < 1e-6 < second["kl"]  # with log-probs of another completion it would be large
    for one, other in zip(*map(chain.from_iterable, found), strict=True):
        assert [one.pop(name, "") for name in TEXTS] == [other.pop(name, "") for name in TEXTS]
        assert one == pytest.approx(other, rel=1e-4, abs=1e-7)


MAIN_THREAD = """
import asyncio
from math_verify import parse, verify

async def nothing():
    await asyncio.sleep(0)

def judged(completions, answer, **columns):  # math-verify's time limits are signal.alarm, for the main thread alone
    asyncio.get_event_loop().run_until_complete(nothing())
    return [float(verify(parse(f"${gold}$"), parse(f"${text[-40:]}$"))) - 0.01 * len(parse(text))
            for text, gold in zip(completions, answer)]

def done(completions, trainer_state, **columns):
    return [trainer_state.global_step / trainer_state.max_steps] * len(completions)
"""


def test_a_reward_that_wants_the_main_thread_or_the_step_has_the_same_values_in_training(launch, embedded, tmp_path):
    (tmp_path / "wanting.py").write_text(MAIN_THREAD)
    code, text = launch(
        "grpo_train.py", *data(embedded), f"OUTPUT_DIR={tmp_path}/run", "REWARDS=wanting:judged,0*wanting:done", "BETA=0",
        "STEPS=1", "EVAL_EVERY=1", "SAVE_EVERY=0", "PROMPTS_PER_STEP=2", env={"PYTHONPATH": str(tmp_path)}).wait()
    assert code == 0, text
    before, after = rows(tmp_path / "run/metrics.jsonl")
    assert [before["eval_reward/done"], after["reward/done"], after["eval_reward/done"]] == [0, 0, 1]
    code = (f"import json, sys; sys.path.insert(0, {str(tmp_path)!r}); from wanting import judged\n"
            f"rows = [json.loads(line) for line in open('{tmp_path}/run/completions.jsonl')]\n"
            f"answers = {{r['question']: r['answer'] for r in map(json.loads, open('{embedded}/train.jsonl'))}}\n"
            "gold = next(a for q, a in answers.items() if q in rows[0]['prompt'])\n"
            "expected = judged([row['completion'] for row in rows], [gold] * len(rows))\n"
            "print(json.dumps([expected, [row['judged'] for row in rows]]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    expected, found = json.loads(done.stdout.splitlines()[-1])
    assert found == expected and len(set(found)) > 1, done.stderr
    evaluated = read(tmp_path / "run/metrics.jsonl")
    assert all(isinstance(row["eval_reward"], float) for row in evaluated)


UPDATES = {  # the constants of an update, and how it may be split; the first way is what the others are compared with
    "grpo": ("LR=1e-3", ["1", "1 MICRO_BATCH_TOKENS=400", "1 GRADIENT_CHECKPOINTING=True", "1 ZERO_STAGE=0",
                         "1 ZERO_STAGE=2", "1 ZERO_STAGE=3", "2 ZERO_STAGE=0 MICRO_BATCH_TOKENS=400", "2 ZERO_STAGE=1",
                         "2 ZERO_STAGE=2 MICRO_BATCH_TOKENS=400", "2 ZERO_STAGE=3 MICRO_BATCH_TOKENS=400",
                         "2 ZERO_STAGE=3 MICRO_BATCH_TOKENS=1000 GRADIENT_CHECKPOINTING=True"]),
    # token weights and the deviation of the rewards are those of the whole step, some completions are cut off
    "dapo": ("LR=1e-4 LOSS_TYPE=dapo ADVANTAGE_SCALE=batch MASK_TRUNCATED=True MAX_COMPLETION_TOKENS=28 CLIP_LOW=0.01 "
             "CLIP_HIGH=0.01 UPDATES_PER_BATCH=2 MICRO_BATCH_TOKENS=1000", ["1", "2", "2 ZERO_STAGE=3"]),
    "lora": ("LR=3e-3 LORA_RANK=4", ["1", "2 ZERO_STAGE=3 MICRO_BATCH_TOKENS=400"]),
}


def test_an_update_does_not_depend_on_how_it_is_split(launch, embedded, tmp_path):
    # BETA=0 contacts no reference server: there is none at this address.
    common = [*data(embedded), "BETA=0", "REF_SERVER=http://127.0.0.1:9", "STEPS=1", "WARMUP_STEPS=0", "EVAL_EVERY=0"]
    runs = [(name, way, tmp_path / f"{name}{number}", constants)
            for name, (constants, ways) in UPDATES.items() for number, way in enumerate(ways)]
    for world in "1", "2":
        turns = [argument for _, way, folder, constants in runs if way[0] == world
                 for argument in ("--", f"OUTPUT_DIR={folder}", *constants.split(), *way.split()[1:])]
        if world == "2":  # each sees longer and shorter completions than the other: nobody waits for ever
            turns += ["--", f"OUTPUT_DIR={tmp_path}/long", "ZERO_STAGE=3", "STEPS=8", "SAVE_EVERY=0"]
        launcher = "deepspeed", "--num_accelerators", world, "--master_port=29610", "tests/in_turn.py"
        code, text = launch(*launcher, *common, *turns).wait(300)
        assert code == 0, text
    assert len(read(tmp_path / "long/metrics.jsonl")) == 9
    start = weights(f"{embedded}/model")
    for name in UPDATES:
        folders = {way: folder for this, way, folder, _ in runs if this == name}
        after = {way: weights(folder / "step_1") for way, folder in folders.items()}
        metrics = {way: read(folder / "metrics.jsonl")[1] for way, folder in folders.items()}
        one, expected = after["1"], metrics["1"]
        for way, other in after.items():
            assert (other - one).norm() < 1e-5 * one.norm(), (name, way)
            assert (other - one).norm() < 1e-3 * (one - start).norm(), (name, way)  # signs of tiny gradients included
            for key in "reward completion_tokens_total loss entropy advantage_zero_groups clip_region_frac".split():
                assert metrics[way][key] == pytest.approx(expected[key], rel=1e-5, abs=1e-7), (name, way, key)
            if "ZERO_STAGE=0" in way:
                assert metrics[way]["grad_norm"] is None, (name, way)  # DeepSpeed tells none
            else:
                assert metrics[way]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5), (name, way)
        assert (name == "dapo") == (expected["clip_region_frac"] > 0)
        assert expected["truncated_frac"] > 0 or name != "dapo"

    folder = tmp_path / "lora0/step_1"  # the merged model is the one that it started from, and the adapters
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{embedded}/model"), folder / "adapter")
    merged = torch.cat([p.detach().double().flatten() for p in adapted.merge_and_unload().parameters()])
    assert (merged - weights(folder)).norm() < 1e-6 * (merged - start).norm()


@pytest.mark.parametrize(
    "constants, world, sentence",
    [
        ({"PROMPTS_PER_STEP": 16}, 3, "PROMPTS_PER_STEP=16: cannot be shared equally by 3 processes"),
        ({"MIN_COMPLETION_TOKENS": 65}, 1, "MIN_COMPLETION_TOKENS=65 is over the limit"),
        ({"REF_SYNC_EVERY": 5, "BETA": 0.0}, 1, "REF_SYNC_EVERY=5: with BETA=0"),
    ],
)
def test_bad_constants_are_refused_before_anything_is_loaded(monkeypatch, constants, world, sentence):
    def begin(*_):
        raise AssertionError("nothing is wrong")

    monkeypatch.setattr(distributed, "start", lambda: (0, world))
    monkeypatch.setattr(checkpoint, "begin", begin)
    for name, value in constants.items():
        monkeypatch.setattr(grpo_train, name, value)
    with pytest.raises(SystemExit, match=sentence):
        grpo_train.main()
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "begin", begin)
    monkeypatch.setattr(distributed, "start", lambda: (0, 4))
    with pytest.raises(AssertionError, match="nothing is wrong"):
        grpo_train.main()


@pytest.mark.parametrize(
    "word", ["LOSS_TYPE=ppo", "IMPORTANCE=word", "ADVANTAGE_SCALE=std", "ZERO_STAGE=4", "SAMPLER=hf"])
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(word):
    with pytest.raises(SystemExit, match=f"{word}: expected one of "):
        override_constants("grpo_train", [word])


def test_a_temperature_of_zero_and_an_unknown_tracker_are_refused():
    with pytest.raises(SystemExit, match="TEMPERATURE=0.0: sampling needs a positive one"):
        Policy("nowhere", 9, temperature=0.0)
    with pytest.raises(SystemExit, match="TRACKERS=wandb,comet: expected csv, tensorboard, wandb"):
        trackers(["wandb", "comet"], "folder")


COUNT_FORWARD_PASSES = """
import sys, torch, grpo_train
from grpo import policy
passes, load = [], policy.load_model
def load_and_count(*arguments):
    model, tokenizer = load(*arguments)
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    return model, tokenizer
policy.load_model = load_and_count
vars(grpo_train).update(MODEL=sys.argv[1], DATASET=sys.argv[2], EVAL_EVERY=0, SAVE_EVERY=0, BETA=0, STEPS=1)
vars(grpo_train).update(OUTPUT_DIR=sys.argv[3], GRADIENT_CHECKPOINTING=sys.argv[4] == "True")
grpo_train.main()
print("forward passes with gradients:", sum(passes))
"""


def test_gradient_checkpointing_makes_the_activations_again(launch, embedded, tmp_path):
    passes = {}
    for on in False, True:
        data = f"{embedded}/model", f"{embedded}/train.jsonl", f"{tmp_path}/{on}"
        run = launch("-c", COUNT_FORWARD_PASSES, *data, str(on))
        code, text = run.wait()
        assert code == 0, text
        passes[on] = int(run.wait_for(r"with gradients: (\d+)")[1])
    assert passes[True] == 2 * passes[False] > 0


def test_a_raising_reward_ends_the_run_with_its_name_and_the_completion(launch, embedded, tmp_path):
    (tmp_path / "bad.py").write_text("def reward(completions, **columns):\n    return [1 / (not c.startswith('<think>')) for c in completions]\n")
    run = launch(
        "grpo_train.py",
        *data(embedded),
        "BETA=0",
        "REWARDS=bad:reward",
        "EVAL_EVERY=0",
        f"OUTPUT_DIR={tmp_path}/run",
        env={"PYTHONPATH": str(tmp_path)},
    )
    code, text = run.wait()
    assert code == 1 and "reward reward raised ZeroDivisionError" in text and "at the completion '<think>" in text
