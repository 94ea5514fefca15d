"""Mixtures of experts: each token goes through a few of many feed-forwards, chosen by a router."""

from typing import TYPE_CHECKING

import jax

from epigone.models.sharding import Sharding

if TYPE_CHECKING:
    pass


def mixture(config, sharding: Sharding, weights: dict[str, jax.Array], x_BTD: jax.Array) -> jax.Array:
    raise NotImplementedError
