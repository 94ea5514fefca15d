"""`epigone import PATH --as NAME`: a run of one node whose weights come from files."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from epigone.cli import Place
from epigone.errors import UserError
from epigone.grow import grow
from epigone.lineage import Lineage
from epigone.materials import fill
from epigone.pretrained import pretrained
from epigone.processes import is_first
from epigone.storage.places import resolve
from epigone.store import Store, open_run
from epigone.training.config import Hardware
from epigone.view import Terminal


@dataclass(frozen=True)
class Import:
    """Make a node of a Hugging Face folder or a GGUF file; its run directory can be named in configs and by all verbs.

    Attributes:
        path: a folder with config.json, safetensors and tokenizer.json, or a .gguf file.
        name: what the node is called; its key is NAME@0.
        run: the run directory; by default runs/NAME.
        data: where the weights lie, once for all runs; by default `data` beside the run directory.
        bos: the token that is read before every document; by default the one that the tokenizer names.
        dtype: type of the computation: float32, bfloat16 or float16.
        hardware: the mesh onto which the weights are streamed.
    """

    path: tyro.conf.Positional[Path]
    name: Annotated[str, tyro.conf.arg(name="as")]
    run: Place | None = None
    data: Place | None = None
    bos: str | None = None
    dtype: str = "float32"
    hardware: Hardware = field(default_factory=Hardware)


def import_node(given: Import) -> None:
    """Import, and say what came of it and what can be done with it."""
    node = pretrained(given.path, given.name, bos=given.bos, dtype=given.dtype)
    run = given.run or Path("runs") / given.name
    lineage = Lineage(given.name, (node,), None, f"Imported from {given.path}")
    _check_free(run, lineage)
    fill(node.model, node.tokenizer.build())  # a tokenizer that cannot be read leaves nothing on disk
    with Terminal(lineage.name, {node.key: 1.0}, Console(quiet=not is_first())) as view:
        grow(lineage, run, hardware=given.hardware, data=given.data, view=view)
    if not is_first():
        return
    record = json.loads((Store(run, lineage, given.data).directory(node) / "record.json").read_text())
    sizes = node.model.sizes
    print(f"{node.key}: {record['parameters']:,} parameters, {sizes.L} layers, D {sizes.D}, vocabulary {sizes.V:,}")
    print(f"licence {record['source']['licence'] or 'unknown'}; weights in {resolve(run, record['weights'])}")
    print(f'try: epigone sample {run}/{node.key} --prompt "..." --n 1')


def _check_free(run: Path, lineage: Lineage) -> None:
    """Refuse a run directory that is another's: its nodes would be found no more."""
    if (run / "lineage.json").exists():
        others = {node["key"] for node in open_run(run)["nodes"] if node["identity"] not in lineage.identities.values()}
        grown = {path.parent.name.rpartition("-")[0] for path in run.glob("nodes/*/record.json")}
        if others & grown:
            raise UserError(f"'{run}' holds {', '.join(sorted(others))}, another model: name another run with --run")
