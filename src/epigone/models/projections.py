"""Products with the matrices of a layer, and with the low-rank adapters that may lie beside them."""

from typing import Any

import jax
import jax.numpy as jnp

from epigone.models.sharding import Sharding, out, placed, suffix


def project(config: Any, sharding: Sharding, weights: dict[str, jax.Array], x: jax.Array, name: str) -> jax.Array:
    """x W [+ (x A) B] [+ bias].

    Args:
        config: the decoder's.
        sharding: where arrays lie.
        weights: those of one layer, under their stacked names; A and B are there where the matrix has an adapter.
        x: [B, T, ...], its other axes those with which the matrix begins.
        name: of the matrix, as in `query_LDNH`.
    """
    inputs, outputs = axes_of(name)
    low, high = adapter_names(name)
    y = _product(config, sharding, x, weights[name], inputs, outputs)
    if low in weights:
        x_BTR = _product(config, sharding, x, weights[low], inputs, "R")
        y = y + _product(config, sharding, x_BTR, weights[high], "R", outputs)
    bias = weights.get(f"{word_of(name)}_bias_L{outputs}")
    return y if bias is None else y + placed(bias.astype(config.compute_dtype), sharding.gathered(outputs))


def word_of(name: str) -> str:
    """A name without its axes: `query_LDNH` -> `query`."""
    return name.rsplit("_", 1)[0]


def axes_of(name: str) -> tuple[str, str]:
    """Axes of one layer's matrix for its inputs and for its outputs; the stream's features are one side of it."""
    letters = suffix(name)[1:]
    return (letters[:-1], "D") if letters[-1] == "D" else ("D", letters[1:])


def adapter_names(name: str) -> tuple[str, str]:
    """Names of a matrix' adapter: A from the inputs to the rank R, and B from there to the outputs."""
    inputs, outputs = axes_of(name)
    return f"{word_of(name)}_lora_a_L{inputs}R", f"{word_of(name)}_lora_b_LR{outputs}"


def _product(config: Any, sharding: Sharding, x: jax.Array, weight: jax.Array, inputs: str, outputs: str) -> jax.Array:
    """In the type of the computation; the result lies as an activation does."""
    before, behind = inputs.lower(), outputs.lower()
    weight = placed(weight.astype(config.compute_dtype), sharding.gathered(inputs + outputs))
    cut = out(sharding.activation("BT" + outputs))
    return jnp.einsum(f"bt{before},{before}{behind}->bt{behind}", x, weight, out_sharding=cut)
