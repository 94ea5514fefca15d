"""Values of config.json, checked: each function takes a key and its value, and raises UserError for a wrong kind."""

import math
from collections.abc import Callable
from typing import Any

from epigone.errors import UserError
from epigone.models.layers import exact_gelu, gelu, silu

_ACTIVATIONS = {
    "silu": silu,
    "swish": silu,
    "gelu_pytorch_tanh": gelu,
    "gelu_new": gelu,
    "gelu_fast": gelu,
    "gelu_python_tanh": gelu,
    "gelu": exact_gelu,
    "gelu_python": exact_gelu,
}
"""Names of activations in transformers; the first of each function is the one that is written."""


LARGEST = 2**24
"""No size of a model is larger, and one that is would fill the memory before it is found out."""


def whole(key: str, value: Any) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 != 0 or not abs(value) <= LARGEST:
        raise UserError(f"{key} is {value!r:.80}: a whole number of at most {LARGEST} is wanted")
    return int(value)


def layer_count(key: str, value: Any) -> int:
    """A number of layers."""
    if whole(key, value) > 10_000:
        raise UserError(f"{key} is {value!r}: at most 10000 layers are read")
    return int(value)


def number(key: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{key} is {value!r}: a number is wanted")
    return float(value)


def positive(key: str, value: Any) -> float:
    """A number above 0."""
    if number(key, value) <= 0:
        raise UserError(f"{key} is {value!r}: a number above 0 is wanted")
    return float(value)


def numbers(key: str, value: Any) -> tuple[float, ...]:
    """A list of numbers."""
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{key} is {value!r}: a list of numbers is wanted")
    return tuple(number(key, entry) for entry in value)


def switch(key: str, value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise UserError(f"{key} is {value!r}: true or false is wanted")
    return value


def optional(kind: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """The same kind of value, or null."""
    return lambda key, value: None if value is None else kind(key, value)


def activation(key: str, value: Any) -> Callable[..., Any]:
    """The function of an activation's name."""
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise UserError(f"{key} {value!r:.80} is not one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def activation_name(function: Callable[..., Any]) -> str:
    """The name that is written for an activation; a name that no file has for a function that none knows."""
    names = [name for name, known in _ACTIVATIONS.items() if known is function]
    return names[0] if names else function.__qualname__
