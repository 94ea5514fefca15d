"""The model card of an exported node: what it is, whom it learned from and how, how good it is, and on which terms."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from epigone.identity import canonical, restore
from epigone.lineage import Node, Text, Written
from epigone.opened import OpenedNode
from epigone.store import open_run
from epigone.verbs.descriptions import (
    Line,
    Record,
    corpus_name,
    count,
    file_name,
    lesson_in_words,
    lineage_tree,
    number,
    one_line,
    plain,
    quantization_in_words,
    real_texts,
    without_places,
)
from epigone.verbs.licences import Source, recognised, summary

METRICS = (
    ("perplexity", "Perplexity per token"),
    ("bits_per_byte", "Bits per byte"),
    ("ece", "Expected calibration error"),
    ("accuracy", "Most probable token is right"),
    ("tokens_evaluated", "Tokens evaluated"),
)
AGREEMENT = (
    ("top1", "Same most probable token"),
    ("forward_kl", "KL({other} || this), nats"),
    ("reverse_kl", "KL(this || {other}), nats"),
)

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizers cut text; transformers 5 cuts so for every folder of model type qwen2, whatever it says."""


class Read(NamedTuple):
    """A real text of the lineage, as its card describes it, and who read it; every field ready to be shown."""

    name: str
    split: str
    size: str
    licence: str
    sha256: str
    readers: str


def model_card(opened: OpenedNode, family: str, dtype: str) -> str:
    """The text of README.md: front matter in YAML, then Markdown.

    Whatever comes from outside (names, licences, cards of data sets) is brought onto one line and quoted, so that
    it can end neither the front matter nor a table. What is not known is said to be unknown.

    Args:
        opened: the node; the records of its ancestors are read from its run, as far as they are there.
        family: the transformers model type that the folder is written as.
        dtype: the type of the exported weights.
    """
    records = ancestors(opened)
    sources = [source for key, record in records.items() for source in _sources(key, record)]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = plain
    node, record = opened.node, opened.record
    return environment.get_template("model_card.md.jinja").render(
        front_matter=_front_matter(node, records, sources),
        sentence=_sentence(node, record),
        node=node,
        record=record,
        glance=[*_glance(node, record, family, dtype), *_tokenizer(opened, family)],
        never=opened.tokenizer.specials.never,
        chat=opened.tokenizer.chat_template is not None,
        tree=lineage_tree(node.key, records),
        lesson=lesson_in_words(node.lesson, node.seed),
        config=json.dumps(without_places(canonical(node.lesson)), indent=1),
        model=json.dumps(without_places(canonical(node.model)), indent=1),
        data=_data(records),
        measures=_measures(record),
        held_out=_held_out(opened),
        made=_made(record),
        sources=sources,
        licence=summary(sources),
        recognised=recognised,
    )


def ancestors(opened: OpenedNode) -> dict[str, Record | None]:
    """The record of the node itself and of every ancestor by key; None for one that is no longer in the run."""
    found: dict[str, Record | None] = {opened.node.key: opened.record}
    waiting = list(opened.record.get("parents", ()))
    while waiting:
        parent = waiting.pop(0)
        if parent["key"] not in found:
            path = opened.run / "nodes" / f"{parent['key']}-{parent['identity'][:8]}" / "record.json"
            try:
                record = json.loads(path.read_text())
                waiting += record["parents"]
            except (OSError, ValueError, KeyError, TypeError):
                record = None
            found[parent["key"]] = record
    return found


def _sources(key: str, record: Record | None) -> list[Source]:
    """What a node brings into the chain of licences by itself: imported weights, real text."""
    if record is None:
        return [Source(f"what {key} learned from (its record is gone)", None)]
    given = record.get("source")
    weights = [Source(f"weights of {key}: {file_name(given['path'])}", given.get("licence"))] if given else []
    cards = {card["name"]: card for card in real_texts(record)}
    return weights + [
        Source(f"text read by {key}: {file_name(name)}", card.get("licence")) for name, card in cards.items()
    ]


def _front_matter(node: Node, records: Mapping[str, Record | None], sources: list[Source]) -> str:
    """YAML, written as JSON values, which YAML reads."""
    licence = summary(sources)
    given = [record["source"]["path"] for record in records.values() if record and record.get("source")]
    fields: dict[str, Any] = {"license": licence}
    if licence == "other":
        fields |= {"license_name": "see-licences", "license_link": "README.md"}
    if given:
        fields["base_model"] = list(dict.fromkeys(PurePath(path).name.removesuffix(".gguf") for path in given))
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": _tags(node)}
    if texts := _data(records):
        fields["datasets"] = list(dict.fromkeys(text.name for text in texts))
    return "\n".join(f"{name}: {json.dumps(one_line(value), ensure_ascii=False)}" for name, value in fields.items())


def _tags(node: Node) -> list[str]:
    lesson = node.lesson
    written = any(isinstance(source, Written) for source in lesson.text)
    taught = bool(lesson.teacher or lesson.mean_teacher)
    tags = {"distillation": taught, "imported": bool(lesson.source), "synthetic-data": written}
    return ["epigone", *(name for name, holds in tags.items() if holds)]


