"""Whatever dies, the run goes on as if it had not: killed servers, signals, a process that fails, bad numbers."""

import json
import os
import random
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import rows
from safetensors.torch import load_file

TRAINER = "grpo_train.py"


def same_run(one, other, step):
    first, second = (load_file(folder / f"step_{step}/model.safetensors") for folder in (one, other))
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    assert rows(one / "metrics.jsonl") == rows(other / "metrics.jsonl")
    assert (one / "completions.jsonl").read_text() == (other / "completions.jsonl").read_text()


def steps_done(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") - 1 if path.exists() else -1


@pytest.fixture
def serve(launch, tiny_folder):
    """serve() -> a reference server and its port; serve(port) -> another one there."""
    def start(port=0, **env):
        process = launch("ref_server.py", f"MODEL={tiny_folder}", f"PORT={port}", env=env)
        return process, int(process.wait_for(r"http://127.0.0.1:(\d+)")[1])

    return start


def test_a_server_and_a_trainer_that_are_killed_change_nothing(launch, serve, few, tmp_path):
    # twice: while it computes log-probs, and after it was sent a new reference, which it then does not have any more;
    # and the trainer once, after which the reference of its last checkpoint is older than what the server has
    server, port = serve()
    few = [*few, f"REF_SERVER=http://127.0.0.1:{port}", "STEPS=8", "SAVE_EVERY=4", "REF_SYNC_EVERY=3",
           "REF_MIXUP_ALPHA=0.6", "EVAL_EVERY=0"]
    code, text = launch(TRAINER, *few, f"OUTPUT_DIR={tmp_path}/whole").wait()
    assert code == 0, text
    run = launch(TRAINER, *few, f"OUTPUT_DIR={tmp_path}/broken")
    for step, pause in (1, 20), (4, 0):
        run.wait_until(lambda: steps_done(tmp_path / "broken") >= step)
        time.sleep(random.random() / 10)
        server.end()
        time.sleep(pause)
        server, _ = serve(port)
    run.wait_until(lambda: steps_done(tmp_path / "broken") >= 7)
    run.end()
    code, text = launch(TRAINER, *few, f"OUTPUT_DIR={tmp_path}/broken").wait()
    assert code == 0, text
    same_run(tmp_path / "whole", tmp_path / "broken", 8)
    kl = [row["kl"] for row in rows(tmp_path / "whole/metrics.jsonl")[1:]]
    assert kl[0] < 1e-6 and all(kl[synced] < 0.5 * kl[synced - 1] for synced in (3, 6))  # the reference follows


def test_the_work_goes_to_the_servers_that_answer(launch, serve, few, tmp_path):
    (first, port), (_, other) = serve(), serve()
    servers = f"REF_SERVER=http://127.0.0.1:{port},http://127.0.0.1:{other}"
    few = [*few, servers, "EVAL_EVERY=0", "STEPS=20", "SAVE_EVERY=0", "LORA_RANK=4", "LR=1e-3"]
    run = launch(TRAINER, *few, f"OUTPUT_DIR={tmp_path}/run")
    run.wait_until(lambda: steps_done(tmp_path / "run") >= 3)
    first.end()
    code, text = run.wait()
    assert code == 0 and steps_done(tmp_path / "run") == 20, text
    history = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(row["seconds_ref_wait"] for row in history[1:]) < 5
    assert 0 <= history[1]["kl"] < 1e-6 < history[20]["kl"]  # with adapters too


def test_a_signal_ends_the_run_after_the_step_and_another_one_at_once(launch, few, tmp_path):
    few = [*few, "EVAL_EVERY=0", "BETA=0", "STEPS=1000", "SAVE_EVERY=0"]
    run = launch(TRAINER, *few, f"OUTPUT_DIR={tmp_path}/run")
    run.wait_until(lambda: steps_done(tmp_path / "run") >= 2)
    run.popen.send_signal(signal.SIGTERM)
    code, text = run.wait()
    done = steps_done(tmp_path / "run")
    assert code == 0 and "stopping after this step" in text and (tmp_path / f"run/step_{done}").is_dir(), text
    assert [row["step"] for row in rows(tmp_path / "run/metrics.jsonl")] == list(range(done + 1))

    run = launch(TRAINER, *few, "PROMPTS_PER_STEP=256", "MAX_COMPLETION_TOKENS=500", f"OUTPUT_DIR={tmp_path}/slow")
    run.wait_for("GRPO:")
    run.popen.send_signal(signal.SIGINT)
    run.wait_for("stopping after this step")
    run.popen.send_signal(signal.SIGINT)
    assert run.wait(5)[0] == -signal.SIGINT and steps_done(tmp_path / "slow") == 0


def two(number, *arguments):
    return "deepspeed", "--num_accelerators", "2", f"--master_port={number}", TRAINER, *arguments


def test_ctrl_c_stops_all_processes_after_the_step(launch, few, tmp_path):
    run = launch(*two(29630, *few, "EVAL_EVERY=0", "BETA=0", "STEPS=1000", "SAVE_EVERY=0", f"OUTPUT_DIR={tmp_path}"))
    run.wait_until(lambda: steps_done(tmp_path) >= 2)
    os.killpg(run.popen.pid, signal.SIGINT)  # to the launcher too, which makes a SIGTERM of it for its processes
    _, text = run.wait(60)
    assert (tmp_path / f"step_{steps_done(tmp_path)}").is_dir(), text
    assert "grpo_train.py\", line" not in text, text


def test_ctrl_c_in_a_script_leaves_the_server_alive_until_the_step_is_saved(launch, few, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = ["examples/demo.sh", f"{tmp_path}/run", *few, f"REF_SERVER=http://127.0.0.1:{port}", "EVAL_EVERY=0",
                   "STEPS=1000", "SAVE_EVERY=0"]
        environment = {"TRAINER": "python", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        code, text = launch(*command, env=environment).wait(60)
        assert code == 1 and f"something runs at http://127.0.0.1:{port} already" in text, text
    run = launch(*command, env=environment)
    run.wait_until(lambda: steps_done(tmp_path / "run") >= 2)
    os.killpg(run.popen.pid, signal.SIGINT)  # as a terminal does: to the script, the trainer and the server
    code, text = run.popen.wait(60), run.out.read_text()
    assert code == 0 and (tmp_path / f"run/step_{steps_done(tmp_path / 'run')}").is_dir(), text
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_the_error_of_the_process_that_failed_is_the_last_one(launch, few, tmp_path):
    (tmp_path / "second.py").write_text(
        "import os\ncalls = []\ndef reward(completions, **columns):\n    calls.append(1)\n"
        "    return [1 / (os.environ['RANK'] == '0' or len(calls) < 3) for c in completions]\n")
    arguments = two(29631, *few, "EVAL_EVERY=0", "BETA=0", "REWARDS=second:reward", f"OUTPUT_DIR={tmp_path}/run")
    code, text = launch(*arguments, env={"PYTHONPATH": str(tmp_path)}).wait(120)
    said = [line for line in text.splitlines() if "[launch.py" not in line and line.strip()]
    assert code == 1 and "reward reward raised ZeroDivisionError" in said[-1], text
    assert "gloo" not in text


def test_a_port_that_another_run_has_is_named(launch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        meet = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        code, text = launch(TRAINER, env=meet).wait(60)
    assert code == 1 and f"cannot meet at 127.0.0.1:{port}" in text and "deepspeed --master_port" in text, text
    assert "Traceback" not in text


NOT_FINITE = """
import sys
import grpo_train
from grpo import constants, distributed
stages, bad = eval(sys.argv.pop(1)), eval(sys.argv.pop(1))
real = grpo_train.GRPO_step
def GRPO_step(policy, batch):
    loss, *rest = real(policy, batch)
    calls.append(loss)
    return (loss * float("inf") if len(calls) in bad else loss, *rest)
grpo_train.GRPO_step = GRPO_step
constants.override_constants("grpo_train", sys.argv[1:])
folder = grpo_train.OUTPUT_DIR
for stage in stages:
    calls, grpo_train.OUTPUT_DIR = [], f"{folder}/{stage}"
    grpo_train.DS_CONFIG["zero_optimization"]["stage"] = grpo_train.ZERO_STAGE = stage
    distributed.run(grpo_train.main)
"""


def moments(folder):
    """What AdamW remembers, in DeepSpeed's files."""
    def tensors(value):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if name in ("exp_avg", "exp_avg_sq", "step"):
                yield torch.as_tensor(inner)
            elif isinstance(inner, (dict, list, tuple)):
                yield from tensors(inner)

    files = sorted((folder / "state").glob("*.pt"))
    return [tensor for file in files for tensor in tensors(torch.load(file, weights_only=False))]


def test_an_update_that_is_not_finite_is_skipped_and_counted(launch, few, tmp_path):
    few = [*few, "EVAL_EVERY=0", "BETA=0", "MICRO_BATCH_TOKENS=100000", "KEEP_CHECKPOINTS=0", "SAVE_EVERY=1"]
    code, text = launch("-c", NOT_FINITE, "[0, 1, 2, 3]", "[2]", *few, "STEPS=3", f"OUTPUT_DIR={tmp_path}").wait()
    assert code == 0 and text.count("UPDATE SKIPPED") >= 4, text
    for stage in 0, 1, 2, 3:
        folder = tmp_path / str(stage)
        assert [row["skipped_updates"] for row in rows(folder / "metrics.jsonl")[1:]] == [0, 1, 0]
        after = [load_file(folder / f"step_{step}/model.safetensors") for step in (1, 2, 3)]
        assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])
        assert not all(torch.equal(after[1][name], after[2][name]) for name in after[0])
        assert all(tensor.isfinite().all() for tensor in after[2].values())
        remembered = [moments(folder / f"step_{step}") for step in (1, 2, 3)]
        assert len(remembered[0]) > 1 and all(map(torch.equal, remembered[0], remembered[1]))
        assert not all(map(torch.equal, remembered[1], remembered[2]))


def test_too_many_of_them_end_the_run_with_the_likely_causes(launch, few, tmp_path):
    few = [*few, "EVAL_EVERY=0", "BETA=0", "MICRO_BATCH_TOKENS=100000", "MAX_SKIPPED_STEPS=3", "SAVE_EVERY=0"]
    code, text = launch("-c", NOT_FINITE, "[1]", "[2, 4, 5, 6, 7]", *few, f"OUTPUT_DIR={tmp_path}").wait()
    assert code == 1 and "step 6: the loss or its gradients were not finite, 3 times in a row. Likely: LR" in text, text
    assert "Traceback" not in text and steps_done(tmp_path / "1") == 6


def test_no_permission_while_saving_loses_nothing(launch, few, tmp_path):
    few = [*few, "EVAL_EVERY=0", "BETA=0", "STEPS=6", "SAVE_EVERY=2", f"OUTPUT_DIR={tmp_path}/run"]
    # root may write anywhere, but not without its capabilities
    obedient = "setpriv --bounding-set=-all --inh-caps=-all".split() if os.geteuid() == 0 else []
    run = launch(*obedient, sys.executable, TRAINER, *few)
    run.wait_until(lambda: (tmp_path / "run/step_2").is_dir())
    (tmp_path / "run").chmod(0o555)
    code, text = run.wait()
    (tmp_path / "run").chmod(0o755)
    assert code == 1 and re.search(r"cannot save .*Permission denied.*complete checkpoints: \[2", text), text
    code, text = launch(TRAINER, *few).wait()
    assert code == 0 and [row["step"] for row in rows(tmp_path / "run/metrics.jsonl")] == list(range(7)), text
