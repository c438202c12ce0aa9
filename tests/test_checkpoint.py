"""An interrupted run ends as if nothing had happened; a save that fails loses nothing."""

import html
import json
import re
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
    assert f"| KL to the reference | 0.000 | {history[6]['kl']:.3f} |" in card.text
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
    row = re.search(r"^\| `SYSTEM_PROMPT` \| (.*) \|$", card.text, re.MULTILINE)[1]
    assert html.unescape(row) == hostile + "\n```" and not set(row) & set("|<`[]*\n")
    assert report.on_hub("gpt2") and not any(map(report.on_hub, ["a/b/c", "/a/b", "train.jsonl", "tests", "", "a b"]))


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

    policy = SimpleNamespace(model=tiny[0], tokenizer=tiny[1], gathered=nullcontext)
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
        (tmp_path / name).mkdir()
    assert checkpoint.complete(tmp_path) == [2, 10]
    assert checkpoint.begin(tmp_path, {"LR": 1.0}, True)[0] == 10
    assert not (tmp_path / "step_12.unfinished").exists()
    assert json.loads((tmp_path / "run.json").read_text()) == {"LR": 1.0}


def test_a_folder_with_another_run_is_refused(alone, tmp_path):
    assert checkpoint.begin(tmp_path, {"LR": 1.0, "STEPS": 5, "REWARDS": [rows]}, True)[0] == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "step_7").mkdir()
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


def test_the_readme_says_what_may_change():
    text = (ROOT / "docs/reliability.md").read_text()
    assert all(f"`{name}`" in text for name in checkpoint.MAY_CHANGE if name != "DS_CONFIG")
