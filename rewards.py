"""Rewards: functions that turn completions into numbers, and what they share.

A reward function is `f(completions, **columns) -> list[float | None]`. Completions are strings; the columns are the
data set's (`answer`, ...) plus `prompts` and `completion_ids`, all lists of the same length. This is TRL's convention:
a function written for one runs in the other. `None` means that the function does not apply to that completion.

A function may carry `f.check(**columns)`, called once with the whole data set before training starts; it raises
ValueError at a row that could never be judged.
"""
import contextlib
import importlib
import inspect
import math
import os
import queue
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from decimal import Decimal
from multiprocessing.connection import Connection

JUDGE_SECONDS = 1.0  # math-verify's time for one answer; an answer that takes longer is wrong
JUDGE_MEMORY = 2 * 2**30  # bytes of address space for it
LONGEST_ANSWER = 1000  # characters; a longer answer is wrong


# ------------------------------------------------------------------------------------------------- rewards

def reward_correct(completions, answer, **columns) -> list[float]:
    """+1 where the completion's answer (see `extract_answer`) equals the column `answer`, otherwise -1."""
    return [1.0 if is_equal(gold_answer(gold), extract_answer(completion)) else -1.0
            for completion, gold in zip(completions, answer, strict=True)]


def check_answers(answer, **columns) -> None:
    """ValueError at the first gold answer that math-verify cannot read, so that no completion could ever be right."""
    for row, gold in enumerate(map(gold_answer, answer), start=1):
        if as_number(gold) is None and not ask_judge(gold, gold):
            raise ValueError(f"row {row}: the answer {gold!r} cannot be parsed as a number or as mathematics")


reward_correct.check = check_answers


def reward_format(completions, **columns) -> list[float]:
    """+1.25 for exactly `<think>...</think>`, white space, `<answer>...</answer>`, neither blank; otherwise -1."""
    return [1.25 if has_format(completion.strip()) else -1.0 for completion in completions]


def has_format(text: str) -> bool:
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    if any(text.count(tag) != 1 for tag in tags):  # counted first: the expression below then has no second way to match
        return False
    match = re.fullmatch(r"<think>(.*)</think>\s*<answer>(.*)</answer>", text, re.DOTALL)
    return bool(match and match[1].strip() and match[2].strip())


# ------------------------------------------------------------------------------------------------- answers

def extract_answer(completion: str) -> str | None:
    """The text of the single complete `<answer>` block after the last `</think>`; None if there is no such block."""
    _, thought, rest = completion.rpartition("</think>")
    if not thought or rest.count("<answer>") != 1 or rest.count("</answer>") != 1:
        return None
    inside = rest.partition("<answer>")[2]
    return inside.partition("</answer>")[0].strip() if "</answer>" in inside else None


def gold_answer(gold) -> str:
    """A data set's answer as text; GSM8K writes it behind `####`, at the end of the solution."""
    return str(gold).rpartition("####")[2].strip()


def as_number(text: str) -> Decimal | None:
    """A plain decimal number, thousands commas allowed; None for everything else."""
    plain = re.fullmatch(r"[+-]?(\d+|\d{1,3}(,\d{3})+)?(\.\d+)?", text, re.ASCII)
    return Decimal(text.replace(",", "")) if plain and text[-1:].isdigit() else None


def is_equal(gold: str, answer: str | None) -> bool:
    """Whether `answer` is mathematically the same as `gold`. Numbers are compared here, the rest goes to a judge."""
    if not answer or len(answer) > LONGEST_ANSWER:
        return False
    numbers = as_number(gold), as_number(answer)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return ask_judge(gold, answer)


# ------------------------------------------------------------------------------------------------- the judge
# math-verify runs arbitrary mathematics that a model wrote: it can hang in C code, eat the memory, or recurse without
# end, and its own time limit needs the main thread. So it lives in child processes, which are killed when they do not
# answer in time. One nursery process imports it once and forks a judge, in milliseconds, whenever one is missing.

idle_judges = queue.SimpleQueue()  # (connection, process id) of judges that wait for a question
nursery_lock = threading.Lock()
nursery = None  # (process, socket) once it runs


def ask_judge(gold: str, answer: str) -> bool:
    """math-verify's verdict, False if it takes more than JUDGE_SECONDS or JUDGE_MEMORY. From any thread."""
    try:
        connection, pid = idle_judges.get_nowait()
    except queue.Empty:
        connection, pid = new_judge()
    try:
        connection.send((gold, answer))
    except BrokenPipeError:  # it died while it was idle
        return ask_judge(gold, answer)
    try:
        if connection.poll(JUDGE_SECONDS):
            verdict = connection.recv()
            idle_judges.put((connection, pid))
            return verdict
        os.kill(pid, signal.SIGKILL)
    except (EOFError, ConnectionResetError, ProcessLookupError):  # it died of the question
        pass
    connection.close()
    return False


