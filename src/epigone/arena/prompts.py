"""What is asked: one small config a strategy. Each gives its prompts in an order that is always the same."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from epigone.data import files
from epigone.errors import UserError, check_sizes


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
