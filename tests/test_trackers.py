"""TRACKERS: TensorBoard, Weights & Biases and CSV files hold what metrics.jsonl holds, step by step."""

import json
import os
import shutil
import struct
import subprocess
import sys

import pytest

from conftest import ROOT


@pytest.fixture(scope="module")
def run(few, tmp_path_factory):

    folder = tmp_path_factory.mktemp("tracked")
    words = ["EVAL_EVERY=2", "SAVE_EVERY=2", "BETA=0", "PROMPTS_PER_STEP=2", "GROUP_SIZE=4",
             "TRACKERS=tensorboard,wandb,csv", f"OUTPUT_DIR={folder}/run"]
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": f"{folder}/before"}
    for steps in 3, 4:  # the second one loses its last step, and goes on
        done = subprocess.run([sys.executable, "grpo_train.py", *few, *words, f"STEPS={steps}"], cwd=ROOT, timeout=240,
                              env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        environment["WANDB_DIR"] = str(folder)
        if steps == 3:
            shutil.rmtree(folder / "run/step_3")
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return folder, {name: [(row["step"], row[name]) for row in rows if name in row] for name in rows[2]}


def test_csv(run):
    folder, metrics = run
    for name in ("reward", "reward/reward_len", "eval_accuracy", "seconds_train"):
        lines = (folder / "run/csv" / f"{name.replace('/', '_')}.csv").read_text().split()[1:]
        assert [(int(step), float(value)) for step, value in (line.split(",") for line in lines)] == metrics[name]


def test_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, metrics = run
    events = EventAccumulator(str(folder / "run/tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == metrics.keys() - {"step"}
    for name in ("reward", "reward/reward_len", "eval_accuracy"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in metrics[name]]


def records(data: bytes):
    """Those of a .wandb file: after 7 bytes LevelDB's log, blocks of 32 kB with pieces of (checksum, length, kind)."""
    piece, place = b"", 7
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
        length, kind = struct.unpack_from("<HB", data, place + 4)
        piece += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield piece
            piece = b""


def test_wandb(run):
    from wandb.proto.wandb_internal_pb2 import Record

    folder, metrics = run
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found = {}
    for data in records(path.read_bytes()):
        record = Record.FromString(data)
        items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for name in items.keys() & metrics.keys():
            found.setdefault(name, []).append((items["_step"], items[name]))
    for name in ("reward", "reward/reward_len", "eval_accuracy"):
        assert found[name] == metrics[name]


def test_an_unknown_tracker_is_refused(launch, few, tmp_path):
    code, said = launch("grpo_train.py", *few, "TRACKERS=mlflow", f"OUTPUT_DIR={tmp_path}/run").wait()
    assert code != 0 and "TRACKERS=mlflow: expected csv, tensorboard, wandb" in said
