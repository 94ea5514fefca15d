"""Students that start from their teacher's weights: chosen layers, sliced width, the teacher's embeddings.

    how = Inherit(layers=evenly, width=most_active, embeddings=True)
    params = inherit(teacher, teacher_params, student, init(student, seed), how, calibration)

Every weight's name ends in its axis letters, so what is kept is one array of indices a letter: layers L and features D
of the stream for the whole model, and for each kept layer its own query heads N, key and value heads K, feed-forward
units F and experts E. Head features H and the vocabulary V stay whole. All indices ascend: with nothing to leave out
the student is the teacher to the bit.

Grouped queries: the heads that share a key head form a group. A student keeps the K groups whose best N / K heads score
most, and in each group those heads, so that every kept query head still reads its own keys.

Sources: Sanh et al. 2019 (DistilBERT) for layers and embeddings; Muralidharan et al. 2024 (Minitron) for width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from epigone.errors import UserError
from epigone.models.config import DecoderConfig, Sizes, layer_weights, outer_weights
from epigone.models.importance import Tokens, measure
from epigone.models.layers import learned
from epigone.models.selection import (
    LayerChoice,
    Units,
    WidthChoice,
    evenly,
    first_units,
    kept_units,
    least_redundant,
    most_active,
)
from epigone.models.sharding import Sharding, placed, suffix


@dataclass(frozen=True)
class Inherit:
    """What a student takes from its teacher. What it does not take keeps the student's own initial values.

    Attributes:
        layers: which of the teacher's layers become the student's: their indices, ascending, or one of evenly,
            every_other, first_and_last, least_redundant; None takes none.
        width: which units are kept where the student is narrower: first_units or most_active; None: it is not narrower.
        embeddings: take what lies outside the layers: table, learned positions, final norm, head.
    """

    layers: tuple[int, ...] | LayerChoice | None = evenly
    width: WidthChoice | None = None
    embeddings: bool = True

    @property
    def needs_calibration(self) -> bool:
        """Whether anything is measured on text."""
        return self.layers is least_redundant or self.width is most_active

    def chosen_layers(
        self, teacher: DecoderConfig, student: DecoderConfig, influence_L: np.ndarray | None = None
    ) -> tuple[int, ...]:
        """The teacher's layers, one for each of the student's; none for `layers=None`."""
        if self.layers is None:
            return ()
        return self.layers(teacher, student, influence_L) if callable(self.layers) else tuple(self.layers)


LAYER_FIELDS = (
    *("norm", "norm_bias", "pre_norm", "post_norm", "qk_norm", "qk_norm_whole", "positions", "rope_theta"),
    *("rope_fraction", "rope_scaling", "rope_local_theta", "activation", "gated", "qkv_bias", "mix_bias", "ff_bias"),
    *("normalise_experts", "score_scale", "attention_softcap"),
)
"""Fields that give the weights of a layer their meaning: a student that takes layers has its teacher's."""

OUTER_FIELDS = ("positions", "norm", "norm_bias", "logit_softcap")
"""The same for the weights outside the layers."""

VOCABULARY_FIELDS = ("vocab_size", "specials")
"""The same for their rows, where it is not known that both vocabularies differ in padding alone."""

NARROWER = {"D": "model_size", "N": "heads", "K": "kv_heads", "F": "ff_size", "E": "experts"}
"""The axes that are sliced, and the fields that set them."""


def check(teacher: DecoderConfig, student: DecoderConfig, how: Inherit, tokens: int | None = None) -> None:
    """Refuse, before any work, what cannot be inherited. Raises UserError with field, both values, and what to do.

    `tokens`: ids of the one tokenizer that both read, where both may have more rows; None: it is not known.
    """
    if how.layers is None and not how.embeddings:
        raise UserError("layers is None and embeddings is False: nothing is inherited; say what, or leave out inherit")
    if how.layers is not None:
        _check_layers(teacher, student, how)
        _check_same(teacher, student, LAYER_FIELDS)
    if how.embeddings:
        one = tokens is not None and min(teacher.sizes.V, student.sizes.V) >= tokens
        _check_same(teacher, student, OUTER_FIELDS if one else VOCABULARY_FIELDS + OUTER_FIELDS)
        _check_outer(teacher, student)
    for letter, field in NARROWER.items():
        if how.layers is not None or letter == "D":
            _check_size(letter, field, teacher.sizes, student.sizes, how)
    if how.layers is not None:
        _check_groups(teacher.sizes, student.sizes)
    _check_embedding_scale(teacher, student)


