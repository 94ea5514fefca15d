"""Nodes whose weights were trained elsewhere: Hugging Face folders and GGUF files."""

import contextlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from epigone.data.foreign_tokenizers import pretrained_tokenizer
from epigone.errors import Fault, UserError
from epigone.identity import restore
from epigone.lineage import Lesson, Node, Pretrained
from epigone.materials import Materials, fill
from epigone.processes import is_first, wait
from epigone.storage.places import place
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
    path = place(str(path)).expanduser()
    if (path / "lineage.json").is_file():
        return replace(_imported(path), name=name, labels=labels)
    from epigone.interchange.huggingface import read_config
    from epigone.interchange.weight_files import open_weights

    files = open_weights(path)
    config = replace(read_config(files.config_json), dtype=dtype)
    tokenizer = pretrained_tokenizer(path, config.vocab_size or 0, bos)
    lesson = Lesson(source=Pretrained(str(path.resolve()), files.digest, files.licence))
    return Node(name, 0, config, tokenizer, lesson, labels=labels)


@dataclass(frozen=True)
class NotHere:
    """The tokenizer of weights that are not here: enough to plan with.

    Attributes:
        name: of the model, as its publisher calls it.
        vocab_size: ids that it has.
    """

    name: str
    vocab_size: int

    def build(self) -> Any:
        """Raises UserError: there are no files."""
        raise UserError(f"{self.name} is not here, so its lineage can only be planned: fetch it, and name its folder")


def published(
    config_json: Mapping[str, Any], name: str, path: str = "", *, dtype: str = "bfloat16", **labels: str
) -> Node:
    """A node of a published model: of its files where there is a path, and else of its config.json alone.

    Without files a lineage can be planned (`epigone plan`), and is refused when it is run.

    Args:
        config_json: what its config.json says; `_name_or_path` names it.
        name: the node's name; its key is NAME@0.
        path: a Hugging Face folder with its weights; empty for none.
        dtype: type of the computation, and of the weights that are not here.
        labels: for reports.

    Raises:
        UserError: as `pretrained`; or the files are of a model of another shape.
    """
    from epigone.interchange.huggingface import read_config

    config = replace(read_config(config_json), dtype=dtype, weights_dtype=dtype)
    called = str(config_json.get("_name_or_path", name))
    if not path:
        tokenizer = NotHere(called, config.vocab_size or 0)
        return Node(name, 0, config, tokenizer, Lesson(source=Pretrained(called, digest="")), labels=labels)
    node = pretrained(path, name, dtype=dtype, **labels)
    if node.model.sizes != config.sizes:
        raise UserError(f"'{path}' holds a model of {node.model.sizes}, and {called} has {config.sizes}")
    return node


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
    if len(described) != 1:
        raise UserError(f"'{run}' holds {len(described)} nodes and is no run of 'epigone import': name one of those")
    path = run / "nodes" / f"{described[0]['key']}-{described[0]['identity'][:8]}" / "record.json"
    if not path.is_file():
        raise UserError(f"the import in '{run}' is not finished: give the same 'epigone import' again")
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

    store, source = materials.store, node.lesson.source
    assert source is not None
    place = store.weights(node).parent
    with store.lock_weights(node) if is_first() and not store.has_weights(node) else contextlib.nullcontext():
        wait(f"{node.key}: nobody else imports it now")
        if not store.has_weights(node):
            _bring(node, source, materials, hardware, place)
        wait(f"{node.key}: imported")
    try:
        checksums = dict(json.loads((place / "checksums.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise Fault(f"{place / 'checksums.json'} is damaged: delete {place} and give the same command") from None
    said = {"path": source.path, "licence": source.licence, "files": checksums}
    return {"parameters": parameter_count(fill(node.model, materials.tokenizer(node.tokenizer))), "source": said}


def _bring(node: Node, source: Pretrained, materials: Materials, hardware: Any, place: Path) -> None:
    """Stream the weights onto the mesh and write them as a checkpoint; the checksums come last and make it whole."""
    import jax

    from epigone.interchange.streaming import load_weights
    from epigone.interchange.weight_files import check_fits, open_weights
    from epigone.models.sharding import make_mesh
    from epigone.training import checkpoint

    if not Path(source.path).exists():
        raise UserError(f"'{source.path}', of which node '{node.key}' is made, is gone: put it back")
    files = open_weights(Path(source.path))
    if files.digest != source.digest:
        raise UserError(f"'{source.path}' is no longer what node '{node.key}' names: import it again")
    config = fill(node.model, materials.tokenizer(node.tokenizer))
    try:
        check_fits(files, config)
    except UserError as error:
        raise UserError(f"node '{node.key}' is not the model in '{source.path}': {error}") from None
    with jax.set_mesh(make_mesh(*hardware.sizes)):
        checkpoint.save_params(place / "model", load_weights(files, config))
    if is_first():
        write_json(place / "checksums.json", files.checksums())
