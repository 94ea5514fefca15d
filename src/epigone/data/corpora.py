"""Real text as TFDS data sets, and the choice of a part of it. A corpus is a frozen dataclass with `prepare`."""

import bisect
import contextlib
import difflib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from epigone.data import embedded, files
from epigone.data.datasets import CARD, Documents, describe, open_splits, read_text, write_splits, write_text
from epigone.errors import Fault, UserError
from epigone.storage.folders import fetched, is_whole, writing
from epigone.storage.places import on_store, reached

__all__ = [
    "Collected",
    "Documents",
    "Embedded",
    "Noised",
    "TextFiles",
    "Tfds",
    "read_text",
    "slice_documents",
    "slice_indices",
    "write_text",
]

SHARES = (0.90, 0.05, 0.05)
SPLITS = ("train", "validation", "test")
_SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Embedded:
    """English text from a Python package: by default the Bible in Basic English (4 MB, small vocabulary).

    Attributes:
        text: Which text: bbe (Bible in Basic English) or asv (American Standard Version).
        unit: What one document is: verse or chapter.
    """

    text: str = "bbe"
    unit: str = "verse"

    splits: ClassVar[tuple[str, ...]] = SPLITS

    def prepare(self, data_dir: Path) -> dict[str, Documents]:
        """Documents by split, in canonical order; whole chapters fall into one split (90 / 5 / 5 per cent).

        Raises UserError if the package is missing.
        """
        package = embedded.package(self.text)
        if self.unit not in ("verse", "chapter"):
            raise UserError(f"unit '{self.unit}' is neither 'verse' nor 'chapter'")
        title, licence = embedded.TEXTS[self.text]
        card = {"name": f"{title} ({self.text})", "source": f"PyPI package {package}", "licence": licence}
        return _prepared(data_dir / f"{self.text}-{self.unit}", self._documents, {**card, "unit": self.unit})

    def _documents(self, split: str) -> Iterator[str]:
        chapter: tuple[int, int] | None = None
        parts: list[str] = []
        for verse in embedded.verses(self.text):
            if _split_of(embedded.share(verse.book, verse.chapter), SHARES) != split:
                continue
            if parts and (self.unit == "verse" or chapter != (verse.book, verse.chapter)):
                yield " ".join(parts)
                parts = []
            chapter = (verse.book, verse.chapter)
            parts.append(verse.text)
        if parts:
            yield " ".join(parts)


