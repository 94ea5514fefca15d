"""What decoder families are made of: norms, activations, positions, remat policies. All plain functions.

A DecoderConfig holds these functions themselves. A new family adds a function of the same signature.
"""

import jax
import jax.numpy as jnp

from epigone.models.rope import LongRopeScaling, RopeScaling, frequencies

Angles = tuple[jax.Array, jax.Array]


def rms_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) * scale [+ bias], over the axes that scale has, in float32.

    Source: Zhang & Sennrich 2019.
    """
    return _affine(_root_mean_square(x, scale.ndim, epsilon), scale, bias).astype(x.dtype)


def offset_rms_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float) -> jax.Array:
    """rms_norm with 1 + scale in place of scale, which starts at 0 (Gemma)."""
    return _affine(_root_mean_square(x, scale.ndim, epsilon), 1.0 + scale.astype(jnp.float32), bias).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float) -> jax.Array:
    """(x - mean) / sqrt(var + epsilon) * scale [+ bias], over the axes that scale has, in float32 (Ba et al. 2016)."""
    x_float = x.astype(jnp.float32)
    centred = x_float - jnp.mean(x_float, axis=_last(scale.ndim), keepdims=True)
    return _affine(_root_mean_square(centred, scale.ndim, epsilon), scale, bias).astype(x.dtype)


def _root_mean_square(x: jax.Array, axes: int, epsilon: float) -> jax.Array:
    x_float = x.astype(jnp.float32)
    return x_float * jax.lax.rsqrt(jnp.mean(x_float**2, axis=_last(axes), keepdims=True) + epsilon)


def _last(axes: int) -> tuple[int, ...]:
    return tuple(range(-axes, 0))


def _affine(x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x * scale if bias is None else x * scale + bias


def silu(x: jax.Array) -> jax.Array:
    """x * sigmoid(x); gated, this is SwiGLU (Shazeer 2020)."""
    return jax.nn.silu(x)


def gelu(x: jax.Array) -> jax.Array:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the form of GPT-2 (Hendrycks & Gimpel 2016)."""
    return jax.nn.gelu(x, approximate=True)


def exact_gelu(x: jax.Array) -> jax.Array:
    """x times the standard normal distribution function at x."""
    return jax.nn.gelu(x, approximate=False)


def rotary(positions_BT: jax.Array, size: int, theta: float, scaling: RopeScaling | None = None) -> Angles:
    """Factor times cosines and sines [B, T, size / 2] of position * theta^(-2i / size) (Su et al. 2021), or as scaled.

    With LongRopeScaling a row takes the long factors when its largest position is beyond the original length.
    """
    inverse, factor = scaling.frequencies(size, theta) if scaling else (frequencies(size, theta), 1.0)
    if isinstance(scaling, LongRopeScaling):
        long, _ = scaling.frequencies(size, theta, long=True)
        far_B11 = jnp.max(positions_BT, axis=1)[:, None, None] >= scaling.original_max_length
        angles = positions_BT[..., None].astype(jnp.float32) * jnp.where(far_B11, long, inverse)
    else:
        angles = positions_BT[..., None].astype(jnp.float32) * inverse
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if factor == 1.0 else (factor * cos, factor * sin)


def learned(positions_BT: jax.Array, size: int, theta: float, scaling: RopeScaling | None = None) -> None:
    """No rotation: a decoder with this choice adds a row of a trained table to each embedding instead."""


def rotate(x_BTNH: jax.Array, angles: Angles | None) -> jax.Array:
    """Rotate feature i with feature i + R/2 by the angles [B, T, R/2], in float32; features behind R stay as they are.

    None leaves all of x as it is.
    """
    if angles is None:
        return x_BTNH
    cos, sin = (a[:, :, None, :] for a in angles)
    half = cos.shape[-1]
    x_float = x_BTNH.astype(jnp.float32)
    first, second, rest = x_float[..., :half], x_float[..., half : 2 * half], x_BTNH[..., 2 * half :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), so that |x| < cap (Gemma 2); None leaves x as it is."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def save_nothing(primitive, *args, **params) -> bool:
    """Remat policy: keep only each layer's input and compute the rest again in the backward pass."""
    return jax.checkpoint_policies.nothing_saveable(primitive, *args, **params)


def save_products(primitive, *args, **params) -> bool:
    """Remat policy: keep the results of matrix products with weights, compute the rest again."""
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
