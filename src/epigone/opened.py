"""A node that is grown, read from its run directory alone: what the verbs that read begin with."""

import contextlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from epigone.data.tokenizers import Tokenizer
from epigone.errors import Fault, UserError, did_you_mean
from epigone.identity import fingerprint, restore
from epigone.lineage import Node
from epigone.materials import load_model
from epigone.models.language_model import LanguageModel
from epigone.storage.places import reached, resolve
from epigone.store import open_run
from epigone.training.config import Hardware


@dataclass(frozen=True)
class OpenedNode:
    """A node, its record and its files.

    Attributes:
        run: the run directory.
        node: its config, as it was grown.
        record: what was recorded of it.
        directory: its directory in the run.
    """

    run: Path
    node: Node
    record: dict[str, Any]
    directory: Path

    @property
    def weights(self) -> Path:
        """Where its model lies: in its directory, or beside the data sets when it was imported."""
        return resolve(self.run, self.record["weights"]) if "weights" in self.record else self.directory / "model"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that it reads and writes."""
        return Tokenizer.load(self.run / "tokenizers" / f"{fingerprint(self.node.tokenizer)}.json")

    @cached_property
    def model(self) -> LanguageModel:
        """The model, ready to be asked."""
        return load_model(self.node.model, self.weights, self.tokenizer)


def on_mesh(hardware: Hardware) -> contextlib.AbstractContextManager[Any]:
    """Set the mesh over which the weights of opened nodes are cut. One device needs none, and no JAX."""
    if set(hardware.sizes) == {1}:
        return contextlib.nullcontext()
    import jax

    from epigone.models.sharding import make_mesh

    return jax.set_mesh(make_mesh(*hardware.sizes))


def open_node(reference: str, run: Path | None = None) -> OpenedNode:
    """The node of a reference: KEY as in teacher@0, NAME where one node has it, or RUN/KEY.

    Args:
        reference: which node.
        run: the run directory; by default that of the reference, or else the one below runs/ that has the node.

    Raises:
        UserError: there is no such run or node, or it is not grown yet.
        Fault: its record is damaged.
    """
    head, slash, key = reference.rpartition("/")
    run = run or (reached(head or "/") if slash else _run_with(key))
    nodes = {node["key"]: node["identity"] for node in open_run(run)["nodes"]}
    key = _key(key, list(nodes)) or key
    if key not in nodes:
        raise UserError(f"no node '{key}' in {run}{did_you_mean(key, nodes)}")
    directory = run / "nodes" / f"{key}-{nodes[key][:8]}"
    path = directory / "record.json"
    if not path.exists():
        raise UserError(f"node '{key}' of {run} is not grown yet: run its config first")
    try:
        record = json.loads(path.read_text())
        node = restore(record["config"])
    except (ValueError, KeyError, TypeError, UserError):
        node = None
    if not isinstance(node, Node):
        raise Fault(f"record {path} is damaged: delete its directory to grow the node again")
    return OpenedNode(run, node, record, directory)


def _key(reference: str, keys: list[str]) -> str | None:
    """The key that a reference means: itself, or the only one of that name."""
    named = [key for key in keys if key.partition("@")[0] == reference]
    return reference if reference in keys else named[0] if len(named) == 1 else None


def _run_with(reference: str) -> Path:
    """The one run below runs/ that has the node."""
    runs = {}
    for path in sorted(Path("runs").glob("*/lineage.json")):
        with contextlib.suppress(Fault):  # another run that is damaged is none of this one's business
            runs[path.parent] = [node["key"] for node in open_run(path.parent)["nodes"]]
    having = [run for run, keys in runs.items() if _key(reference, keys)]
    if len(having) == 1:
        return having[0]
    if having:
        raise UserError(f"node '{reference}' is in {', '.join(map(str, having))}: say which with --run")
    known = [key for keys in runs.values() for key in keys]
    raise UserError(f"no run below runs/ has a node '{reference}'{did_you_mean(reference, known)}; or give --run")
