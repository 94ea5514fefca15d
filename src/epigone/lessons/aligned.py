"""The loss of a student beside a teacher that reads other tokens, for the objectives of `alignment`.

What is compared position by position is one fused pass over the student's logits, with the teacher's states gathered at
the student's positions. A loss of chunks needs the log-probabilities of all their tokens first; then the student's
gradient is that of one more pass. No array [tokens, vocabulary] is made.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from epigone.lessons.alignment import NO_TEXT, by_position
from epigone.lessons.chunks import Mesh, placed
from epigone.lessons.divergences import cross_entropy
from epigone.lessons.fused import fused_loss, per_token
from epigone.lessons.heads import Beside, Head, Hidden, read, states_of
from epigone.lessons.objective import Objective
from epigone.lessons.terms import chosen_log_prob, floored, on_cut_rows

UNREAD = -2
"""In `Aligned.match_BT`: a position behind what the teacher has read."""


class Aligned(NamedTuple):
    """What a teacher gives for rows of its own, [B, U], and how they lie beside the student's, [B, T].

    Attributes:
        given: hidden states and its head, or logits [B, U, W].
        targets_BU: its next tokens.
        match_BT: for each position of the student that of the teacher which has read the same bytes, -1, or UNREAD.
        chunk_BT: the chunk of the row in which the target lies, 0 to T - 1; -1 for none.
        chunk_BU: the same of the teacher's targets.
        ids_V: for each id of the student the teacher's of the same bytes, -1 for none, NO_TEXT for what is no text.
    """

    given: Any
    targets_BU: jax.Array
    match_BT: jax.Array
    chunk_BT: jax.Array
    chunk_BU: jax.Array
    ids_V: jax.Array


def aligned_loss(
    objective: Objective,
    student: Hidden,
    teacher: Aligned,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    heads: tuple[Head | None, ...],
    mesh: Mesh = Mesh(),
    chunk: int | None = None,
    knobs: Any = None,
) -> tuple[Float[Array, ""], None]:
    """sum_bt weights_bt ((1 - hard_weight) soft_bt + hard_weight cross_entropy_bt), with the gradient of the student.

    soft_bt is that of the objective's divergence where the teacher has read the same bytes. Of chunks the sum is over
    chunks, and each counts with the least weight of its tokens.

    Args: those of `fused_loss`; heads of student and teacher. Makes no array [tokens, vocabulary].
    """
    how: dict[str, Any] = {"mesh": mesh, "chunk": chunk}
    if by_position(objective.divergence):
        counts_BT = (teacher.match_BT >= 0).astype(jnp.float32)
        beside = Beside(_at(mesh, teacher.given, teacher.match_BT), counts_BT)
        ids_V = jnp.pad(teacher.ids_V, (0, student.weight_VD.shape[0] - len(teacher.ids_V)), constant_values=NO_TEXT)
        loss, given = partial(_position_loss, objective), (student, beside, targets_BT, weights_BT)
        return fused_loss(loss, *given, heads=heads, knobs=(knobs, ids_V), **how)[0], None
    return _chunk_loss(objective, student, teacher, targets_BT, weights_BT, heads, knobs, how), None


def _numbers(objective: Objective, knobs: Any) -> tuple[Any, Any]:
    return knobs if knobs is not None else (objective.temperature, objective.hard_weight)


def _position_loss(
    objective: Objective,
    student_logits_BTV: jax.Array,
    teacher: Beside,
    targets_BT: jax.Array,
    vocab_axis: str | None = None,
    knobs: Any = None,
) -> jax.Array:
    """Of the logits of some tokens, as `Objective.loss`."""
    (temperature, hard_weight), ids_V = _numbers(objective, knobs[0]), knobs[1]
    divergence: Callable[..., Any] = objective.divergence
    if "ids_V" in inspect.signature(divergence).parameters:
        divergence = partial(divergence, ids_V=ids_V)
    soft_BT = on_cut_rows(divergence, vocab_axis)(
        student_logits_BTV, teacher.given, temperature=temperature, temperature_squared=objective.temperature_squared
    )
    soft_BT = soft_BT * teacher.counts_BT
    if knobs[0] is None and hard_weight == 0.0:
        return soft_BT
    hard_BT = cross_entropy(student_logits_BTV, targets_BT, vocab_axis=vocab_axis)
    return (1.0 - hard_weight) * soft_BT + hard_weight * hard_BT


def _at(mesh: Mesh, given: Any, match_BT: jax.Array) -> Any:
    """Hidden states or logits [B, U, ...] of a teacher at the student's positions, [B, T, ...]."""

    def take(x_BUD: jax.Array, match_BT: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BUD, jnp.maximum(match_BT, 0)[..., None], axis=1)

    states_BTD = _by_rows(mesh, take, states_of(given), match_BT)
    return given._replace(hidden_BTD=states_BTD) if isinstance(given, Hidden) else states_BTD


def _by_rows(mesh: Mesh, function: Callable[..., Any], *rows: jax.Array, out: Any = None) -> Any:
    """A function of whole rows [B, ...], on every device for its own."""
    spec: Any = P(mesh.batch or None)
    mesh, rows = placed(mesh, rows, (spec,) * len(rows))
    if mesh == Mesh():
        return function(*rows)
    return jax.shard_map(function, in_specs=(spec,) * len(rows), out_specs=spec if out is None else out)(*rows)


