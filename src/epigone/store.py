"""A run directory: where nodes, their texts and their records lie, and who may write there."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from epigone import __version__
from epigone.errors import Busy, Fault, UserError, did_you_mean
from epigone.identity import canonical, fingerprint
from epigone.lineage import Lineage, Node, Population, Written
from epigone.storage.places import on_store, write_whole


class Store:
    """Paths and records of one run. A node's directory carries its identity, so a changed config never meets old files.

    RUN/lineage.json, RUN/tokenizers/<identity>.json and, in RUN/nodes/<key>-<identity>/: record.json, model/, text/.
    Weights that came from files lie beside the data sets, in DATA/pretrained/<digest>/, once for all runs.
    """

    def __init__(self, run: Path, lineage: Lineage, data: Path | None = None) -> None:
        self.run, self.lineage = run, lineage
        self.data = data or run.parent / "data"
        if self.data == self.run:
            raise UserError(f"'{run}' is where texts and imported weights of all runs lie: name another run directory")

    def directory(self, node: Node) -> Path:
        """Where a node lives."""
        return self.run / "nodes" / f"{node.key}-{self.lineage.identities[node.key][:8]}"

    def weights(self, node: Node) -> Path:
        """Where its model lies."""
        source = node.lesson.source
        if source is None:
            return self.directory(node) / "model"
        use = ("dtype", "remat", "specials", "quantization")
        shape = {k: v for k, v in canonical(node.model).items() if k not in use}
        kept_as = fingerprint(shape)
        return self.data / "pretrained" / f"{source.digest[:16]}-{kept_as[:4]}" / "model"

    def has_weights(self, node: Node) -> bool:
        """Whether an imported node's weights lie there whole."""
        place = self.weights(node)
        return (place / "manifest.json").exists() and (place.parent / "checksums.json").exists()

    def written(self, source: Written) -> Path:
        """Where the text that a node writes for one kind of sampling lies."""
        source, judge = source.whole, self.lineage.identities[source.judge] if source.judge else None
        return self.directory(self.lineage[source.by]) / "text" / fingerprint([source, judge] if judge else source)[:8]

    def tokenizer(self, config: Any) -> Path:
        """Where a tokenizer lies in the run."""
        return self.run / "tokenizers" / f"{fingerprint(config)}.json"

    def record(self, node: Node) -> dict[str, Any] | None:
        """The record of a node that is done; None before, and where what an imported node needs was deleted."""
        path = self.directory(node) / "record.json"
        if not path.exists():
            return None
        if node.lesson.source and not (self.has_weights(node) and self.tokenizer(node.tokenizer).exists()):
            return None
        try:
            record = json.loads(path.read_text())
        except ValueError:
            raise Fault(f"record {path} is damaged: delete its directory to grow node '{node.key}' again") from None
        if not isinstance(record, dict) or record.get("identity") != self.lineage.identities[node.key]:
            raise Fault(f"record {path} is not of this lineage: delete its directory to grow node '{node.key}' again")
        return record

    def measured_as(self, node: Node) -> str:
        """What a record's measures depend on beside the node: the evaluation, and the models it is held against."""
        judge = self.lineage.evaluation.judge if self.lineage.evaluation else None
        others = [self.lineage[key] for key in [*self.compared(node), *([judge] if judge else [])]]
        known = [
            (self.lineage.identities[other.key], (self.directory(other) / "record.json").exists()) for other in others
        ]
        first = self.lineage.identities[self.lineage.ancestor(node.key).key]
        return fingerprint([self.lineage.evaluation, known, first])

    def compared(self, node: Node) -> list[str]:
        """Keys of the nodes with whose scores a node's are compared: its teacher, and what the evaluation names."""
        named = self.lineage.evaluation.compare if self.lineage.evaluation else {}
        wanted = dict.fromkeys([*node.lesson.teachers, named.get(node.name)])
        return [key for key in wanted if key]

    def write_record(self, node: Node, record: dict[str, Any]) -> None:
        """Make a node done: the record appears whole or not at all."""
        write_json(self.directory(node) / "record.json", record)

    def population_record(self, population: Population) -> dict[str, Any] | None:
        """What was measured of a population of these very nodes; None before."""
        return _if_current(self.run / "populations" / f"{population.key}.json", self.population_as(population))

    def population_as(self, population: Population) -> str:
        """What its measures depend on."""
        members = [self.lineage.identities[key] for key in population.members]
        return fingerprint([population, members, self.lineage.evaluation])

    def write_population(self, population: Population, measures: dict[str, float]) -> None:
        """Keep what was measured of a population."""
        described = {name: getattr(population, name) for name in ("key", "name", "seed", "members", "factors")}
        record = {**described, "metrics": measures, "measured_as": self.population_as(population)}
        write_json(self.run / "populations" / f"{population.key}.json", record)

    def watch_record(self) -> dict[str, Any] | None:
        """What was measured at the box that the lineage watches; None before."""
        return _if_current(self.run / "watch.json", self.watch_as())

    def watch_as(self) -> str:
        """What that depends on."""
        watch = self.lineage.watch
        return fingerprint([watch, self.lineage.identities[watch.teacher]]) if watch else ""

    def write_watch(self, measures: dict[str, Any]) -> None:
        """Keep what was measured at the box."""
        write_json(self.run / "watch.json", measures | {"measured_as": self.watch_as()})

    def write_lineage(self) -> None:
        """Describe the whole lineage, grown or not, for the report and for people."""
        lineage = self.lineage
        nodes = [
            {
                "key": node.key,
                "name": node.name,
                "generation": node.generation,
                "seed": node.seed,
                "identity": lineage.identities[node.key],
                "kind": kind(node),
                "parents": [{"key": key, "role": role} for key, role in node.parents],
                "labels": dict(node.labels),
            }
            for node in lineage.order
        ]
        described = {
            "name": lineage.name,
            "description": lineage.description,
            "epigone": __version__,
            "nodes": nodes,
            "evaluation": canonical(lineage.evaluation),
            "populations": [
                {**canonical(population), "key": population.key, "measured_as": self.population_as(population)}
                for population in lineage.populations
            ],
            "claims": [canonical(claim) for claim in lineage.claims],
            **({"watch": self.watch_as()} if lineage.watch else {}),
        }
        path = self.run / "lineage.json"
        if not path.exists() or path.read_bytes() != json.dumps(described, indent=1).encode():
            write_json(path, described)

    @contextlib.contextmanager
    def lock(self, node: Node | None = None) -> Iterator[None]:
        """Keep others out while this process writes: the whole run, or one node of it beside processes at others."""
        with contextlib.ExitStack() as stack:
            mode = fcntl.LOCK_EX if node is None else fcntl.LOCK_SH
            stack.enter_context(_locked(self.run / "lock", mode))
            if node is not None:
                stack.enter_context(_locked(self.directory(node) / "lock", fcntl.LOCK_EX))
            yield

    def share(self) -> contextlib.AbstractContextManager[None]:
        """Keep out whoever would grow the whole run, and nobody else."""
        return _locked(self.run / "lock", fcntl.LOCK_SH)

    def alone(self, place: Path) -> contextlib.AbstractContextManager[None]:
        """Wait until no other process is making what will lie at this place, and keep others out."""
        return _locked(place.with_name(f"{place.name}.lock"), fcntl.LOCK_EX, patient=True)

    def lock_weights(self, node: Node) -> contextlib.AbstractContextManager[None]:
        """Wait until no other run imports these weights, and keep others out."""
        return _locked(self.weights(node).parent / "lock", fcntl.LOCK_EX, patient=True)


