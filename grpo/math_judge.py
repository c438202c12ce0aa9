"""math-verify in a guarded process: whether two answers are the same mathematics.

It runs arbitrary mathematics that a model wrote: it can hang in C code, eat the memory, or recurse without end, and its
own time limit needs the main thread. So a nursery process imports it once, and forks a child for each question, which
the kernel ends when its time or its memory is up. Nothing is left to clean up after any of them.
"""
import atexit
import gc
import importlib.util
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
from random import Random

from grpo.answers import choice, clean, is_prose, quantity, same

LONGEST_ANSWER = 1000  # characters; a longer answer is wrong
JUDGE_SECONDS = 0.35  # of processor time for an answer that needs math-verify; one that takes longer is wrong
STANDSTILL_SECONDS = 60  # on the clock, only for a process that uses no processor time
nursery_lock = threading.Lock()
nursery = None  # (process, socket) once it runs


def is_equal(gold: str, answer: str | None) -> bool:
    """Whether the answer means the same as the gold answer, see `answers.same`; mathematics goes to a judge."""
    try:
        return bool(answer) and max(len(gold), len(answer)) <= LONGEST_ANSWER and compare(gold, answer)
    except TimeoutError:  # no verdict to remember: `lru_cache` keeps no errors
        return False


@lru_cache(maxsize=10000)
def compare(gold: str, answer: str) -> bool:
    try:
        return same(gold, answer, too_dangerous_here)
    except (NotImplementedError, RecursionError):
        return ask_judge(gold, answer)


@lru_cache(maxsize=10000)
def is_mathematics(text: str) -> bool:
    """Whether a gold answer is a quantity in digits, a letter of multiple choice, or a formula, and no prose."""
    found = clean(text) if len(text) <= LONGEST_ANSWER else ""
    has_value = re.search(r"\d", text) and quantity(found) or choice(found)
    return bool(found and (has_value or "\\" in text or not is_prose(found)))


def too_dangerous_here(gold: str, answer: str):
    """In place of math-verify: what only that could judge is left to the guarded process, see `compare`."""
    raise NotImplementedError


def get_ready() -> None:
    """Starts the judge's process, which takes seconds, while the caller does something else."""
    require_math_verify()
    threading.Thread(target=ask_judge, args=("1", "1"), daemon=True).start()


def require_math_verify() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("math-verify, which compares answers, is not installed: pip install math-verify==0.9.0")


def ask_judge(gold: str, answer: str) -> bool:
    """Whether `answer` is the same as `gold`, from any thread.

    Processor time alone decides, however long a busy machine takes to grant it. TimeoutError if the judge used it up,
    or its memory, or stood still.
    """
    global nursery
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with nursery_lock:
            if nursery is None or nursery[0].poll() is not None:
                require_math_verify()
                our_end, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                path = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
                nursery = subprocess.Popen([sys.executable, "-P", "-m", "grpo.math_judge"], stdin=its_end,
                                           start_new_session=True, env=os.environ | {"PYTHONPATH": path}), our_end
                its_end.close()
                atexit.register(nursery[0].wait)
                atexit.register(our_end.close)  # comes first, and ends the nursery
            socket.send_fds(nursery[1], [json.dumps([gold, answer]).encode()], [theirs.fileno()])
        theirs.close()
        ours.settimeout(2 * STANDSTILL_SECONDS)
        try:
            verdict = ours.recv(1)
        except TimeoutError:
            raise RuntimeError("the process that runs math-verify has stood still for minutes") from None
    if not verdict:
        if (nursery[0].poll() or 0) > 0:  # it ended by an error; a signal's number is negative
            raise RuntimeError("the process that runs math-verify cannot start, see its error above")
        raise TimeoutError
    return verdict == b"1"


# What the nursery has done once, its children know: how such text is parsed, and what sympy imports for it.
WARM_UP = [("2+3i", "3-i"), (r"\sqrt{8}", r"2\sqrt{2}"), ("x^2-1", "(x-1)(x+1)"), ("y=2x+1", "y-2x=1"),
           (r"\frac{1+\sqrt{5}}{2}", r"\sqrt{5}"), (r"\sqrt{4}/4", r"\log_2 3"), ("x^2<4", r"x \ge 7"),
           (r"[0,1)\cup(2,\infty)", "(0,1]"), (r"\pi r^2", "x^3+8"), (r"\sin x", r"\cos x"), ("e^{2}", r"\ln 2"),
           (r"\sum_{k=0}^{n-1} a_k a_{n-k}", r"\lim_{x \to 0} x^{-2}"),
           (r"y=-\frac{1}{2}x^2+4(x-1)^2", r"24+14*x+(-3)*x^2"),
           (r"\tan^{-1}(2)", r"\arctan 2"), (r"\int_0^1 x dx", r"\binom{5}{2}"), (r"\log_2(3)", "f(x)+5!")]


