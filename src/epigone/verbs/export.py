"""`epigone export NODE --to FOLDER`: a folder that transformers loads, with a model card; whole or not at all."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from epigone import __version__
from epigone.cli import Place
from epigone.errors import UserError
from epigone.materials import fill
from epigone.models.language_model import Specials
from epigone.opened import OpenedNode, open_node
from epigone.storage.folders import checksum
from epigone.verbs.model_card import model_card

MANIFEST = "epigone.json"
"""Says of which node a folder is an export, and what was in its files."""

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Export:
    """Write a node as a Hugging Face folder, with a model card.

    Attributes:
        node: the node, as in student@1, or RUN/student@1.
        to: the folder; made if absent. An older export of the same node in it is replaced.
        run: the run directory; by default the one below runs/ that has the node.
        dtype: float32 or bfloat16; by default the type of the node's own weights.
        shard_size: the largest size of a file of weights, in megabytes.
    """

    node: tyro.conf.Positional[str]
    to: Path
    run: Place | None = None
    dtype: str | None = None
    shard_size: int = 5000


def export_node(given: Export) -> None:
    """Export, and say how to use it."""
    opened = open_node(given.node, given.run)
    files = export(opened, given.to, dtype=given.dtype, shard_bytes=given.shard_size * 10**6)
    print(f"{opened.node.key} in {given.to}: {', '.join(sorted(files))}")
    print(f"how to load it, whence it comes and on which terms: {given.to / 'README.md'}")


def export(opened: OpenedNode, to: Path, *, dtype: str | None = None, shard_bytes: int = 5 * 10**9) -> dict[str, str]:
    """Write config, weights, tokenizer, generation config and model card; the SHA-256 of each file by its name.

    transformers computes from it the logits that Epigone computes, but for the ids that Epigone never predicts.
    All is written to `.NAME.PID.partial` beside the folder, which takes its place in one rename. An export that fails
    leaves what was there before; one that is killed leaves its unfinished folder too. An older export is renamed to
    `.NAME.PID.before` an instant earlier: a kill at that instant leaves no folder, and the next export to the same
    place begins by putting the older one back.

    Raises:
        UserError: the node counts words; no family of transformers has its architecture; the folder holds
            something else than an export of this node, or an export that was changed since.
    """
    from epigone.models.config import DecoderConfig

    if not isinstance(opened.node.model, DecoderConfig):
        raise UserError(f"'{opened.node.key}' counts words, and transformers has no such model: export a decoder")
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype '{dtype}' is not one of {', '.join(DTYPES)}")
    if shard_bytes < 1:
        raise UserError(f"shard_size {shard_bytes // 10**6}: at least 1 megabyte")
    _restore(to.resolve())
    _check_free(to, opened)
    with _whole(to) as folder:
        _write(opened, folder, dtype, shard_bytes)
        files = {path.name: checksum(path) for path in sorted(folder.iterdir())}
        said = {"node": opened.node.key, "identity": opened.record["identity"], "epigone": __version__, "files": files}
        (folder / MANIFEST).write_text(json.dumps(said, indent=1))
        _check_free(to, opened)
    return files


def _write(opened: OpenedNode, folder: Path, dtype: str | None, shard_bytes: int) -> None:
    """Every file but the manifest."""
    from epigone.interchange.huggingface import write_config
    from epigone.interchange.streaming import save_weights
    from epigone.models.decoder import multiplied

    config = fill(opened.node.model, opened.tokenizer)
    config = replace(config, weights_dtype=dtype or config.weights_dtype, quantization=None)
    family = write_config(config)["model_type"]  # refuses what no family has before the weights are read
    model: Any = opened.model
    # As they are multiplied: who reads the files rounds nothing.
    params = multiplied(model.config, model.params) if model.config.quantization else model.params
    save_weights(folder, config, params, shard_bytes=shard_bytes)
    opened.tokenizer.export(folder)
    said = json.dumps(generation_config(config.specials), indent=2)
    (folder / "generation_config.json").write_text(said + "\n", "utf-8")
    (folder / "README.md").write_text(model_card(opened, family, config.weights_dtype), "utf-8")


def generation_config(specials: Specials) -> dict[str, Any]:
    """What transformers' `generate` reads: where texts begin and end, and the ids that are never drawn."""
    ends = [specials.eos, *specials.stops] if specials.stops else specials.eos
    suppressed = {"suppress_tokens": list(specials.never)} if specials.never else {}
    return {"bos_token_id": specials.bos, "eos_token_id": ends, "pad_token_id": specials.pad, **suppressed}


def _check_free(to: Path, opened: OpenedNode) -> None:
    """Refuse a place where something would be lost."""
    advice = "name an empty folder or a new one"
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    if not to.is_dir():
        raise UserError(f"'{to}' is a file: {advice}")
    try:
        said = json.loads((to / MANIFEST).read_text())
        node, identity, files = said["node"], said["identity"], dict(said["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"'{to}' has files that are no export: {advice}") from None
    if (node, identity) != (opened.node.key, opened.record["identity"]):
        raise UserError(f"'{to}' has an export of another node, '{node}' ({identity}): {advice}")
    for path in sorted(to.iterdir()):
        if path.name != MANIFEST and (not path.is_file() or files.get(path.name) != checksum(path)):
            raise UserError(f"'{path}' was added or changed since the export: move it away, or {advice}")


def _restore(to: Path) -> None:
    """Put back the older export that one which was killed had renamed away.

    Should one be at that instant in another process, that one fails, as its place is taken, and nothing is lost.
    """
    name = re.compile(rf"\.{re.escape(to.name)}\.\d+\.before")
    if to.parent.is_dir() and not to.exists():
        left = [path for path in to.parent.iterdir() if name.fullmatch(path.name)]
        if left:
            max(left, key=lambda path: path.stat().st_mtime).rename(to)


@contextlib.contextmanager
def _whole(to: Path) -> Iterator[Path]:
    """A folder beside `to` that takes its place when all went well, and is gone when not."""
    to = to.resolve()
    partial, before = (to.parent / f".{to.name}.{os.getpid()}.{end}" for end in ("partial", "before"))
    to.parent.mkdir(parents=True, exist_ok=True)
    for left in (partial, before):  # of a killed process that had the same number
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        try:
            if to.exists():
                to.rename(before)
            partial.rename(to)
        except BaseException:
            if before.exists() and not to.exists():
                before.rename(to)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if to.exists():
            shutil.rmtree(before, ignore_errors=True)