def _check_embedding_scale(teacher: DecoderConfig, student: DecoderConfig) -> None:
    """Gemma's scale is the root of the model size. A narrower student with the wider one's could not be exported."""
    D, of_teacher, of_student = student.model_size, teacher.embedding_scale, student.embedding_scale
    if teacher.model_size != D and of_teacher == teacher.model_size**0.5 == of_student:
        raise UserError(
            f"embedding_scale {of_student:g} is the root of the teacher's model_size {teacher.model_size}: "
            f"give the student that of its own, embedding_scale={D}**0.5"
        )


def _check_same(teacher: DecoderConfig, student: DecoderConfig, fields: Iterable[str]) -> None:
    for field in fields:
        ours, theirs = getattr(student, field), getattr(teacher, field)
        if ours != theirs:
            raise UserError(f"{_told(field, theirs, ours)}: give the student the teacher's")


def _told(field: str, theirs: Any, ours: Any) -> str:
    named = (getattr(value, "__name__", value) for value in (theirs, ours))
    return "{} is {} in the teacher and {} in the student".format(field, *named)


def _check_layers(teacher: DecoderConfig, student: DecoderConfig, how: Inherit) -> None:
    if teacher.sizes.H != student.sizes.H:
        raise UserError(
            f"{_told('head_size', teacher.sizes.H, student.sizes.H)}: heads are taken whole, give them one size"
        )
    if (teacher.experts is None) != (student.experts is None):
        raise UserError(f"{_told('experts', teacher.experts, student.experts)}: give both experts, or neither")
    if student.layers > teacher.layers:
        raise UserError(f"{_told('layers', teacher.layers, student.layers)}: give the student at most as many")
    _check_choice(teacher, student, how.chosen_layers(teacher, student))


def _check_choice(teacher: DecoderConfig, student: DecoderConfig, chosen: tuple[int, ...]) -> None:
    if len(chosen) != student.layers:
        raise UserError(f"layers {chosen} are {len(chosen)}, and the student has layers {student.layers}: give as many")
    if list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < teacher.layers:
        raise UserError(f"layers {chosen} must ascend from 0 to at most {teacher.layers - 1}, the teacher's last")
    kinds = tuple(teacher.windowed_layers[index] for index in chosen)
    if kinds != student.windowed_layers:
        raise UserError(
            f"layers {chosen} are bound by the teacher's window as {kinds}, and the student's as "
            f"{student.windowed_layers}: choose other layers, or give the student window {teacher.window} and "
            f"window_pattern {kinds}"
        )


def _check_outer(teacher: DecoderConfig, student: DecoderConfig) -> None:
    if student.tied and not teacher.tied:
        raise UserError(f"{_told('tied', teacher.tied, student.tied)}: give the student a head of its own, tied=False")
    if student.positions is learned and student.max_length > teacher.max_length:
        lengths = _told("max_length", teacher.max_length, student.max_length)
        raise UserError(f"{lengths}: learned positions end there, give the student at most as many")


def _check_size(letter: str, field: str, teacher: Sizes, student: Sizes, how: Inherit) -> None:
    theirs, ours = (getattr(sizes, letter) for sizes in (teacher, student))
    if ours > theirs:
        raise UserError(f"{_told(field, theirs, ours)}: a student inherits at most its teacher's width, lower it")
    if ours < theirs and how.width is None:
        raise UserError(f"{_told(field, theirs, ours)}, and width is None: choose most_active or first_units")


