"""Several tokens at a time, each row at its own position: a token at position p lies in column p of its row's ring."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from epigone.models.attention import MASKED
from epigone.models.decoder import Decoder, Weights, block
from epigone.models.layers import Angles, soft_cap
from epigone.models.sharding import in_mesh, placed
from epigone.sampling.cache import Ring, ring_sharding


def read_many(
    model: Decoder, layers: list[Weights], rings: list[Ring], tokens_BT: jax.Array, position_B: jax.Array
) -> tuple[jax.Array, list[Ring]]:
    """Hidden states [B, T, D] of T tokens a row, from its position on, which are written into their columns.

    Each sees the columns up to its own, so that columns behind may hold anything. Positions from max_length on are
    read as the last one: what is written there is of no use to anybody.
    """
    config, sharding = model.config, model.sharding
    places_BT = position_B[:, None] + jnp.arange(tokens_BT.shape[1])
    distance_BTS = places_BT[:, :, None] - jnp.arange(rings[0][0].shape[1])

    def seen(window: int | None) -> jax.Array:
        near_BTS = distance_BTS >= 0 if window is None else (distance_BTS >= 0) & (distance_BTS < window)
        return placed(near_BTS, sharding.activation("BTS"))

    masks, one = (seen(None), seen(config.window)), sharding.activation("BT")
    tokens_BT, positions_BT = placed(tokens_BT, one), placed(jnp.minimum(places_BT, config.max_length - 1), one)
    angles = _angles(model, positions_BT)
    x_BTD, written = model.embed(tokens_BT, positions_BT), []
    for weights, ring, bound in zip(layers, rings, config.windowed_layers, strict=True):
        mix = _mix(model, ring, position_B, masks[bound])
        x_BTD, ring = block(config.on_grid, sharding, weights, x_BTD, angles[bound], mix)
        written.append(ring)
    return model.finish(x_BTD), written


def _angles(model: Decoder, positions_BT: jax.Array) -> tuple[Angles | None, Angles | None]:
    """Rotations of tokens that are read as if one by one: none of them has a say in how the others are rotated."""
    angles = jax.vmap(lambda position_B: model.angles(position_B[:, None]), 1, 1)(positions_BT)
    return jax.tree.map(lambda x: x[:, :, 0], angles)


def _mix(model: Decoder, ring: Ring, position_B: jax.Array, mask_BTS: jax.Array) -> Callable[..., tuple[Any, Ring]]:
    """Attention over the ring, after the rows' own keys and values are written into it."""
    sharding, cap, scale = model.sharding, model.config.attention_softcap, model.config.score_scale

    def local(q, k, v, keys, values, mask, position):
        B, T, N, H = q.shape
        K, S = k.shape[2], keys.shape[1]
        keys, values = _written(keys, k, position), _written(values, v, position)
        q = (q * scale).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B * K, -1, H)
        scores = jax.lax.dot_general(q, keys, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)
        scores = soft_cap(scores, cap).reshape(B, K, N // K, T, S)
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)
        weights = weights.astype(values.dtype).reshape(B * K, -1, S)
        mixed = jax.lax.dot_general(weights, values, (((2,), (1,)), ((0,), (0,))))
        return mixed.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H), keys, values

    def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Ring]:
        run, position = local, placed(position_B, sharding.activation("B"))
        if in_mesh():
            heads, groups, rows = (sharding.activation(letters) for letters in ("BTNH", "BTKH", "B"))
            cache = ring_sharding(sharding)
            specs = (heads, groups, groups, cache, cache, rows, rows)
            run = jax.shard_map(local, in_specs=specs, out_specs=(heads, cache, cache))
        mixed_BTNH, keys, values = run(q, k, v, *ring, mask_BTS, position)
        return mixed_BTNH, (keys, values)

    return mix


def _written(ring: jax.Array, new_BTKH: jax.Array, position_B: jax.Array) -> jax.Array:
    """The ring with each row's T tokens in the columns from its position on; in place."""
    B, _, K, H = new_BTKH.shape

    def row(ring_KSH: jax.Array, new_KTH: jax.Array, position: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(ring_KSH, new_KTH, (0, position, 0))

    return jax.vmap(row)(ring.reshape(B, K, -1, H), new_BTKH.transpose(0, 2, 1, 3), position_B).reshape(ring.shape)
