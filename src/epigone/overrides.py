"""Change any field of any node from the command line: `student.lesson.training.steps=200`."""

import dataclasses
import functools
import importlib
import types
import typing
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import docstring_parser

from epigone.errors import UserError, did_you_mean
from epigone.lineage import Lineage, Node


def override(lineage: Lineage, assignments: Sequence[str]) -> Lineage:
    """The lineage with every `PLACE.FIELD[.FIELD...]=VALUE` applied in order.

    PLACE is a node's name (`student`: all its generations and seeds), its key (`student@1.s2`) or a pattern
    (`self-*`), or `evaluation`. Numbers name entries of a tuple. A value is read as the field's own type; a function
    is named as it is where the present one is defined, or as `module:name`.

    Raises:
        UserError: no such node or field (the nearest is named), or a value of another type.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        place, dot, fields = path.partition(".")
        if path.count("@") and ".s" in path:
            place, fields = _split_key(path, lineage)
            dot = "."
        if not (equals and dot and fields):
            raise UserError(
                f"cannot read '{assignment}': write NODE.FIELD=VALUE, as in student.lesson.training.steps=9"
            )
        lineage = _apply(lineage, place, fields.split("."), text, assignment)
    return lineage


def _split_key(path: str, lineage: Lineage) -> tuple[str, str]:
    """Keys hold a dot before the seed: take the longest key that the path begins with."""
    keys = [key for key in lineage.by_key if path.startswith(key + ".")]
    place = max(keys, key=len) if keys else path.partition(".")[0]
    return place, path[len(place) + 1 :]


def _apply(lineage: Lineage, place: str, fields: list[str], text: str, assignment: str) -> Lineage:
    if place == "evaluation":
        return dataclasses.replace(lineage, evaluation=changed(lineage.evaluation, fields, text, assignment))
    chosen = {node.key for node in lineage.nodes if place in (node.name, node.key) or fnmatchcase(node.key, place)}
    chosen |= {node.key for node in lineage.nodes if fnmatchcase(node.name, place)}
    if not chosen:
        names = dict.fromkeys([*(node.name for node in lineage.nodes), "evaluation"])
        raise UserError(f"no node '{place}' in lineage '{lineage.name}'{did_you_mean(place, names)}")
    nodes = tuple(changed(n, fields, text, assignment) if n.key in chosen else n for n in lineage.nodes)
    return dataclasses.replace(lineage, nodes=nodes)


def changed(value: Any, fields: list[str], text: str, assignment: str) -> Any:
    """`value` with the field at the end of the path read from `text`."""
    name, rest = fields[0], fields[1:]
    if isinstance(value, tuple):
        if not (name.isdigit() and int(name) < len(value)):
            raise UserError(f"'{assignment}': '{name}' is no entry of a list of {len(value)}; entries count from 0")
        index = int(name)
        item = changed(value[index], rest, text, assignment) if rest else read(text, Any, value[index], assignment)
        return (*value[:index], item, *value[index + 1 :])
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise UserError(f"'{assignment}': there is no field '{name}' in {value!r}, which is a plain value")
    known = [field.name for field in dataclasses.fields(value)]
    if name not in known:
        raise UserError(f"'{assignment}': {type(value).__name__} has no field '{name}'{did_you_mean(name, known)}")
    old = getattr(value, name)
    if rest:
        return dataclasses.replace(value, **{name: changed(old, rest, text, assignment)})
    annotation = typing.get_type_hints(type(value))[name]
    if text == "None" and getattr(type(value), name, "absent") is None:
        return dataclasses.replace(value, **{name: None})
    return dataclasses.replace(value, **{name: read(text, annotation, old, assignment)})


def read(text: str, annotation: Any, old: Any, assignment: str) -> Any:
    """A value of the annotated type from its text; where the type is open, of the type of the old value."""
    kinds = _kinds(annotation) or ([type(old)] if isinstance(old, bool | int | float | str) else [])
    if text == "None" and (type(None) in kinds or old is None):
        return None
    if callable(old) and not isinstance(old, type):
        return _function(text, old, assignment)
    if isinstance(old, tuple) or any(typing.get_origin(kind) is tuple for kind in kinds):
        parts = [part for part in text.strip("()").split(",") if part.strip()]
        declared = [typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is tuple]
        item = type(old[0]) if old else declared[0][0] if declared and declared[0] else str
        return tuple(read(part.strip(), item, None, assignment) for part in parts)
    for kind in (kind for kind in (bool, int, float, str) if kind in kinds):
        try:
            return _booleans[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            continue
    wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds) or type(old).__name__
    raise UserError(f"'{assignment}': '{text}' is not of type {wanted}; it is {old!r} now")


_booleans = {"true": True, "false": False}


def _kinds(annotation: Any) -> list[Any]:
    if annotation is Any:
        return []
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return list(typing.get_args(annotation)) if union else [annotation]


def _function(text: str, old: Any, assignment: str) -> Any:
    """A function by name: beside the present one, or in the module before the colon."""
    present = old.func if isinstance(old, functools.partial) else old
    module_name, _, name = text.rpartition(":")
    try:
        module = importlib.import_module(module_name or present.__module__)
    except (ImportError, TypeError, ValueError):
        raise UserError(f"'{assignment}': there is no module '{module_name}'") from None
    if not callable(getattr(module, name, None)):
        public = [n for n, f in vars(module).items() if callable(f) and getattr(f, "__module__", "") == module.__name__]
        known = [n for n in public if not n.startswith("_") and isinstance(getattr(module, n), types.FunctionType)]
        raise UserError(f"'{assignment}': {module.__name__} has no function '{name}'{did_you_mean(name, known)}")
    return getattr(module, name)


def documented_fields(value: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(path, present value, what it means) of every field below a config, from the docstrings of its dataclasses."""
    parsed = docstring_parser.parse(type(value).__doc__ or "")
    texts = {parameter.arg_name: (parameter.description or "") for parameter in parsed.params}
    for field in dataclasses.fields(value):
        item, path = getattr(value, field.name), f"{prefix}{field.name}"
        if isinstance(item, tuple) and item and dataclasses.is_dataclass(item[0]):
            for index, entry in enumerate(item):
                yield from documented_fields(entry, f"{path}.{index}.")
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            yield from documented_fields(item, f"{path}.")
        else:
            yield path, item, " ".join(texts.get(field.name, "").split())


def kinds_of_node(lineage: Lineage) -> dict[str, Node]:
    """The first node of each name."""
    first: dict[str, Node] = {}
    for node in lineage.order:
        first.setdefault(node.name, node)
    return first
