"""Shared by the tests: small real models, a real reference server, real launches."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model name that is not a folder fails at once
if os.environ.get("ON_GPU") != "1":  # the tests of test_gpu.py alone are for a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for each other crawl when processes share the cores

import arithmetic  # noqa: E402


class Process:
    """A script of the project in a process of its own; `out` is a file that keeps what it prints."""

    def __init__(self, arguments, out: Path, env: dict | None = None):
        self.out = out
        self.popen = subprocess.Popen(
            [str(a) for a in arguments],
            stdout=out.open("w"),
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
            env=os.environ | (env or {}),
        )

    def wait(self, seconds: float = 240) -> tuple[int, str]:
        try:
            return self.popen.wait(seconds), self.out.read_text()
        finally:
            self.end()

    def end(self) -> None:
        """Kills it and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def wait_until(self, condition, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.popen.poll() is None and time.monotonic() < deadline, self.out.read_text()
            time.sleep(0.002)

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match:
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.out.read_text())):
            assert self.popen.poll() is None and time.monotonic() < deadline, self.out.read_text()
            time.sleep(0.1)
        return match


@pytest.fixture
def launch(tmp_path):
    """launch("ref_server.py", "PORT=0", env={...}) -> Process; everything is killed after the test."""
    started = []

    def start(*arguments, env=None):
        python = arguments[0] == "-c" or arguments[0].endswith(".py")
        program = [sys.executable, *arguments] if python else arguments
        started.append(Process(program, tmp_path / f"out{len(started)}.txt", env))
        return started[-1]

    yield start
    for process in started:
        process.end()


def rows(path: Path) -> list[dict]:
    """The objects of a .jsonl file, without what differs from run to run."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: v for name, v in row.items() if not name.startswith(("seconds", "peak_memory_mb"))} for row in found]


@pytest.fixture(scope="session")
def alone():
    """This process as the only one of a run."""
    from grpo import distributed

    return distributed.start()


@pytest.fixture(scope="session")
def few(tiny_folder, tmp_path_factory) -> list[str]:
    """Arguments for the untrained model and a handful of problems: enough to compare runs bit by bit."""
    path = tmp_path_factory.mktemp("few") / "data.jsonl"
    problems = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(20)]
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    reward = "REWARDS=reward_len,reward_format"  # an untrained model gets no other
    return [f"MODEL={tiny_folder}", f"DATASET={path}", f"EVAL_DATASET={path}", "MAX_COMPLETION_TOKENS=16", reward]


def make_tiny(folder: str) -> None:
    """An untrained model of the embedded task's shape, with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = arithmetic.make_tokenizer(arithmetic.make_problems(200, random.Random(0)))
    model = arithmetic.make_model(tokenizer)
    with torch.no_grad():
        for matrix in (p for p in model.parameters() if p.dim() > 1):
            matrix.normal_(0, 0.1)  # an untrained model is almost uniform; this one has opinions
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("tiny"))
    make_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    from grpo.policy import load_model

    return load_model(tiny_folder)


@pytest.fixture(scope="session")
def server(tiny_folder, tmp_path_factory):
    """The address of a real reference server that holds the tiny model."""
    out = tmp_path_factory.mktemp("server") / "out.txt"
    process = Process([sys.executable, "ref_server.py", f"MODEL={tiny_folder}", "PORT=0", "MAX_BODY_MB=1"], out)
    yield process.wait_for(r"http://127.0.0.1:\d+")[0]
    process.end()


@pytest.fixture(scope="session")
def embedded(tmp_path_factory) -> Path:
    """The embedded task: what `make` has built before the tests, or else the same, built once for all workers."""
    script, folder, base = ROOT / "examples/arithmetic.py", ROOT / "examples/arithmetic", tmp_path_factory.getbasetemp()
    model = folder / "model/config.json"
    if model.exists() and model.stat().st_mtime > script.stat().st_mtime:
        return folder
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "embedded"
    with FileLock(f"{folder}.lock", timeout=600):
        if not folder.exists():
            subprocess.run([sys.executable, script, f"OUTPUT_DIR={folder}"], cwd=ROOT, check=True, timeout=500)
    return folder
