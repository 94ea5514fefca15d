"""Divergences between a teacher's and a student's next-token distributions: the conventions, once.

Notation: P and S are teacher and student after a softmax of logits / temperature; r = log P - log S. Every
function is `f(student_logits_BTV, teacher_logits_BTV, *, temperature, temperature_squared)` and gives one float32
per token (float64 for float64 logits), neither masked nor averaged: the caller sums loss * weight and divides by
the sum of all weights. Units are nats, but for total_variation (a probability) and logit_mse (squared logits).

- Temperature divides both sets of logits. The factor T^2 of Hinton et al. (2015, section 2), which keeps the size of
  the gradient when T changes, is on by default.
- A divergence holds the teacher's entropy: it is 0, with zero gradient, for identical logits.
- `jsd`: beta weighs the teacher in the mixture (Agarwal et al. 2024). `skew_*`: alpha weighs, in the mixture, the
  distribution under which the expectation is taken (Ko et al. 2024), so that alpha = 0 is the plain KL.
- `vocab_axis`: inside shard_map, the mesh axis over which V is cut.

docs/lessons.md has the names and factors of other libraries. Where only one side masks an entry to which the other
gives weight, a true value may be infinite; here it is about 1e9 times that weight. lessons/terms.py says how rounding
is kept out.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epigone.errors import UserError
from epigone.lessons.terms import (
    FORWARD_KL,
    MIXED_KL,
    REVERSE_KL,
    TOTAL_VARIATION,
    Terms,
    alpha_beta_terms,
    check,
    chosen_log_prob,
    difference,
    floored,
    jsd_terms,
    log_softmax,
    normaliser,
    skew_terms,
    summed,
    total,
)

Logits = Float[Array, "B T V"]
PerToken = Float[Array, "B T"]
Temperature = float | jax.Array

MASKED = -1e4
"""A logit that is not above it says that its token is never predicted."""


class Divergence(Protocol):
    """Per-token divergence [B, T] of logits [B, T, V].

    One that takes no `vocab_axis` is given whole rows of logits wherever it is used.
    """

    def __call__(
        self,
        student_logits_BTV: Logits,
        teacher_logits_BTV: Logits,
        *,
        temperature: Temperature = 1.0,
        temperature_squared: bool = True,
    ) -> PerToken: ...


def forward_kl(
    student_logits_BTV: Logits,
    teacher_logits_BTV: Logits,
    *,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
    vocab_axis: str | None = None,
) -> PerToken:
    """KL(P || S) = sum_v P (log P - log S), times T^2: covers all that the teacher may say. Hinton et al. 2015.

    Args: logits [B, T, V]. Returns: [B, T] in nats. Raises UserError for a temperature that is not positive.
    """
    return total(FORWARD_KL, student_logits_BTV, teacher_logits_BTV, temperature, temperature_squared, vocab_axis)


def reverse_kl(
    student_logits_BTV: Logits,
    teacher_logits_BTV: Logits,
    *,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
    vocab_axis: str | None = None,
) -> PerToken:
    """KL(S || P) = sum_v S (log S - log P), times T^2: punishes what the teacher would not say. Gu et al. 2024.

    Args: logits [B, T, V]. Returns: [B, T] in nats. Raises UserError for a temperature that is not positive.
    """
    return total(REVERSE_KL, student_logits_BTV, teacher_logits_BTV, temperature, temperature_squared, vocab_axis)


def symmetric_kl(
    student_logits_BTV: Logits,
    teacher_logits_BTV: Logits,
    *,
    reverse_weight: float = 0.5,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
    vocab_axis: str | None = None,
) -> PerToken:
    """(1 - reverse_weight) KL(P || S) + reverse_weight KL(S || P), times T^2; half of Jeffreys' divergence at 0.5.

    Args: logits [B, T, V]; reverse_weight in [0, 1], a Python number. Returns: [B, T] in nats.
    Raises: UserError for a reverse_weight outside [0, 1] or a temperature that is not positive.
    """
    _check_share("symmetric_kl: reverse_weight", reverse_weight, "0 is forward KL, 1 is reverse KL")
    return total(
        MIXED_KL, student_logits_BTV, teacher_logits_BTV, temperature, temperature_squared, vocab_axis, reverse_weight
    )


def jsd(
    student_logits_BTV: Logits,
    teacher_logits_BTV: Logits,
    *,
    beta: float = 0.5,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
    vocab_axis: str | None = None,
) -> PerToken:
    """beta KL(P || M) + (1 - beta) KL(S || M), M = beta P + (1 - beta) S, times T^2. Agarwal et al. 2024, eq. 1.

    beta=0 means forward_kl and beta=1 means reverse_kl: the limits of jsd / (beta (1 - beta)). jsd itself tends to 0
    at both ends, so its value jumps there (its direction does not).

    Args: logits [B, T, V]; beta in [0, 1], a Python number. Returns: [B, T] in nats.
    Raises: UserError for a beta outside [0, 1] or a temperature that is not positive.
    """
    _check_share("jsd: beta", beta, "0 is forward KL, 1 is reverse KL, 0.5 is symmetric")
    terms = {0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(beta) or jsd_terms(beta)
    return total(terms, student_logits_BTV, teacher_logits_BTV, temperature, temperature_squared, vocab_axis)


def skew_forward_kl(
    student_logits_BTV: Logits,
    teacher_logits_BTV: Logits,
    *,
    alpha: float = 0.1,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
    vocab_axis: str | None = None,
) -> PerToken:
    """KL(P || alpha P + (1 - alpha) S), times T^2: forward KL with a bounded gradient. Ko et al. 2024, eq. 4.

    alpha=0 is forward_kl, alpha=1 is 0.

    Args: logits [B, T, V]; alpha in [0, 1], a Python number. Returns: [B, T] in nats.
    Raises: UserError for an alpha outside [0, 1] or a temperature that is not positive.
    """
    terms = _skewed("skew_forward_kl", alpha, forward=True)
    return total(terms, student_logits_BTV, teacher_logits_BTV, temperature, temperature_squared, vocab_axis)


def skew_reverse_kl(
    student_logits_BTV: Logits,
    teacher_logits_BTV: Logits,
    *,
    alpha: float = 0.1,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
    vocab_axis: str | None = None,
) -> PerToken:
    """KL(S || alpha S + (1 - alpha) P), times T^2: reverse KL with a bounded gradient. Ko et al. 2024, section 3.1.

    alpha=0 is reverse_kl, alpha=1 is 0.

    Args: logits [B, T, V]; alpha in [0, 1], a Python number. Returns: [B, T] in nats.
    Raises: UserError for an alpha outside [0, 1] or a temperature that is not positive.
    """
    terms = _skewed("skew_reverse_kl", alpha, forward=False)
    return total(terms, student_logits_BTV, teacher_logits_BTV, temperature, temperature_squared, vocab_axis)


def _skewed(name: str, alpha: float, forward: bool) -> Terms:
    _check_share(f"{name}: alpha", alpha, "0 is the plain KL, 1 is nothing at all")
    if alpha == 1.0:
        return Terms(_nothing, _nothing, _nothing, (True, True))
    if alpha == 0.0:
        return FORWARD_KL if forward else REVERSE_KL
    return skew_terms(alpha, forward)


def _nothing(log_s: jax.Array, log_p: jax.Array, more: Any) -> jax.Array:
    return jnp.zeros_like(log_s)


def adaptive_kl(
    student_logits_BTV: Logits,
    teacher_logits_BTV: Logits,
    *,
    head_mass: float = 0.5,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
    vocab_axis: str | None = None,
) -> PerToken:
    """(g_head KL(P || S) + g_tail KL(S || P)) / (g_head + g_tail), times T^2. Wu et al. 2025, section 4.2 (AKL).

    g sums |P - S| over the teacher's head or tail. The head are its most probable tokens, as many as hold no more than
    head_mass together, and at least the best one. The shares are constants for the gradient.

    Args: logits [B, T, V]; head_mass in [0, 1], a Python number. Returns: [B, T] in nats.
    Raises: UserError for a head_mass outside [0, 1] or a temperature that is not positive.
    """
    _check_share("adaptive_kl: head_mass", head_mass, "the probability that the head may hold")
    check(student_logits_BTV, teacher_logits_BTV, temperature)
    logits = (floored(jax.lax.stop_gradient(x), temperature) for x in (student_logits_BTV, teacher_logits_BTV))
    log_s, log_p = (log_softmax(x, normaliser(x, vocab_axis)) for x in logits)
    gap_BTV = jnp.abs(difference(log_p, log_s))
    head_BT = summed(jnp.where(_in_head(jnp.exp(log_p), head_mass, vocab_axis), gap_BTV, 0.0), vocab_axis)
    all_BT = summed(gap_BTV, vocab_axis)
    tail_BT1 = 1.0 - (head_BT / jnp.where(all_BT > 0.0, all_BT, 1.0))[..., None]
    return total(
        MIXED_KL, student_logits_BTV, teacher_logits_BTV, temperature, temperature_squared, vocab_axis, tail_BT1
    )


def _in_head(p_BTV: jax.Array, mass: float, vocab_axis: str | None) -> jax.Array:
    """Which entries are the most probable ones that hold at most `mass` together, or the best one.

    By bisection of a threshold: the bits of positive floats are in the order of their values, and no sort is needed,
    so that V may be cut.
    """
    # Made once: where a compiler makes it again for each use, the largest may differ from itself in its last bit.
    p_BTV = jax.lax.optimization_barrier(p_BTV)
    width = jnp.finfo(p_BTV.dtype).bits
    bits = jnp.int32 if width == 32 else jnp.int64
    bits_BTV = jax.lax.bitcast_convert_type(p_BTV, bits)
    top_BT = jnp.max(bits_BTV, axis=-1)
    top_BT = top_BT if vocab_axis is None else jax.lax.pmax(top_BT, vocab_axis)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_BT, high_BT = bounds
        middle_BT = low_BT + (high_BT - low_BT) // 2
        held_BT = summed(jnp.where(bits_BTV >= middle_BT[..., None], p_BTV, 0.0), vocab_axis)
        fits_BT = held_BT <= mass
        return jnp.where(fits_BT, low_BT, middle_BT), jnp.where(fits_BT, middle_BT, high_BT)

    _, threshold_BT = jax.lax.fori_loop(0, width, halve, (jnp.zeros_like(top_BT), top_BT + 1))
    return bits_BTV >= jnp.minimum(threshold_BT, top_BT)[..., None]


def total_variation(
    student_logits_BTV: Logits,
    teacher_logits_BTV: Logits,
    *,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
    vocab_axis: str | None = None,
) -> PerToken:
    """1/2 sum_v |P - S|, times T^2: the largest difference in the probability of any event. Wen et al. 2023.

    Args: logits [B, T, V]. Returns: [B, T], a probability. Raises UserError for a temperature that is not positive.
    """
    return total(TOTAL_VARIATION, student_logits_BTV, teacher_logits_BTV, temperature, temperature_squared, vocab_axis)


def alpha_beta(
    student_logits_BTV: Logits,
    teacher_logits_BTV: Logits,
    *,
    alpha: float = 0.2,
    beta: float = 0.7,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
    vocab_axis: str | None = None,
) -> PerToken:
    """-1/(alpha beta) sum_v [P^alpha S^beta - (alpha P^(alpha+beta) + beta S^(alpha+beta)) / (alpha+beta)], times T^2.

    The alpha-beta divergence of Cichocki et al. 2011; Wang et al. 2025 (ABKD), eq. 6. (1, 0) is forward_kl, (0, 1) is
    reverse_kl, and both are limits; (1/2, 1/2) is four times the squared Hellinger distance.

    Args: logits [B, T, V]; alpha and beta at least 0, not both 0, Python numbers. Returns: [B, T] in nats.
    Raises: UserError for other alphas and betas, or a temperature that is not positive.
    """
    if not (alpha >= 0.0 and beta >= 0.0 and alpha + beta > 0.0):
        raise UserError(f"alpha_beta: alpha={alpha}, beta={beta}: both must be at least 0, and one of them more")
    terms = alpha_beta_terms(alpha, beta)
    return total(terms, student_logits_BTV, teacher_logits_BTV, temperature, temperature_squared, vocab_axis)


def logit_mse(
    student_logits_BTV: Logits,
    teacher_logits_BTV: Logits,
    *,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
    vocab_axis: str | None = None,
) -> PerToken:
    """The mean over v of (s - t)^2 of the logits, divided by T^2 and times T^2. Ba and Caruana 2014; Kim et al. 2021.

    Entries that both sides mask (logits of at most -1e4) do not count. For centred logits, forward_kl tends to half of
    it as T grows. Unlike the others, it sees a constant that is added to all logits.

    Args: logits [B, T, V]. Returns: [B, T], squared logits. Raises UserError for a temperature that is not positive.
    """
    check(student_logits_BTV, teacher_logits_BTV, temperature)
    counts_BTV = (student_logits_BTV > MASKED) | (teacher_logits_BTV > MASKED)
    s_BTV, t_BTV = floored(student_logits_BTV, temperature), floored(teacher_logits_BTV, temperature)
    squares_BTV = jnp.where(counts_BTV, jnp.square(s_BTV - t_BTV), 0.0)
    count_BT1 = jnp.maximum(summed(counts_BTV.astype(squares_BTV.dtype), vocab_axis), 1.0)[..., None]
    mean_BT = summed(squares_BTV / count_BT1, vocab_axis)
    return mean_BT * temperature**2 if temperature_squared else mean_BT


def cross_entropy(logits_BTV: Logits, targets_BT: Int[Array, "B T"], *, vocab_axis: str | None = None) -> PerToken:
    """-log softmax(logits)[target] in nats: [B, T], float32 (float64 for float64 logits), unreduced."""
    return -chosen_log_prob(vocab_axis, floored(logits_BTV, 1.0), targets_BT)


def _check_share(what: str, share: float, meaning: str) -> None:
    if not 0.0 <= share <= 1.0:
        raise UserError(f"{what}={share} is outside [0, 1] ({meaning})")
