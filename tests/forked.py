"""Runs scripts in forks of one process that has imported everything: a run that ends at the start takes a second.

A line of stdin is a JSON list: the folder to run in, the environment's changes, and script and arguments, or "-m" and
a module. A line of stdout is [exit status, what it wrote]. WITHOUT in the environment names packages, with commas
between, that are not there.
"""
import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # libraries may say something while they are imported
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import grpo_train  # noqa: E402, F401: with everything that it imports
import grpo.evaluate  # noqa: E402, F401
import ref_server  # noqa: E402, F401


def end(code: int) -> None:
    sys.stdout.flush()
    os._exit(code)


def run(folder: str, environment: dict, program: list[str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    for name in [name for name in sys.modules if name.split(".")[-1] in ("evaluate", "rewards", "grpo_train")]:
        del sys.modules[name]
    absent = environment.get("WITHOUT", "").split(",")
    for name in [name for name in sys.modules if name.split(".")[0] in absent]:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(filter(None, absent)))
    sys.argv = program[program[0] == "-m" :]
    try:
        if program[0] == "-m":
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(ROOT)
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        end(bool(error.code))
    except BaseException:
        traceback.print_exc()
        end(1)
    end(0)


if __name__ == "__main__":
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out:
            child = os.fork()
            if child == 0:
                for number in 1, 2:
                    os.dup2(out.fileno(), number)
                run(*json.loads(line))
            _, status = os.waitpid(child, 0)
            out.seek(0)
            result = os.waitstatus_to_exitcode(status), out.read().decode(errors="replace")
            print(json.dumps(result), file=answers, flush=True)