def _chunk_loss(
    objective: Objective,
    student: Hidden,
    teacher: Aligned,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    heads: tuple[Head | None, ...],
    knobs: Any,
    how: dict[str, Any],
) -> jax.Array:
    """Log-probabilities of both, chunks of them, and the student's gradient by one more pass over its logits.

    What a loss of chunks asks of each token's log-probability is known once all are: it is the weight with which that
    token's own gradient is taken.
    """
    mesh, (temperature, hard_weight) = how["mesh"], _numbers(objective, knobs)
    measure = partial(_log_prob, temperature if knobs is None else None)
    still = jax.tree.map(jax.lax.stop_gradient, (student, teacher))
    log_s_BT = per_token(measure, still[0], None, targets_BT, heads=heads[:1], knobs=knobs, **how)
    log_p_BU = _teacher_log_probs(measure, still[1], heads[1], knobs, how)

    def local(log_s_BT: jax.Array, log_p_BU: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array]:
        total, slope_BT = jax.value_and_grad(partial(_of_chunks, objective.divergence))(log_s_BT, log_p_BU, *rest)
        return (jax.lax.psum(total, mesh.batch) if _is_cut(mesh) else total), slope_BT

    rows = (log_s_BT, log_p_BU, weights_BT, teacher.chunk_BT, teacher.chunk_BU)
    soft, slope_BT = _by_rows(mesh, local, *rows, out=(P(), P(mesh.batch or None)))
    scale = (1.0 - hard_weight) * (temperature**2 if objective.temperature_squared else 1.0)
    negative = partial(_negative, measure)
    pull = fused_loss(negative, student, None, targets_BT, -scale * slope_BT, heads=heads[:1], knobs=knobs, **how)[0]
    total = scale * soft + pull - jax.lax.stop_gradient(pull)
    if not callable(objective.hard_weight) and objective.hard_weight == 0.0:
        return total
    plain = partial(_negative, partial(_log_prob, 1.0))
    hard = fused_loss(plain, student, None, targets_BT, weights_BT, heads=heads[:1], **how)[0]
    return total + hard_weight * hard


def _is_cut(mesh: Mesh) -> bool:
    return bool(mesh.batch) and not jax.sharding.get_abstract_mesh().empty


def _log_prob(
    temperature: float | None,
    logits_BTV: jax.Array,
    _: Any,
    targets_BT: jax.Array,
    vocab_axis: str | None = None,
    knobs: Any = None,
) -> jax.Array:
    """log softmax(logits / T)[target], T among the knobs if it is None."""
    scaled_BTV = floored(logits_BTV, knobs[0] if temperature is None else temperature)
    return chosen_log_prob(vocab_axis, scaled_BTV, targets_BT)


def _negative(measure: Callable[..., jax.Array], *given: Any, **more: Any) -> jax.Array:
    return -measure(*given, **more)


def _teacher_log_probs(
    measure: Callable[..., jax.Array], teacher: Aligned, head: Head | None, knobs: Any, how: dict[str, Any]
) -> jax.Array:
    """Of the teacher's own next tokens [B, U]."""
    if isinstance(teacher.given, Hidden):
        return per_token(measure, teacher.given, None, teacher.targets_BU, heads=(head,), knobs=knobs, **how)

    def local(logits_BUW: jax.Array, targets_BU: jax.Array) -> jax.Array:
        return measure(read(logits_BUW, None, head or Head(), None), None, targets_BU, knobs=knobs)

    return _by_rows(how["mesh"], local, teacher.given, teacher.targets_BU)


def _of_chunks(
    divergence: Callable[..., jax.Array],
    log_s_BT: jax.Array,
    log_p_BU: jax.Array,
    weights_BT: jax.Array,
    chunk_BT: jax.Array,
    chunk_BU: jax.Array,
) -> jax.Array:
    """The sum over the chunks of these rows of weight and divergence."""
    T = chunk_BT.shape[1]

    def slots(chunk_BX: jax.Array) -> jax.Array:
        return jnp.where(chunk_BX < 0, T, chunk_BX)

    sums = jax.vmap(lambda x, c: jax.ops.segment_sum(x, c, T + 1)[:T])
    least = jax.vmap(lambda x, c: jax.ops.segment_min(x, c, T + 1)[:T])
    there_BT = sums(jnp.ones_like(log_s_BT), slots(chunk_BT)) > 0
    # No chunk: any log-likelihood that is finite, and no weight.
    log_s, log_p = (
        jnp.where(there_BT, sums(x, slots(c)), -1.0) for x, c in ((log_s_BT, chunk_BT), (log_p_BU, chunk_BU))
    )
    weight_BT = jnp.where(there_BT, least(weights_BT, slots(chunk_BT)), 0.0)
    return jnp.sum(weight_BT * divergence(log_s, log_p))


def aligned_sums(teacher: Aligned, weights_BT: Float[Array, "B T"]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Sums and counts, by weight: the shares of tokens at aligned positions, in aligned chunks, and not read at all."""
    shares = {
        "aligned_positions": teacher.match_BT >= 0,
        "aligned_chunks": teacher.chunk_BT >= 0,
        "unread": teacher.match_BT == UNREAD,
    }
    return {name: (jnp.sum(there_BT * weights_BT), jnp.sum(weights_BT)) for name, there_BT in shares.items()}
