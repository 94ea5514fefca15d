"""Counts of n-grams of every length up to an order, as sorted integer keys.

Shapes: E stored n-grams (context, token), C contexts of one length, P positions (events), M queries, V vocabulary.
A context of length k is (context of length k - 1, one older token): its id is the rank of the key
`parent id * V + older token`, and an n-gram's key is `context id * V + token`. Ids are dense at every length, so a key
stays below (stored n-grams) * V, whatever the order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from epigone.errors import UserError
from epigone.models.language_model import BOS, EOS, UNK, Document


@dataclass(frozen=True)
class Level:
    """The n-grams whose context has one length.

    Attributes:
        vocab_size: V, the base of the keys.
        context_keys_C: Sorted int64 keys `parent id * V + older token`; `[0]` for the empty context.
        starts: int64 [C + 1]; context c owns the n-grams `starts[c]:starts[c + 1]`, never none.
        tokens_E: int32 token of each n-gram, ascending within a context.
    """

    vocab_size: int
    context_keys_C: np.ndarray
    starts: np.ndarray
    tokens_E: np.ndarray

    @cached_property
    def keys_E(self) -> np.ndarray:
        """Sorted int64 keys `context id * V + token`."""
        contexts_E = np.repeat(np.arange(len(self.context_keys_C)), np.diff(self.starts))
        return contexts_E * self.vocab_size + self.tokens_E


@dataclass(frozen=True)
class Counts:
    """How often each n-gram occurs: `counts[k]` [E] belongs to `levels[k]`, the contexts of length k."""

    levels: tuple[Level, ...]
    counts: tuple[np.ndarray, ...]

    @cached_property
    def continuations(self) -> tuple[np.ndarray, ...]:
        """Distinct left neighbours of each n-gram, [E] for every length but the longest; float64."""
        return tuple(map(_left_neighbours, self.levels[:-1], self.levels[1:]))


def flatten(documents: Sequence[Document], order: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The documents as one stream, each behind `order - 1` bos and before one eos.

    Returns:
        stream: int64 tokens, specials included; positions_P: where the predicted events x_1..x_n, eos stand in it.
    """
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    pad = order - 1
    pads_P = np.repeat(pad * np.arange(1, len(lengths) + 1), lengths + 1)
    positions_P = np.arange(len(pads_P)) + pads_P
    last = np.cumsum(lengths + 1) - 1
    inside = np.ones(len(positions_P), dtype=bool)
    inside[last] = False
    stream = np.full(len(positions_P) + pad * len(lengths), BOS, dtype=np.int64)
    stream[positions_P[last]] = EOS
    if lengths.any():
        tokens = np.concatenate(list(documents))
        _check_tokens(tokens, UNK, vocab_size)
        stream[positions_P[inside]] = tokens
    return stream, positions_P


def _check_tokens(tokens: np.ndarray, lowest: int, vocab_size: int) -> None:
    if not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"tokens of type {tokens.dtype}: token ids must be integers")
    low, high = int(tokens.min()), int(tokens.max())
    if low < lowest or high >= vocab_size:
        raise UserError(
            f"token id {low if low < lowest else high} lies outside {lowest}..{vocab_size - 1}: "
            "the text was encoded by another tokenizer, or has special tokens in it"
        )


def histories(contexts: Sequence[Document], order: int, vocab_size: int) -> np.ndarray:
    """The last `order - 1` tokens of each context, newest first and padded by bos: int64 [order - 1, M]."""
    result = np.full((order - 1, len(contexts)), BOS, dtype=np.int64)
    for row, context in enumerate(contexts):
        recent = np.asarray(context)[::-1][: order - 1]
        result[: len(recent), row] = recent
    if result.size:
        _check_tokens(result, 0, vocab_size)
    return result


def past(stream: np.ndarray, positions_P: np.ndarray, order: int) -> np.ndarray:
    """The `order - 1` tokens before each position, newest first: [order - 1, P]."""
    return stream[positions_P - np.arange(1, order)[:, None]]


def count(stream: np.ndarray, positions_P: np.ndarray, order: int, vocab_size: int) -> Counts:
    """Count the n-grams that end at `positions_P`, for every context length from 0 to `order - 1`."""
    targets_P = stream[positions_P]
    level, counts_E = _count_level(np.zeros(1, np.int64), np.zeros(len(positions_P), np.int64), targets_P, vocab_size)
    levels, counts = [level], [counts_E]
    contexts_P = np.zeros(len(positions_P), np.int64)
    for older_P in past(stream, positions_P, order):
        context_keys_C, contexts_P = np.unique(contexts_P * vocab_size + older_P, return_inverse=True)
        level, counts_E = _count_level(context_keys_C, contexts_P, targets_P, vocab_size)
        levels.append(level)
        counts.append(counts_E)
    return Counts(tuple(levels), tuple(counts))


def _count_level(
    context_keys_C: np.ndarray, contexts_P: np.ndarray, targets_P: np.ndarray, vocab_size: int
) -> tuple[Level, np.ndarray]:
    keys_E, counts_E = np.unique(contexts_P * vocab_size + targets_P, return_counts=True)
    contexts_E, tokens_E = np.divmod(keys_E, vocab_size)
    starts = np.searchsorted(contexts_E, np.arange(len(context_keys_C) + 1))
    return Level(vocab_size, context_keys_C, starts, tokens_E.astype(np.int32)), counts_E


def _left_neighbours(shorter: Level, longer: Level) -> np.ndarray:
    parents_C = longer.context_keys_C // longer.vocab_size
    parents_E = np.repeat(parents_C, np.diff(longer.starts))
    suffixes_E = np.searchsorted(shorter.keys_E, parents_E * longer.vocab_size + longer.tokens_E)
    return np.bincount(suffixes_E, minlength=len(shorter.tokens_E)).astype(np.float64)


def find(sorted_keys: np.ndarray, keys_M: np.ndarray) -> np.ndarray:
    """Index of each key in `sorted_keys`, or -1; a key below zero (made from an unseen parent) is never found."""
    index_M = np.searchsorted(sorted_keys, keys_M)
    index_M[index_M == len(sorted_keys)] = 0
    return np.where(sorted_keys[index_M] == keys_M, index_M, -1)


def find_contexts(levels: Sequence[Level], history: np.ndarray) -> list[np.ndarray]:
    """Id of the context of every length, [M] each, -1 where unseen; `history` [order - 1, M] is newest first."""
    contexts = [np.zeros(history.shape[1], np.int64)]
    for level, older_M in zip(levels[1:], history, strict=True):
        contexts.append(find(level.context_keys_C, contexts[-1] * level.vocab_size + older_M))
    return contexts


def find_events(levels: Sequence[Level], contexts: Sequence[np.ndarray], tokens_M: np.ndarray) -> list[np.ndarray]:
    """Index of (context, token) in every level, [M] each, -1 where that n-gram was not seen."""
    return [
        find(level.keys_E, contexts_M * level.vocab_size + tokens_M)
        for level, contexts_M in zip(levels, contexts, strict=True)
    ]
