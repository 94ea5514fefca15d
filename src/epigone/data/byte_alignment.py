"""Where the tokens of two tokenizations of one text begin and end together. Numbers are of bytes."""

from typing import NamedTuple

import numpy as np


class Alignment(NamedTuple):
    """How n tokens lie beside m others.

    Attributes:
        match_N: for each token the other one that begins where it begins, the text before both being read; else -1.
        chunk_N: the chunk of a token, from 0; -1 for none.
        chunk_M: the same of the others.
    """

    match_N: np.ndarray
    chunk_N: np.ndarray
    chunk_M: np.ndarray


def align(borders: np.ndarray, others: np.ndarray) -> Alignment:
    """Lay tokens side by side.

    Args:
        borders: bytes before each of n tokens, and behind the last: n + 1 numbers that never fall.
        others: the same of m tokens of the same text.

    A chunk is what lies between two neighbouring borders that both have: whole tokens on both sides. A token without
    bytes is in none, and none is a chunk in whose midst there is one. Tokens that begin at one place are matched at
    the last of them, the one that has bytes.
    """
    common = np.intersect1d(borders, others)
    match_N = np.full(len(borders) - 1, -1, np.int32)
    last_N, last_M = (np.searchsorted(x, common, side="right") - 1 for x in (borders, others))
    both = (last_N < len(borders) - 1) & (last_M < len(others) - 1)
    match_N[last_N[both]] = last_M[both]
    (chunk_N, bad_N), (chunk_M, bad_M) = (_chunks(x, common) for x in (borders, others))
    bad = np.union1d(bad_N, bad_M)
    chunk_N, chunk_M = (np.where(np.isin(chunk, bad), -1, chunk).astype(np.int32) for chunk in (chunk_N, chunk_M))
    return Alignment(match_N, chunk_N, chunk_M)


def _chunks(borders: np.ndarray, common: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chunk of every token, and the chunks in whose midst there is a token without bytes."""
    begins, ends = borders[:-1], borders[1:]
    chunk = np.searchsorted(common, begins, side="right") - 1
    inside = (chunk >= 0) & (chunk + 1 < len(common))
    empty = begins == ends
    between = inside & empty & (begins > common[np.maximum(chunk, 0)] if len(common) else empty)
    return np.where(inside & ~empty, chunk, -1), np.unique(chunk[between])
