"""Which proposals of a draft become the target's text, so that the text has the target's distribution exactly.

A token x that was drawn from the draft's q is kept with probability min(1, p(x) / q(x)). The first that is refused is
drawn again from the normalised (p - q)+; where all are kept, one more is drawn from p (Leviathan et al. 2023, appendix
A.1). Both distributions are those after temperature, top-k and top-p.

Random numbers belong to a position and a purpose, so those of a refused continuation come again in the text that takes
its place. This is sound: nothing that was written depended on them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from epigone.models.sharding import Sharding, in_mesh, placed
from epigone.sampling.draw import drawn
from epigone.sampling.loop import Knobs, Switches, limited

PROPOSE, JUDGE, REPLACE = slice(0, 2), 2, slice(3, 5)
"""The uniform numbers of a position, by their purpose."""
NUMBERS = 5


class Found(NamedTuple):
    """What a pass found: tokens [B, T], their log-probabilities [B, T], and how many of them were proposals [B].

    The token after those is the target's own; what is behind it means nothing.
    """

    tokens_BT: jax.Array
    log_probs_BT: jax.Array
    kept_B: jax.Array


def probabilities(switch: Switches, knobs: Knobs, logits: jax.Array) -> jax.Array:
    """Of the next token [..., V], after temperature, top-k and top-p; at temperature 0 the best token has all."""
    if switch.greedy:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return jax.nn.softmax(limited(switch, knobs, logits), axis=-1)


def propose(
    sharding: Sharding, switch: Switches, knobs: Knobs, logits_BV: jax.Array, uniform_B5: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Tokens [B] of the draft, and the probabilities [B, V] by which they were drawn."""

    def local(logits_BV: jax.Array, uniform_B5: jax.Array, knobs: Knobs) -> tuple[jax.Array, jax.Array]:
        q_BV = probabilities(switch, knobs, logits_BV)
        return drawn(q_BV, uniform_B5[:, PROPOSE]), q_BV

    token_B, q_BV = _on_own_rows(local, sharding, logits_BV, uniform_B5, knobs)
    return placed(token_B, P()), q_BV


def accept(
    sharding: Sharding,
    switch: Switches,
    knobs: Knobs,
    logits_BTV: jax.Array,
    q_BCV: jax.Array,
    proposed_BC: jax.Array,
    uniform_BT5: jax.Array,
) -> Found:
    """What a pass writes, from the target's logits and the draft's probabilities; T is C + 1.

    The log-probabilities are those of the logits as they are.
    """

    def local(logits_BTV, q_BCV, proposed_BC, uniform_BT5, knobs):
        p_BTV = probabilities(switch, knobs, logits_BTV)
        kept_B, own_B = verdict(p_BTV, q_BCV, proposed_BC, uniform_BT5)
        own_BT = jnp.arange(p_BTV.shape[1]) == kept_B[:, None]
        tokens_BT = jnp.where(own_BT, own_B[:, None], jnp.pad(proposed_BC, ((0, 0), (0, 1))))
        return tokens_BT, _chosen(logits_BTV, tokens_BT) - jax.nn.logsumexp(logits_BTV, axis=-1), kept_B

    found = _on_own_rows(local, sharding, logits_BTV, q_BCV, proposed_BC, uniform_BT5, knobs)
    return Found(*(placed(x, P()) for x in found))


def verdict(
    p_BTV: jax.Array, q_BCV: jax.Array, proposed_BC: jax.Array, uniform_BT5: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How many proposals are kept [B], and the target's own token after them [B]."""
    C = proposed_BC.shape[1]
    p_BC, q_BC = _chosen(p_BTV[:, :C], proposed_BC), _chosen(q_BCV, proposed_BC)
    kept_BC = is_kept(uniform_BT5[:, :C, JUDGE], p_BC, q_BC)
    kept_B = jnp.sum(jnp.cumprod(kept_BC.astype(jnp.int32), axis=1), axis=1)
    q_BV = jnp.where(kept_B[:, None] < C, _at(q_BCV, jnp.minimum(kept_B, C - 1)), 0.0)
    return kept_B, drawn(residual(_at(p_BTV, kept_B), q_BV), _at(uniform_BT5, kept_B)[:, REPLACE])


def is_kept(uniform: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
    """True with probability min(1, p / q), and never where p is 0."""
    return uniform * q < p


def residual(p_BV: jax.Array, q_BV: jax.Array) -> jax.Array:
    """(p - q)+, not normalised; p where rounding leaves nothing of it, which is where nothing is ever refused."""
    rest_BV = jnp.maximum(p_BV - q_BV, 0.0)
    return jnp.where(jnp.any(rest_BV > 0, axis=-1, keepdims=True), rest_BV, p_BV)


def _chosen(values_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values_BTV, tokens_BT[..., None], axis=-1)[..., 0]


def _at(values_BTV: jax.Array, step_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values_BTV, step_B[:, None, None], axis=1)[:, 0]


def _on_own_rows(local: Callable[..., Any], sharding: Sharding, *arguments: Any) -> Any:
    """`local` on the rows that each device has, with the whole vocabulary; the last argument is the same for all."""
    if not in_mesh():
        return local(*arguments)
    rows = sharding.activation("B")
    cut = jax.shard_map(local, in_specs=(*(rows,) * (len(arguments) - 1), P()), out_specs=rows)
    return cut(*(placed(x, rows) for x in arguments[:-1]), arguments[-1])
