"""An interrupted run ends as if nothing had happened; a save that fails loses nothing."""

import html
import json
import math
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, rows
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from grpo import checkpoint
from grpo import report
from grpo.policy import Policy

SAME = "BETA=0 STEPS=6 SAVE_EVERY=2 EVAL_EVERY=3".split()


def test_a_killed_run_ends_bit_identical_to_an_undisturbed_one(launch, few, tmp_path):
    few = [*few, *SAME]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, text = launch("grpo_train.py", *few, f"OUTPUT_DIR={whole}").wait()
    assert code == 0, text
    moments = [
        lambda: (broken / "completions.jsonl").exists(),  # before any save
        lambda: (broken / "step_4.unfinished").exists(),  # during a save
    ]
    for moment in moments:
        run = launch("grpo_train.py", *few, f"OUTPUT_DIR={broken}")
        run.wait_until(moment)
        run.end()
    code, text = launch("grpo_train.py", *few, f"OUTPUT_DIR={broken}").wait()
    assert code == 0, text
    first, second = (load_file(folder / "step_6/model.safetensors") for folder in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    assert rows(whole / "metrics.jsonl") == rows(broken / "metrics.jsonl")
    assert [row["step"] for row in rows(broken / "metrics.jsonl")] == list(range(7))
    assert (whole / "completions.jsonl").read_text() == (broken / "completions.jsonl").read_text()
    assert sorted(path.name for path in broken.glob("step_*")) == ["step_4", "step_6"]  # KEEP_CHECKPOINTS
    for name in "README.md", "reward.png":
        assert (whole / "step_6" / name).read_bytes() == (broken / "step_6" / name).read_bytes(), name
    the_card_is_right(whole, few[0].removeprefix("MODEL="))

    constants = " ".join([*few, "STEPS=8", f"OUTPUT_DIR={broken}"])
    command = f"ulimit -f 1000; exec {sys.executable} grpo_train.py {constants}"  # as on a full disk
    code, text = launch("-c", f"import os; os.execlp('bash', 'bash', '-c', {command!r})").wait()
    assert code == 1 and "step_8: " in text and "complete checkpoints: [4, 6]. Make room" in text, text
    assert not (broken / "step_8").exists()
    code, text = launch("grpo_train.py", *few, "STEPS=8", f"OUTPUT_DIR={broken}").wait()
    assert code == 0 and [row["step"] for row in rows(broken / "metrics.jsonl")] == list(range(9)), text


def the_card_is_right(run, start):
    """What a checkpoint says about itself, and that it opens as it says."""
    history, folder = rows(run / "metrics.jsonl"), run / "step_6"
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {"library_name": "transformers", "pipeline_tag": "text-generation",
                                   "tags": ["grpo", "reinforcement-learning"]}  # nothing of it is on the hub
    before, after = (history[step]["eval_reward"] for step in (0, 6))
    assert f"| held-out reward, greedy | {before:.3f} | {after:.3f} |" in card.text
    assert f"| training reward | {history[1]['reward']:.3f} | {history[6]['reward']:.3f} |" in card.text
    assert history[6]["kl"] is None and "KL to the reference |" not in card.text  # there is no reference
    assert "after 6 steps of GRPO" in card.text and "| `LR` | 5e-05 |" in card.text
    assert "| `SYSTEM_PROMPT` | First reason between &#60;think&#62; and" in card.text
    assert "seconds" not in card.text and str(run) not in card.text and "](reward.png)" in card.text
    assert (folder / "reward.png").read_bytes().startswith(b"\x89PNG")

    template, its_template = (AutoTokenizer.from_pretrained(path).chat_template for path in (start, folder))
    config, its_config = (GenerationConfig.from_pretrained(path).to_dict() for path in (start, folder))
    assert template and its_template == template and config["eos_token_id"] is not None and its_config == config
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert len(code.splitlines()) == 3
    said = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=100)
    assert said.returncode == 0 and "'role': 'assistant'" in said.stdout, said.stderr


