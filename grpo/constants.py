"""The upper-case names at the top of a script: set for one run as NAME=value, checked before anything starts."""
import sys
from inspect import get_annotations
from typing import get_args


def require(condition, sentence: str) -> None:
    """SystemExit with the sentence if the condition does not hold."""
    if not condition:
        raise SystemExit(sentence)


def constants_of(module: str) -> dict:
    """The upper-case names of a module, `__name__` for the caller's own, with their values."""
    return {name: value for name, value in vars(sys.modules[module]).items() if name.isupper()}


def override_constants(module: str, arguments: list[str]) -> None:
    """Sets a module's constants from NAME=value arguments, of the same type as the default.

    SystemExit at an unknown name, another type, or a value that is not in the constant's `Literal[...]`, if it has one.
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
    for name, values in allowed.items():
        value, values = valid[name], get_args(values)
        require(value in values, f"{name}={value}: expected one of {', '.join(map(str, values))}")
    vars(sys.modules[module]).update(valid)
