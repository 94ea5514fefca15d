"""`epigone sample NODE`: texts of a node that is grown, read from its run directory alone."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from epigone.data.tokenizers import Tokenizer
from epigone.errors import Fault, UserError
from epigone.identity import fingerprint, restore
from epigone.lineage import Node, did_you_mean
from epigone.materials import load_model
from epigone.models.language_model import Document, LanguageModel
from epigone.store import open_run


def samples(
    node: str,
    run: Path | None,
    prompt: Sequence[str],
    n: int,
    temperature: float,
    top_k: int,
    top_p: float,
    max_length: int,
    seed: int,
    scores: bool,
) -> Iterator[str]:
    """The texts, prompt first, one a line; the arguments are those of the verb.

    Raises UserError for a node or run that is not there, and for a prompt that the model cannot read.
    """
    if n < 1 or max_length < 1:
        raise UserError(f"n={n}, max_length={max_length}: both must be at least 1")
    if not 0 <= seed < 2**31:
        raise UserError(f"seed={seed}: from 0 to {2**31 - 1}")
    if 0 < temperature < 1e-6:
        raise UserError(f"temperature={temperature}: 0 takes the most probable token; above it, at least 1e-6")
    if temperature < 0:
        raise UserError(f"temperature={temperature} is negative: 0 takes the most probable token, 1 samples")
    run = run or _run_with(node)
    config, directory = _grown(run, node)
    if any(not text.isprintable() and "\ud800" <= max(text) <= "\udfff" for text in prompt):
        raise UserError("a prompt is not valid UTF-8 text")
    tokenizer = Tokenizer.load(run / "tokenizers" / f"{fingerprint(config.tokenizer)}.json")
    model = load_model(config.model, directory / "model", tokenizer.size)
    prompts = [tokenizer.encode(text) for text in prompt or ("",)]
    top_k, temperature = (1, 1.0) if temperature == 0 else (top_k, temperature)
    knobs: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for begun, found in zip(prompts, model.sample(prompts, seed, samples=n, length=max_length, **knobs), strict=True):
        for continuation in found:
            whole = np.concatenate([begun, continuation]).astype(np.int32)
            text = " ".join(tokenizer.decode(whole).split("\n"))
            yield f"{_score(model, whole):7.3f}  {text}" if scores else text


def _score(model: LanguageModel, document: Document) -> float:
    """Mean log-probability of a document's tokens and its end, in nats."""
    return float(np.mean(model.log_probs([document])[0]))


def _run_with(node: str) -> Path:
    """The one run below runs/ that has the node."""
    runs = {}
    for path in sorted(Path("runs").glob("*/lineage.json")):
        with contextlib.suppress(Fault):  # another run that is damaged is none of this one's business
            runs[path.parent] = open_run(path.parent)
    having = [run for run, lineage in runs.items() if any(n["key"] == node for n in lineage["nodes"])]
    if len(having) == 1:
        return having[0]
    if having:
        raise UserError(f"node '{node}' is in {', '.join(map(str, having))}: say which with --run")
    known = [n["key"] for lineage in runs.values() for n in lineage["nodes"]]
    raise UserError(f"no run below runs/ has a node '{node}'{did_you_mean(node, known)}; or give --run")


def _grown(run: Path, key: str) -> tuple[Node, Path]:
    """The node's config and directory, from its record."""
    nodes = {node["key"]: node["identity"] for node in open_run(run)["nodes"]}
    if key not in nodes:
        raise UserError(f"no node '{key}' in {run}{did_you_mean(key, nodes)}")
    directory = run / "nodes" / f"{key}-{nodes[key][:8]}"
    path = directory / "record.json"
    if not path.exists():
        raise UserError(f"node '{key}' of {run} is not grown yet: run its config first")
    try:
        config = restore(json.loads(path.read_text())["config"])
    except (ValueError, KeyError, TypeError, UserError):
        config = None
    if not isinstance(config, Node):
        raise Fault(f"record {path} is damaged: delete its directory to grow the node again")
    return config, directory
