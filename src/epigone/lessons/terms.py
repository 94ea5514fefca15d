"""What divergences sum over the vocabulary: terms that are never negative, with their exact derivatives.

Notation: P and S are teacher and student, r = log P - log S. Terms and slopes are functions of log S and log P,
[..., V].

How rounding is kept out: low-precision logits are first rounded to what they claim to be and widened to float32;
logits / T is floored at -1e9, so that -inf (a masked entry) means probability 0 and nothing becomes NaN; each term is
that of distributions which need not sum to 1 (a KL has p r - p + q), in which the error of both log-normalisers cancels
to second order. Derivatives are written out, so that they are exactly 0 at r = 0: left to itself, a fused multiply-add
would leave 1e-9 there, and exp, compiled twice, may differ in its last bit.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from epigone.errors import UserError

FLOOR = -1e9


def widened(x: jax.Array) -> jax.Array:
    """In float32 (float64 stays), rounded to what the narrower type claims to be."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if wide.dtype != x.dtype:
        # XLA may skip the rounding of an intermediate bfloat16 on one side only; then identical numbers would differ.
        info = jnp.finfo(x.dtype)
        wide = jax.lax.reduce_precision(wide, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    return wide


def floored(logits: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """logits / temperature in float32 (float64 for float64 logits), at least -1e9."""
    wide = widened(logits)
    plain = isinstance(temperature, int | float) and temperature == 1.0
    return _floored(wide if plain else wide / temperature)


@jax.custom_jvp
def _floored(x: jax.Array) -> jax.Array:
    return jnp.where(x < FLOOR, FLOOR, x)


@_floored.defjvp
def _floored_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """From the result, and not from x, which a loop would have to copy before it writes the gradient over it."""
    floored = _floored(*primals)
    return floored, jnp.where(floored == FLOOR, 0.0, 1.0) * tangents[0]


Normaliser = tuple[jax.Array, jax.Array]
"""The largest logit, and log sum exp(logit - largest): [..., 1] each."""


def normaliser(logits: jax.Array, vocab_axis: str | None) -> Normaliser:
    """Of each row, also where V is cut over a mesh axis; a constant for derivatives."""
    logits = jax.lax.stop_gradient(logits)
    top = jnp.max(logits, axis=-1, keepdims=True)
    top = top if vocab_axis is None else jax.lax.pmax(top, vocab_axis)
    return top, jnp.log(summed(jnp.exp(logits - top), vocab_axis)[..., None])


def log_softmax(logits: jax.Array, normal: Normaliser) -> jax.Array:
    """log softmax [..., V] of logits with this normaliser."""
    return (logits - normal[0]) - normal[1]


def check(student: jax.Array, teacher: jax.Array, temperature: float | jax.Array) -> None:
    """Raises UserError for a temperature that is not positive, and for two vocabularies."""
    if isinstance(temperature, int | float) and not temperature > 0.0:
        raise UserError(f"temperature={temperature}: logits are divided by it, it must be positive")
    if student.shape[-1] != teacher.shape[-1]:
        raise UserError(
            f"teacher logits have {teacher.shape[-1]} entries a token, student logits {student.shape[-1]}: "
            "a divergence needs one vocabulary"
        )


def on_cut_rows(divergence: Callable[..., jax.Array], vocab_axis: str | None) -> Callable[..., jax.Array]:
    """A divergence of logits whose V is cut over a mesh axis; one that knows nothing of it is given whole rows."""
    if vocab_axis is None:
        return divergence
    if "vocab_axis" in inspect.signature(divergence).parameters:
        return partial(divergence, vocab_axis=vocab_axis)

    def gathered(student_BTV: jax.Array, teacher_BTV: jax.Array, **given: Any) -> jax.Array:
        rows = (jax.lax.all_gather(x, vocab_axis, axis=2, tiled=True) for x in (student_BTV, teacher_BTV))
        return jax.lax.pmean(divergence(*rows, **given), vocab_axis)

    return gathered


def summed(terms_BTV: jax.Array, vocab_axis: str | None) -> jax.Array:
    """Over V, [..., V] -> [...]."""
    total_BT = jnp.sum(terms_BTV, axis=-1)
    return total_BT if vocab_axis is None else jax.lax.psum(total_BT, vocab_axis)


_Function = Callable[..., jax.Array]


class Terms(NamedTuple):
    """A divergence as a sum over the vocabulary. Functions of (log S, log P, more) that give [..., V].

    Attributes:
        value: the terms.
        student: their derivative by log S.
        teacher: their derivative by log P.
        balanced: which of the two derivatives sum to 0 over the vocabulary.
    """

    value: _Function
    student: _Function
    teacher: _Function
    balanced: tuple[bool, bool] = (False, False)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def summed_terms(terms: Terms, vocab_axis: str | None, student: jax.Array, teacher: jax.Array, more: Any) -> jax.Array:
    """The sum [...] of terms of log softmax(student) and log softmax(teacher) [..., V]; `more` is constant."""
    log_s, log_p = (log_softmax(logits, normaliser(logits, vocab_axis)) for logits in (student, teacher))
    return summed(terms.value(log_s, log_p, more), vocab_axis)


@partial(summed_terms.defjvp, symbolic_zeros=True)
def _summed_terms_jvp(terms: Terms, vocab_axis: str | None, primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    *logits, more = primals
    log_s, log_p = logs = [log_softmax(x, normaliser(x, vocab_axis)) for x in logits]
    value = summed(terms.value(log_s, log_p, more), vocab_axis)
    change = jnp.zeros_like(value)
    for side, slope in enumerate((terms.student, terms.teacher)):
        if isinstance(tangents[side], SymbolicZero):
            continue
        # d/d logits = slope - softmax * (sum of slopes).
        by_logits = slope(log_s, log_p, more)
        if not terms.balanced[side]:
            by_logits -= jnp.exp(logs[side]) * summed(by_logits, vocab_axis)[..., None]
        change += summed(by_logits * tangents[side], vocab_axis)
    return value, change


def total(
    terms: Terms,
    student: jax.Array,
    teacher: jax.Array,
    temperature: float | jax.Array,
    temperature_squared: bool,
    vocab_axis: str | None,
    more: Any = None,
) -> jax.Array:
    """The sum of terms over V, never negative, times T^2 if asked for. Raises UserError as `check` does."""
    check(student, teacher, temperature)
    scaled = [floored(logits, temperature) for logits in (student, teacher)]
    total_BT = summed_terms(terms, vocab_axis, *scaled, more)
    # Rounding may leave -1e-9. The clamp is not differentiated: the gradient must not vanish with it.
    total_BT += jax.lax.stop_gradient(jnp.maximum(total_BT, 0.0) - total_BT)
    return total_BT * temperature**2 if temperature_squared else total_BT


def difference_of(x: jax.Array, y: jax.Array) -> jax.Array:
    """x - y, which is 0 at x = y by decree: what is subtracted may be a product that is rounded on one side only."""
    return jnp.where(x == y, 0.0, x - y)


def difference(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """p - q, which is 0 at log p = log q by decree."""
    return jnp.where(log_p == log_q, 0.0, jnp.exp(log_p) - jnp.exp(log_q))


def kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """p log(p / q) - p + q."""
    return jnp.exp(log_p) * (log_p - log_q) + difference(log_q, log_p)


def kl_by_first(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Derivative of `kl` by log p."""
    return jnp.exp(log_p) * (log_p - log_q)


FORWARD_KL = Terms(
    lambda s, p, _: kl(p, s), lambda s, p, _: difference(s, p), lambda s, p, _: kl_by_first(p, s), (True, False)
)
REVERSE_KL = Terms(
    lambda s, p, _: kl(s, p), lambda s, p, _: kl_by_first(s, p), lambda s, p, _: difference(p, s), (False, True)
)


def _apart(value: _Function, student: _Function, teacher: _Function) -> Terms:
    """Terms of these, 0 at log S = log P by decree.

    On a CPU it counts that this is their last step: a sum takes ten times as long where XLA leaves it some products.
    """

    def one(function: _Function) -> _Function:
        return lambda s, p, more: jnp.where(s == p, 0.0, function(s, p, more))

    return Terms(one(value), one(student), one(teacher))


MIXED_KL = _apart(
    lambda s, p, w: (1.0 - w) * kl(p, s) + w * kl(s, p),
    lambda s, p, w: (1.0 - w) * difference(s, p) + w * kl_by_first(s, p),
    lambda s, p, w: (1.0 - w) * kl_by_first(p, s) + w * difference(p, s),
)
"""(1 - w) KL(P || S) + w KL(S || P), with w in `more`."""

TOTAL_VARIATION = _apart(
    lambda s, p, _: 0.5 * jnp.abs(difference(p, s)),
    lambda s, p, _: 0.5 * jnp.sign(difference(s, p)) * jnp.exp(s),
    lambda s, p, _: 0.5 * jnp.sign(difference(p, s)) * jnp.exp(p),
)


def jsd_terms(beta: float) -> Terms:
    """beta P log(P / M) + (1 - beta) S log(S / M), M = beta P + (1 - beta) S, beta inside (0, 1).

    The derivative through M cancels: by log S it is (1 - beta) S log(S / M), by log P beta P log(P / M).
    """

    def of_student(s: jax.Array, p: jax.Array, _: Any) -> jax.Array:
        return (1.0 - beta) * jnp.exp(s) * _log_over_mixture(beta, p - s)[0]

    def of_teacher(s: jax.Array, p: jax.Array, _: Any) -> jax.Array:
        return beta * jnp.exp(p) * _log_over_mixture(beta, p - s)[1]

    return _apart(lambda *given: of_student(*given) + of_teacher(*given), of_student, of_teacher)


def skew_terms(alpha: float, forward: bool) -> Terms:
    """p log(p / m) - p + m, m = alpha p + (1 - alpha) q, alpha inside (0, 1); p is the teacher's if `forward`.

    By log p: p log(p / m) + alpha (1 - alpha) p (q - p) / m; by log q: (1 - alpha)^2 q (q - p) / m.
    """

    def value(p: jax.Array, q: jax.Array) -> jax.Array:
        return jnp.exp(p) * _log_over_mixture(alpha, p - q)[1] + (1.0 - alpha) * difference(q, p)

    def pull(p: jax.Array, q: jax.Array) -> jax.Array:
        q_over_m, p_over_m = _log_over_mixture(alpha, p - q)
        return (1.0 - alpha) * difference(q_over_m, p_over_m)

    def by_p(p: jax.Array, q: jax.Array) -> jax.Array:
        return jnp.exp(p) * (_log_over_mixture(alpha, p - q)[1] + alpha * pull(p, q))

    def by_q(p: jax.Array, q: jax.Array) -> jax.Array:
        return (1.0 - alpha) * jnp.exp(q) * pull(p, q)

    if forward:
        return _apart(lambda s, p, _: value(p, s), lambda s, p, _: by_q(p, s), lambda s, p, _: by_p(p, s))
    return _apart(lambda s, p, _: value(s, p), lambda s, p, _: by_p(s, p), lambda s, p, _: by_q(s, p))


def _log_over_mixture(beta: float, r: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log S/M and log P/M from r = log P - log S; no overflow at any r."""
    larger_over_m = -jnp.log1p(jnp.where(r > 0, 1.0 - beta, beta) * jnp.expm1(-jnp.abs(r)))
    smaller_over_m = larger_over_m - jnp.abs(r)
    return jnp.where(r > 0, smaller_over_m, larger_over_m), jnp.where(r > 0, larger_over_m, smaller_over_m)


def alpha_beta_terms(alpha: float, beta: float) -> Terms:
    """(a P^(alpha + beta) + b S^(alpha + beta) - P^alpha S^beta) / (alpha beta), a = alpha / (alpha + beta), b = 1 - a.

    Where alpha or beta is 0 it is the limit. Young's inequality makes it never negative. By log P:
    (P^(alpha + beta) - P^alpha S^beta) / beta; by log S: (S^(alpha + beta) - P^alpha S^beta) / alpha.
    """
    power = alpha + beta

    def value(s: jax.Array, p: jax.Array, _: Any) -> jax.Array:
        # From the larger power: larger^(alpha + beta) * bracket(share of the other), and nothing overflows.
        z = -jnp.abs(power * (p - s))
        brackets = jnp.where(p > s, _bracket(beta / power, z), _bracket(alpha / power, z))
        return jnp.exp(power * jnp.maximum(p, s)) * brackets / power**2

    def slope(own: jax.Array, other: jax.Array, k: float, mixed: jax.Array) -> jax.Array:
        rest = _expm1_over(k, -jnp.abs(own - other))
        return jnp.where(own > other, -jnp.exp(power * own), mixed) * rest

    def by_student(s: jax.Array, p: jax.Array, _: Any) -> jax.Array:
        return slope(s, p, alpha, jnp.exp(alpha * p + beta * s))

    def by_teacher(s: jax.Array, p: jax.Array, _: Any) -> jax.Array:
        return slope(p, s, beta, jnp.exp(alpha * p + beta * s))

    return _apart(value, by_student, by_teacher)


def _bracket(share: float, z: jax.Array) -> jax.Array:
    """(1 - share + share e^z - e^(share z)) / (share (1 - share)) for z <= 0, or its limit at share 0 or 1."""
    if share <= 0.5:
        return (jnp.expm1(z) - _expm1_over(share, z)) / (1.0 - share)
    rest = 1.0 - share
    return (jnp.exp(share * z) * _expm1_over(rest, z) - jnp.expm1(z)) / share


def _expm1_over(k: float, z: jax.Array) -> jax.Array:
    """(e^(k z) - 1) / k, which is z at k = 0."""
    return jnp.expm1(k * z) / k if k else z


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def chosen_log_prob(vocab_axis: str | None, logits: jax.Array, targets: jax.Array) -> jax.Array:
    """log softmax(logits)[target] [...], by a masked sum: a vocabulary that is cut over devices stays where it is."""
    hits = jnp.where(_is_target(vocab_axis, logits, targets), logits, 0.0)
    top, rest = normaliser(logits, vocab_axis)
    return summed(hits, vocab_axis) - top[..., 0] - rest[..., 0]


@chosen_log_prob.defjvp
def _chosen_log_prob_jvp(vocab_axis: str | None, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    logits, targets = primals
    softmax = jnp.exp(log_softmax(logits, normaliser(logits, vocab_axis)))
    by_logits = _is_target(vocab_axis, logits, targets) - softmax
    return chosen_log_prob(vocab_axis, logits, targets), summed(by_logits * tangents[0], vocab_axis)


def _is_target(vocab_axis: str | None, logits: jax.Array, targets: jax.Array) -> jax.Array:
    V, axes = logits.shape[-1], targets.ndim
    places = jax.lax.broadcasted_iota(targets.dtype, (1,) * axes + (V,), axes)
    if vocab_axis is not None:
        places += jax.lax.axis_index(vocab_axis) * V
    return places == targets[..., None]
