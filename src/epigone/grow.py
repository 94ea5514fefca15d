"""Walk a lineage: skip what is done, grow the rest, measure it, write its record."""

import contextlib
import datetime
import itertools
import os
import platform
import resource
import subprocess
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from epigone import __version__
from epigone.errors import UserError
from epigone.groups import groups
from epigone.identity import canonical
from epigone.learning import learn, learn_together
from epigone.lineage import Lineage, Node, Text, TrainedTokenizer, Written
from epigone.materials import Materials
from epigone.measure import compared, measured, watched
from epigone.models.ngram import NGram
from epigone.plan import check_trained
from epigone.processes import first_then_all, is_first, wait
from epigone.starting import check_quantization, check_start
from epigone.storage.places import relative, remove
from epigone.store import Store, kind
from epigone.teaching import check_teacher
from epigone.training.config import Hardware
from epigone.view import View


def grow(
    lineage: Lineage,
    run: Path,
    *,
    hardware: Hardware = Hardware(),
    only: str | None = None,
    data: Path | None = None,
    view: View,
) -> list[str]:
    """Grow every node that is not done, parents first, and return the keys of those that were grown or measured anew.

    Args:
        lineage: what to grow.
        run: the run directory; made if absent.
        hardware: mesh and micro-batches.
        only: grow this node alone; its parents must be done. Several processes may grow different nodes at once.
        data: where prepared corpora lie; by default `data` beside the run directory.
        view: hears of the progress.

    Raises:
        UserError: another process is at it, or a parent of `only` is not done.
    """
    store = Store(run, lineage, data)
    target = lineage[only] if only else None
    with store.lock(target) if is_first() else contextlib.nullcontext():
        materials = Materials(store)
        nodes = [node for node in pending(store) if target in (None, node)]
        with first_then_all("checks"):
            check(nodes, materials)
        if is_first():
            store.write_lineage()
        for group in groups(nodes, store, hardware.together):
            for node in group:
                _demand_parents(store, node)
            learned = learn_together(group, materials, hardware, view) if len(group) > 1 else {}
            for node in group:
                if node in nodes:
                    finish(node, materials, hardware, view, learned.get(node.key))
        if is_first() and target is None:
            measure_whole(materials, view)
    return [node.key for node in nodes]


def finish(
    node: Node, materials: Materials, hardware: Hardware, view: View, learned: dict[str, Any] | None = None
) -> None:
    """Grow a node whose parents are done, or only measure it if it was grown before, and write its record.

    `learned`: what is known of its training where it was trained together with others.
    """
    store = materials.store
    view.start(node)
    record = store.record(node) or _grow_node(node, materials, hardware, view, learned)
    if is_first():
        record = measured(node, record, materials, view)
        store.write_record(node, record)
        remove(store.directory(node) / "training" / "checkpoints")
    wait(f"{node.key} is done")
    view.finish(node, record)


def measure_whole(materials: Materials, view: View) -> None:
    """What is measured of the lineage as a whole, where its nodes are grown and it was not done.

    The members of each population are held against each other; traffic at the box is watched.
    """
    store, populations = materials.store, materials.store.lineage.populations
    for number, population in enumerate(populations if store.lineage.evaluation else (), start=1):
        members = [store.lineage[key] for key in population.members]
        if store.population_record(population) is None and all(store.record(node) is not None for node in members):
            view.stage(f"compare populations, {number} of {len(populations)}")
            store.write_population(population, compared(members, materials))
    watch = store.lineage.watch
    if watch and store.watch_record() is None and store.record(store.lineage[watch.teacher]) is not None:
        view.stage("watch the box")
        store.write_watch(watched(watch, materials))


def pending(store: Store) -> list[Node]:
    """Nodes, parents first, that are not grown yet or not measured as the evaluation now asks."""
    return [node for node in store.lineage.order if is_pending(node, store)]


def is_pending(node: Node, store: Store) -> bool:
    """Whether a node is not grown yet or not measured as the evaluation now asks."""
    return (store.record(node) or {}).get("measured_as") != store.measured_as(node)


