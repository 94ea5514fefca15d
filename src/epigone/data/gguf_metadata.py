"""The key-value pairs at the head of a GGUF file, of which a tokenizer is made."""

import mmap
import struct
from pathlib import Path
from typing import Any

from epigone.errors import UserError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def tokenizer_metadata(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Values of the keys that begin with `tokenizer.`, and the bytes that hold each of them.

    The gguf package reads the same in seconds, since it makes arrays of every one of some 100,000 strings.
    Source: the GGUF specification, versions 2 and 3, little endian.

    Raises UserError for a file that is none, or cut short.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _pairs(data)
    except (OSError, ValueError, KeyError, IndexError, struct.error, OverflowError) as error:
        raise UserError(f"'{path}' is no GGUF file, or damaged: {error}") from error


def _pairs(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, bytes]]:
    magic, version, _, count = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r}, version {version}")
    values, raw, at = {}, {}, 24
    for _ in range(count):
        start = at
        key, at = _string(data, at)
        (kind,), at = struct.unpack_from("<I", data, at), at + 4
        value, at = _value(data, kind, at)
        if at > len(data):
            raise ValueError("it ends in the middle")
        if key.startswith("tokenizer."):
            values[key], raw[key] = value, data[start:at]
    return values, raw


def _value(data: mmap.mmap, kind: int, at: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _string(data, at)
    if kind != _ARRAY:
        form = f"<{_NUMBERS[kind]}"
        return struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)
    (inner, length), at = struct.unpack_from("<IQ", data, at), at + 12
    if length > len(data):
        raise ValueError(f"a list of {length} values")
    if inner in _NUMBERS:
        form = f"<{length}{_NUMBERS[inner]}"
        return list(struct.unpack_from(form, data, at)), at + struct.calcsize(form)
    values = []
    for _ in range(length):
        value, at = _value(data, inner, at)
        values.append(value)
    return values, at


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,), at = struct.unpack_from("<Q", data, at), at + 8
    return data[at : at + length].decode("utf-8"), at + length
