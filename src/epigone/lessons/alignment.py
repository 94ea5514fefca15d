"""Learning from a teacher that reads other tokens: what can be compared where both have read the same bytes.

Three objectives, each the value of `Objective.divergence`. P and S are teacher and student. The name of the second
argument says what it takes: logits [B, T, W] of another vocabulary, or log-likelihoods of chunks.

- `uld`: the L1 distance of both distributions, each sorted; Boizard et al. 2024. It needs no common token.
- `common_tokens`: a divergence over the tokens that both vocabularies have, and one outcome for all others.
- `likelihood_matching`: how probable each side finds the next chunk of text that is whole tokens to both; Minixhofer et
  al. 2025 (ALM).

The first two compare at positions before which both have read the same bytes. A chunk is what lies between two
neighbouring boundaries that both tokenizations have. Elsewhere a token has no part in these objectives: its loss is
0, and it counts among the tokens by which the sum is divided.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epigone.lessons.divergences import MASKED, Divergence, Temperature, forward_kl
from epigone.lessons.terms import FLOOR, floored

NO_TEXT = -2
"""In `ids_V`: an id that is no text, such as that of an unknown word, and has no counterpart."""

EQUAL = 1e-5
"""Probabilities that differ by no more than this, relative to the larger, are equal to `uld`."""


def by_position(divergence: Callable[..., Any]) -> bool:
    """Whether it compares logits of two vocabularies."""
    return _second(divergence).endswith("BTW")


def by_chunk(divergence: Callable[..., Any]) -> bool:
    """Whether it compares the likelihoods of chunks."""
    return _second(divergence).endswith("chunks_BT")


def aligns(divergence: Callable[..., Any]) -> bool:
    """Whether it takes a teacher of other tokens."""
    return by_position(divergence) or by_chunk(divergence)


def name_of(divergence: Callable[..., Any]) -> str:
    """As a reader knows it."""
    return str(getattr(getattr(divergence, "func", divergence), "__name__", divergence))


def _second(divergence: Callable[..., Any]) -> str:
    return [*inspect.signature(divergence).parameters, "", ""][1]


def uld(
    student_logits_BTV: Float[Array, "B T V"],
    teacher_logits_BTW: Float[Array, "B T W"],
    *,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
) -> Float[Array, "B T"]:
    """sum_k |S_(k) - P_(k)| of the probabilities in falling order, the shorter list filled with 0, times T^2.

    The universal logit distillation of Boizard et al. 2024, eq. 5, a Wasserstein distance where every token is as far
    from every other. Boizard et al. take it at T = 1, beside the cross-entropy.

    Args: logits [B, T, V] and [B, T, W]. Returns: [B, T], from 0 to 2.
    """
    s, p = (jnp.exp(jax.nn.log_softmax(floored(x, temperature))) for x in (student_logits_BTV, teacher_logits_BTW))
    size = max(s.shape[-1], p.shape[-1])
    s, p = (_filled(-jnp.sort(-x, axis=-1), size) for x in (s, p))
    # The gradient of a distance jumps at 0: what rounding leaves between two equal numbers must have none.
    gap = jnp.where(jnp.abs(s - p) <= EQUAL * jnp.maximum(s, p), 0.0, s - p)
    loss_BT = jnp.sum(jnp.abs(gap), axis=-1)
    return loss_BT * temperature**2 if temperature_squared else loss_BT


def _filled(x: jax.Array, size: int) -> jax.Array:
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, size - x.shape[-1])))


def common_tokens(
    student_logits_BTV: Float[Array, "B T V"],
    teacher_logits_BTW: Float[Array, "B T W"],
    *,
    ids_V: Int[Array, " V"],
    divergence: Divergence = forward_kl,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
) -> Float[Array, "B T"]:
    """A divergence of the tokens that both have, and of all others as one outcome, times T^2.

    It is that divergence where both vocabularies are one. How the rest is shared out is not taught. Where one side has
    no rest, there is no such outcome, and the other is renormalised over the common tokens.

    Args: logits [B, T, V] and [B, T, W]; ids_V, the teacher's id of each of the student's, -1 for a token of the rest,
        NO_TEXT for what is none and not counted; divergence, of `epigone.lessons.divergences`.
    Returns: [B, T], in its units.
    """
    s, p = floored(student_logits_BTV, temperature), floored(teacher_logits_BTW, temperature)
    common_V = ids_V >= 0
    taken_W = jnp.zeros(p.shape[-1], bool).at[jnp.where(common_V, ids_V, p.shape[-1])].set(True, mode="drop")
    on_ours = jnp.where(common_V, jnp.take(p, jnp.maximum(ids_V, 0), axis=-1), FLOOR)
    rests = [jax.nn.logsumexp(jnp.where(out, x, FLOOR), axis=-1) for x, out in ((s, ids_V == -1), (p, ~taken_W))]
    both_BT = (rests[0] > MASKED) & (rests[1] > MASKED)
    sides = zip((jnp.where(common_V, s, FLOOR), on_ours), rests, strict=True)
    known = [jnp.concatenate([x, jnp.where(both_BT, rest, FLOOR)[..., None]], axis=-1) for x, rest in sides]
    loss_BT = divergence(*known, temperature=1.0, temperature_squared=False)
    return loss_BT * temperature**2 if temperature_squared else loss_BT


def likelihood_matching(
    student_chunks_BT: Float[Array, "B T"], teacher_chunks_BT: Float[Array, "B T"], *, tau: float = 100.0
) -> Float[Array, "B T"]:
    """tau KL(Bernoulli(p^(1/tau)) || Bernoulli(s^(1/tau))), p and s the likelihoods of a chunk under both.

    Approximate likelihood matching, Minixhofer et al. 2025, with the binarised KL. A large tau looks at
    log-likelihoods: with a = -log p and b = -log s, the limit is a log(a / b) - a + b. The factor tau, which theirs has
    not, keeps the size of the gradient when tau changes.

    Args: log-likelihoods of chunks in nats, [B, T]; tau, a Python number. Returns: [B, T] in nats, 0 at equality.
    """
    return tau * _binary_kl(student_chunks_BT / tau, teacher_chunks_BT / tau)


LEAST = -1e-6
"""A log-probability is taken to be at most this, so that what is left to 1 has a logarithm."""


@jax.custom_jvp
def _binary_kl(log_s: jax.Array, log_p: jax.Array) -> jax.Array:
    """p log(p / s) + (1 - p) log((1 - p) / (1 - s))."""
    log_s, log_p = jnp.minimum(log_s, LEAST), jnp.minimum(log_p, LEAST)
    not_s, not_p = (jnp.log(-jnp.expm1(x)) for x in (log_s, log_p))
    return jnp.maximum(jnp.exp(log_p) * (log_p - log_s) - jnp.expm1(log_p) * (not_p - not_s), 0.0)


@_binary_kl.defjvp
def _binary_kl_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """By log s it is (s - p) / (1 - s): exactly 0 where both are equal."""
    log_s, log_p = (jnp.minimum(x, LEAST) for x in primals)
    slope = jnp.where(log_s == log_p, 0.0, (jnp.exp(log_s) - jnp.exp(log_p)) / -jnp.expm1(log_s))
    return _binary_kl(*primals), slope * tangents[0]
