"""Several teachers as one: a mean of their probabilities or of their logits, with weights for every token.

Notation: z_i are the logits of teacher i, w_i its weight at a token, with sum_i w_i = 1, and T the temperature.

- `mean_of_probabilities`: P = sum_i w_i softmax(z_i / T); Hinton et al. 2015, the arithmetic mean: what any teacher
  believes is kept.
- `mean_of_logits`: P = softmax(sum_i w_i z_i / T), the geometric mean, renormalised: what one teacher rules out is out.

Weights are constant, chosen by the text's source, or by the token: `by_confidence`, `by_likelihood`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epigone.lessons.terms import FLOOR, chosen_log_prob, floored, log_softmax, normaliser, summed

Combine = Callable[[list[jax.Array], jax.Array], jax.Array]
Weigh = Callable[[Float[Array, "B T V"], Int[Array, "B T"], str | None], Float[Array, "B T"]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Several:
    """What several teachers give for a batch.

    Attributes:
        members: of each its logits [B, T, V], or hidden states with a head.
        weights_BTM: weight of each, >= 0; they need not sum to 1, but one must be positive.
        combine: `mean_of_probabilities` or `mean_of_logits`.
        weigh: of a teacher's log-probabilities at the temperature, the next tokens and the axis over which the
            vocabulary is cut: the logarithm of a factor on its weight; None for none.
    """

    members: tuple[Any, ...]
    weights_BTM: Float[Array, "B T M"]
    combine: Combine = field(metadata={"static": True})
    weigh: Weigh | None = field(metadata={"static": True})


def combined(
    teachers: Several, targets_BT: Int[Array, "B T"], temperature: float | jax.Array, vocab_axis: str | None = None
) -> Float[Array, "B T V"]:
    """Logits that, divided by the temperature, are those of the teachers together; its members are logits."""
    scaled = [floored(logits_BTV, temperature) for logits_BTV in teachers.members]
    log_p = [log_softmax(x_BTV, normaliser(x_BTV, vocab_axis)) for x_BTV in scaled]
    log_w_BTM = jnp.log(jnp.maximum(teachers.weights_BTM, 1e-37))  # padding may have none at all
    if teachers.weigh is not None:
        log_w_BTM += jnp.stack([teachers.weigh(x_BTV, targets_BT, vocab_axis) for x_BTV in log_p], axis=-1)
    weights_BTM = jax.nn.softmax(log_w_BTM, axis=-1)
    rows = log_p if teachers.combine is mean_of_probabilities else scaled
    return jnp.maximum(teachers.combine(rows, weights_BTM), FLOOR) * temperature


def mean_of_probabilities(log_p: list[jax.Array], weights_BTM: jax.Array) -> jax.Array:
    """log sum_i w_i p_i [B, T, V]."""
    top_BTV = jnp.maximum(jnp.stack(log_p).max(0), FLOOR)
    return top_BTV + jnp.log(sum(weights_BTM[..., i, None] * jnp.exp(x - top_BTV) for i, x in enumerate(log_p)))


def mean_of_logits(logits: list[jax.Array], weights_BTM: jax.Array) -> jax.Array:
    """sum_i w_i z_i / T [B, T, V]."""
    return sum((weights_BTM[..., i, None] * x for i, x in enumerate(logits)), jnp.zeros(()))


def by_confidence(log_p_BTV: jax.Array, targets_BT: jax.Array, vocab_axis: str | None) -> jax.Array:
    """Minus the entropy in nats [B, T]: a teacher counts exp(-entropy) as much, so the surer one counts more."""
    p_BTV = jnp.exp(log_p_BTV)
    return summed(jnp.where(p_BTV > 0, p_BTV * log_p_BTV, 0.0), vocab_axis)


def by_likelihood(log_p_BTV: jax.Array, targets_BT: jax.Array, vocab_axis: str | None) -> jax.Array:
    """log p(next token) [B, T]: a teacher counts as much as it expected what the text says."""
    return chosen_log_prob(vocab_axis, log_p_BTV, targets_BT)
