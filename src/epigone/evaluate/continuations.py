"""How probable a given continuation is, and whether a greedy reader would write it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from epigone.evaluate.contexts import score_contexts
from epigone.models.language_model import LanguageModel


class Piece(NamedTuple):
    """The last C of `targets_C` and `inputs_T` stand side by side: each target follows the input at its place."""

    inputs_T: np.ndarray
    targets_C: np.ndarray


class Scored(NamedTuple):
    """Natural-log probability of all targets of a piece together, and whether each was the most probable token."""

    log_prob: float
    greedy: bool


Score = Callable[[Sequence[Piece]], Sequence[tuple[float, bool]]]
"""How pieces are scored, each to what a `Scored` holds."""


def pieces_of(ids: np.ndarray, count: int, max_length: int | None) -> list[Piece]:
    """Pieces that score the last `count` of the ids, each id once, as the harness cuts them.

    Each reads as much of what stands before its last target as fits in `max_length`; bos counts.
    """
    step = max_length or max(1, count)
    pieces = []
    for start in range(len(ids) - count, len(ids), step):
        end = min(start + step, len(ids))
        first = 0 if max_length is None else max(0, end - 1 - max_length)
        pieces.append(Piece(ids[first : end - 1], ids[start:end]))
    return pieces


def scores_by_asking(model: LanguageModel, pieces: Sequence[Piece]) -> list[Scored]:
    """Scores of pieces that begin with bos, by the model's own `log_probs` and `next_log_probs`.

    A target of probability above one half is the most probable token. Of the others the least probable one is asked
    first: mostly the answer is there.
    """
    documents = [np.r_[piece.inputs_T[1:], piece.targets_C[-1:]].astype(np.int32) for piece in pieces]
    scores = []
    for document, piece, values in zip(documents, pieces, model.log_probs(documents), strict=True):
        n = len(document)
        scores.append(np.asarray(values[n - len(piece.targets_C) : n], np.float64))
    least = [(index, int(values.argmin())) for index, values in enumerate(scores)]
    holds = _most_probable(model, pieces, least)
    doubtful = [
        (index, int(place))
        for (index, lowest), first in zip(least, holds, strict=True)
        for place in np.flatnonzero(scores[index] <= np.log(0.5))
        if first and place != lowest
    ]
    rest = _most_probable(model, pieces, doubtful)
    failing = {index for (index, _), held in zip([*least, *doubtful], [*holds, *rest], strict=True) if not held}
    return [Scored(float(values.sum()), index not in failing) for index, values in enumerate(scores)]


def _most_probable(model: LanguageModel, pieces: Sequence[Piece], places: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether the target at each (piece, place) is the most probable token there, the lowest id among equals."""
    prefixes = []
    for index, place in places:
        inputs_T, targets_C = pieces[index]
        prefixes.append(inputs_T[1 : len(inputs_T) - len(targets_C) + 1 + place])
    chosen = [scores_MV.argmax(axis=1) for (scores_MV,) in score_contexts([model], prefixes)]
    targets = [pieces[index].targets_C[place] for index, place in places]
    return list(np.concatenate([np.empty(0, np.int64), *chosen]) == np.array(targets, np.int64))
