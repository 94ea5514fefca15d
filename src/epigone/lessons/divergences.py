"""Divergences between a teacher's and a student's next-token distributions: the conventions, once.

Notation: P and S are teacher and student after a softmax of logits / temperature; r = log P - log S. Every
function is `f(student_logits_BTV, teacher_logits_BTV, *, temperature, temperature_squared)` and gives one float32
per token (float64 for float64 logits), neither masked nor averaged: the caller sums loss * weight and divides by
the sum of all weights. Units are nats.

- Temperature divides both sets of logits. The factor T^2 of Hinton et al. (2015, section 2), which keeps the size of
  the gradient when T changes, is on by default.
- A divergence holds the teacher's entropy: it is 0, with zero gradient, for identical logits.
- `jsd`: beta weighs the teacher in the mixture (Agarwal et al. 2024).

    here         elsewhere
    forward_kl   TRL, Liger, GKD: jsd at beta=0. torchtune ForwardKLLoss, DistiLLM forward_kl and TextBrewer
                 kd_ce_loss are the soft cross-entropy: forward_kl + H(P), the same gradient, another value.
    reverse_kl   TRL, Liger, GKD: jsd at beta=1. MiniLLM: its sequence-level form by policy gradient.
    jsd(beta)    TRL, Liger, ms-swift: the same beta. KDFlow and DistiLLM (lam): 1 - beta. EasyDeL: equal at 0.5 only.
    T^2          on: Tunix, MaxText, EasyDeL, DistillKit, NeMo-Automodel. Off: TRL, Liger, KDFlow, ms-swift, axolotl.

How rounding is kept out: low-precision logits are first rounded to what they claim to be and widened to float32;
logits / T is floored at -1e9, so that -inf (a masked entry) means probability 0 and nothing becomes NaN; each KL is
summed as p r - p + q, a sum of non-negative terms in which the error of both log-normalisers cancels to second
order. Where only one side masks an entry to which the other gives weight, the true value is infinite; here it is
about 1e9 times that weight.
"""

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epigone.errors import UserError

FLOOR = -1e9


class Divergence(Protocol):
    """Per-token divergence [B, T] of logits [B, T, V], in nats."""

    def __call__(
        self,
        student_logits_BTV: Float[Array, "B T V"],
        teacher_logits_BTV: Float[Array, "B T V"],
        *,
        temperature: float = 1.0,
        temperature_squared: bool = True,
    ) -> Float[Array, "B T"]: ...


def forward_kl(
    student_logits_BTV: Float[Array, "B T V"],
    teacher_logits_BTV: Float[Array, "B T V"],
    *,
    temperature: float = 1.0,
    temperature_squared: bool = True,
) -> Float[Array, "B T"]:
    """KL(P || S) = sum_v P (log P - log S), times T^2: covers all that the teacher may say. Hinton et al. 2015.

    Args: logits [B, T, V]. Returns: [B, T] in nats. Raises UserError for a temperature that is not positive.
    """
    log_s, log_p = _log_distributions(student_logits_BTV, teacher_logits_BTV, temperature)
    return _total(_kl_terms(log_p, log_s), temperature, temperature_squared)


def reverse_kl(
    student_logits_BTV: Float[Array, "B T V"],
    teacher_logits_BTV: Float[Array, "B T V"],
    *,
    temperature: float = 1.0,
    temperature_squared: bool = True,
) -> Float[Array, "B T"]:
    """KL(S || P) = sum_v S (log S - log P), times T^2: punishes what the teacher would not say. Gu et al. 2024.

    Args: logits [B, T, V]. Returns: [B, T] in nats. Raises UserError for a temperature that is not positive.
    """
    log_s, log_p = _log_distributions(student_logits_BTV, teacher_logits_BTV, temperature)
    return _total(_kl_terms(log_s, log_p), temperature, temperature_squared)


def jsd(
    student_logits_BTV: Float[Array, "B T V"],
    teacher_logits_BTV: Float[Array, "B T V"],
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_squared: bool = True,
) -> Float[Array, "B T"]:
    """beta KL(P || M) + (1 - beta) KL(S || M), M = beta P + (1 - beta) S, times T^2. Agarwal et al. 2024, eq. 1.

    beta=0 means forward_kl and beta=1 means reverse_kl: the limits of jsd / (beta (1 - beta)). jsd itself tends to 0
    at both ends, so its value jumps there (its direction does not).

    Args: logits [B, T, V]; beta in [0, 1], a Python number. Returns: [B, T] in nats.
    Raises: UserError for a beta outside [0, 1] or a temperature that is not positive.
    """
    if not 0.0 <= beta <= 1.0:
        raise UserError(f"jsd: beta={beta} is outside [0, 1] (0 is forward KL, 1 is reverse KL, 0.5 is symmetric)")
    if beta in (0.0, 1.0):
        end = forward_kl if beta == 0.0 else reverse_kl
        return end(
            student_logits_BTV, teacher_logits_BTV, temperature=temperature, temperature_squared=temperature_squared
        )
    log_s, log_p = _log_distributions(student_logits_BTV, teacher_logits_BTV, temperature)
    return _total(_jsd_terms(beta, log_s, log_p), temperature, temperature_squared)


