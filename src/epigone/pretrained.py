"""Nodes whose weights were trained elsewhere: Hugging Face folders and GGUF files."""

import contextlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from epigone.data.foreign_tokenizers import pretrained_tokenizer
from epigone.errors import Fault, UserError
from epigone.identity import canonical, restore
from epigone.lineage import Lesson, Node, Pretrained
from epigone.materials import Materials, fill
from epigone.processes import is_first, wait
from epigone.store import open_run, write_json


def pretrained(path: Path | str, name: str, *, bos: str | None = None, dtype: str = "float32", **labels: str) -> Node:
    """A node of the weights in a Hugging Face folder or a GGUF file, or of what `epigone import` made of them.

    Only headers are read here; the weights when the node is grown, and once for all runs beside each other.

    Args:
        path: the folder, the file, or the run directory that `epigone import` left.
        name: the node's name; its key is NAME@0.
        bos: the token that is read before every document; by default the one that the tokenizer names.
        dtype: type of the computation: float32, bfloat16 or float16. The weights keep the type of their file.
        labels: for reports.

    Raises:
        UserError: no such file, or one that holds what no decoder of Epigone can represent.
    """
    path = Path(path).expanduser()
    if (path / "lineage.json").is_file():
        return replace(_imported(path), name=name, labels=labels)
    from epigone.interchange.huggingface import read_config
    from epigone.interchange.weight_files import open_weights

    files = open_weights(path)
    config = replace(read_config(files.config_json), dtype=dtype)
    tokenizer = pretrained_tokenizer(path, config.vocab_size or 0, bos)
    lesson = Lesson(source=Pretrained(str(path.resolve()), files.digest))
    return Node(name, 0, config, tokenizer, lesson, labels=labels)


def packaged(module: str, pattern: str = "*.gguf", *, install: str) -> Path:
    """The file of weights inside an installed package, which is found and not imported.

    Args:
        module: the package's module.
        pattern: what its file is called.
        install: how to install it, for the message.

    Raises:
        UserError: the package is not there, or holds no such file.
    """
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).rglob(pattern)):
            return path
    raise UserError(f"the package '{module}' with {pattern} is not installed: {install}")


def _imported(run: Path) -> Node:
    """The one node of a run that `epigone import` made."""
    described = open_run(run)["nodes"]
    path = run / "nodes" / f"{described[0]['key']}-{described[0]['identity'][:8]}" / "record.json"
    if len(described) != 1 or not path.is_file():
        raise UserError(f"'{run}' is no run of 'epigone import': name one, a Hugging Face folder or a GGUF file")
    node = restore(json.loads(path.read_text())["config"])
    if not isinstance(node, Node) or node.lesson.source is None:
        raise UserError(f"'{run}' holds '{described[0]['key']}', which was grown and not imported")
    return node


def import_weights(node: Node, materials: Materials, hardware: Any) -> dict[str, Any]:
    """Bring a node's weights into the store, unless they are there; what the record says of them.

    Raises:
        UserError: the files are gone, are no longer what they were, or do not fit each other.
    """
    from epigone.models.decoder import parameter_count

    place = materials.store.weights(node).parent
    missing = not (place / "source.json").exists()
    wait(f"{node.key}: all have looked")
    if missing:
        with materials.store.lock_weights(node) if is_first() else contextlib.nullcontext():
            _bring(node, materials, hardware, place)
    wait(f"{node.key}: imported")
    try:
        source = json.loads((place / "source.json").read_text())
    except (OSError, ValueError):
        raise Fault(f"{place / 'source.json'} is damaged: delete {place} and give the same command") from None
    return {"parameters": parameter_count(fill(node.model, materials.tokenizer(node.tokenizer))), **source}


def _bring(node: Node, materials: Materials, hardware: Any, place: Path) -> None:
    """Stream the weights onto the mesh and write them as a checkpoint; `source.json` comes last and makes it whole."""
    import jax

    from epigone.interchange.streaming import load_weights
    from epigone.interchange.weight_files import open_weights
    from epigone.models.sharding import make_mesh
    from epigone.training import checkpoint

    source = node.lesson.source
    assert source is not None
    files = open_weights(Path(source.path))
    if files.digest != source.digest:
        raise UserError(f"'{source.path}' is no longer what node '{node.key}' names: import it again")
    config = fill(node.model, materials.tokenizer(node.tokenizer))
    mesh = make_mesh(hardware.data, hardware.fsdp, hardware.tensor)
    with jax.set_mesh(mesh):
        checkpoint.save_params(place / "model", load_weights(files, config))
    if is_first():
        said = {"licence": files.licence, "files": files.checksums(), "path": source.path}
        write_json(place / "source.json", {"source": said, "architecture": canonical(config)})
