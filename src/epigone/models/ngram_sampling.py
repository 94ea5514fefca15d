"""Ancestral sampling from an n-gram model, many documents side by side.

Shapes: M documents (or queries) in flight, E stored n-grams, V vocabulary. An interpolated row is a mixture over
context lengths: stay at the longest seen context with probability 1 - escape / total and draw one of its n-grams by
weight, else go one token shorter, at last to the uniform distribution. Only temperature, top-k and top-p need the row
itself.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from epigone.errors import UserError
from epigone.models import counts as counting
from epigone.models.beam import Beams, Next, most_probable, search
from epigone.models.language_model import BOS, EOS, Document

if TYPE_CHECKING:
    from epigone.models.ngram import NGramModel

WAVE = 8192
"""Documents begun at once: enough to hide the cost of a step, few enough for 256 tokens of each to take 8 MiB."""

CHANCES = 2**21
"""Random numbers that are drawn at once for texts with a generator each: 16 MiB."""

BEAM_ROWS = 512
"""Rows of probabilities that a beam search forms at once."""

ROW_ELEMENTS = 2**18
"""Probabilities formed at once where rows are needed: 2 MiB, which stays in a core's cache."""


class Sampler:
    """Draws next tokens from a model, after temperature, top-k and top-p (in this order)."""

    def __init__(self, model: "NGramModel", temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> None:
        if not 0 <= temperature < np.inf:
            raise UserError(f"temperature {temperature}: it must be 0 (the most likely token every time) or more")
        if top_k < 0:
            raise UserError(f"top_k {top_k}: it must be 1 or more, or 0 for off")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p {top_p}: it must lie in (0, 1], 1 for off")
        if temperature == 0:
            temperature, top_k, top_p = 1.0, 1, 1.0
        self.model, self.temperature, self.top_k, self.top_p = model, temperature, top_k, top_p
        self.plain = temperature == 1.0 and top_k == 0 and top_p == 1.0

    def next_tokens(self, contexts: Sequence[np.ndarray], chance: "Chance", rows_M: np.ndarray) -> np.ndarray:
        """One token int64 [M] after each context, given by its id at every level; `rows_M` says whose chance it is."""
        return (self._from_mixture if self.plain else self._from_rows)(contexts, chance, rows_M)

    @cached_property
    def _escapes(self) -> list[np.ndarray]:
        # The element for id -1, an unseen context, is a sure escape: no uniform number reaches 1.
        return [
            np.append(mass.escape_C / total_C, 1.0)
            for mass, total_C in zip(self.model.masses, self.model.totals, strict=True)
        ]

    @cached_property
    def _cumulative(self) -> list[np.ndarray]:
        return [np.concatenate([[0.0], np.cumsum(mass.weights_E)]) for mass in self.model.masses]

    def _from_mixture(self, contexts: Sequence[np.ndarray], chance: "Chance", rows_M: np.ndarray) -> np.ndarray:
        tokens_M = np.empty(len(contexts[0]), np.int64)
        pending = np.arange(len(tokens_M))
        for k in range(self.model.order - 1, -1, -1):
            ids = contexts[k][pending]
            stays = chance.uniform(rows_M[pending]) >= self._escapes[k][ids]
            tokens_M[pending[stays]] = self._by_weight(k, ids[stays], chance.uniform(rows_M[pending[stays]]))
            pending = pending[~stays]
        tokens_M[pending] = chance.integers(rows_M[pending], EOS, self.model.vocab_size)
        return tokens_M

    def _by_weight(self, k: int, ids: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        level, cumulative = self.model.levels[k], self._cumulative[k]
        first, end = level.starts[ids], level.starts[ids + 1]
        low, high = cumulative[first], cumulative[end]
        found = np.searchsorted(cumulative, low + uniform * (high - low), side="right") - 1
        return level.tokens_E[np.minimum(found, end - 1)]

    def _from_rows(self, contexts: Sequence[np.ndarray], chance: "Chance", rows_M: np.ndarray) -> np.ndarray:
        states, inverse_M = self._states(contexts)
        uniform_M = chance.uniform(rows_M)
        tokens_M = np.empty(len(inverse_M), np.int64)
        chunk = max(1, ROW_ELEMENTS // self.model.vocab_size)
        for start in range(0, len(states[0]), chunk):
            here = np.flatnonzero((inverse_M >= start) & (inverse_M < start + chunk))
            rows = self.model.rows([ids[start : start + chunk] for ids in states])
            rows = filtered(rows, self.temperature, self.top_k, self.top_p)
            tokens_M[here] = _inverse_cdf(rows, inverse_M[here] - start, uniform_M[here])
        return tokens_M

    def _states(self, contexts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
        """The distinct contexts, so that each row is formed once; the longest seen context tells all shorter ones."""
        longest_M, offset = np.zeros(len(contexts[0]), np.int64), 0
        for level, ids_M in zip(self.model.levels, contexts, strict=True):
            longest_M = np.where(ids_M >= 0, offset + ids_M, longest_M)
            offset += len(level.context_keys_C)
        _, first, inverse_M = np.unique(longest_M, return_index=True, return_inverse=True)
        return [ids_M[first] for ids_M in contexts], inverse_M


class Chance(Protocol):
    """Where random numbers come from: rows are texts in flight."""

    def uniform(self, rows_M: np.ndarray) -> np.ndarray:
        """A number in [0, 1) for each row."""
        ...

    def integers(self, rows_M: np.ndarray, low: int, high: int) -> np.ndarray:
        """An integer in [low, high) for each row."""
        ...


class SharedChance:
    """One generator for all rows: what a row gets depends on the others."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def uniform(self, rows_M: np.ndarray) -> np.ndarray:
        return self.rng.random(len(rows_M))

    def integers(self, rows_M: np.ndarray, low: int, high: int) -> np.ndarray:
        return self.rng.integers(low, high, len(rows_M))


class OwnChance:
    """A generator of its own for each row, told by its key: a row gets the same beside whatever others."""

    def __init__(self, keys: Sequence[Sequence[int]], most: int) -> None:
        self.numbers_RN = np.stack([np.random.default_rng(list(key)).random(most) for key in keys])
        self.used_R = np.zeros(len(keys), np.int64)

    def uniform(self, rows_M: np.ndarray) -> np.ndarray:
        found = self.numbers_RN[rows_M, self.used_R[rows_M]]
        self.used_R[rows_M] += 1
        return found

    def integers(self, rows_M: np.ndarray, low: int, high: int) -> np.ndarray:
        return low + (self.uniform(rows_M) * (high - low)).astype(np.int64)


def filtered(rows_MV: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Probabilities [M, V] after temperature, then top-k, then top-p; ties go to the lower ids, so exactly k stay.

    Top-p keeps the fewest most likely tokens whose mass reaches `top_p`. Every row sums to 1 again.
    """
    if temperature != 1.0:
        # Relative to the row's largest, so that no power of a small temperature leaves a row empty.
        rows_MV = (rows_MV / rows_MV.max(axis=1, keepdims=True)) ** (1 / temperature)
    if top_k or top_p < 1:
        rows_MV = np.where(_largest(rows_MV, top_k or rows_MV.shape[1], top_p), rows_MV, 0.0)
    return rows_MV / rows_MV.sum(axis=1, keepdims=True)


def _largest(rows_MV: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Mask of the tokens that top-k and top-p keep; sorts values, not indices, which is several times faster."""
    sorted_MK = np.sort(rows_MV, axis=1)[:, ::-1][:, :top_k]
    before_MK = np.cumsum(sorted_MK, axis=1) - sorted_MK
    sizes_M = (
        (before_MK < top_p * sorted_MK.sum(axis=1, keepdims=True)).sum(axis=1) if top_p < 1 else sorted_MK.shape[1]
    )
    smallest_M1 = np.take_along_axis(sorted_MK, np.broadcast_to(sizes_M, len(rows_MV))[:, None] - 1, axis=1)
    above_MV, ties_MV = rows_MV > smallest_M1, rows_MV == smallest_M1
    room_M = sizes_M - above_MV.sum(axis=1)
    return above_MV | (ties_MV & (np.cumsum(ties_MV, axis=1) <= room_M[:, None]))


def _inverse_cdf(rows_SV: np.ndarray, rows_M: np.ndarray, uniform_M: np.ndarray) -> np.ndarray:
    cumulative_SV = np.cumsum(rows_SV, axis=1)
    tokens_M = np.empty(len(rows_M), np.int64)
    order = np.argsort(rows_M, kind="stable")
    bounds = np.searchsorted(rows_M[order], np.arange(len(rows_SV) + 1))
    for row, cumulative_V in enumerate(cumulative_SV):
        here = order[bounds[row] : bounds[row + 1]]
        tokens_M[here] = np.searchsorted(cumulative_V, uniform_M[here] * cumulative_V[-1], side="right")
    return tokens_M


def write(sampler: Sampler, tokens: int, seed: int, max_length: int) -> list[Document]:
    """Whole documents from bos to eos (or `max_length` tokens) until their lengths + 1 add up to `tokens`."""
    if tokens < 1:
        raise UserError(f"{tokens} tokens to write: it must be 1 or more")
    if max_length < 1:
        raise UserError(f"max_length {max_length}: it must be 1 or more")
    chance = SharedChance(np.random.default_rng(seed))
    documents: list[Document] = []
    total, mean = 0, _mean_events(sampler.model)
    while total < tokens:
        wave = _wave(sampler, min(WAVE, int(1.05 * (tokens - total) / mean) + 4), chance, max_length)
        ends = total + np.cumsum([len(document) + 1 for document in wave])
        needed = min(len(wave), int(np.searchsorted(ends, tokens)) + 1)
        documents += wave[:needed]
        total = int(ends[needed - 1])
        mean = total / len(documents)
    return documents


def _mean_events(model: "NGramModel") -> float:
    weights_E, tokens_E = model.masses[0].weights_E, model.levels[0].tokens_E
    return max(1.0, float(weights_E.sum() / weights_E[tokens_E == EOS].sum())) if (weights_E > 0).all() else 16.0


def sample(sampler: Sampler, prompts: Sequence[Document], seed: int, samples: int, length: int) -> list[list[Document]]:
    """Continue each prompt `samples` times; sample j of prompt i depends on the prompt and (seed, i, j) alone."""
    model = sampler.model
    keys = [(seed, index, number) for index in range(len(prompts)) for number in range(samples)]
    most = length * (model.order + 1)  # of each token: whether it stays at every level, and which it is
    each = max(1, CHANCES // most)
    written: list[Document] = []
    for start in range(0, len(keys), each):
        part = keys[start : start + each]
        history = counting.histories([prompts[index] for _, index, _ in part], model.order, model.vocab_size)
        written += _wave(sampler, len(part), OwnChance(part, most), length, history)
    return [written[index * samples : (index + 1) * samples] for index in range(len(prompts))]


def beam(model: "NGramModel", prompts: Sequence[Document], beams: int, length: int) -> list[Document]:
    """The best continuation of each prompt that a search with so many beams finds; prompts in parts of `BEAM_ROWS`."""
    found: list[Document] = []
    each = max(1, BEAM_ROWS // beams)
    for start in range(0, len(prompts), each):
        part = prompts[start : start + each]
        history = np.repeat(counting.histories(part, model.order, model.vocab_size), beams, axis=1)
        steps = _BeamSteps(model, history, 2 * beams)
        found += search(steps.step, steps.next(), Beams(len(part), beams, length, (EOS,)))
    return found


class _BeamSteps:
    """The last tokens [order - 1, R] of each row of a search."""

    def __init__(self, model: "NGramModel", history: np.ndarray, count: int) -> None:
        self.model, self.history, self.count = model, history, count

    def step(self, parents_R: np.ndarray, tokens_R: np.ndarray) -> Next:
        joined = np.concatenate([tokens_R[None].astype(np.int64), self.history[:, parents_R]])
        self.history = joined[: self.model.order - 1]
        return self.next()

    def next(self) -> Next:
        with np.errstate(divide="ignore"):
            rows_RV = np.log(self.model.rows(counting.find_contexts(self.model.levels, self.history)))
        return most_probable(rows_RV, self.count)


def _wave(
    sampler: Sampler, size: int, chance: Chance, max_length: int, history: np.ndarray | None = None
) -> list[Document]:
    """`size` documents side by side, after the last tokens in `history` [order - 1, size], or after bos."""
    model = sampler.model
    columns: list[tuple[np.ndarray, np.ndarray]] = []
    lengths = np.full(size, max_length)
    alive = np.arange(size)
    history = np.full((model.order - 1, size), BOS, np.int64) if history is None else history
    for step in range(max_length):
        tokens = sampler.next_tokens(counting.find_contexts(model.levels, history), chance, alive)
        ended = tokens == EOS
        lengths[alive[ended]] = step
        alive, tokens, history = alive[~ended], tokens[~ended], history[:, ~ended]
        if not len(alive):
            break
        columns.append((alive, tokens))
        history = np.concatenate([tokens[None], history])[: model.order - 1]
    written = np.empty((size, len(columns)), np.int32)
    for step, (rows, tokens) in enumerate(columns):
        written[rows, step] = tokens
    return [row[:length].copy() for row, length in zip(written, lengths, strict=True)]
