"""Exact draws from a distribution over the vocabulary with 64 random bits a token.

Inverse distribution function in two levels: a block of the vocabulary, then a token in it, each with its own
uniform number. On a CPU the random bits of a Gumbel draw over the whole vocabulary would cost more than
the model, and one running sum over it would lose the small probabilities to rounding.
"""

import jax
import jax.numpy as jnp

BLOCK = 128


def token_keys(seed_key: jax.Array, prompt_B: jax.Array, sample_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """One key for each row, from its prompt, sample and position alone: the other rows do not matter.

    `seed_key` is one for all rows, or one a row.
    """

    def key(seed_key: jax.Array, prompt: jax.Array, sample: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(seed_key, prompt), sample), position)

    return jax.vmap(key, in_axes=(0 if seed_key.ndim else None, 0, 0, 0))(seed_key, prompt_B, sample_B, position_B)


def draw(logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Tokens [B] drawn from softmax(logits), one for each row and key; never one of probability 0 in float32."""
    weights_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    return drawn(weights_BV, uniforms(keys_B, 2))


def uniforms(keys: jax.Array, numbers: int) -> jax.Array:
    """Numbers from 0, included, to 1, excluded, for each key: [..., numbers], 24 bits each."""
    bits = jax.vmap(lambda key: jax.random.bits(key, (numbers,), jnp.uint32))(keys.ravel())
    return ((bits >> 8).astype(jnp.float32) * 2.0**-24).reshape(*keys.shape, numbers)


def drawn(weights_BV: jax.Array, uniform_B2: jax.Array) -> jax.Array:
    """Tokens [B] in proportion to their weights, with two uniform numbers a row."""
    B, V = weights_BV.shape
    blocks = jnp.pad(weights_BV, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    block_B = pick(jnp.sum(blocks, axis=-1), uniform_B2[:, 0])
    chosen = jnp.take_along_axis(blocks, block_B[:, None, None], axis=1)[:, 0]
    return block_B * BLOCK + pick(chosen, uniform_B2[:, 1])


def pick(weights_BM: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The first index whose running sum exceeds uniform * sum, among indices of positive weight.

    A running sum need not be monotone in floating point: so indices of weight 0 are ruled out explicitly, and
    where rounding leaves none, the last of positive weight is taken.
    """
    running = jnp.cumsum(weights_BM, axis=-1)
    positive = weights_BM > 0
    reached = positive & (running > uniform_B[:, None] * running[:, -1:])
    last = weights_BM.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    return jnp.where(jnp.any(reached, axis=-1), jnp.argmax(reached, axis=-1), last).astype(jnp.int32)