def _sentence(node: Node, record: Record) -> str:
    size = f"A language model of {count(record['parameters'])} parameters"
    if node.lesson.source:
        return f"{size}, imported from {file_name(node.lesson.source.path)} and not trained since."
    names = [f"text that {card['parents'][0]['key']} wrote" if "parents" in card else card["name"]
             for card in record["data"]]  # fmt: skip
    read = ", ".join(dict.fromkeys(map(file_name, names))) or "no text"
    start = f" It started from the weights of {node.lesson.start_from}." if node.lesson.start_from else ""
    if teachers := node.lesson.teachers:
        does = "does" if len(teachers) == 1 else "do together"
        return f"{size} that learned to predict as {' and '.join(teachers)} {does}, on {read}.{start}"
    itself = " and from the running average of its own weights" if node.lesson.mean_teacher else ""
    return f"{size} that learned from {read}{itself}.{start}"


def _glance(node: Node, record: Record, family: str, dtype: str) -> list[Line]:
    sizes = node.model
    metrics = record.get("metrics", {})
    shape = f"{family}: {sizes.layers} layers, {sizes.model_size} features, {sizes.heads} heads"
    rounded = "" if dtype == sizes.weights_dtype else f", made of {sizes.weights_dtype}"
    lines = [Line("Architecture", f"{shape}, up to {sizes.max_length} tokens"), Line("Weights", dtype + rounded)]
    if how := sizes.quantization:
        lines += [Line("Quantization", quantization_in_words(how))]
    lines += [Line("Learned from", ", ".join(f"{p['key']} ({p['role']})" for p in record["parents"]) or "nobody")]
    return [*lines, Line("Perplexity of held-out text", number(metrics.get("perplexity")))]


def _tokenizer(opened: OpenedNode, family: str) -> list[Line]:
    """How to load a tokenizer that transformers' AutoTokenizer would replace by Qwen's."""
    tokenizer = opened.tokenizer
    described = json.loads(tokenizer.inner.to_str())
    cuts = json.dumps(described["pre_tokenizer"])
    theirs = tokenizer.conventions is not None and json.dumps(QWEN_WORDS) in cuts
    if family != "qwen2" or (theirs and described["normalizer"] == {"type": "NFC"}):
        return []
    how = "load it with transformers.PreTrainedTokenizerFast.from_pretrained(folder), not with AutoTokenizer"
    return [Line("Tokenizer", f"{how}: that takes every folder of type qwen2 for Qwen's own and gives other ids")]


def _data(records: Mapping[str, Record | None]) -> list[Read]:
    """Every real text of the lineage; the same text read by several is one line."""
    found: dict[Read, list[str]] = {}
    for key, record in records.items():
        for card in real_texts(record) if record else []:
            size = f"{card['documents']:,} documents, {card['bytes']:,} bytes" if "bytes" in card else ""
            size = f"{card['tokens']:,} tokens of {size}" if "tokens" in card else size
            known = (card["name"], card.get("split"), size, card.get("licence"), card.get("sha256", "")[:16])
            name, split, size, licence, sha256 = (file_name(str(value)) if value else "unknown" for value in known)
            text = Read(name, split, size, licence, sha256, readers="")
            found.setdefault(text, []).append(key)
    return [text._replace(readers=", ".join(keys)) for text, keys in found.items()]


def _measures(record: Record) -> list[Line]:
    metrics = record.get("metrics", {})
    lines = []
    if "nats_per_token" in metrics:
        error = metrics.get("nats_per_token_error")
        margin = "" if error is None else f" ± {number(error)} (standard error over documents)"
        lines.append(Line("Nats per token", number(metrics["nats_per_token"]) + margin))
    lines += [Line(words, number(metrics[name])) for name, words in METRICS if name in metrics]
    for other, values in record.get("agreement", {}).items():
        lines += [
            Line(words.format(other=other) + ("" if "{" in words else f" as {other}"), number(values[name]))
            for name, words in AGREEMENT
            if name in values
        ]
    return lines


def _held_out(opened: OpenedNode) -> str:
    """The text of the measures, from the description of the run."""
    text = (open_run(opened.run).get("evaluation") or {}).get("text")
    found = restore(text) if text else None
    return f"split {found.split} of {corpus_name(found)}" if isinstance(found, Text) else "unknown"


def _made(record: Record) -> list[Line]:
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    known = {
        "Code": record.get("git_commit"),
        "Versions": versions,
        "Device": record.get("device"),
        "Finished": record.get("finished"),
        "Wall time": f"{record['seconds']:,.0f} s" if "seconds" in record else None,
        "Tokens": f"{record['tokens']:,}" if "tokens" in record else None,
        "Floating-point operations": f"{record['flops']:.3g}" if "flops" in record else None,
    }
    files = (record.get("source") or {}).get("files", {})
    return [Line(what, value or "unknown") for what, value in known.items()] + [
        Line(f"SHA-256 of {name}", digest) for name, digest in files.items()
    ]