def _check_groups(teacher: Sizes, student: Sizes) -> None:
    theirs, ours = teacher.N // teacher.K, student.N // student.K
    if ours > theirs:
        fitting = [k for k in range(1, teacher.K + 1) if student.N % k == 0 and student.N // k <= theirs]
        way = f"kv_heads={fitting[0]}" if fitting else f"heads={student.K * theirs}"
        raise UserError(
            f"{_told('heads / kv_heads', theirs, ours)}: at most {theirs} query heads can share a key head of the "
            f"teacher, give the student {way}"
        )


def inherit(
    teacher: DecoderConfig,
    teacher_params: nnx.State,
    student: DecoderConfig,
    student_params: nnx.State,
    how: Inherit,
    calibration: Iterable[Tokens] = (),
    sharding: Sharding = Sharding(),
    tokens: int | None = None,
) -> nnx.State:
    """The student's starting weights, placed and typed as `student_params`, the values of what is not inherited.

    Args:
        teacher: config of the weights that are taken, and `teacher_params`.
        student: config of the student, and `student_params`, its own initial weights.
        how: what is taken.
        calibration: batches (tokens_BT, positions_BT, segments_BT) of one shape, read when `how.needs_calibration`.
        sharding: where arrays live on the mesh that is set.
        tokens: as in `check`. Rows that the teacher does not have start at 0.

    Raises UserError for what `check` refuses, and for a missing calibration.
    """
    check(teacher, student, how, tokens)
    measured = measure(teacher, teacher_params, calibration, sharding) if how.needs_calibration else None
    layers = how.chosen_layers(teacher, student, None if measured is None else measured.influence_L)
    scores = (how.width or first_units)(teacher, measured)
    units = {letter: jnp.asarray(kept) for letter, kept in kept_units(teacher, student, scores, layers).items()}
    outer = tuple(outer_weights(student)) if how.embeddings else ()
    theirs = _by_name(teacher_params)
    theirs.setdefault("head_VD", theirs["embedding_VD"])
    sources = {name: theirs[name] for name in (*outer, *(layer_weights(student) if layers else ()))}
    taken = _take(student, sharding, sources, units)
    return jax.tree_util.tree_map_with_path(lambda path, own: taken.get(_name(path), own), student_params)


@partial(jax.jit, static_argnums=(0, 1))
def _take(student: DecoderConfig, sharding: Sharding, sources: dict, units: dict) -> dict:
    """The kept units of every source; of the layers' weights one layer at a time, so that only one is ever whole."""
    whole = {letter: kept for letter, kept in units.items() if letter == "D"}
    by_layer = {letter: kept for letter, kept in units.items() if letter != "D"}
    taken = {}
    for name, source in sources.items():
        letters = suffix(name)
        if letters[0] == "L":
            value = jax.lax.map(partial(_layer, sharding, source, letters[1:], whole), by_layer)
        else:
            value = _rows(student, letters, _kept(placed(source, P()), letters, whole))
        taken[name] = placed(value.astype(student.weights_dtype), sharding.weight(letters))
    return taken


def _layer(sharding: Sharding, source: jax.Array, letters: str, whole: Units, kept: Units) -> jax.Array:
    layer = placed(source[kept["L"]], P())
    return placed(_kept(layer, letters, whole | kept), sharding.weight(letters))


def _kept(weight: jax.Array, letters: str, kept: Units) -> jax.Array:
    """The kept units of a weight; indices [experts, units] belong to an axis behind that of the experts."""
    for axis, letter in enumerate(letters):
        indices = kept.get(letter)
        if indices is not None and indices.ndim == 2:
            weight = jax.vmap(partial(jnp.take, axis=axis - 1))(weight, indices)
        elif indices is not None:
            weight = jnp.take(weight, indices, axis=axis)
    return weight


def _rows(student: DecoderConfig, letters: str, weight: jax.Array) -> jax.Array:
    """As many rows as the student has: the first positions, and the true vocabulary above padding of its own."""
    if letters[0] == "T":
        return weight[: student.max_length]
    if letters[0] != "V" or len(weight) == student.sizes.V:
        return weight
    true_VD = weight[: student.vocab_size]
    return jnp.pad(true_VD, ((0, student.sizes.V - len(true_VD)), (0, 0)))


def _by_name(params: nnx.State) -> dict[str, jax.Array]:
    return {_name(path): array for path, array in jax.tree_util.tree_leaves_with_path(params)}


def _name(path: tuple) -> str:
    return next(part.key for part in reversed(path) if hasattr(part, "key"))
