"""The two ways in which a command ends badly, which the command line prints as one line; and checks that many share."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class UserError(Exception):
    """What the user gave cannot be used: what, which value, what to do. Exit code 2."""


class Busy(UserError):
    """Another process is at the same work."""


class Fault(Exception):
    """The run could not go on: a full disk, a damaged file, a loss that is not a number. Exit code 1."""


class Stopped(BaseException):
    """The run was asked to stop and saved what it had; the same command goes on. Exit code 143.

    Like KeyboardInterrupt it is no Exception: what catches those to tell of a failure must let it pass.
    """


def check_name(name: str) -> None:
    """Names become names of directories."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"name '{name[:120]}': use letters, digits, '.', '_' and '-', a hundred at most")


def check_sizes(config: Any, **least: int) -> None:
    """Refuse a config with a field, if it is set, that is less than its least value."""
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise UserError(f"{type(config).__name__}: {name}={value} must be at least {smallest}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known word, or all of them when none is near and they are few."""
    known = list(known)
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= 12 else ""
