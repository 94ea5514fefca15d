"""Products with the matrices of a layer: rounded where that is asked for, and with low-rank adapters beside them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from epigone.models.quantization import rounded
from epigone.models.sharding import Sharding, out, placed, suffix

MATRICES = ("query", "key", "value", "mix", "gate", "up", "down")
"""Those of attention and of the feed-forward, by their words."""


def project(config: Any, sharding: Sharding, weights: dict[str, jax.Array], x: jax.Array, name: str) -> jax.Array:
    """x W [+ (x A) B] [+ bias], with x and W in the types of the config's quantization.

    Args:
        config: the decoder's.
        sharding: where arrays lie.
        weights: those of one layer, under their stacked names; A and B are there where the matrix has an adapter.
        x: [B, T, ...], its other axes those with which the matrix begins.
        name: of the matrix, as in `query_LDNH`.
    """
    inputs, outputs = axes_of(name)
    low, high = adapter_names(name)
    y = _product(config, sharding, *_quantized(config, x, name, weights[name]), inputs, outputs)
    if low in weights:
        x_BTR = _product(config, sharding, x, weights[low], inputs, "R")
        y = y + _product(config, sharding, x_BTR, weights[high], "R", outputs)
    bias = weights.get(f"{word_of(name)}_bias_L{outputs}")
    return y if bias is None else y + placed(bias, sharding.gathered(outputs)).astype(config.compute_dtype)


def _quantized(config: Any, x: jax.Array, name: str, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is multiplied."""
    how, count = config.quantization, len(axes_of(name)[0])
    if how is None:
        return x, weight
    if how.activations:
        x = rounded(x, how.activations, tuple(range(2, 2 + count)))
    return x, rounded(weight, how.weights, tuple(range(count)), how.block) if how.weights else weight


def on_grid(config: Any, weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The weights of all layers, their matrices as they are multiplied; `config.on_grid` is the config of these."""
    how = config.quantization
    if how is None or how.weights is None:
        return weights
    inputs = {name: tuple(range(1, 1 + len(axes_of(name)[0]))) for name in weights if word_of(name) in MATRICES}
    return weights | {name: rounded(weights[name], how.weights, axes, how.block) for name, axes in inputs.items()}


def input_sizes(config: Any) -> dict[str, int]:
    """Inputs of each matrix."""
    s = config.sizes
    return {word: s.F if word == "down" else s.N * s.H if word == "mix" else s.D for word in MATRICES}


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
    where = _Where(jnp.dtype(config.compute_dtype).name, sharding, inputs, outputs)
    longer = weight.dtype.itemsize - config.compute_dtype.itemsize
    alone = jax.sharding.get_abstract_mesh().size == 1
    return _mixed(where, x, weight) if longer > 0 or (longer == 0 and alone) else _forward(where, x, weight)


class _Where(NamedTuple):
    """Type of a product, rules, and the letters of a matrix' inputs and outputs."""

    dtype: str
    sharding: Sharding
    inputs: str
    outputs: str

    def used(self, weight: jax.Array) -> jax.Array:
        """A matrix as it is multiplied."""
        return placed(weight.astype(self.dtype), self.sharding.gathered(self.inputs + self.outputs))

    def einsum(self, form: str, *operands: jax.Array, into: Any, **more: Any) -> jax.Array:
        """A product, written with i for the inputs and o for the outputs."""
        letters = form.replace("i", self.inputs.lower()).replace("o", self.outputs.lower())
        return jnp.einsum(letters, *operands, out_sharding=out(into), **more)


def _forward(where: _Where, x: jax.Array, weight: jax.Array) -> jax.Array:
    return where.einsum("bti,io->bto", x, where.used(weight), into=where.sharding.activation("BT" + where.outputs))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(where: _Where, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`_forward` with a matrix of a longer type, whose gradient is summed in that type, over tokens and devices alike.

    Autodiff would sum in the shorter one, since there it is that the product is taken. It would also make the transpose
    of the gradient, and on a CPU a transposed copy of all the outputs' gradients for that: so on one device, where no
    weights have to be gathered again, matrices of one type are handled so too.
    """
    return _forward(where, x, weight)


def _mixed_forward(where: _Where, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _forward(where, x, weight), (x, weight)


def _mixed_backward(
    where: _Where, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    # Gradients lie as their operands do: as the rules say, or whole where a fork multiplies arrays that nobody placed.
    like_x, like_weight = (jax.typeof(operand).sharding.spec for operand in kept)
    for_x = where.einsum("bto,io->bti", gradient, where.used(weight), into=like_x)
    for_weight = where.einsum("bti,bto->io", x, gradient, into=like_weight, preferred_element_type=weight.dtype)
    return for_x, for_weight


_mixed.defvjp(_mixed_forward, _mixed_backward)