def new_judge() -> tuple[Connection, int]:
    """A fresh judge: its connection and its process id."""
    global nursery
    with nursery_lock:
        if nursery is None or nursery[0].poll() is not None:
            ours, theirs = socket.socketpair()
            process = subprocess.Popen([sys.executable, __file__], stdin=theirs, start_new_session=True)
            theirs.close()
            nursery = process, ours
        ours, theirs = socket.socketpair()
        socket.send_fds(nursery[1], [b"judge"], [theirs.fileno()])
        theirs.close()
    connection = Connection(ours.detach())
    if not connection.poll(120):
        raise TimeoutError("the process that runs math-verify did not start within 120 s")
    return connection, connection.recv()


def run_nursery() -> None:
    """The child's main loop; when the parent is gone, the socket on stdin is closed, and this process group ends."""
    import logging

    import math_verify

    logging.disable()  # math-verify warns that its own time limit is off
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    requests = socket.socket(fileno=0)
    while True:
        _, descriptors, _, _ = socket.recv_fds(requests, 16, 1)
        if not descriptors:
            os.killpg(0, signal.SIGKILL)  # a judge that is at work would never notice
        if os.fork() == 0:
            resource.setrlimit(resource.RLIMIT_AS, (JUDGE_MEMORY, JUDGE_MEMORY))
            with contextlib.suppress(EOFError, ConnectionResetError):  # the parent is gone
                run_judge(Connection(descriptors[0]), math_verify)
            return
        os.close(descriptors[0])


def run_judge(connection: Connection, math_verify) -> None:
    latex_only = [math_verify.LatexExtractionConfig()]

    def parse(text):
        latex = "$" + text.strip("$ ") + "$"
        return math_verify.parse(latex, latex_only, fallback_mode="no_fallback", parsing_timeout=None)

    connection.send(os.getpid())
    while True:
        gold, answer = connection.recv()
        try:
            gold = parse(gold)
            verdict = bool(gold) and math_verify.verify(gold, parse(answer), float_rounding=10, timeout_seconds=None)
        except Exception:
            verdict = False
        connection.send(verdict)


# ------------------------------------------------------------------------------------------------- calling them

def load_rewards(rewards: list) -> list:
    """Functions from functions or names: one of this file, or `module:function`. SystemExit says which is missing."""
    functions = []
    for reward in rewards:
        if isinstance(reward, str):
            module, _, name = reward.rpartition(":")
            try:
                reward = getattr(importlib.import_module(module or __name__), name)
            except (ImportError, AttributeError) as error:
                raise SystemExit(f"no reward function {reward} ({error}): name one of rewards.py, or module:function")
        functions.append(reward)
    return functions


def check_rewards(functions: list, columns: dict[str, list]) -> None:
    """SystemExit if a function cannot be called with these columns, or finds a row that it could never judge."""
    for function in functions:
        try:
            inspect.signature(function).bind(completions=[], prompts=[], completion_ids=[], **columns)
            getattr(function, "check", lambda **columns: None)(**columns)
        except (TypeError, ValueError) as error:
            raise SystemExit(f"reward {function.__name__} cannot judge the data set: {error}; columns: {list(columns)}")


def compute_rewards(functions: list, completions: list[str], **columns) -> list[list[float | None]]:
    """Every function's values, a list a function. ValueError names the function and the completion that it fails at."""
    values = []
    for function in functions:
        name = function.__name__
        try:
            result = function(completions=completions, **columns)
        except Exception as error:
            completion = culprit(function, completions, columns)
            raise ValueError(f"reward {name} raised {error!r} at the completion {completion!r}") from error
        if len(result) != len(completions):
            raise ValueError(f"reward {name} returned {len(result)} values for {len(completions)} completions")
        for value, completion in zip(result, completions):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"reward {name} returned {value} for {completion!r}")
        values.append(result)
    return values


def culprit(function, completions: list[str], columns: dict[str, list]) -> str:
    """The first completion that `function` raises at by itself, or a note that none does."""
    for i, completion in enumerate(completions):
        try:
            function(completions=[completion], **{name: values[i : i + 1] for name, values in columns.items()})
        except Exception:
            return completion
    return "no single completion"


if __name__ == "__main__":
    run_nursery()