def kind(node: Node) -> str:
    """What sort of model a node is: the name of its architecture's config, in lower case."""
    return type(node.model).__name__.removesuffix("Config").lower()


def _if_current(path: Path, mark: str) -> dict[str, Any] | None:
    """What was measured of the lineage as a whole, if it still is of this lineage."""
    try:
        record = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError:
        raise Fault(f"{path} is damaged: delete it to measure again") from None
    return record if record.get("measured_as") == mark else None


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader, or a run killed at any moment, sees the old file or the new one, never a part."""
    write_whole(path, json.dumps(_finite(value), indent=1, allow_nan=False).encode())


def _finite(value: Any) -> Any:
    """JSON has no infinity: such numbers become the strings "inf", "-inf" and "nan"."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value.item() if hasattr(value, "item") else value


@contextlib.contextmanager
def _locked(path: Path, mode: int, patient: bool = False) -> Iterator[None]:
    """Hold an advisory lock on a file, which the system takes back when the process ends, however it ends.

    In a bucket a claim takes its place, which is void a minute after the process ended without giving it up.
    """
    if on_store(path):
        from epigone.storage.claims import held

        with held(path, shared=mode == fcntl.LOCK_SH, patient=patient):
            yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, mode if patient else mode | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = f"process {file.read().strip()}" if path.stat().st_size else "processes that grow single nodes"
            raise Busy(f"{path.parent} is being grown by {owner}: wait, or stop them") from None
        if mode == fcntl.LOCK_EX:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        try:
            yield
        finally:
            if mode == fcntl.LOCK_EX:
                file.truncate(0)


def open_run(run: Path) -> dict[str, Any]:
    """The description of a grown lineage, as `write_lineage` left it."""
    path = run / "lineage.json"
    if not path.exists():
        others = [] if on_store(run) else [p.parent.name for p in run.parent.glob("*/lineage.json")]
        raise UserError(f"no run in {run}{did_you_mean(run.name, others)}; grow one with 'epigone run CONFIG'")
    try:
        described = json.loads(path.read_text())
        _ = [(node["key"], node["identity"]) for node in described["nodes"]]
    except (ValueError, KeyError, TypeError):
        raise Fault(f"{path} is damaged: run 'epigone run' on the same config to write it again") from None
    return described