def test_the_card_names_what_is_on_the_hub_and_only_that(tmp_path):
    hostile = "| <img src=x> `a` [b](c)\n---\n# no"
    constants = {"MODEL": "Qwen/Qwen2.5-1.5B-Instruct", "DATASET": "openai/gsm8k:main:train", "REWARDS": ["mine"],
                 "SYSTEM_PROMPT": hostile + "\n```", "MAX_COMPLETION_TOKENS": 9}
    (tmp_path / "run.json").write_text(json.dumps(constants))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "reward": 0.5, "kl": null}\n')
    (tmp_path / "step_1").mkdir()
    report.card(tmp_path, tmp_path / "step_1")
    card = ModelCard.load(tmp_path / "step_1/README.md")
    assert card.data.base_model == "Qwen/Qwen2.5-1.5B-Instruct" and card.data.datasets == ["openai/gsm8k"]
    assert card.text.count("\n# ") == 1 and card.text.count("\n```") == 2
    assert "'role': 'system'" in card.text
    row = re.search(r"^\| `SYSTEM_PROMPT` \| (.*) \|$", card.text, re.MULTILINE)[1]
    assert html.unescape(row) == hostile + "\n```" and not set(row) & set("|<`[]*\n")
    assert report.on_hub("gpt2") and not any(map(report.on_hub, ["a/b/c", "/a/b", "train.jsonl", "tests", "", "a b"]))


