"""English text that Python packages ship: Bible translations in the public domain, cleaned."""

import functools
import hashlib
import importlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from epigone.errors import Fault, UserError

TEXTS = {
    "bbe": ("Bible in Basic English", "public domain in the United States; package MIT"),
    "asv": ("American Standard Version", "public domain; package MIT"),
}
"""Short name: title and licence of the text in the package `pythonbible-<short name>`."""

_MARKER = re.compile(r"\\(\d+):(\d+)\\")


class Verse(NamedTuple):
    """One verse, cleaned, with the number of its book and the chapter that it belongs to."""

    book: int
    chapter: int
    text: str


def package(text: str) -> str:
    """Name of the package on PyPI. Raises UserError for an unknown text."""
    if text not in TEXTS:
        raise UserError(f"no embedded text '{text}'; there are: {', '.join(TEXTS)}")
    return f"pythonbible-{text}"


@functools.lru_cache(maxsize=1)
def verses(text: str) -> tuple[Verse, ...]:
    """All verses in canonical order; those of which nothing is left (lost or doubtful in the source) are dropped."""
    return tuple(_cleaned(_slices(_bible(text))))


def _cleaned(slices: Iterable[tuple[int, str]]) -> Iterator[Verse]:
    for identifier, raw in slices:
        marker = _MARKER.search(raw)
        # Where a text counts chapters as the Hebrew does, the marker has the English number.
        chapter = int(marker[1]) if marker else identifier // 1000 % 1000
        cleaned = clean(raw)
        if any(character.isalpha() for character in cleaned):
            yield Verse(identifier // 1_000_000, chapter, cleaned)


def clean(verse: str) -> str:
    """Drop chapter markers, brackets and footnote signs; one sign, three dots, for words lost in the source."""
    verse = _MARKER.sub(" ", verse)
    verse = re.sub(r"[\\\[\]+]", " ", verse).replace("***", "...")
    verse = re.sub(r"\.{4,}", "...", verse)
    verse = re.sub(r"\s+([,;:?!])", r"\1", verse)
    return " ".join(verse.split())


def share(book: int, chapter: int) -> float:
    """A number in [0, 1) that depends on the chapter alone: all its verses fall into one split."""
    digest = hashlib.sha256(f"{book}:{chapter}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _bible(text: str) -> Any:
    module = f"{package(text).replace('-', '_')}.plain_text_readers_bible"
    try:
        return importlib.import_module(module).bible
    except ModuleNotFoundError as error:
        raise UserError(f"the text '{text}' needs the package {package(text)}: pip install {package(text)}") from error


def _slices(bible: Any) -> Iterator[tuple[int, str]]:
    # The package's offsets count each backslash twice, as its source file spells it; uncorrected, verses are cut
    # inside words after the first marker, by up to 2,752 characters at the end of the text.
    source = bible.scripture_content.replace("\\", "\\\\")
    starts, ends = bible.verse_start_indices, bible.verse_end_indices
    end = max(ends.values())
    if end != len(source):
        raise Fault(f"the package's verse offsets end at {end}, its text at {len(source)}: install version 0.0.2")
    for identifier, start in starts.items():
        yield identifier, source[start : ends[identifier]].replace("\\\\", "\\")
