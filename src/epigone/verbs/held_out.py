"""Text on which models are measured: found by its name or its files, cut to a part, and encoded for each tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from epigone.data import corpora
from epigone.data.embedded import TEXTS
from epigone.data.tokenizers import Tokenizer
from epigone.errors import UserError, did_you_mean
from epigone.models.language_model import Document

KINDS = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class HeldOut:
    """Documents as text.

    Attributes:
        texts: the documents.
        card: where they are from.
    """

    texts: tuple[str, ...]
    card: dict[str, Any]


class Encoded(NamedTuple):
    """The documents in one tokenizer's tokens, the UTF-8 bytes of each, and how many do not decode to their text."""

    documents: list[Document]
    byte_counts: list[int]
    lost: int


def read_held_out(name: str, split: str, data: Path) -> HeldOut:
    """The documents of one split of a corpus; 'all' takes every split, one after the other.

    Args:
        name: an embedded text such as bbe, 'tfds:NAME', or text files: one, a glob pattern, or a folder.
        split: train, validation, test or all.
        data: where prepared corpora lie.

    Raises:
        UserError: there is no such corpus, file or split.
    """
    corpus, named = corpus_of(name), split
    if split == "all" and isinstance(corpus, corpora.TextFiles):
        corpus, split = replace(corpus, shares=(0.0, 0.0, 1.0)), "test"
    prepared = corpus.prepare(data)
    if split != "all" and split not in prepared:
        raise UserError(f"'{name}' has no split '{split}'; it has {', '.join(prepared)}, and all")
    parts = list(prepared.values()) if split == "all" else [prepared[split]]
    texts = tuple(text for part in parts for text in part)
    if not texts:
        raise UserError(f"split '{split}' of '{name}' has no document: take --split all for the whole text")
    card = dict(parts[0].card) if len(parts) == 1 else {"name": parts[0].card["name"]}
    return HeldOut(texts, card | {"split": named})


def corpus_of(name: str) -> Any:
    """The corpus that a name on the command line means. Raises UserError if it means none."""
    if name in TEXTS:
        return corpora.Embedded(name)
    if name.startswith("tfds:"):
        return corpora.Tfds(name)
    if "://" in name:
        return corpora.TextFiles(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return corpora.TextFiles(_pattern(path))
    if not path.exists() and not set("*?[") & set(name):
        near = did_you_mean(name, TEXTS)
        raise UserError(f"no text '{name}': give {', '.join(TEXTS)}, tfds:NAME, a file, a pattern or a folder{near}")
    return corpora.TextFiles(str(path))


def _pattern(folder: Path) -> str:
    """All text files below a folder, which must be of one kind."""
    kinds = [kind for kind in KINDS if next(folder.rglob(f"*{kind}"), None)]
    if len(kinds) != 1:
        found = f"both {' and '.join(kinds)}: name a pattern, such as {folder}/**/*{kinds[0]}" if kinds else "no text"
        raise UserError(f"folder '{folder}' has {found} (a text is {', '.join(KINDS)})")
    return str(folder / "**" / f"*{kinds[0]}")


def part_of(held_out: HeldOut, tokenizer: Tokenizer, tokens: int | None) -> HeldOut:
    """The documents that a lineage's `Text(tokens=...)` takes: the first ones of a fixed shuffled order.

    Raises UserError if the text has fewer tokens.
    """
    if tokens is None:
        return held_out
    chosen = corpora.slice_indices(tokenizer.encode_batch(held_out.texts), 0, tokens)
    return HeldOut(tuple(held_out.texts[index] for index in chosen), held_out.card)


def encoded(texts: Sequence[str], tokenizer: Tokenizer) -> Encoded:
    """Documents for the models of one tokenizer."""
    documents = tokenizer.encode_batch(texts)
    lost = sum(tokenizer.decode(ids) != text for text, ids in zip(texts, documents, strict=True))
    return Encoded(documents, [len(text.encode()) for text in texts], lost)
