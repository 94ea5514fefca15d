"""What is inside a decoder while it reads: of chosen layers the states behind them, their queries, keys and values.

Layers count from 1. A scan over layers that gave all of them would keep all; here each layer writes to the place of the
next one that was asked for, so that the last to write there is that one, and only what was asked for is kept.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from epigone.models.config import DecoderConfig
from epigone.models.sharding import Sharding, placed

Heads = tuple[jax.Array, jax.Array, jax.Array]
"""Queries [B, T, N, H], keys and values [B, T, K, H] of one layer, as attention takes them: normalised and rotated."""


@dataclass(frozen=True)
class Asked:
    """Of which layers what is wanted, in rising order.

    Attributes:
        states: layers behind which the residual stream is wanted.
        heads: layers of which queries, keys and values are.
    """

    states: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()


class Inside(NamedTuple):
    """What was asked for, by layer: states [B, T, D], before the final norm, and heads."""

    states: dict[int, jax.Array]
    heads: dict[int, Heads]


Kept = tuple[Any, ...]
"""The states, queries, keys and values of the asked layers, [places, B, T, ...] each; None where none are asked."""


def empty(config: DecoderConfig, sharding: Sharding, asked: Asked, B: int, T: int) -> Kept:
    """Places for what is asked for, one more where layers come behind the last of them."""
    s, L = config.sizes, config.layers
    sizes = {"BTD": (B, T, s.D), "BTNH": (B, T, s.N, s.H), "BTKH": (B, T, s.K, s.H)}

    def places(layers: tuple[int, ...], letters: str) -> jax.Array | None:
        if not layers:
            return None
        zeros = jnp.zeros((len(layers) + (layers[-1] < L), *sizes[letters]), config.compute_dtype)
        return placed(zeros, P(None, *sharding.activation(letters)))

    return places(asked.states, "BTD"), *(places(asked.heads, letters) for letters in ("BTNH", "BTKH", "BTKH"))


def places(config: DecoderConfig, asked: Asked) -> jax.Array:
    """The place to which each layer writes its states, and that of its heads [L, 2]."""
    layers_L = np.arange(1, config.layers + 1)
    return jnp.asarray(np.stack([np.searchsorted(asked.states, layers_L), np.searchsorted(asked.heads, layers_L)], 1))


def keep(kept: Kept, place_2: jax.Array, x_BTD: jax.Array, heads: Heads | None) -> Kept:
    """Write what a layer gave."""
    given = (x_BTD, *(heads or (None, None, None)))
    where = (place_2[0], *(place_2[1],) * 3)

    def write(all_of_it: jax.Array | None, one: Any, place: jax.Array) -> jax.Array | None:
        return None if all_of_it is None else jax.lax.dynamic_update_index_in_dim(all_of_it, one, place, 0)

    return tuple(write(*part) for part in zip(kept, given, where, strict=True))


def by_place(kept: Kept, asked: Asked) -> Inside:
    """What was kept, by its layers."""
    states = {layer: kept[0][place] for place, layer in enumerate(asked.states)}
    heads = {layer: (kept[1][place], kept[2][place], kept[3][place]) for place, layer in enumerate(asked.heads)}
    return Inside(states, heads)