def make_verify():
    """`verify(gold, answer) -> bool`, for text in the spelling of `clean`."""
    import math_verify
    from sympy import Eq, Expr, I, Integral, Limit, Product, Rational, Sum

    SLOW = Integral, Limit, Product, Sum  # at a point

    options = dict(basic_latex=True, units=False, malformed_operators=True, boxed="none")
    normalization = math_verify.LatexNormalizationConfig(**options)
    latex_only = [math_verify.LatexExtractionConfig(normalization_config=normalization)]

    def exact(decimal):
        """As a fraction; in braces if it does not stand alone, where math-verify would suspect a set, for 60 ms."""
        fraction = r"\frac{%d}{%d}" % Fraction(decimal[0]).as_integer_ratio()
        return fraction if decimal[0] == decimal.string else "{" + fraction + "}"

    def read(text):
        """The text as expressions with exact numbers, the letter i as the imaginary unit."""
        text = re.sub(r"\d*\.\d+", exact, text.replace("*", r" \cdot "))
        expressions = math_verify.parse(f"${text}$", latex_only, fallback_mode="no_fallback", parsing_timeout=None)
        return [expression.xreplace({symbol: I for symbol in expression.free_symbols if symbol.name == "i"})
                for expression in expressions]

    def apart(gold, answer):
        """math-verify takes R for r: where one text has both, the capital becomes a letter that neither has."""
        token = re.compile(r"\\[A-Za-z]+|[A-Za-z]")
        each = [set(token.findall(text)) for text in (gold, answer)]
        used = set.union(*each)
        both = sorted({name for names in each for name in names if name != name.lower() and name.lower() in names})
        free = iter(letter for letter in "zyxwvutsrqponmlkhgcba" if not {letter, letter.upper()} & used)
        new = {name: next(free, name) for name in both}
        return [token.sub(lambda match: new.get(match[0], match[0]), text) for text in (gold, answer)]

    def values(expression, symbols):
        """At five points, positive and negative, with 50 digits: equal there is equal, and tiny numbers differ."""
        random = Random(0)
        points = [{symbol: random.choice(signs) * Rational(random.randint(100, 9999), 271) for symbol in symbols}
                  for signs in ((1, 1), (-1, 1), (-1, 1), (-1, 1), (-1, -1))]
        return [expression.xreplace(point).evalf(50) for point in points]

    def same_values(gold, answer):
        """Whether two expressions have equal values, or two equations the same solutions; None if that is open."""
        if isinstance(gold, SLOW) and gold.args[1:] == answer.args[1:]:  # two sums over the same range
            gold, answer = gold.args[0], answer.args[0]
        symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
        are_equations = isinstance(gold, Eq) and isinstance(answer, Eq)
        if are_equations:
            gold, answer = gold.lhs - gold.rhs, answer.lhs - answer.rhs
        if not isinstance(gold, Expr) or not isinstance(answer, Expr) or symbols and (gold + answer).has(*SLOW):
            return None
        if not symbols and all(one.doit().is_Rational for one in (gold, answer)):
            return gold.doit() == answer.doit()
        pairs = [(a, b) for a, b in zip(values(gold, symbols), values(answer, symbols)) if a.is_finite and b.is_finite
                 and (a.is_real and b.is_real or not symbols)]
        if are_equations:
            pairs = [(a / b, pairs[0][0] / pairs[0][1]) for a, b in pairs if b]
        equal = len(pairs) > 1 and all(abs(a - b) <= abs(a) * Rational(1, 10**40) for a, b in pairs)
        return equal or (False if len(pairs) > 1 else None)

    def verify(gold, answer):
        golds, answers = map(read, apart(gold, answer))
        verdict = same_values(golds[0], answers[0]) if golds and answers else False
        if verdict is None:
            verdict = math_verify.verify(golds, answers, float_rounding=10, timeout_seconds=None)
        return verdict

    return verify


def run_nursery() -> None:
    """The nursery's main loop. It ends when the parent is gone, because the socket on its stdin is then closed."""
    logging.disable()  # math-verify warns that its own time limit is off
    verify = make_verify()
    for pair in WARM_UP:
        verify(*pair)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    requests = socket.socket(fileno=0)
    while True:
        question, descriptors, _, _ = socket.recv_fds(requests, 2**16, 1)
        if not descriptors:
            return
        if os.fork() == 0:
            gold, answer = json.loads(question)
            resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))  # bytes
            signal.setitimer(signal.ITIMER_PROF, JUDGE_SECONDS)  # its signal ends the child, whatever C code it is in
            signal.setitimer(signal.ITIMER_REAL, STANDSTILL_SECONDS)
            connection = socket.socket(fileno=descriptors[0])
            try:
                connection.send(b"1" if same(gold, answer, verify) else b"0")
            except Exception:  # in what a model wrote: nobody's news
                connection.send(b"0")
            finally:
                os._exit(0)
        os.close(descriptors[0])


if __name__ == "__main__":
    run_nursery()
