"""What decoder families are made of: norms, activations, positions, remat policies. All plain functions.

A DecoderConfig holds these functions themselves. A new family adds a function of the same signature.
"""

import jax
import jax.numpy as jnp
import numpy as np

Angles = tuple[jax.Array, jax.Array]


def rms_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) * scale [+ bias], over the last axis, in float32 (Zhang & Sennrich 2019)."""
    x_float = x.astype(jnp.float32)
    normed = x_float * jax.lax.rsqrt(jnp.mean(x_float**2, axis=-1, keepdims=True) + epsilon)
    return _affine(normed, scale, bias).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float) -> jax.Array:
    """(x - mean) / sqrt(var + epsilon) * scale [+ bias], over the last axis, in float32 (Ba et al. 2016)."""
    x_float = x.astype(jnp.float32)
    centred = x_float - jnp.mean(x_float, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + epsilon)
    return _affine(normed, scale, bias).astype(x.dtype)


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


def rotary(positions_BT: jax.Array, head_size: int, theta: float) -> Angles:
    """Cosines and sines [B, T, head_size / 2] of position * theta^(-2i / head_size) (Su et al. 2021)."""
    frequencies = theta ** (-np.arange(0, head_size, 2, dtype=np.float32) / head_size)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def learned(positions_BT: jax.Array, head_size: int, theta: float) -> None:
    """No rotation: a decoder with this choice adds a row of a trained table to each embedding instead."""


def rotate(x_BTNH: jax.Array, angles: Angles | None) -> jax.Array:
    """Rotate feature i with feature i + H/2 by the angles, in float32; None leaves x as it is."""
    if angles is None:
        return x_BTNH
    cos, sin = (a[:, :, None, :] for a in angles)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), so that |x| < cap (Gemma 2); None leaves x as it is."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def save_nothing(primitive, *args, **params) -> bool:
    """Remat policy: keep only each layer's input and compute the rest again in the backward pass."""
    return jax.checkpoint_policies.nothing_saveable(primitive, *args, **params)


def save_products(primitive, *args, **params) -> bool:
    """Remat policy: keep the results of matrix products with weights, compute the rest again."""
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
