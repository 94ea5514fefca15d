"""What is asked: one small config a strategy. Each gives its prompts in an order that is always the same."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from epigone.data import files
from epigone.data.datasets import read_text
from epigone.errors import UserError, check_sizes
from epigone.opened import open_node
from epigone.storage.places import reached


class Prompts(Protocol):
    """A strategy."""

    def __call__(self, data_dir: Path) -> Iterator[str]:
        """The prompts; corpora are prepared in `data_dir`. Each is given once."""
        ...


@dataclass(frozen=True)
class Prefixes:
    """The first words of a corpus' documents, in a shuffled order.

    Attributes:
        corpus: a config of `epigone.data.corpora`.
        words: of each document; shorter ones are left out.
        split: of the corpus.
        seed: of the order.
    """

    corpus: Any
    words: int = 6
    split: str = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, words=1, seed=0)

    def __call__(self, data_dir: Path) -> Iterator[str]:
        documents = self.corpus.prepare(data_dir)[self.split]
        seen = set[str]()
        for index in np.random.default_rng(self.seed).permutation(len(documents)).tolist():
            words = documents[index].split()
            prompt = " ".join(words[: self.words])
            if len(words) > self.words and prompt not in seen:
                seen.add(prompt)
                yield prompt


@dataclass(frozen=True)
class Lines:
    """Prompts from files: paragraphs of .txt, a field of .jsonl, a column of .parquet.

    Attributes:
        pattern: path or glob pattern.
        field: of .jsonl and .parquet.
    """

    pattern: str
    field: str = "prompt"

    def __call__(self, data_dir: Path) -> Iterator[str]:
        seen = set[str]()
        for path in files.find(self.pattern):
            for prompt in files.read(path, self.field):
                if prompt not in seen:
                    seen.add(prompt)
                    yield prompt


@dataclass(frozen=True)
class Framed:
    """Prompts of another strategy in frames, in turn: `"Say in other words: {}"`.

    Attributes:
        prompts: the strategy.
        frames: texts with one `{}` each.
    """

    prompts: Any
    frames: tuple[str, ...]

    def __post_init__(self) -> None:
        for frame in self.frames or ("",):
            if frame.count("{}") != 1:
                raise UserError(f"frame '{frame}': write '{{}}' once, where the prompt is to stand")

    def __call__(self, data_dir: Path) -> Iterator[str]:
        for number, prompt in enumerate(self.prompts(data_dir)):
            yield self.frames[number % len(self.frames)].replace("{}", prompt)


@dataclass(frozen=True)
class Mixed:
    """Several strategies in proportion, until the first of them has no more.

    Attributes:
        parts: strategies.
        weights: of each, above 0.
    """

    parts: tuple[Any, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.parts or len(self.parts) != len(self.weights) or min(self.weights) <= 0:
            raise UserError(f"{len(self.parts)} parts and weights {self.weights}: give one above 0 for each part")

    def __call__(self, data_dir: Path) -> Iterator[str]:
        # The part that is furthest behind its share comes next: the shares hold at every moment, not on average.
        given, shares = np.zeros(len(self.parts)), np.array(self.weights) / sum(self.weights)
        streams, seen = [part(data_dir) for part in self.parts], set[str]()
        for number in count(1):
            behind = int(np.argmax(shares * number - given))
            given[behind] += 1
            prompt = next((one for one in streams[behind] if one not in seen), None)
            if prompt is None:
                return
            seen.add(prompt)
            yield prompt


@dataclass(frozen=True)
class Grouped:
    """Several prompts of another strategy, each on a line, so that the answer is one more like them.

    With `Answered`, which reads such answers, this is self-instruct (Wang et al. 2023).

    Attributes:
        prompts: the strategy.
        count: of its prompts in one.
        before: text before the first.
    """

    prompts: Any
    count: int = 3
    before: str = ""

    def __post_init__(self) -> None:
        check_sizes(self, count=1)

    def __call__(self, data_dir: Path) -> Iterator[str]:
        stream = self.prompts(data_dir)
        while len(group := list(islice(stream, self.count))) == self.count:
            yield self.before + "\n".join(group) + "\n"


@dataclass(frozen=True)
class Answered:
    """First lines of what a collection was answered, but for those that are like another.

    Attributes:
        folder: of the collection, which is published.
        overlap: share of a line's pairs of words that one line before may have too, at most; 1 takes all that differ.
        words: of a line, at least.
    """

    folder: str
    overlap: float = 0.7
    words: int = 3

    def __post_init__(self) -> None:
        check_sizes(self, words=2)
        if not 0 <= self.overlap <= 1:
            raise UserError(f"overlap={self.overlap} is a share: from 0 to 1")

    def __call__(self, data_dir: Path) -> Iterator[str]:
        lines_with = defaultdict[tuple[str, str], list[int]](list)
        for number, answer in enumerate(read_text(reached(self.folder) / "answers")):
            line = next((line.strip() for line in answer.splitlines() if line.strip()), "")
            words = line.lower().split()
            pairs = set(pairwise(words))
            if len(words) < self.words:
                continue
            shared = Counter(other for pair in pairs for other in lines_with[pair])
            most = max(shared.values(), default=0) / len(pairs)
            if most < 1 and most <= self.overlap:
                for pair in pairs:
                    lines_with[pair].append(number)
                yield line


@dataclass(frozen=True)
class Hardest:
    """Those prompts of another strategy after which a student is least sure what comes next.

    Attributes:
        prompts: the strategy.
        student: RUN/KEY of a node; its entropy over the next token says how sure it is.
        share: of the prompts that is asked, the hardest first.
        look_at: prompts that are held against each other.
    """

    prompts: Any
    student: str
    share: float = 0.1
    look_at: int = 10_000

    def __post_init__(self) -> None:
        check_sizes(self, look_at=1)
        if not 0 < self.share <= 1:
            raise UserError(f"share={self.share}: above 0, up to 1 for all")

    def __call__(self, data_dir: Path) -> Iterator[str]:
        opened = open_node(self.student)
        stream = self.prompts(data_dir)
        while block := list(islice(stream, self.look_at)):
            unsure = np.concatenate([
                _entropy(opened.model.next_log_probs(opened.tokenizer.encode_batch(block[first : first + _TOGETHER])))
                for first in range(0, len(block), _TOGETHER)
            ])  # fmt: skip
            kept = max(1, round(self.share * len(block)))
            yield from (block[index] for index in np.argsort(-unsure, kind="stable")[:kept].tolist())


_TOGETHER = 256
"""Prompts whose next tokens' scores are held at once."""


def _entropy(log_probs_BV: np.ndarray) -> np.ndarray:
    """Nats [B]."""
    x_BV = log_probs_BV.astype(np.float64)
    return -np.where(x_BV > -np.inf, np.exp(x_BV) * np.maximum(x_BV, -1e9), 0.0).sum(axis=-1)


@dataclass(frozen=True)
class First:
    """So many of a strategy's prompts.

    Attributes:
        prompts: the strategy.
        count: of its prompts.
    """

    prompts: Any
    count: int

    def __post_init__(self) -> None:
        check_sizes(self, count=1)

    def __call__(self, data_dir: Path) -> Iterator[str]:
        return islice(self.prompts(data_dir), self.count)
