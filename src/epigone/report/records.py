"""Read a run directory: the lineage and the record of every node that is grown.

A record is used only if its key and identity are those of a node of `lineage.json`; what an older config left
behind is ignored, and a node without a record is pending. A metric that nobody computed is absent (None), never 0.

The report knows no names. What it needs to know about a node stands in the node's labels in `lineage.json`, all
optional strings:

| label    | meaning                                                     | without it             |
|----------|-------------------------------------------------------------|------------------------|
| `family` | the panel in which the node is drawn, e.g. "trigram"        | the node's kind        |
| `regime` | the curve over generations it belongs to, e.g. "replace"    | the node's name        |
| `role`   | "student" or "control" puts the node into the comparison of | not compared           |
|          | the two (same family, same generation, paired by seed); any |                        |
|          | other word is only shown in the table                       |                        |
| `way`    | how a student outside a prompt box learned, e.g. "text"     | not drawn there        |
| `asked`  | tokens that it asked for, a number                          | not drawn there        |
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from epigone.errors import Fault, UserError

# (key, identity) -> (record, its path in the run)
Records = dict[tuple[str, str], tuple[dict[str, Any], str]]


@dataclass(frozen=True)
class Parent:
    """One lesson's source: the parent's key and its role, "teacher", "text", "start" or "judge"."""

    key: str
    role: str


@dataclass(frozen=True)
class Node:
    """A node of the lineage with its record and the record's path in the run; None and "" while it is pending."""

    key: str
    name: str
    generation: int
    seed: int
    identity: str
    kind: str
    parents: tuple[Parent, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    record: dict[str, Any] | None = None
    path: str = ""

    @property
    def family(self) -> str:
        return self.labels.get("family") or self.kind or "model"

    @property
    def regime(self) -> str:
        return self.labels.get("regime") or self.name

    @property
    def role(self) -> str:
        return self.labels.get("role") or ""

    @property
    def group(self) -> str:
        """The name at its generation: what the seeds of one recipe share."""
        return f"{self.name}@{self.generation}"

    @property
    def own_key(self) -> str:
        """The key in the node's own run, also where runs are joined."""
        return self.key.rpartition("/")[2]

    @property
    def reads_real_text(self) -> bool:
        """Whether a data card of the record has no parents: text that no model wrote."""
        return any(not card.get("parents") for card in self.get("data", []))

    def get(self, name: str, default: Any = None) -> Any:
        """A field of the record, or `default` where the record or the field is absent."""
        value = (self.record or {}).get(name)
        return default if value is None else value

    def metric(self, name: str) -> float | None:
        """A metric of the record as a float (inf and nan included), None where it is absent."""
        return number(self.get("metrics", {}).get(name))

    def theory(self, name: str) -> float | None:
        """What theory expects of a metric, None where it says nothing."""
        return number(self.get("theory", {}).get(name))


@dataclass(frozen=True)
class Population:
    """Models that were held against each other; `metrics` is empty while they are not."""

    key: str
    seed: int
    members: tuple[str, ...]
    factors: dict[str, float]
    metrics: dict[str, Any] = field(default_factory=dict)

    def metric(self, name: str) -> float | None:
        """A measure as a float, None where it is absent."""
        return number(self.metrics.get(name))


@dataclass(frozen=True)
class Claim:
    """What a source says: the metric of each group of nodes is less than `factor` times that of the next."""

    says: str
    source: str
    order: tuple[str, ...]
    factor: float
    metric: str


@dataclass(frozen=True)
class Run:
    """All that a report is made from."""

    name: str
    description: str
    version: str
    nodes: tuple[Node, ...]
    populations: tuple[Population, ...] = ()
    claims: tuple[Claim, ...] = ()
    watch: dict[str, Any] = field(default_factory=dict)

    @property
    def grown(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.record is not None)

    @cached_property
    def by_key(self) -> dict[str, Node]:
        return {node.key: node for node in self.nodes}


def number(value: Any) -> float | None:
    """A JSON value as float: numbers and the strings "inf", "-inf", "nan"; everything else is None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str) and value.lower() in ("inf", "-inf", "nan", "infinity", "-infinity"):
        return float(value)
    return None


def finite(value: Any) -> float | None:
    """`number`, but None also for inf and nan."""
    result = number(value)
    return result if result is not None and math.isfinite(result) else None


def joined(directories: Sequence[Path], folder: Path) -> Run:
    """Several runs as one, for a report in a folder: keys, names and families begin with the run directory's name.

    Raises:
        UserError: two directories have one name, or one holds no lineage.
        Fault: a lineage or a record is not readable JSON.
    """
    names = [directory.name for directory in directories]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two runs are called '{double}': rename one directory, so that their nodes can be told apart")
    runs = [load_run(directory, folder) for directory in directories]
    nodes = [_renamed(node, name) for name, run in zip(names, runs, strict=True) for node in run.nodes]
    populations = [
        replace(one, key=f"{name}/{one.key}", members=tuple(f"{name}/{key}" for key in one.members))
        for name, run in zip(names, runs, strict=True)
        for one in run.populations
    ]
    claims = [
        replace(one, order=tuple(f"{name}/{group}" for group in one.order))
        for name, run in zip(names, runs, strict=True)
        for one in run.claims
    ]
    told = " ".join(f"{name}: {run.description}" for name, run in zip(names, runs, strict=True))
    return Run(" and ".join(names), told, runs[0].version, tuple(nodes), tuple(populations), tuple(claims))


def _renamed(node: Node, run: str) -> Node:
    """A node of a run among those of others."""
    named = {"family": f"{run} · {node.family}", "regime": node.regime if "regime" in node.labels else ""}
    if "way" in node.labels:
        named["way"] = f"{run} · {node.labels['way']}"
    labels = {**node.labels, **{name: value for name, value in named.items() if value}}
    parents = tuple(Parent(f"{run}/{parent.key}", parent.role) for parent in node.parents)
    return replace(node, key=f"{run}/{node.key}", name=f"{run}/{node.name}", parents=parents, labels=labels)


def load_run(directory: Path, folder: Path | None = None) -> Run:
    """Read `lineage.json` and the records that belong to it; their paths are from `folder`, by default the directory.

    Raises:
        UserError: there is no lineage in the directory.
        Fault: the lineage or a record is not readable JSON.
    """
    path = directory / "lineage.json"
    if not path.is_file():
        raise UserError(f"no lineage.json in '{directory}': give the directory of a run, or grow it with `epigone run`")
    lineage = _read_object(path)
    records = _read_records(directory, folder or directory)
    try:
        nodes = tuple(_node(entry, records) for entry in lineage["nodes"])
        populations = tuple(_population(entry, directory) for entry in lineage.get("populations") or ())
        claims = tuple(_claim(entry) for entry in lineage.get("claims") or ())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Fault(f"damaged lineage '{path}': {error!r}; grow the run again to rewrite it") from error
    return Run(
        name=str(lineage.get("name") or directory.name),
        description=str(lineage.get("description") or ""),
        version=str(lineage.get("epigone") or ""),
        nodes=nodes,
        populations=populations,
        claims=claims,
        watch=_watch(lineage, directory),
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Fault(f"damaged file '{path}': {error}; delete it and grow the run again") from error
    if not isinstance(value, dict):
        raise Fault(f"damaged file '{path}': expected a JSON object; delete it and grow the run again")
    return value


def _read_records(directory: Path, folder: Path) -> Records:
    records: Records = {}
    for path in sorted(directory.glob("nodes/*/record.json")):
        record = _read_object(path)
        inside = path.is_relative_to(folder)
        place = path.relative_to(folder).as_posix() if inside else Path(os.path.relpath(path, folder)).as_posix()
        records[str(record.get("key")), str(record.get("identity"))] = (record, place)
    return records


def _claim(entry: dict[str, Any]) -> Claim:
    order = tuple(str(group) for group in entry["order"])
    return Claim(str(entry["says"]), str(entry["source"]), order, float(entry["factor"]), str(entry["metric"]))


def _watch(lineage: dict[str, Any], directory: Path) -> dict[str, Any]:
    """What was measured at the box; empty where nothing was, or of another lineage."""
    path = directory / "watch.json"
    record = _read_object(path) if lineage.get("watch") and path.is_file() else {}
    return record if record.get("measured_as") == lineage.get("watch") else {}


def _population(entry: dict[str, Any], directory: Path) -> Population:
    path = directory / "populations" / f"{entry['key']}.json"
    record = _read_object(path) if path.is_file() else {}
    current = record.get("measured_as") == entry["measured_as"]
    return Population(
        key=str(entry["key"]),
        seed=int(entry.get("seed") or 0),
        members=tuple(str(key) for key in entry["members"]),
        factors={str(name): float(value) for name, value in (entry.get("factors") or {}).items()},
        metrics=dict(record.get("metrics") or {}) if current else {},
    )


def _node(entry: dict[str, Any], records: Records) -> Node:
    key, identity = str(entry["key"]), str(entry["identity"])
    record, path = records.get((key, identity), (None, ""))
    return Node(
        key=key,
        name=str(entry["name"]),
        generation=int(entry["generation"]),
        seed=int(entry.get("seed") or 0),
        identity=identity,
        kind=str(entry.get("kind") or ""),
        parents=tuple(Parent(str(p["key"]), str(p.get("role") or "text")) for p in entry.get("parents") or ()),
        labels={str(k): str(v) for k, v in (entry.get("labels") or {}).items() if v},
        record=record,
        path=path,
    )
