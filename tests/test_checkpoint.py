"""An interrupted run ends as if nothing had happened; a save that fails loses nothing."""

import json
import sys

import pytest
import torch
from conftest import ROOT, rows
from safetensors.torch import load_file

import checkpoint

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

    constants = " ".join([*few, "STEPS=8", f"OUTPUT_DIR={broken}"])
    command = f"ulimit -f 1000; exec {sys.executable} grpo_train.py {constants}"  # as on a full disk
    code, text = launch("-c", f"import os; os.execlp('bash', 'bash', '-c', {command!r})").wait()
    assert code == 1 and "step_8: " in text and "complete checkpoints: [4, 6]. Make room" in text, text
    assert not (broken / "step_8").exists()
    code, text = launch("grpo_train.py", *few, "STEPS=8", f"OUTPUT_DIR={broken}").wait()
    assert code == 0 and [row["step"] for row in rows(broken / "metrics.jsonl")] == list(range(9)), text


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


def test_unfinished_checkpoints_do_not_count(tmp_path):
    for name in "step_2", "step_10", "step_12.unfinished", "step_x":
        (tmp_path / name).mkdir()
    assert checkpoint.complete(tmp_path) == [2, 10]
    assert checkpoint.begin(tmp_path, {"LR": 1.0, "lr": 2.0}, True) == 10
    assert not (tmp_path / "step_12.unfinished").exists()
    assert json.loads((tmp_path / "run.json").read_text()) == {"LR": 1.0}


def test_a_folder_with_another_run_is_refused(tmp_path):
    assert checkpoint.begin(tmp_path, {"LR": 1.0, "STEPS": 5, "REWARDS": [rows]}, True) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "step_7").mkdir()
    with pytest.raises(SystemExit, match=r"holds another run: choose another \(LR=1.0 there\)"):
        checkpoint.begin(tmp_path, {"LR": 2.0, "STEPS": 5, "REWARDS": [rows]}, True)
    with pytest.raises(SystemExit, match="RESUME=True continues it"):
        checkpoint.begin(tmp_path, {"LR": 1.0, "STEPS": 5, "REWARDS": [rows]}, False)
    assert checkpoint.begin(tmp_path, {"LR": 1.0, "STEPS": 9, "REWARDS": [rows]}, True) == 7


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="OUTPUT_DIR=.*file/run cannot be written: .*Not a directory"):
        checkpoint.begin(f"{tmp_path}/file/run", {"LR": 1.0}, True)
    with pytest.raises(SystemExit, match="is not the folder of the first process"):
        checkpoint.see(f"{tmp_path}/elsewhere")


def test_the_readme_says_what_may_change():
    text = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in text for name in checkpoint.MAY_CHANGE if name != "DS_CONFIG")
