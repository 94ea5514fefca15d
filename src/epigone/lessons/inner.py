"""What of the teacher's inside a lesson asks for: which layers, held together how, and with which weight.

    Objective(inner=(Match(States(hidden_cosine), layers=evenly), Match(Relations(heads=4), layers=((2, 6),))))

The loss of a token is then that of the logits, plus for each match its weight times the mean over its pairs of layers.
Layers count from 1; the states of a layer are the residual stream behind it, before the final norm. Projections are
trained with the student, by its optimizer, and are no part of it: they are in checkpoints and not in what is saved.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from epigone.errors import UserError
from epigone.lessons.chunks import Mesh, placed
from epigone.lessons.match_kinds import Kind, Sizes, States
from epigone.lessons.schedules import Schedule, ends

Pairs = tuple[tuple[int, int], ...]
"""Layers of the student, each with one of the teacher."""


def last(student_layers: int, teacher_layers: int) -> Pairs:
    """The last layer with the last layer."""
    return ((student_layers, teacher_layers),)


def evenly(student_layers: int, teacher_layers: int) -> Pairs:
    """Every layer l of the student, with the teacher's at the same share of its depth (Jiao et al. 2020, TinyBERT)."""
    share = teacher_layers / student_layers
    return tuple((layer, max(1, round(layer * share))) for layer in range(1, student_layers + 1))


@dataclass(frozen=True)
class Match:
    """One way in which layers of the student are held against layers of the teacher.

    Attributes:
        kind: `States`, `Relations` or `Contrast`.
        layers: pairs (layer of the student, layer of the teacher), counted from 1, or a function of both numbers of
            layers that gives them: `last`, `evenly`.
        weight: of the mean over the pairs, beside the loss of the logits; a number, or a schedule.
    """

    kind: Kind = States()
    layers: Callable[[int, int], Pairs] | Pairs = last
    weight: float | Schedule = 1.0

    def __post_init__(self) -> None:
        if not all(weight >= 0.0 for weight in ends(self.weight)):
            raise UserError(f"inner: weight={self.weight} must not be negative")

    def pairs(self, student: Sizes, teacher: Sizes) -> Pairs:
        """The pairs of layers. Raises UserError for a layer that is not there."""
        pairs = self.layers(student.L, teacher.L) if callable(self.layers) else self.layers
        if not pairs:
            raise UserError("inner: layers is empty: name at least one pair, or take last")
        for pair in pairs:
            if len(pair) != 2 or not (1 <= pair[0] <= student.L and 1 <= pair[1] <= teacher.L):
                raise UserError(
                    f"inner: layers {pair} is no pair of a layer of the student, 1 to {student.L}, and one of the "
                    f"teacher, 1 to {teacher.L}"
                )
        return pairs


def check(matches: tuple[Match, ...], student: Sizes, teacher: Sizes) -> None:
    """Refuse layers that are not there, and sizes that do not fit. Raises UserError."""
    for match in matches:
        match.pairs(student, teacher)
        match.kind.check(student, teacher)


def layers_of(matches: tuple[Match, ...], student: Sizes, teacher: Sizes, heads: bool) -> tuple[tuple[int, ...], ...]:
    """The layers of student and of teacher whose states, or heads, are asked for: in rising order."""
    pairs = [pair for match in matches if match.kind.of_heads == heads for pair in match.pairs(student, teacher)]
    return tuple(tuple(sorted({pair[side] for pair in pairs})) for side in (0, 1))


def projections_of(matches: tuple[Match, ...], student: Sizes, teacher: Sizes) -> dict[str, tuple[int, int]]:
    """Shapes of all that is learned beside the student: `inner0_2_6_student_DE` is of match 0 and its pair (2, 6)."""
    found: dict[str, tuple[int, int]] = {}
    for place, match in enumerate(matches):
        for pair in match.pairs(student, teacher):
            shapes = match.kind.projections(student, teacher)
            found |= {f"{_prefix(place, pair)}_{name}": shape for name, shape in shapes.items()}
    return found


def names_of(matches: tuple[Match, ...]) -> tuple[str, ...]:
    """What the curve calls each match: `inner_` and its kind, with its place behind it where there are several."""
    names = [f"inner_{match.kind.name}" for match in matches]
    return tuple(f"{name}_{place}" if names.count(name) > 1 else name for place, name in enumerate(names))


def flops_per_token(matches: tuple[Match, ...], student: Sizes, teacher: Sizes, length: int) -> int:
    """Floating-point operations of all matches for one token in training."""
    each = (len(m.pairs(student, teacher)) * m.kind.flops(student, teacher, length) for m in matches)
    return round(sum(each))


def inner_losses(
    matches: tuple[Match, ...],
    pairs: tuple[Pairs, ...],
    projections: Mapping[str, Float[Array, "_ _"]],
    student: Any,
    teacher: Any,
    segments_BT: Int[Array, "B T"],
    *,
    mesh: Mesh = Mesh(),
) -> tuple[Float[Array, "B T"], ...]:
    """Of each match the mean over its pairs of layers [B, T], float32, not weighted.

    Args:
        matches: what is held together.
        pairs: of each match its layers, as `Match.pairs` gives them.
        projections: all that is learned beside the student, by the names of `projections_of`.
        student: its (states, heads), each a dictionary by layer; heads are (queries, keys, values).
        teacher: the same of the teacher, a constant.
        segments_BT: the texts of a row; 0 is padding.
        mesh: the axes of the mesh that is set. Each device takes its own rows, with all features.
    """
    rows: Any = P(mesh.batch or None)
    arguments = (dict(projections), tuple(student), tuple(teacher), segments_BT)
    where = (jax.tree.map(lambda _: P(), arguments[0]), *jax.tree.map(lambda _: rows, arguments[1:]))
    mesh, arguments = placed(mesh, arguments, where)
    local = partial(_local, matches, pairs)
    if mesh == Mesh():
        return local(*arguments)
    return jax.shard_map(local, in_specs=where, out_specs=rows)(*arguments)


def _local(
    matches: tuple[Match, ...], pairs: tuple[Pairs, ...], projections: Any, student: Any, teacher: Any, segments_BT: Any
) -> tuple[jax.Array, ...]:
    """The rows that are on this device."""
    found = []
    for place, (match, layers) in enumerate(zip(matches, pairs, strict=True)):
        mine, theirs = student[match.kind.of_heads], teacher[match.kind.of_heads]
        each = []
        for pair in layers:
            start = f"{_prefix(place, pair)}_"
            own = {name.removeprefix(start): x for name, x in projections.items() if name.startswith(start)}
            each.append(match.kind(own, mine[pair[0]], theirs[pair[1]], segments_BT))
        found.append(sum(each) / len(each))
    return tuple(found)


def _prefix(place: int, pair: tuple[int, int]) -> str:
    return f"inner{place}_{pair[0]}_{pair[1]}"