@dataclass(frozen=True)
class TextFiles:
    """Local files: .txt (a document is a paragraph, between blank lines), .jsonl, .parquet.

    Attributes:
        pattern: Path or glob pattern, such as 'texts/**/*.txt' or 'gs://BUCKET/texts/*.jsonl'.
        field: Field of .jsonl or column of .parquet that holds the text.
        shares: Parts of the documents that become train, validation and test; 0 leaves a split out.
        licence: What the card says of the licence.
    """

    pattern: str
    field: str = "text"
    shares: tuple[float, float, float] = SHARES
    licence: str = "not stated"

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits whose share is not 0."""
        return tuple(split for split, share in zip(SPLITS, self.shares, strict=True) if share > 0)

    def prepare(self, data_dir: Path) -> dict[str, Documents]:
        """Documents by split, in the order of the files; equal documents always fall into the same split.

        Prepared again when a file changes. Raises UserError for missing, empty or unreadable files.
        """
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-9:
            raise UserError(f"shares {self.shares} are not three parts of 1 (train, validation, test)")
        paths = files.find(self.pattern)
        card = {"name": self.pattern, "source": f"{len(paths)} local file(s)", "licence": self.licence}
        state = files.fingerprint(paths, self.field, self.shares)
        return _prepared(
            data_dir / f"files-{state}", partial(self._documents, paths), {**card, "unit": "document"}, self.splits
        )

    def _documents(self, paths: Sequence[Path], split: str) -> Iterator[str]:
        empty = True
        for path in paths:
            for text in files.read(path, self.field):
                empty = False
                if _split_of(files.share(text), self.shares) == split:
                    yield text
        if empty:
            raise UserError(f"'{self.pattern}' has no text: every file that matches is empty")


@dataclass(frozen=True)
class Collected:
    """What an endpoint answered: the data set that `epigone collect` publishes.

    Attributes:
        folder: of the collection, such as collections/NAME.
    """

    folder: str

    splits: ClassVar[tuple[str, ...]] = ("train",)

    def prepare(self, data_dir: Path) -> dict[str, Documents]:
        """Its documents, in one split. Raises UserError where nothing is published, Fault for damaged files."""
        if not is_whole(answers := reached(self.folder) / "answers"):
            raise UserError(f"'{self.folder}' has no answers: 'epigone collect' publishes them there")
        return open_splits(answers)


@dataclass(frozen=True)
class Noised:
    """A corpus in which some words stand in the place of others, as in a text that was scanned or typed badly.

    Each word is replaced with probability `share`, by a word of the same split: of what is replaced, a word is as often
    as it is in the text.

    Attributes:
        corpus: the clean one.
        share: of the words, from 0 to 1.
        seed: chooses which, and what stands there instead.
    """

    corpus: Any
    share: float
    seed: int = 0

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return self.corpus.splits

    def prepare(self, data_dir: Path) -> dict[str, Documents]:
        """Documents by split, in the order of the clean ones. Raises UserError for a share that is none."""
        if not 0 <= self.share <= 1:
            raise UserError(f"Noised: share={self.share} of the words is from 0 to 1")
        clean = self.corpus.prepare(data_dir)
        card = {**next(iter(clean.values())).card, "noise": {"share": self.share, "seed": self.seed}}
        state = repr((self.share, self.seed, [documents.card.get("sha256") for documents in clean.values()]))
        name = f"noised-{hashlib.blake2b(state.encode(), digest_size=8).hexdigest()}"
        card["name"] = f"{card['name']}, {self.share:.0%} of the words replaced"
        return _prepared(data_dir / name, lambda split: self._documents(clean[split]), card, tuple(clean))

    def _documents(self, clean: Documents) -> Iterator[str]:
        random = np.random.default_rng(self.seed)
        words = [word for text in clean for word in text.split()]
        for text in clean:
            own = text.split()
            for place in np.flatnonzero(random.random(len(own)) < self.share):
                own[place] = words[int(random.integers(len(words)))]
            yield " ".join(own)


@dataclass(frozen=True)
class Tfds:
    """A data set that TensorFlow Datasets knows by name, such as 'lm1b' or 'wiki40b/en'.

    Attributes:
        name: TFDS name, with config and version if wished; 'tfds:' may stand before it.
        text_field: Feature that holds the text.
        train_split: TFDS expression for train, such as 'train' or 'train[:95%]'.
        validation_split: The same for validation; empty for none.
        test_split: The same for test; empty for none.
    """

    name: str
    text_field: str = "text"
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that are not empty."""
        return tuple(split for split in SPLITS if self._expression(split))

    def prepare(self, data_dir: Path) -> dict[str, Documents]:
        """Documents by split, downloaded and prepared by TFDS on first use, in ArrayRecord format.

        Raises UserError for an unknown name, split or field, Fault if TFDS cannot prepare the data set here.
        """
        builder = self._builder(self._on_this_disk(data_dir / "tfds"))
        if self.text_field not in builder.info.features:
            known = ", ".join(builder.info.features)
            raise UserError(f"'{self.name}' has no feature '{self.text_field}'; it has {known}")
        feature = builder.info.features[self.text_field]
        if feature.shape != () or feature.np_dtype not in (object, str, bytes):
            raise UserError(f"feature '{self.text_field}' of '{self.name}' is not text: {type(feature).__name__}")
        return {split: self._open(builder, split) for split in self.splits}

    def _on_this_disk(self, data_dir: Path) -> Path:
        """Where TFDS prepares and reads; what lies in a bucket is prepared once for all, and fetched."""
        if not on_store(data_dir):
            return data_dir
        folder = data_dir / re.sub(r"[^\w.-]+", "-", self.name.removeprefix("tfds:"))
        if not is_whole(folder):
            with writing(folder) as local:
                self._builder(local)
                shutil.rmtree(local / "downloads", ignore_errors=True)
        return fetched(folder)

    def _expression(self, split: str) -> str:
        return {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}[split]

    def _builder(self, data_dir: Path) -> Any:
        import tensorflow_datasets as tfds

        name = self.name.removeprefix("tfds:")
        short = re.split("[/:]", name)[0]
        registered = tfds.list_builders(with_community_datasets=False)
        if short not in registered and not (data_dir / short).is_dir():
            near = difflib.get_close_matches(short, registered, 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"TFDS has no data set '{self.name}'{hint}")
        try:
            builder = tfds.builder(name, data_dir=str(data_dir), file_format="array_record")
        except Exception as error:  # of many types, for a config or version that is not there
            raise UserError(f"TFDS cannot open '{self.name}': {_reason(error)}") from error
        try:
            builder.download_and_prepare()
        except ImportError as error:
            missing = (
                f"preparing '{self.name}' (not reading it) needs the package '{error.name}': pip install {error.name}, "
                f"or prepare it elsewhere with file_format='array_record' and copy it to {data_dir}"
            )
            raise UserError(missing) from error
        except Exception as error:  # a builder runs code of its own: downloads, archives, parsers
            raise Fault(f"TFDS cannot prepare '{self.name}': {_reason(error)}") from error
        return builder

    def _open(self, builder: Any, split: str) -> Documents:
        expression = self._expression(split)
        directory = Path(builder.data_dir)
        try:
            source = builder.as_data_source(split=expression)
        except (ValueError, KeyError) as error:
            known = ", ".join(builder.info.splits)
            raise UserError(f"'{self.name}' has no split '{expression}'; it has {known}") from error
        except Exception as error:
            again = "delete it to prepare it again"
            raise Fault(f"TFDS data set {directory} cannot be read: {_reason(error)}; {again}") from error
        card = {
            "name": f"tfds:{builder.info.full_name}",
            "source": builder.info.homepage or "TensorFlow Datasets",
            "licence": builder.info.redistribution_info.license or "not stated",
            "unit": "example",
            "split": split,
        }
        documents = Documents(source, card, directory, self.text_field)
        card.update(_counts(directory, expression, self.text_field, documents))
        return documents


