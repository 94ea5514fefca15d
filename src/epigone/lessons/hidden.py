"""What is inside a student held against what is inside its teacher: pure functions, one number a token.

Notation: s and t are states of one token in one layer of student and teacher, D and E features wide. A projection W
[D, E] is learned beside the student and forgotten with the training. All give [B, T], float32 (float64 for float64
states), neither weighted nor averaged, and a teacher's states are constants.

| function        | per token                                                                        | source      |
|-----------------|----------------------------------------------------------------------------------|-------------|
| `hidden_mse`    | mean over E of (s W - t)^2, as they are                                          | Romero 2015 |
| `hidden_cosine` | 1 - cos(s W, t)                                                                  | Sanh 2019   |
| `relation_kl`   | mean over heads of KL(softmax of the teacher's relations, that of the student's) | Wang 2021   |
| `info_nce`      | -log softmax over tokens j of cos(s W, t_j W') / temperature, at j = the token   | Tian 2020   |

Relations and contrast are of tokens of one row, so that the number of a token depends on no other row: not on
micro-batches and not on devices. Relations stay within a segment and see what is before, so packing changes nothing
either; the contrast is with all tokens of the row, those of other segments too, padding (segment 0) excepted.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epigone.errors import UserError
from epigone.lessons.chunks import parts
from epigone.lessons.terms import FLOOR, FORWARD_KL, difference_of, total, widened

SCORES_BYTES = 2**27
"""Bytes of the scores of all pairs of tokens that are made at once, for each of the two models."""

SHORTEST = 1e-12
"""Added to the squared length of a vector that is divided by its length: that of zero has a finite gradient."""


def hidden_mse(
    student_BTD: Float[Array, "B T D"],
    teacher_BTE: Float[Array, "B T E"],
    projection_DE: Float[Array, "D E"] | None = None,
) -> Float[Array, "B T"]:
    """1/E sum_e ((s W)_e - t_e)^2: the hint of FitNets (Romero et al. 2015, eq. 3), and TinyBERT's (Jiao et al. 2020).

    States are taken as they are, at their own scale; without a projection both must have one width.
    """
    difference_BTE = difference_of(*_aligned(student_BTD, teacher_BTE, projection_DE))
    return jnp.mean(difference_BTE**2, axis=-1)


def hidden_cosine(
    student_BTD: Float[Array, "B T D"],
    teacher_BTE: Float[Array, "B T E"],
    projection_DE: Float[Array, "D E"] | None = None,
) -> Float[Array, "B T"]:
    """1 - cos(s W, t), from 0 to 2: directions alone (Sanh et al. 2019, DistilBERT, whose W is the identity).

    It is computed as half of |s W / |s W| - t / |t||^2, which is exactly 0 for equal states. A vector that is zero has
    no direction, and counts 1/2 against any other.
    """
    aligned = _aligned(student_BTD, teacher_BTE, projection_DE)
    return 0.5 * jnp.sum(difference_of(*map(_unit, aligned)) ** 2, axis=-1)


def relation_kl(
    student: tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]],
    teacher: tuple[Float[Array, "B T n h"], Float[Array, "B T k h"]],
    segments_BT: Int[Array, "B T"],
    relation_heads: int | None = None,
) -> Float[Array, "B T"]:
    """1/R sum_r KL(P_rt, S_rt), with P_rt = softmax over u of a_tr b_ur / sqrt(features of a relation head).

    `student` and `teacher` are (a, b): twice the queries, twice the keys or twice the values for the relations of
    MiniLMv2 (Wang et al. 2021, eqs. 5 to 7), queries and keys for the attention distributions of MiniLM (Wang et al.
    2020, eq. 3). The features of all heads are divided anew into R `relation_heads`, so student and teacher may differ
    in heads and sizes; None keeps their own heads, which must then be as many. Where b has fewer heads than a, each
    serves its group of a's, as in grouped attention.

    Here models are causal: u is t or before it, in t's segment. Neither a window of the attention, nor its soft cap or
    a scale of its own counts. No array [B, R, T, T] is made where it is larger than SCORES_BYTES.

    Raises UserError where heads do not fit.
    """
    pairs = [_related(*pair, relation_heads) for pair in (student, jax.lax.stop_gradient(teacher))]
    heads = [left.shape[2] for left, _ in pairs]
    if heads[0] != heads[1]:
        raise UserError(
            f"relations of {heads[0]} heads of the student and {heads[1]} of the teacher: set relation_heads to a "
            "divisor of the features of both"
        )
    (s_left, s_right), (t_left, t_right) = pairs
    steps_S = jnp.arange(segments_BT.shape[1])

    def rows(steps_C: jax.Array, segments_BC: jax.Array, s_BCRH: jax.Array, t_BCRH: jax.Array) -> jax.Array:
        seen_BCS = (segments_BC[:, :, None] == segments_BT[:, None, :]) & (steps_S <= steps_C[:, None])
        student, teacher = _scores(s_BCRH, s_right, seen_BCS), _scores(t_BCRH, t_right, seen_BCS)
        return jnp.mean(total(FORWARD_KL, student, teacher, 1.0, False, None), axis=1)

    return _by_rows(rows, heads[0], segments_BT, s_left, t_left)


def info_nce(
    student_BTD: Float[Array, "B T D"],
    teacher_BTE: Float[Array, "B T E"],
    student_DC: Float[Array, "D C"],
    teacher_EC: Float[Array, "E C"],
    segments_BT: Int[Array, "B T"],
    temperature: float = 0.07,
    negatives: int | None = None,
) -> Float[Array, "B T"]:
    """-log(exp(u_t v_t / T) / sum_j exp(u_t v_j / T)), u and v being s W and t W' divided by their lengths.

    Contrastive representation distillation (Tian et al. 2020) with the loss of van den Oord et al. 2018 (InfoNCE) in
    place of its noise-contrastive one, whose negatives come from a memory of the whole data set. Here j runs over the
    tokens of the same row: all that are no padding, or the token itself and the nearest `negatives` on either side of
    it. Both projections are learned, the teacher's states are constants. At least 0; two equal models do not reach it.

    Raises UserError for a temperature that is not positive.
    """
    if not temperature > 0.0:
        raise UserError(f"temperature={temperature}: similarities are divided by it, it must be positive")
    u_BTC = _unit(projected(student_BTD, student_DC))
    v_BSC = _unit(projected(jax.lax.stop_gradient(teacher_BTE), teacher_EC))
    steps_S, real_BS = jnp.arange(segments_BT.shape[1]), segments_BT > 0

    def rows(steps_C: jax.Array, u_BCC: jax.Array) -> jax.Array:
        apart_CS = jnp.abs(steps_S - steps_C[:, None])
        near_CS = apart_CS <= (steps_S.size if negatives is None else negatives)
        scores_BCS = jnp.einsum("bcd,bsd->bcs", u_BCC, v_BSC) / temperature
        own_BC1 = jnp.sum(jnp.where(apart_CS == 0, scores_BCS, 0.0), axis=-1, keepdims=True)
        beside_BCS = jnp.where(near_CS & real_BS[:, None], scores_BCS - own_BC1, FLOOR)
        return jax.nn.logsumexp(jnp.where(apart_CS == 0, 0.0, beside_BCS), axis=-1)

    return _by_rows(rows, 1, u_BTC)


def projected(states_BTD: Float[Array, "B T D"], weight_DE: Float[Array, "D E"] | None) -> Float[Array, "B T E"]:
    """s W in float32, W in the type of the states; without a projection the states themselves."""
    if weight_DE is None:
        return widened(states_BTD)
    wide = jnp.promote_types(states_BTD.dtype, jnp.float32)
    return jnp.einsum("btd,de->bte", states_BTD, weight_DE.astype(states_BTD.dtype), preferred_element_type=wide)


def _aligned(student_BTD: jax.Array, teacher_BTE: jax.Array, projection_DE: Any) -> tuple[jax.Array, jax.Array]:
    """The student's states at the teacher's width, and the teacher's."""
    student_BTE, teacher_BTE = projected(student_BTD, projection_DE), widened(jax.lax.stop_gradient(teacher_BTE))
    if student_BTE.shape[-1] != teacher_BTE.shape[-1]:
        raise UserError(
            f"states of {student_BTE.shape[-1]} and {teacher_BTE.shape[-1]} features are compared: project the "
            "student's to the teacher's width"
        )
    return student_BTE, teacher_BTE


