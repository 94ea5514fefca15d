"""Scaled dot-product attention, and the one function that chooses how it is computed."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from epigone.models.layers import soft_cap
from epigone.models.sharding import Sharding, in_mesh

MASKED = -1e30
"""The score of a position that may not be seen: finite, so that no row becomes NaN; its weight is exactly 0."""


class Attention(NamedTuple):
    """How attention is computed, and why: `function(q_BTNH, k_BSKH, v_BSKH, mask_BTS, cap, scale) -> out_BTNH`."""

    function: Callable[..., jax.Array]
    name: str
    reason: str


def choose_attention(head_size: int, dtype: str, cap: float | None, backend: str | None = None) -> Attention:
    """The fastest implementation for a backend (default: the one in use): cuDNN on a GPU that can, else XLA."""
    backend = backend or jax.default_backend()
    if backend not in ("gpu", "cuda"):
        return Attention(xla_attention, "xla", f"backend {backend}")
    if dtype not in ("bfloat16", "float16"):
        return Attention(xla_attention, "xla", f"cuDNN attention does not take {dtype}")
    if head_size % 8 or head_size > 128:
        return Attention(xla_attention, "xla", f"cuDNN attention does not take head size {head_size}")
    if cap is not None:
        return Attention(xla_attention, "xla", "cuDNN attention has no soft cap")
    return Attention(cudnn_attention, "cudnn", f"backend {backend}, {dtype}, head size {head_size}")


def causal_mask(segments_BT: jax.Array, window: int | None) -> jax.Array:
    """Whether t may see s [B, T, T]: s <= t, same segment, and t - s < window."""
    steps = jnp.arange(segments_BT.shape[1])
    distance_TS = steps[:, None] - steps[None, :]
    near_TS = (distance_TS >= 0) & (distance_TS < window) if window else distance_TS >= 0
    return (segments_BT[:, :, None] == segments_BT[:, None, :]) & near_TS[None]


def xla_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, cap: float | None, scale: float
) -> jax.Array:
    """softmax(cap(scale q k) + mask) v, softmax in float32; N / K query heads share a key head.

    The products run over one merged batch axis [B K, G T, H]: on a CPU this is several times faster than
    an einsum over `BTNH`, and keys are never repeated.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q = (q_BTNH * scale).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B * K, -1, H)
    k, v = (x.transpose(0, 2, 1, 3).reshape(B * K, S, H) for x in (k_BSKH, v_BSKH))
    scores = jax.lax.dot_general(q, k, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)
    scores = soft_cap(scores, cap).reshape(B, K, N // K, T, S)
    weights = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores, MASKED), axis=-1)
    mixed = jax.lax.dot_general(weights.astype(v.dtype).reshape(B * K, -1, S), v, (((2,), (1,)), ((0,), (0,))))
    return mixed.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def cudnn_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, cap: float | None, scale: float
) -> jax.Array:
    """The same through cuDNN's fused kernel, without a soft cap."""
    mask = mask_BTS[:, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask, scale=scale, implementation="cudnn")


def attend(
    attention: Attention,
    sharding: Sharding,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    cap: float | None,
    scale: float,
) -> jax.Array:
    """Attention on each device's own rows and heads: nothing is exchanged between devices."""

    def local(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        return attention.function(q, k, v, mask, cap, scale)

    if not in_mesh():
        return local(q_BTNH, k_BSKH, v_BSKH, mask_BTS)
    queries, keys = sharding.activation("BTNH"), sharding.activation("BTKH")
    specs = (queries, keys, keys, sharding.activation("BTS"))
    return jax.shard_map(local, in_specs=specs, out_specs=queries)(q_BTNH, k_BSKH, v_BSKH, mask_BTS)