def slice_documents(documents: Sequence[np.ndarray], skip_tokens: int, tokens: int | None) -> list[np.ndarray]:
    """The documents of `slice_indices`."""
    return [documents[index] for index in slice_indices(documents, skip_tokens, tokens)]


def slice_indices(documents: Sequence[np.ndarray], skip_tokens: int, tokens: int | None) -> list[int]:
    """Whole documents in a fixed shuffled order: leave out the first `skip_tokens` tokens, take `tokens` (None: all).

    Tokens count one eos a document. The document in which a number is reached belongs to the part that ends there, so
    the slices (a, n) and (a + n, m) are disjoint and adjoin; a slice is off its size by less than a document. Raises
    UserError if the text is too short.
    """
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(len(documents))
    ends = np.cumsum([len(documents[index]) + 1 for index in order])
    total = int(ends[-1]) if len(ends) else 0
    first = int(np.searchsorted(ends, skip_tokens)) + 1 if skip_tokens > 0 else 0
    last = len(ends) if tokens is None else int(np.searchsorted(ends, skip_tokens + tokens)) + 1
    if first >= last and last <= len(ends) and first < len(ends):
        raise UserError(f"no document ends between token {skip_tokens} and {tokens} further: take more tokens")
    if first >= len(ends) or last > len(ends):
        wanted = f"{skip_tokens} to skip" + ("" if tokens is None else f" and {tokens} to take")
        raise UserError(f"the text has {total} tokens, too few for {wanted}")
    return [int(index) for index in order[first:last]]


def subsample_indices(documents: Sequence[np.ndarray], tokens: int, seed: int) -> list[int]:
    """Whole documents drawn at random without repetition, until they hold `tokens` (one eos a document), in order.

    The document in which the number is reached is taken too. Raises UserError if the text is too short.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    ends = np.cumsum([len(documents[index]) + 1 for index in order])
    if not len(ends) or ends[-1] < tokens:
        raise UserError(f"the text has {int(ends[-1]) if len(ends) else 0} tokens, too few to draw {tokens} of them")
    return sorted(int(index) for index in order[: int(np.searchsorted(ends, tokens)) + 1])


def _prepared(
    directory: Path,
    documents: Callable[[str], Iterable[str]],
    card: dict[str, Any],
    splits: Sequence[str] = SPLITS,
) -> dict[str, Documents]:
    """Write the splits if they are not there, and open them."""
    if not is_whole(directory):
        write_splits(directory, {split: partial(documents, split) for split in splits}, card)
    return open_splits(directory)


def _split_of(share: float, shares: Sequence[float]) -> str:
    return SPLITS[bisect.bisect_right([shares[0], shares[0] + shares[1]], share)]


def _counts(directory: Path, expression: str, field: str, documents: Documents) -> dict[str, Any]:
    """Counts and hash of a TFDS split: one pass over it the first time, then read from beside it."""
    path = directory / f"epigone-{CARD}"
    key = f"{expression}:{field}"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if key not in known:
        known[key] = describe(documents)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with contextlib.suppress(OSError):  # a data set that is shared may not be written beside
            temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
            temporary.replace(path)
    return known[key]


def _reason(error: BaseException) -> str:
    """The first line of the error underneath, since TFDS adds pages to it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0] or type(error).__name__