def cross_entropy(logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """-log softmax(logits)[target] in nats: [B, T], float32 (float64 for float64 logits), unreduced."""
    logits_BTV = _floored(logits_BTV, 1.0)
    # A masked sum instead of a gather: a vocabulary sharded over devices stays where it is.
    hit_BTV = jax.lax.broadcasted_iota(targets_BT.dtype, (1, 1, logits_BTV.shape[-1]), 2) == targets_BT[..., None]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - jnp.sum(jnp.where(hit_BTV, logits_BTV, 0.0), axis=-1)


def _floored(logits: jax.Array, temperature: float) -> jax.Array:
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if wide.dtype != logits.dtype:
        # XLA may skip the rounding of an intermediate bfloat16 on one side only; then identical logits would differ.
        info = jnp.finfo(logits.dtype)
        wide = jax.lax.reduce_precision(wide, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    return jnp.maximum(wide if temperature == 1.0 else wide / temperature, FLOOR)


def _log_distributions(student: jax.Array, teacher: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    if isinstance(temperature, int | float) and not temperature > 0.0:
        raise UserError(f"temperature={temperature}: logits are divided by it, it must be positive")
    if student.shape[-1] != teacher.shape[-1]:
        raise UserError(
            f"teacher logits have {teacher.shape[-1]} entries a token, student logits {student.shape[-1]}: "
            "a divergence needs one vocabulary"
        )
    log_s = jax.nn.log_softmax(_floored(student, temperature), axis=-1)
    return log_s, jax.nn.log_softmax(_floored(teacher, temperature), axis=-1)


@jax.custom_jvp
def _kl_terms(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    from_p, difference = _kl_slopes(log_p, log_q)
    return from_p + difference


@_kl_terms.defjvp
def _kl_terms_jvp(primals, tangents):
    # d/d log P = p r and d/d log Q = q - p. Left to itself, a fused multiply-add would leave 1e-9 of it at p = q.
    from_p, difference = _kl_slopes(*primals)
    return from_p + difference, from_p * tangents[0] + difference * tangents[1]


def _kl_slopes(log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """p r and q - p. The second is 0 at r = 0 by decree: compiled twice, exp may differ in its last bit."""
    p, q, r = jnp.exp(log_p), jnp.exp(log_q), log_p - log_q
    return p * r, jnp.where(r == 0.0, 0.0, q - p)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _jsd_terms(beta: float, log_s: jax.Array, log_p: jax.Array) -> jax.Array:
    s_over_m, p_over_m = _log_over_mixture(beta, log_p - log_s)
    return beta * jnp.exp(log_p) * p_over_m + (1.0 - beta) * jnp.exp(log_s) * s_over_m


@_jsd_terms.defjvp
def _jsd_terms_jvp(beta, primals, tangents):
    # The derivative through M cancels: d/d log S = (1 - beta) S log(S / M), d/d log P = beta P log(P / M).
    (log_s, log_p), (tangent_s, tangent_p) = primals, tangents
    s_over_m, p_over_m = _log_over_mixture(beta, log_p - log_s)
    from_s = (1.0 - beta) * jnp.exp(log_s) * s_over_m
    from_p = beta * jnp.exp(log_p) * p_over_m
    return from_p + from_s, from_s * tangent_s + from_p * tangent_p


def _log_over_mixture(beta: float, r: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log S/M and log P/M from r = log P - log S; exactly 0 at r = 0, and no overflow at any r."""
    larger_over_m = -jnp.log1p(jnp.where(r > 0, 1.0 - beta, beta) * jnp.expm1(-jnp.abs(r)))
    smaller_over_m = larger_over_m - jnp.abs(r)
    return jnp.where(r > 0, smaller_over_m, larger_over_m), jnp.where(r > 0, larger_over_m, smaller_over_m)


def _total(terms_BTV: jax.Array, temperature: float, temperature_squared: bool) -> jax.Array:
    total_BT = jnp.sum(terms_BTV, axis=-1)
    # Rounding may leave -1e-9. The clamp is not differentiated: the gradient must not vanish with it.
    total_BT += jax.lax.stop_gradient(jnp.maximum(total_BT, 0.0) - total_BT)
    return total_BT * temperature**2 if temperature_squared else total_BT