def test_the_card_of_a_run_without_a_system_prompt_asks_without_one(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({
        "MODEL": "a", "DATASET": "b", "REWARDS": [], "SYSTEM_PROMPT": "", "MAX_COMPLETION_TOKENS": 9}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    report.card(tmp_path, tmp_path)
    assert "print(chat([{'role': 'user', 'content': 'What is 2 + 3?'}], " in (tmp_path / "README.md").read_text()


def test_what_is_logged_is_json_whatever_it_was(tmp_path):
    report.append(str(tmp_path / "rows.jsonl"), {
        "mean": math.nan, "all": [math.inf, 1.5], "array": torch.tensor([1, 2]), "one": torch.tensor(0.5), "path": tmp_path})
    (line,) = (tmp_path / "rows.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=None)
    assert "NaN" not in line and "Infinity" not in line
    assert row == {"mean": None, "all": [None, 1.5], "array": [1, 2], "one": 0.5, "path": str(tmp_path)}
    with pytest.raises(SystemExit, match="metrics.jsonl is not there: no run has come to its first step in"):
        report.show(str(tmp_path))


def test_a_card_that_fails_loses_no_checkpoint(alone, tiny, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no more colours")

    monkeypatch.setattr(report, "draw", fail)
    (tmp_path / "run.json").write_text(json.dumps({"MODEL": "a", "DATASET": "b", "REWARDS": [], "SYSTEM_PROMPT": "",
                                                   "MAX_COMPLETION_TOKENS": 9}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')

    class Engine:
        def save_checkpoint(self, folder, **_):
            Path(folder, "state").mkdir(parents=True)

    policy = SimpleNamespace(model=tiny[0], tokenizer=tiny[1], gathered=nullcontext, path=str(tmp_path))
    checkpoint.save(Engine(), policy, tmp_path, 1, 0)
    assert checkpoint.complete(tmp_path) == [1] and (tmp_path / "step_1/model.safetensors").exists()
    assert "step_1: the model card is not whole: RuntimeError('no more colours')" in capsys.readouterr().out


def test_only_whole_rows_up_to_the_checkpoint_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps({"step": step}) + "\n" for step in range(5))
    path.write_text(text + '{"step": 5, "los')
    checkpoint.cut(path, 4)
    assert path.read_text() == text
    checkpoint.cut(path, 2)
    assert [row["step"] for row in rows(path)] == [0, 1, 2]
    checkpoint.cut(path, 0)
    assert path.read_text() == "" and list(tmp_path.iterdir()) == [path]


def test_unfinished_checkpoints_do_not_count(alone, tmp_path):
    for name in "step_2", "step_10", "step_12.unfinished", "step_x":
        (tmp_path / name / "state").mkdir(parents=True)
    assert checkpoint.complete(tmp_path) == [2, 10]
    assert checkpoint.begin(tmp_path, {"LR": 1.0}, True)[0] == 10
    assert not (tmp_path / "step_12.unfinished").exists()
    assert json.loads((tmp_path / "run.json").read_text()) == {"LR": 1.0}


def test_a_folder_with_another_run_is_refused(alone, tmp_path):
    assert checkpoint.begin(tmp_path, {"LR": 1.0, "STEPS": 5, "REWARDS": [rows]}, True)[0] == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "step_7/state").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"holds another run: choose another \(LR=1.0 there\)"):
        checkpoint.begin(tmp_path, {"LR": 2.0, "STEPS": 5, "REWARDS": [rows]}, True)
    with pytest.raises(SystemExit, match="RESUME=True continues it"):
        checkpoint.begin(tmp_path, {"LR": 1.0, "STEPS": 5, "REWARDS": [rows]}, False)
    assert checkpoint.begin(tmp_path, {"LR": 1.0, "STEPS": 9, "REWARDS": [rows]}, True)[0] == 7


def test_a_folder_that_cannot_be_written_is_refused(alone, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="OUTPUT_DIR=.*file/run cannot be written: .*Not a directory"):
        checkpoint.begin(f"{tmp_path}/file/run", {"LR": 1.0}, True)
    with pytest.raises(SystemExit, match="is not the folder of the first process"):
        monkeypatch.setattr(checkpoint, "prepare", lambda *_: 0)  # as on a machine that the first process is not on
        checkpoint.begin(f"{tmp_path}/elsewhere", {}, True)


def test_a_folder_belongs_to_one_run_at_a_time(alone, launch, tmp_path):
    holds = ("import sys, time, pathlib; from grpo.checkpoint import lock; lock(pathlib.Path(sys.argv[1])); "
             "print('got it', flush=True); time.sleep(99)")
    other = launch("-c", holds, str(tmp_path))
    other.wait_for("got it")
    with pytest.raises(SystemExit, match=f"is in use by process {other.popen.pid} on .*: end that run, or choose another"):
        checkpoint.begin(str(tmp_path), {"LR": 1.0}, True)
    other.popen.kill()
    other.popen.wait()
    assert checkpoint.begin(str(tmp_path), {"LR": 1.0}, True)[0] == 0


def test_a_run_is_not_continued_on_other_data(alone, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("one")
    constants = {"LR": 1.0, "DATASET": str(data), "EVAL_DATASET": "a/hub:data:set"}
    checkpoint.begin(str(tmp_path / "run"), constants, True)
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 0}\n')
    checkpoint.begin(str(tmp_path / "run"), constants, True)
    data.write_text("two")
    with pytest.raises(SystemExit, match="holds another run: choose another .SHA-256 of DATASET=7692c3ad3540.* there"):
        checkpoint.begin(str(tmp_path / "run"), constants, True)


def test_a_checkpoint_without_its_state_is_one_sentence(alone, launch, few, tmp_path):
    few = [*few, "BETA=0", "EVAL_EVERY=0", "SAVE_EVERY=1", f"OUTPUT_DIR={tmp_path}/run"]
    code, text = launch("grpo_train.py", *few, "STEPS=1").wait()
    assert code == 0, text
    state = tmp_path / "run/step_1/state"
    kept = {path: path.read_bytes() for path in state.iterdir()}
    for path in kept:
        path.write_bytes(kept[path][:99])
        code, text = launch("grpo_train.py", *few, "STEPS=2").wait()
        assert code == 1 and "step_1/state is not whole" in text and "Traceback" not in text, text
        path.write_bytes(kept[path])
    shutil.rmtree(state)
    with pytest.raises(SystemExit, match="step_1 has no state/ to continue from: move it away"):
        checkpoint.begin(str(tmp_path / "run"), {}, True)


def test_what_a_save_would_refuse_is_refused_before_the_first_step(alone, tiny_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    policy = Policy(str(tmp_path / "model"), 50)
    assert "generation_config.json" in capsys.readouterr().out
    checkpoint.rehearse(policy, str(tmp_path))
    checkpoint.write(tmp_path / "step_1.unfinished", policy)
    assert json.loads((tmp_path / "step_1.unfinished/generation_config.json").read_text())["temperature"] == 0.6
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(SystemExit, match="has room for 0.0 GB, a checkpoint takes up to"):
        checkpoint.rehearse(policy, str(tmp_path))
    policy.model.generation_config.do_sample = False
    with pytest.raises(SystemExit, match="cannot be saved by transformers"):
        checkpoint.rehearse(policy, str(tmp_path))
    assert list(tmp_path.glob("*.unfinished")) == [tmp_path / "step_1.unfinished"]  # the rehearsals leave nothing


def test_the_readme_says_what_may_change():
    text = (ROOT / "docs/reliability.md").read_text()
    assert all(f"`{name}`" in text for name in checkpoint.MAY_CHANGE if name != "DS_CONFIG")
