"""Matrices of the layers, and what they are multiplied with, on the grid of a shorter type; gradients pass straight.

The numbers that are multiplied are those of the type, times a scale: q(x) = scale round(x / scale). They are made by
qwix; its own interception of products does not see the weights of a scan over layers, and drops where results lie on a
mesh, so its arrays are used and not its providers. Backward q is the identity (the straight-through estimator, Bengio
et al. 2013): the weights themselves stay float32, and collect steps that are too small to change what is multiplied.

A scale is the largest absolute value over the type's largest number, 127, 7 or 448: of each output of a matrix, or of
each block of its inputs; of each token, where activations are rounded. So zero and the largest are exact, and what is
rounded already stays as it is, up to the last bit of its scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from epigone.errors import UserError
from epigone.models.sharding import in_mesh

TYPES: Mapping[str, Any] = {"int8": jnp.int8, "int4": jnp.int4, "fp8": jnp.float8_e4m3fn}

CALIBRATION = {"int8": f"absmax,{127.5 / 127}", "int4": f"absmax,{7.5 / 7}", "fp8": "absmax"}
"""qwix puts the largest value half a step above the largest integer, where a last bit decides between -7 and -8; with
these factors it is that integer."""


@dataclass(frozen=True)
class Quantization:
    """In which types the products of the layers are taken. Embeddings, output head, norms and biases stay as they are.

    Attributes:
        weights: int8, int4 or fp8 (e4m3) for the matrices of attention and feed-forward; None for none.
        activations: int8, int4 or fp8 for what they are multiplied with, by the token; None for none.
        block: inputs of a matrix that share a scale; None: all of an output.
    """

    weights: str | None = "int8"
    activations: str | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        for name in ("weights", "activations"):
            if getattr(self, name) not in (None, *TYPES):
                raise UserError(f"quantization: {name}='{getattr(self, name)}' is not one of {', '.join(TYPES)}")
        if self.weights is None and self.activations is None:
            raise UserError("quantization of neither weights nor activations: name a type, or leave it out")
        if self.block is not None and (self.block < 1 or self.weights is None):
            raise UserError(f"quantization: block={self.block} must be at least 1 input of weights that are rounded")


def check(how: Quantization, inputs: Mapping[str, int]) -> None:
    """Refuse blocks that do not divide a matrix, and quantization without qwix. `inputs`: their number by its name."""
    library()
    for name, size in inputs.items():
        if size % (how.block or 1):
            raise UserError(f"quantization: block={how.block} does not divide the {size} inputs of '{name}'")


def library() -> Any:
    """qwix, which is not installed by default."""
    try:
        import qwix
    except ImportError:
        raise UserError("quantization needs qwix: pip install 'epigone[quantization]'") from None
    return qwix


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def rounded(x: jax.Array, kind: str, inputs: tuple[int, ...], block: int | None = None) -> jax.Array:
    """The nearest numbers of a type, times their scale; found in float32, and given in the type of x.

    Args:
        x: a weight, or what it is multiplied with.
        kind: int8, int4 or fp8.
        inputs: neighbouring axes that are summed over in the product: these share a scale, all others have their own.
        block: of the inputs, in their order, as many share one; None: all.
    """
    nearest = partial(_nearest, kind=kind, inputs=inputs, block=block)
    if not in_mesh():
        return nearest(x)
    # qwix knows no explicit shardings: inside it, the compiler places what lies between.
    return jax.sharding.auto_axes(nearest, out_sharding=jax.typeof(x).sharding)(x)


def _rounded_forward(x: jax.Array, kind: str, inputs: tuple[int, ...], block: int | None) -> tuple[jax.Array, None]:
    return rounded(x, kind, inputs, block), None


def _rounded_backward(kind: str, inputs: Any, block: Any, kept: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (gradient,)


rounded.defvjp(_rounded_forward, _rounded_backward)


def _nearest(x: jax.Array, kind: str, inputs: tuple[int, ...], block: int | None) -> jax.Array:
    first, last = inputs[0], inputs[-1] + 1
    flat = x.astype(jnp.float32).reshape(*x.shape[:first], prod(x.shape[first:last]), *x.shape[last:])
    qwix, others = library(), tuple(axis for axis in range(flat.ndim) if axis != first)
    tiles = {first: block} if block else {}
    array = qwix.quantize(
        flat, TYPES[kind], channelwise_axes=others, tiled_axes=tiles, calibration_method=CALIBRATION[kind]
    )
    return qwix.dequantize(array).reshape(x.shape).astype(x.dtype)