def check(nodes: list[Node], materials: Materials) -> None:
    """Refuse, before any work, what would fail after hours: texts that are not there, parts that do not fit."""
    evaluation = materials.store.lineage.evaluation
    texts = [evaluation.text, evaluation.real] if nodes and evaluation else []
    if watch := materials.store.lineage.watch:
        texts.append(watch.text)
        if watch.boxes and isinstance(materials.store.lineage[watch.teacher].model, NGram):
            raise UserError(f"watch: '{watch.teacher}' counts, and boxes are of a decoder: leave out the boxes")
    for node in nodes:
        lesson = node.lesson
        texts += [source for source in lesson.text if isinstance(source, Text)]
        for source in lesson.text:
            if isinstance(source, Written):
                materials.check_written(source)
        texts += [lesson.validation] if lesson.validation else []
        texts += [node.tokenizer.text] if isinstance(node.tokenizer, TrainedTokenizer) else []
        if isinstance(node.model, NGram):
            if lesson.weights or lesson.teacher or lesson.mean_teacher or lesson.start_from or lesson.source:
                raise UserError(f"node '{node.key}' counts words: it takes text alone, no weights, teacher, start")
            if not isinstance(node.tokenizer, TrainedTokenizer):
                raise UserError(f"node '{node.key}' counts words: it reads a tokenizer that is trained here, no other")
        elif not (lesson.source or lesson.adapters) and node.model.weights_dtype != "float32":
            raise UserError(
                f"node '{node.key}' is trained, and weights_dtype '{node.model.weights_dtype}' rounds small steps "
                "away: give it weights_dtype='float32' (dtype sets the type of the computation)"
            )
        else:
            check_trained(node)
        if getattr(node.model, "quantization", None):
            check_quantization(node, materials)
        if lesson.start_from:
            check_start(node, materials)
        if lesson.objective is not None:
            check_teacher(node, materials)
    for text in dict.fromkeys(texts):
        materials.strings(text)


def _demand_parents(store: Store, node: Node) -> None:
    for key, role in node.parents:
        if store.record(store.lineage[key]) is None:
            raise UserError(f"node '{node.key}' needs '{key}' ({role}), which is not done: grow '{key}' first")


def _grow_node(
    node: Node, materials: Materials, hardware: Hardware, view: View, learned: dict[str, Any] | None
) -> dict[str, Any]:
    """Learn the lesson and leave the model in the node's directory; the record, but for what is measured."""
    started = time.monotonic()
    store = materials.store
    if learned is None:
        learned = learn(node, materials, hardware, view)
    if writing := sum(materials.card(source).get("flops", 0) for source in _first_read_by(node, store.lineage)):
        learned["flops"] = learned.get("flops", 0) + writing
    record = {
        "key": node.key,
        "name": node.name,
        "generation": node.generation,
        "seed": node.seed,
        "identity": store.lineage.identities[node.key],
        "kind": kind(node),
        "config": canonical(node),
        "parents": [
            {"key": key, "identity": store.lineage.identities[key], "role": role} for key, role in node.parents
        ],
        "data": [materials.card(source) for source in node.lesson.text],
        "seconds": time.monotonic() - started + learned.pop("seconds_before", 0.0),
        **learned,
        **_circumstances(),
    }
    if node.lesson.source:
        record["weights"] = relative(store.weights(node), store.run)
    if is_first():
        store.write_record(node, record)
    return record


def _first_read_by(node: Node, lineage: Lineage) -> list[Written]:
    """Texts of other nodes that no node before this one reads: their cost is its own.

    The order says so, not the disk: a run that was killed behind the writing would else forget what it cost.
    """
    before = itertools.takewhile(lambda other: other is not node, lineage.order)
    read = {text for other in before for text in _written(other)}
    return [text for text in dict.fromkeys(_written(node)) if text not in read]


def _written(node: Node) -> list[Written]:
    """The texts of other nodes that a node reads, or parts of."""
    return [source.whole for source in node.lesson.text if isinstance(source, Written)]


def _circumstances() -> dict[str, Any]:
    """Where, when and with what a node was grown."""
    import jax

    # A launcher names the commit where the code lies outside a checkout, and the job that this is.
    named = {"git_commit": _git_commit() or os.environ.get("EPIGONE_COMMIT"), "job": os.environ.get("EPIGONE_JOB")}
    return {
        **{name: value for name, value in named.items() if value},
        "versions": {"epigone": __version__, **{name: version(name) for name in ("jax", "flax", "optax", "numpy")}},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "host": platform.node(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@cache
def _git_commit() -> str | None:
    """The commit of the code that ran, with a mark if it was changed since; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
