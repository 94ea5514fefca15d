"""The "small language model": it knows only how often n tokens stood together, and is sampled from what it scores."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from epigone.errors import UserError
from epigone.identity import WHERE_SET
from epigone.models import counts as counting
from epigone.models import ngram_files, ngram_sampling
from epigone.models.counts import Counts, Level
from epigone.models.language_model import EOS, MAX_LENGTH, Document, Specials
from epigone.models.smoothing import Mass, Smoothing, witten_bell


@dataclass(frozen=True)
class NGram:
    """An n-gram model, as it is configured.

    Attributes:
        order: Tokens in an n-gram; the context has one less, padded by bos.
        smoothing: How counts become probabilities: `witten_bell`, `kneser_ney`, `mle`, or one of that shape.
        scales: Candidates for the factor on the counts; validation text picks one, else the nearest to 1 is taken.
        writing: How counts become the probabilities that it writes by; None: those that it scores by. `mle` writes by
            the relative frequencies of what was read, and so adds no word of its own: a smoothed model that reads
            itself again and again adds a little noise each time.
    """

    order: int = 3
    smoothing: Smoothing = witten_bell
    scales: tuple[float, ...] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
    writing: Smoothing | None = field(default=None, metadata={"identity": WHERE_SET})

    def __post_init__(self) -> None:
        if self.order < 1:
            raise UserError(f"order {self.order}: an n-gram has at least 1 token")
        if not self.scales or not all(0 < scale < np.inf for scale in self.scales):
            raise UserError(f"scales {self.scales}: give at least one factor, each above 0")


@dataclass(frozen=True)
class NGramModel:
    """A fitted n-gram model; p(w | h) is the interpolation of `epigone.models.smoothing`, at every level k.

    Attributes:
        levels: The stored n-grams, by context length 0 .. order - 1.
        masses: Weights and escape mass of each level.
        scale: The factor on the counts that was chosen.
        smoothing: Name of the smoothing function, for display.
        written: The masses by which it writes; None: `masses`.
    """

    levels: tuple[Level, ...]
    masses: tuple[Mass, ...]
    scale: float
    smoothing: str
    written: tuple[Mass, ...] | None = None

    @classmethod
    def fit(
        cls,
        config: NGram,
        documents: Sequence[Document],
        vocab_size: int,
        validation: Sequence[Document] | None = None,
    ) -> "NGramModel":
        """Count `documents` and smooth, with the scale of `config.scales` under which `validation` is most likely.

        Raises:
            UserError: no documents, or tokens that are special or outside the vocabulary.
        """
        if not len(documents):
            raise UserError("an n-gram model needs at least one document")
        if vocab_size <= EOS:
            raise UserError(f"vocabulary of {vocab_size}: nothing can be predicted but pad, bos and eos")
        counts = counting.count(*counting.flatten(documents, config.order, vocab_size), config.order, vocab_size)
        scale = _choose_scale(config, counts, validation)
        written = tuple(config.writing(counts, scale)) if config.writing else None
        return cls(counts.levels, tuple(config.smoothing(counts, scale)), scale, _name(config.smoothing), written)

    @property
    def order(self) -> int:
        """Tokens in an n-gram."""
        return len(self.levels)

    @property
    def vocab_size(self) -> int:
        """V, specials included."""
        return self.levels[0].vocab_size

    @property
    def specials(self) -> Specials:
        """Those of Epigone's own tokenizers: n-grams know no others."""
        return Specials()

    @property
    def parameter_count(self) -> int:
        """Stored n-grams of all lengths."""
        return sum(len(level.tokens_E) for level in self.levels)

    @cached_property
    def writer(self) -> "NGramModel":
        """The model that it writes by, mostly itself."""
        return replace(self, masses=self.written, written=None) if self.written else self

    @cached_property
    def totals(self) -> tuple[np.ndarray, ...]:
        """Weights plus escape of each context, [C] for each level."""
        return tuple(_total(level, mass) for level, mass in zip(self.levels, self.masses, strict=True))

    def log_probs(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Natural-log probabilities of x_1..x_n and eos, for each document: float64 [n + 1]; -inf at 0 (`mle`)."""
        if not len(documents):
            return []
        contexts, events = _locate(self.levels, documents, self.vocab_size)
        with np.errstate(divide="ignore"):
            log_probs_P = np.log(_probabilities(self.levels, self.masses, contexts, events))
        ends = np.cumsum([len(document) + 1 for document in documents])[:-1]
        return np.split(log_probs_P, ends)

    def next_log_probs(self, contexts: Sequence[Document]) -> np.ndarray:
        """Log-probabilities float64 [contexts, V] of the token after bos + context; -inf for pad and bos."""
        history = counting.histories(contexts, self.order, self.vocab_size)
        with np.errstate(divide="ignore"):
            rows_MV = self.rows(counting.find_contexts(self.levels, history))
            return np.log(rows_MV, out=rows_MV)

    def rows(self, contexts: Sequence[np.ndarray]) -> np.ndarray:
        """Probabilities [M, V] after contexts given by their id at every level (-1 where unseen), [M] each."""
        unigram_V = np.zeros(self.vocab_size)
        unigram_V[EOS:] = self.masses[0].escape_C[0] / (self.vocab_size - EOS)
        unigram_V[self.levels[0].tokens_E] += self.masses[0].weights_E
        left_M = np.ones(len(contexts[0]))
        parts = []
        for k in range(self.order - 1, 0, -1):
            level, mass, total_C = self.levels[k], self.masses[k], self.totals[k]
            seen = np.flatnonzero(contexts[k] >= 0)
            ids = contexts[k][seen]
            lengths = level.starts[ids + 1] - level.starts[ids]
            entries = np.arange(lengths.sum()) + np.repeat(level.starts[ids] - np.cumsum(lengths) + lengths, lengths)
            shares = mass.weights_E[entries] * np.repeat(left_M[seen] / total_C[ids], lengths)
            parts.append((np.repeat(seen, lengths), level.tokens_E[entries], shares))
            left_M[seen] *= mass.escape_C[ids] / total_C[ids]
        rows_MV = left_M[:, None] * (unigram_V / self.totals[0][0])
        for rows, tokens, shares in parts:
            rows_MV[rows, tokens] += shares
        return rows_MV

    def draw(
        self, context: Document, size: int, seed: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> np.ndarray:
        """`size` independent next tokens after one context, int32, from the row that the `writer` gives."""
        sampler = ngram_sampling.Sampler(self.writer, temperature, top_k, top_p)
        history = counting.histories([context], self.order, self.vocab_size)
        contexts = [np.repeat(ids, size) for ids in counting.find_contexts(self.levels, history)]
        chance = ngram_sampling.SharedChance(np.random.default_rng(seed))
        return sampler.next_tokens(contexts, chance, np.arange(size)).astype(np.int32)

    def write(
        self,
        tokens: int,
        seed: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        max_length: int = MAX_LENGTH,
    ) -> list[Document]:
        """Sample documents until their tokens (each with its eos) reach `tokens`; the same for the same seed.

        Documents are independent, and kept in the order in which they were begun, so that short ones are not favoured.
        """
        sampler = ngram_sampling.Sampler(self.writer, temperature, top_k, top_p)
        return ngram_sampling.write(sampler, tokens, seed, max_length)

    def sample(
        self,
        prompts: Sequence[Document],
        seed: int,
        *,
        samples: int = 1,
        length: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> list[list[Document]]:
        """`samples` continuations of bos + each prompt, each until eos (not included) or `length` tokens."""
        sampler = ngram_sampling.Sampler(self.writer, temperature, top_k, top_p)
        return ngram_sampling.sample(sampler, prompts, seed, samples, length)

    def beam(self, prompts: Sequence[Document], *, beams: int, length: int) -> list[Document]:
        """A very probable continuation of bos + each prompt, at most `length` tokens, as the `writer` says."""
        return ngram_sampling.beam(self.writer, prompts, beams, length)

    def stream(
        self, prompts: Sequence[Document], seed: int, *, samples: int = 1, length: int = 64, **knobs: Any
    ) -> Iterator[tuple[int, int, Document]]:
        """The texts of `sample`, each whole: counting is so fast that nobody waits."""
        for i, row in enumerate(self.sample(prompts, seed, samples=samples, length=length, **knobs)):
            for j, document in enumerate(row):
                yield i, j, document

    def save(self, path: Path) -> None:
        """Write the model as safetensors, atomically. Raises Fault where the disk refuses."""
        notes = {"scale": repr(self.scale), "smoothing": self.smoothing}
        ngram_files.save(Path(path), self.levels, self.masses, notes, self.written)

    @classmethod
    def load(cls, path: Path) -> "NGramModel":
        """Read what `save` wrote. Raises UserError where nothing is, Fault where the file is damaged or foreign."""
        levels, masses, notes, written = ngram_files.load(Path(path))
        return cls(levels, masses, float(notes["scale"]), notes["smoothing"], written)


def _name(smoothing: Smoothing) -> str:
    return getattr(smoothing, "__name__", None) or repr(smoothing)


def _total(level: Level, mass: Mass) -> np.ndarray:
    return np.add.reduceat(mass.weights_E, level.starts[:-1]) + mass.escape_C


def _locate(
    levels: Sequence[Level], documents: Sequence[Document], vocab_size: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    stream, positions_P = counting.flatten(documents, len(levels), vocab_size)
    contexts = counting.find_contexts(levels, counting.past(stream, positions_P, len(levels)))
    return contexts, counting.find_events(levels, contexts, stream[positions_P])


def _probabilities(
    levels: Sequence[Level], masses: Sequence[Mass], contexts: Sequence[np.ndarray], events: Sequence[np.ndarray]
) -> np.ndarray:
    """p(w | h) [P] of events found by `_locate`, from the shortest context to the longest."""
    p_P = np.full(len(events[0]), 1 / (levels[0].vocab_size - EOS))
    for level, mass, contexts_P, events_P in zip(levels, masses, contexts, events, strict=True):
        # Index -1, the unseen, lands on the appended element: weight 0, escape 1, total 1 hand p_P on as it is.
        weights_P = np.append(mass.weights_E, 0.0)[events_P]
        escape_P = np.append(mass.escape_C, 1.0)[contexts_P]
        p_P = (weights_P + escape_P * p_P) / np.append(_total(level, mass), 1.0)[contexts_P]
    return p_P


def _choose_scale(config: NGram, counts: Counts, validation: Sequence[Document] | None) -> float:
    """The scale of the highest validation log-likelihood; the one nearest to 1 in ties and without validation text."""
    by_distance = sorted(config.scales, key=lambda scale: abs(np.log(scale)))
    if validation is None or not len(validation) or len(by_distance) == 1:
        return by_distance[0]
    contexts, events = _locate(counts.levels, validation, counts.levels[0].vocab_size)

    def log_likelihood(scale: float) -> float:
        with np.errstate(divide="ignore"):
            return float(np.log(_probabilities(counts.levels, config.smoothing(counts, scale), contexts, events)).sum())

    return max(by_distance, key=log_likelihood)
