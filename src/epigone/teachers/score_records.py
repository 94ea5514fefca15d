"""The compact record of what was kept of a teacher's scores for the tokens of one segment.

Ids take ceil(log2 V) bits. A log-probability takes 12 bits, in steps of 1/256 nat from 0 down to -16; what is less
probable (1e-7) counts as that. Of the log-probabilities of k tokens, which fall from the first to the last, those of 17
ranks are stored where there are more, densest at the top, and those between lie on straight lines over log rank (the
idea of DistillKit's curves). Of what a prompt box shows all are stored, since the last may lie far
below the one before. Draws are stored as what they are: the different ids, and how often each came, in unary: n draws
take n bits, however they fall.

Bytes a token at V = 128,256: 299 for the 128 best, 33 for 50 draws of 12 different tokens.
"""

from functools import cache

import numpy as np

from epigone.lessons.sparse import Rest
from epigone.lessons.terms import FLOOR
from epigone.teachers.bits import Reader, pack, width_of
from epigone.teachers.kept import Kept, RandomDraws, Scores, Shown

STEPS_A_NAT = 256
LEVEL_BITS = 12
LOWEST = (2**LEVEL_BITS - 1) / STEPS_A_NAT
"""Nats below 0 of the least log-probability, and the largest entropy, that can be told."""

RANKS = 17
"""Log-probabilities that are stored of a curve."""

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
"""ids [T, M] int32, log-probabilities [T, M] float32 (-1e9: none), rest [T] float32, as in `lessons.sparse.Sparse`."""


def encode(scores: Scores, vocab_size: int, kept: Kept) -> bytes:
    """What was kept of T tokens, as bytes."""
    ids_TM, log_probs_TM, rest_T2 = kept.ids_CM, kept.log_probs_CM, kept.rest_C2
    if isinstance(scores, RandomDraws):
        return _encode_draws(scores, vocab_size, ids_TM, log_probs_TM, rest_T2)
    M = scores.entries(vocab_size)
    ids_TM, log_probs_TM = ids_TM[:, :M], log_probs_TM[:, :M]  # what is behind them is padding of the head
    there_TM = log_probs_TM > FLOOR
    sizes_T = there_TM.sum(1)
    full = bool(there_TM.all())
    parts = [bytes([full]), b"" if full else pack(sizes_T, width_of(M + 1))]
    parts.append(pack(ids_TM[there_TM], width_of(vocab_size)))
    parts.append(pack(_level(log_probs_TM[_masks(M, isinstance(scores, Shown))[sizes_T]]), LEVEL_BITS))
    if scores.rest == Rest.BUCKET:
        parts.append(pack(_level(rest_T2[:, 0]), LEVEL_BITS))
    return b"".join(parts)


def decode(scores: Scores, vocab_size: int, tokens: int, data: bytes) -> Arrays:
    """What `encode` wrote of T tokens. Raises Fault for bytes that are too few or too many."""
    reader = Reader(data)
    M = scores.entries(vocab_size)
    if isinstance(scores, RandomDraws):
        return _decode_draws(scores, vocab_size, tokens, reader)
    full = bool(reader.numbers(1, 8)[0])
    sizes_T = np.full(tokens, M, np.int32) if full else reader.numbers(tokens, width_of(M + 1))
    there_TM = np.arange(M) < sizes_T[:, None]
    every = isinstance(scores, Shown)
    stored_TM = _masks(M, every)[sizes_T]
    ids_TM, log_probs_TM = np.zeros((tokens, M), np.int32), np.full((tokens, M), FLOOR, np.float32)
    ids_TM[there_TM] = reader.numbers(int(sizes_T.sum()), width_of(vocab_size))
    log_probs_TM[stored_TM] = _value(reader.numbers(int(stored_TM.sum()), LEVEL_BITS))
    for size in np.unique(sizes_T):
        if size > RANKS and not every:
            rows = sizes_T == size
            log_probs_TM[rows, :size] = log_probs_TM[rows][:, _ranks(size)] @ _lines(size)
    rest_T = np.zeros(tokens, np.float32)
    if scores.rest == Rest.BUCKET:
        rest_T = _value(reader.numbers(tokens, LEVEL_BITS))
    reader.finish()
    return ids_TM, log_probs_TM, rest_T


def _encode_draws(
    scores: RandomDraws, vocab_size: int, ids_TN: np.ndarray, log_probs_TN: np.ndarray, rest_T2: np.ndarray
) -> bytes:
    last_TN = np.ones(ids_TN.shape, bool)
    last_TN[:, :-1] = ids_TN[:, :-1] != ids_TN[:, 1:]
    parts = [pack(last_TN, 1), pack(ids_TN[last_TN], width_of(vocab_size)), pack(_level(-rest_T2[:, 0]), LEVEL_BITS)]
    if scores.power != 1.0:
        parts += [pack(_level(log_probs_TN[last_TN]), LEVEL_BITS), pack(_level(-rest_T2[:, 1]), LEVEL_BITS)]
    return b"".join(parts)


def _decode_draws(scores: RandomDraws, vocab_size: int, tokens: int, reader: Reader) -> Arrays:
    last_TN = reader.runs(tokens * scores.draws).reshape(tokens, scores.draws)
    sizes_T, M = last_TN.sum(1), scores.entries(vocab_size)
    there_TM = np.arange(M) < sizes_T[:, None]
    ids_TM, log_weights_TM = np.zeros((tokens, M), np.int32), np.full((tokens, M), FLOOR, np.float32)
    ids_TM[there_TM] = reader.numbers(int(sizes_T.sum()), width_of(vocab_size))
    places = np.flatnonzero(last_TN)
    counts = np.diff(places, prepend=-1)
    log_weights_TM[there_TM] = np.log(counts / scores.draws)
    entropy_T = -_value(reader.numbers(tokens, LEVEL_BITS))
    if scores.power != 1.0:
        # p / q = p^(1 - power) sum_v p_v^power.
        log_probs = _value(reader.numbers(int(sizes_T.sum()), LEVEL_BITS))
        log_sums_T = -_value(reader.numbers(tokens, LEVEL_BITS))
        log_weights_TM[there_TM] += (1.0 - scores.power) * log_probs + np.repeat(log_sums_T, sizes_T)
    reader.finish()
    return ids_TM, log_weights_TM, entropy_T


def _level(log_probs: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(-log_probs, 0.0, LOWEST) * STEPS_A_NAT).astype(np.int32)


def _value(levels: np.ndarray) -> np.ndarray:
    return (levels / -STEPS_A_NAT).astype(np.float32)


@cache
def _ranks(size: int) -> np.ndarray:
    """Ranks, from 0, whose log-probability is stored, of a curve of `size` tokens."""
    if size <= RANKS:
        return np.arange(size)
    top = RANKS // 2
    return np.unique(
        np.concatenate([np.arange(top), np.rint(np.geomspace(top + 1, size, RANKS - top)) - 1]).astype(int)
    )


@cache
def _lines(size: int) -> np.ndarray:
    """From the stored ranks to all: weights [stored, size] of straight lines over log rank."""
    at, all_ranks = np.log1p(_ranks(size)), np.log1p(np.arange(size))
    return np.stack([np.interp(all_ranks, at, one) for one in np.eye(len(at))]).astype(np.float32)


@cache
def _masks(M: int, every: bool) -> np.ndarray:
    """For each size from 0 to M, which ranks are stored, or all of them: [M + 1, M]."""
    if every:
        return np.tri(M + 1, M, -1, dtype=bool)
    masks = np.zeros((M + 1, M), bool)
    for size in range(1, M + 1):
        masks[size, _ranks(size)] = True
    return masks