def _unit(x: jax.Array) -> jax.Array:
    """x / |x|."""
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + SHORTEST)


def _related(left_BTNH: jax.Array, right_BTKH: jax.Array, relation_heads: int | None) -> tuple[jax.Array, jax.Array]:
    """Both [B, T, R, H], the left one divided by the root of H."""
    B, T, N, H = left_BTNH.shape
    R = relation_heads or N
    if N * H % R:
        raise UserError(f"relation_heads={R} does not divide the {N} x {H} features of all heads: choose a divisor")
    right_BTNH = jnp.repeat(right_BTKH, N // right_BTKH.shape[2], axis=2)
    left, right = (x.reshape(B, T, R, -1) for x in (left_BTNH, right_BTNH))
    return left * left.shape[-1] ** -0.5, right


def _scores(left_BCRH: jax.Array, right_BSRH: jax.Array, seen_BCS: jax.Array) -> jax.Array:
    """[B, R, C, S], of pairs that do not see each other so low that their probability is 0."""
    wide = jnp.promote_types(left_BCRH.dtype, jnp.float32)
    scores = jnp.einsum("bcrh,bsrh->brcs", left_BCRH, right_BSRH, preferred_element_type=wide)
    return jnp.where(seen_BCS[:, None], scores, FLOOR)


def _by_rows(function: Callable[..., jax.Array], heads: int, *queries: jax.Array) -> jax.Array:
    """function(places [C], queries [B, C, ...]) -> [B, C] of all T queries, as many at once as SCORES_BYTES allow.

    Of several pieces each is computed again in the backward pass, so that the scores of one are kept at a time.
    """
    B, T = queries[0].shape[:2]
    pieces, C = parts(T, SCORES_BYTES // (4 * B * heads * T))
    if pieces == 1:
        return function(jnp.arange(T), *queries)

    def cut(x: jax.Array) -> jax.Array:
        longer = jnp.pad(x, ((0, 0), (0, pieces * C - T), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(longer.reshape(B, pieces, C, *x.shape[2:]), 1, 0)

    again = jax.checkpoint(function, prevent_cse=False)
    steps_PC = jnp.arange(pieces * C).reshape(pieces, C)
    values_PBC = jax.lax.map(lambda part: again(*part), (steps_PC, *map(cut, queries)))
    return jnp.moveaxis(values_PBC, 0, 1).reshape(B, -1)[:, :T]
