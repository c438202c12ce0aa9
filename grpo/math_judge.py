"""math-verify in a guarded process: whether two answers are the same mathematics.

It runs arbitrary mathematics that a model wrote: it can hang in C code, eat the memory, or recurse without end, and its
own time limit needs the main thread. So a nursery process imports it once, and forks a child for each question, which
the kernel ends when its time or its memory is up. Nothing is left to clean up after any of them.
"""
import gc
import json
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from grpo.answers import clean, quantity, same

LONGEST_ANSWER = 1000  # characters; a longer answer is wrong
JUDGE_SECONDS = 0.5  # of processor time for an answer that needs math-verify; one that takes longer is wrong
nursery_lock = threading.Lock()
nursery = None  # (process, socket) once it runs


@lru_cache(maxsize=10000)
def is_equal(gold: str, answer: str | None) -> bool:
    """Whether the answer means the same as the gold answer, see `answers.same`; mathematics goes to a judge."""
    if not answer or max(len(gold), len(answer)) > LONGEST_ANSWER:
        return False
    try:
        return same(gold, answer, too_dangerous_here)
    except (NotImplementedError, RecursionError):
        return ask_judge(gold, answer)


@lru_cache(maxsize=10000)
def is_mathematics(text: str) -> bool:
    """Whether a gold answer can be read as a quantity, or by math-verify."""
    return bool(len(text) <= LONGEST_ANSWER and re.search(r"[\d\\^=]", text)
                and (quantity(clean(text)) or ask_judge(text, None)))


def too_dangerous_here(gold: str, answer: str):
    raise NotImplementedError


def get_ready() -> None:
    """Starts the judge's process, which takes seconds, while the caller does something else."""
    threading.Thread(target=ask_judge, args=("1", "1"), daemon=True).start()


def ask_judge(gold: str, answer: str | None) -> bool:
    """Whether `answer` is the same as `gold`, or, without an answer, whether `gold` can be read. From any thread.

    Nearly all questions take less than a tenth of a second of processor time, and have it however long a busy machine
    takes to grant it: no right answer is lost for that. What takes more is asked again, and then the clock counts too.
    """
    return (ask_child(gold, answer, 0.1, 60) or ask_child(gold, answer, JUDGE_SECONDS, 0.6)) == b"1"


def ask_child(gold: str, answer: str | None, seconds: float, clock: float) -> bytes:
    """b"1" or b"0"; nothing, if the child used up its `seconds` of processor time, or those on the clock."""
    global nursery
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with nursery_lock:
            if nursery is None or nursery[0].poll() is not None:
                our_end, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                path = f"{Path(__file__).parent.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
                nursery = subprocess.Popen([sys.executable, "-m", "grpo.math_judge"], stdin=its_end,
                                           start_new_session=True, env=os.environ | {"PYTHONPATH": path}), our_end
                its_end.close()
            socket.send_fds(nursery[1], [json.dumps([gold, answer, seconds, clock]).encode()], [theirs.fileno()])
        theirs.close()
        ours.settimeout(120)
        try:
            return ours.recv(1)
        except TimeoutError:
            raise TimeoutError("the process that runs math-verify gave no verdict within 120 s") from None


# What the nursery has done once, its children know: how such text is parsed, and what sympy imports for it.
WARM_UP = [("2+3i", "3-i"), (r"\sqrt{8}", r"2\sqrt{2}"), ("x^2-1", "(x-1)(x+1)"), ("y=2x+1", "y-2x=1"),
           (r"\frac{1+\sqrt{5}}{2}", r"\sqrt{5}"), (r"\sqrt{4}/4", r"\log_2 3"), ("x^2<4", r"x \ge 7"),
           (r"[0,1)\cup(2,\infty)", "(0,1]"), (r"\pi r^2", "x^3+8"), (r"\sin x", r"\cos x"), ("e^{2}", r"\ln 2")]


def run_nursery() -> None:
    """The nursery's main loop. It ends when the parent is gone, because the socket on its stdin is then closed."""
    from math_verify import LatexExtractionConfig, LatexNormalizationConfig, parse, verify
    from sympy import I

    logging.disable()  # math-verify warns that its own time limit is off
    normalization = LatexNormalizationConfig(basic_latex=True, units=False, malformed_operators=True, boxed="none")
    latex_only = [LatexExtractionConfig(normalization_config=normalization)]

    def exact(decimal):
        """As a fraction; in braces if it does not stand alone, where math-verify would suspect a set, for 60 ms."""
        fraction = r"\frac{%d}{%d}" % Fraction(decimal[0]).as_integer_ratio()
        return fraction if decimal[0] == decimal.string else "{" + fraction + "}"

    def read(text):
        """The text as expressions with exact numbers, the letter i as the imaginary unit."""
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text).replace("*", r" \cdot ")
        text = re.sub(r"\d*\.\d+", exact, text)
        expressions = parse(f"${text}$", latex_only, fallback_mode="no_fallback", parsing_timeout=None)
        return [expression.xreplace({symbol: I for symbol in expression.free_symbols if symbol.name == "i"})
                for expression in expressions]

    def is_same(gold, answer):
        return verify(read(gold), read(answer), float_rounding=10, timeout_seconds=None)

    for pair in WARM_UP:
        is_same(*pair)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    requests = socket.socket(fileno=0)
    while True:
        question, descriptors, _, _ = socket.recv_fds(requests, 2**16, 1)
        if not descriptors:
            return
        if os.fork() == 0:
            gold, answer, seconds, clock = json.loads(question)
            resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))  # bytes
            signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the child, whatever C code it is in
            signal.setitimer(signal.ITIMER_REAL, clock)
            connection = socket.socket(fileno=descriptors[0])
            try:
                verdict = same(gold, answer, is_same) if answer is not None else read(clean(gold))
                connection.send(b"1" if verdict else b"0")
            except Exception:  # in what a model wrote: nobody's news
                connection.send(b"0")
            finally:
                os._exit(0)
        os.close(descriptors[0])


if __name__ == "__main__":
    run_nursery()
