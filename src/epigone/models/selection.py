"""Which layers and which units a student keeps of its teacher: choices that a config names, and the indices.

A student that keeps all of them keeps them in order, so every choice gives ascending indices.
"""

from collections.abc import Callable

import numpy as np

from epigone.errors import UserError
from epigone.models.config import DecoderConfig, Sizes
from epigone.models.importance import Activity

Units = dict[str, np.ndarray]
"""Indices of the teacher's units that the student keeps, by letter: L [l], D [d], N K E [l, units], F [l, units] or,
with experts, [l, experts, units]."""

LayerChoice = Callable[[DecoderConfig, DecoderConfig, np.ndarray | None], tuple[int, ...]]
"""From teacher, student and the influence of the teacher's layers (None: not measured) to ascending layers."""

WidthChoice = Callable[[DecoderConfig, Activity | None], Activity]
"""From the teacher and what was measured (None: nothing) to scores: the units that score most are kept."""


def evenly(teacher: DecoderConfig, student: DecoderConfig, influence_L: np.ndarray | None) -> tuple[int, ...]:
    """Evenly spaced from the first to the last: 0, 2, 4, 7, 9, 11 of 12, the layers of DistilBERT's own script."""
    gaps = max(student.layers - 1, 1)
    return tuple((2 * i * (teacher.layers - 1) + gaps) // (2 * gaps) for i in range(student.layers))


def every_other(teacher: DecoderConfig, student: DecoderConfig, influence_L: np.ndarray | None) -> tuple[int, ...]:
    """0, 2, 4, ... (Sanh et al. 2019: one layer out of two). Raises UserError for more than half, rounded up."""
    if 2 * student.layers > teacher.layers + 1:
        raise UserError(
            f"every other of the teacher's layers {teacher.layers} gives {(teacher.layers + 1) // 2}, and the student "
            f"has layers {student.layers}: make them fewer, or choose evenly"
        )
    return tuple(range(0, 2 * student.layers, 2))


def first_and_last(teacher: DecoderConfig, student: DecoderConfig, influence_L: np.ndarray | None) -> tuple[int, ...]:
    """The first half, rounded up, from the teacher's start and the rest from its end: the middle is left out."""
    last = student.layers // 2
    return (*range(student.layers - last), *range(teacher.layers - last, teacher.layers))


def least_redundant(teacher: DecoderConfig, student: DecoderConfig, influence_L: np.ndarray | None) -> tuple[int, ...]:
    """The layers with the largest sum of influences 1 - cos(x_in, x_out), in order (Men et al. 2024, ShortGPT).

    Where a window binds some layers only, among the choices whose kinds are those of the student's pattern. Raises
    UserError when there is none.
    """
    gains = np.ones(teacher.layers) if influence_L is None else influence_L
    best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ()), *[None] * student.layers]
    for index, (kind, gain) in enumerate(zip(teacher.windowed_layers, gains, strict=True)):
        for count in reversed(range(student.layers)):
            before, after = best[count], best[count + 1]
            if before is None or kind != student.windowed_layers[count]:
                continue
            if after is None or before[0] + gain > after[0]:
                best[count + 1] = (before[0] + float(gain), (*before[1], index))
    if best[-1] is None:
        raise UserError(
            f"no {student.layers} of the teacher's layers, bound by its window as {teacher.windowed_layers}, are bound "
            f"as the student's {student.windowed_layers}: choose another window_pattern"
        )
    return best[-1][1]


def first_units(teacher: DecoderConfig, measured: Activity | None) -> Activity:
    """The first units of every axis score most: nothing is measured, and what is kept is arbitrary."""
    s = teacher.sizes
    falling = lambda *shape: np.broadcast_to(-np.arange(shape[-1], dtype=np.float32), shape)  # noqa: E731
    experts = (s.E,) if s.E else ()
    return Activity(
        influence_L=falling(s.L),
        stream_LD=falling(s.L, s.D),
        final_D=falling(s.D),
        heads_LN=falling(s.L, s.N),
        experts_LE=falling(s.L, s.E),
        ff_LF=falling(s.L, *experts, s.F),
    )


def most_active(teacher: DecoderConfig, measured: Activity | None) -> Activity:
    """Units score what they do on the calibration text (Muralidharan et al. 2024; formulas in importance.py)."""
    if measured is None:
        raise UserError("most_active needs text to weigh the teacher's units on: give calibration batches")
    return measured


def kept_units(teacher: DecoderConfig, student: DecoderConfig, scores: Activity, layers: tuple[int, ...]) -> Units:
    """Which of the teacher's units the student keeps, given their scores and the layers that it takes."""
    s, rows = student.sizes, list(layers) or list(range(teacher.layers))
    kept = {"D": _best(scores.stream_LD[rows].sum(0) + scores.final_D, s.D)}
    if not layers:
        return kept
    kept |= {"L": np.array(layers)} | _kept_heads(teacher.sizes, s, scores.heads_LN[rows])
    ff = scores.ff_LF[rows]
    if s.E:
        kept["E"] = _best(scores.experts_LE[rows], s.E)
        ff = np.take_along_axis(ff, kept["E"][:, :, None], axis=1)
    return kept | {"F": _best(ff, s.F)}


def _kept_heads(teacher: Sizes, student: Sizes, scores_LN: np.ndarray) -> Units:
    """Key heads by the sum of their best query heads, and those query heads, the same number in every group."""
    scores_LKG = scores_LN.reshape(len(scores_LN), teacher.K, -1)
    inside_LKG = _best(scores_LKG, student.N // student.K)
    groups_LK = _best(np.take_along_axis(scores_LKG, inside_LKG, axis=2).sum(2), student.K)
    heads_LKG = np.take_along_axis(inside_LKG, groups_LK[:, :, None], axis=1)
    heads_LKG = heads_LKG + groups_LK[:, :, None] * scores_LKG.shape[2]
    return {"K": groups_LK, "N": heads_LKG.reshape(len(scores_LN), -1)}


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest along the last axis, ascending; of equals the first."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :count], axis=-1)
