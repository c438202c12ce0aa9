"""The upper-case names at the top of a script: set for one run as NAME=value, checked before anything starts.

And how whatever is wrong becomes one sentence.
"""
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import get_annotations
from math import inf
from typing import get_args


def require(condition, sentence: str) -> None:
    """SystemExit with the sentence if the condition does not hold."""
    if not condition:
        raise SystemExit(sentence)


@contextmanager
def explained(sentence: str, errors=Exception, hint=""):
    """A context in which an error of these classes becomes SystemExit: the sentence, the error, its cause, a hint."""
    try:
        yield
    except errors as error:
        said = dict.fromkeys(" ".join(str(one).split()) for one in (error, error.__cause__) if one)  # each once
        raise SystemExit(f"{sentence}: {type(error).__name__}: {' '.join(said):.700}{hint}") from error


@dataclass(frozen=True)
class Over:
    """Annotates a constant that has to be over `low`, and at most `high`. Without an annotation 0 is the least."""
    low: float
    high: float = inf

    def __contains__(self, value) -> bool:
        return self.low < value <= self.high

    def __str__(self) -> str:
        return f"a number over {self.low}" + f", up to {self.high}" * (self.high < inf)


def constants_of(module: str) -> dict:
    """The upper-case names of a module, `__name__` for the caller's own, with their values."""
    return {name: value for name, value in vars(sys.modules[module]).items() if name.isupper()}


def override_constants(module: str, arguments: list[str]) -> None:
    """Sets a module's constants from NAME=value arguments, of the same type as the default.

    SystemExit at an unknown name, another type, a number that is not finite or too large for float32, or a value that
    the constant's annotation, `Literal[...]` or `Over`, does not allow.
    """
    valid, allowed = constants_of(module), get_annotations(sys.modules[module])
    for argument in arguments:
        name, _, text = argument.partition("=")
        if name == "--local_rank":  # the deepspeed launcher's own; the environment says the same
            continue
        require(name in valid, f"unknown constant {argument!r}: write NAME=value with one of {', '.join(valid)}")
        kind = type(valid[name])
        read = {bool: {"True": True, "False": False}.__getitem__, list: lambda names: names.split(",")}.get(kind, kind)
        try:
            valid[name] = read(text)
        except (ValueError, KeyError):
            raise SystemExit(f"{name}={text}: expected {kind.__name__}, as in {name}={valid[name]}") from None
    for name, value in valid.items():
        limits = allowed.get(name)
        if choices := get_args(limits):
            require(value in choices, f"{name}={value}: expected one of {', '.join(map(str, choices))}")
        elif type(value) in (int, float):
            require(abs(value) <= 1e30, f"{name}={value}: expected a finite number, at most 1e30")
            right = value in limits if limits else value >= 0
            require(right, f"{name}={value}: expected {limits or 'a number, 0 or above'}")
    vars(sys.modules[module]).update(valid)
