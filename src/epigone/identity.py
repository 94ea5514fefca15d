"""The identity of a config: one canonical form, one hash, and the way back from a record to the config."""

import dataclasses
import functools
import hashlib
import importlib
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

from epigone.errors import Fault, UserError

WHERE_SET = "where it is set"
"""Metadata `identity` of a field that came later: with its default, configs have the identity that they had before."""


def canonical(value: Any, whole: bool = True) -> Any:
    """A config as plain JSON values: the same for equal configs, in every process and on every machine.

    Dataclasses become objects with their type's name, functions their qualified name, partials their function and
    arguments. Everything else that is not plain data is refused, since its identity would not be stable. Fields with
    the metadata `identity=False`, such as labels and paths, are left out unless the `whole` is asked for; those with
    `identity=WHERE_SET` where they have their default.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = [f.name for f in dataclasses.fields(value) if whole or _counts(f, getattr(value, f.name))]
        fields = {name: canonical(getattr(value, name), whole) for name in kept}
        return {"type": f"{type(value).__module__}:{type(value).__qualname__}", **fields}
    if isinstance(value, functools.partial):
        rest = canonical(value.keywords, whole)
        return {"partial": canonical(value.func, whole), "args": canonical(value.args, whole), **rest}
    if isinstance(value, Mapping):
        return {str(key): canonical(item, whole) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item, whole) for item in value]
    if isinstance(value, Enum):
        return value.value if isinstance(value, str) else value.name
    if isinstance(value, PurePath):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    name = getattr(value, "__qualname__", "<lambda>")
    if callable(value) and "<" not in name:
        return f"{value.__module__}:{name}"
    raise UserError(f"a config cannot hold {value!r}: use plain values, dataclasses, and functions that have a name")


def _counts(field: dataclasses.Field[Any], value: Any) -> bool:
    how = field.metadata.get("identity", True)
    return bool(value != field.default if how == WHERE_SET else how)


def fingerprint(value: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the canonical form, without what is no part of an identity."""
    text = json.dumps(canonical(value, whole=False), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def restore(value: Any) -> Any:
    """The config of which `value` is the canonical form. Only Epigone's own types and functions are looked up.

    Raises Fault for a name that is not there, as in a record of another version.
    """
    if isinstance(value, dict):
        fields = {key: restore(item) for key, item in value.items() if key not in ("type", "partial", "args")}
        if "type" in value:
            kind = _named(value["type"])
            if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
                raise Fault(f"a record names '{value['type']}' as a config, and it is none")
            return kind(**fields)
        if "partial" in value:
            return functools.partial(_named(value["partial"]), *restore(value["args"]), **fields)
        return fields
    if isinstance(value, list):
        return tuple(restore(item) for item in value)
    if isinstance(value, str) and value.startswith("epigone.") and ":" in value:
        return _named(value)
    return value


def _named(reference: str) -> Any:
    """The function or type that is defined at `module:name`, if the module is Epigone's; never what it imported."""
    module, _, name = str(reference).partition(":")
    if module.split(".")[0] != "epigone":
        raise Fault(f"a record names '{reference}', which is not part of epigone")
    try:
        found = vars(importlib.import_module(module))[name]
    except (ImportError, KeyError):
        raise Fault(f"a record names '{reference}', which this version does not have") from None
    if not callable(found) or getattr(found, "__module__", None) != module:
        raise Fault(f"a record names '{reference}', which is not defined there")
    return found
