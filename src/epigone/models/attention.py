"""Scaled dot-product attention, and the one function that chooses how it is computed."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from epigone.devices import platform_in_use
from epigone.models.layers import soft_cap
from epigone.models.sharding import Sharding, in_mesh

MASKED = -1e30
"""The score of a position that may not be seen: finite, so that no row becomes NaN; its weight is exactly 0."""

LANES = 128
"""A TPU's kernel works on multiples of so many positions."""


def causal_mask(segments_BT: jax.Array, window: int | None) -> jax.Array:
    """Whether t may see s [B, T, T]: s <= t, same segment, and t - s < window."""
    steps = jnp.arange(segments_BT.shape[1])
    distance_TS = steps[:, None] - steps[None, :]
    near_TS = (distance_TS >= 0) & (distance_TS < window) if window else distance_TS >= 0
    return (segments_BT[:, :, None] == segments_BT[:, None, :]) & near_TS[None]


class Attention(NamedTuple):
    """How attention is computed, and why.

    Attributes:
        function: (q_BTNH, k_BSKH, v_BSKH, seen, cap, scale) -> out_BTNH.
        name: xla, cudnn or splash.
        reason: why this one.
        seen: (segments_BT, window) -> what the function takes as `seen`: which positions a token may see.
    """

    function: Callable[..., jax.Array]
    name: str
    reason: str
    seen: Callable[[jax.Array, int | None], Any] = causal_mask

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_attention(
    head_size: int,
    dtype: str,
    cap: float | None,
    *,
    window: int | None = None,
    length: int = LANES,
    platform: str | None = None,
) -> Attention:
    """The fastest implementation where it runs: cuDNN's on a GPU that can, JAX's splash kernel on a TPU, else XLA.

    Args:
        head_size: features of a head.
        dtype: type of the computation.
        cap: soft cap of the scores, or None.
        window: tokens that layers in a window see.
        length: tokens in a row.
        platform: `cpu`, `gpu` or `cuda`, `tpu`; by default that of the mesh that is set, or else of the process.
    """
    platform = platform or platform_in_use()
    if platform == "tpu":
        if length < LANES:
            return Attention(xla_attention, "xla", f"the splash kernel takes {LANES} tokens or more, not {length}")
        return Attention(
            partial(splash_attention, window), "splash", f"platform tpu, {length} tokens", segments_and_kind
        )
    if platform not in ("gpu", "cuda"):
        return Attention(xla_attention, "xla", f"platform {platform}")
    if dtype not in ("bfloat16", "float16"):
        return Attention(xla_attention, "xla", f"cuDNN attention does not take {dtype}")
    if head_size % 8 or head_size > 128:
        return Attention(xla_attention, "xla", f"cuDNN attention does not take head size {head_size}")
    if cap is not None:
        return Attention(xla_attention, "xla", "cuDNN attention has no soft cap")
    return Attention(cudnn_attention, "cudnn", f"platform {platform}, {dtype}, head size {head_size}")


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


class SegmentsAndKind(NamedTuple):
    """What the splash kernel takes: segments [B, T], and whether the window binds this layer."""

    segments_BT: jax.Array
    windowed: jax.Array | bool


def segments_and_kind(segments_BT: jax.Array, window: int | None) -> SegmentsAndKind:
    """What may be seen, without an array [T, T]."""
    return SegmentsAndKind(segments_BT, window is not None)


def splash_attention(
    window: int | None,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    seen: SegmentsAndKind,
    cap: float | None,
    scale: float,
    *,
    interpret: bool = False,
) -> jax.Array:
    """The same through the flash kernel for TPUs that JAX ships, which skips what is masked and keeps no scores.

    Rows are padded to a multiple of 128, in a segment of their own. `interpret` runs the kernel anywhere, slowly.
    """
    T = seen.segments_BT.shape[1]
    more = -T % LANES
    q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q_BTNH * scale, k_BTKH, v_BTKH))
    segments_BT = jnp.pad(seen.segments_BT, ((0, 0), (0, more)), constant_values=-1)
    shape = (q.shape[1], T + more, cap, interpret)

    def run(window: int | None) -> jax.Array:
        return _splash_kernel(window, *shape)(q, k, v, segments_BT)

    if window is None or isinstance(seen.windowed, bool):
        mixed = run(window if seen.windowed else None)
    else:
        mixed = jax.lax.cond(seen.windowed, lambda: run(window), lambda: run(None))
    return mixed.swapaxes(1, 2)[:, :T]


def _splash_kernel(
    window: int | None, heads: int, length: int, cap: float | None, interpret: bool
) -> Callable[..., jax.Array]:
    """(q [B, N, T, H], k and v [B, K, T, H], segments [B, T]) -> [B, N, T, H]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in (512, 256, LANES) if length % size == 0)
    kernel = splash.make_splash_mha(
        mask=splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(*(block,) * 8),  # of queries and keys, forward and in both backward passes
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )
    return jax.vmap(lambda q, k, v, segments: kernel(q, k, v, splash.SegmentIds(segments, segments)))


def attend(
    attention: Attention,
    sharding: Sharding,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    seen: Any,
    cap: float | None,
    scale: float,
) -> jax.Array:
    """Attention on each device's own rows and heads: nothing is exchanged between devices."""
    if not in_mesh():
        return attention.function(q_BTNH, k_BSKH, v_BSKH, seen, cap, scale)
    leaves, tree = jax.tree.flatten(seen)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *own: jax.Array) -> jax.Array:
        parts = iter(own)
        merged = [next(parts) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        return attention.function(q, k, v, jax.tree.unflatten(tree, merged), cap, scale)

    queries, keys = sharding.activation("BTNH"), sharding.activation("BTKH")
    specs = (queries, keys, keys, *(sharding.activation("BTS"[: leaf.ndim]) for leaf in arrays))
    # Kernels say nothing of how their results vary over the mesh.
    checked = attention.name != "splash"
    cut = jax.shard_map(local, in_specs=specs, out_specs=queries, check_vma=checked)
    return cut(q_BTNH, k_BSKH, v_BSKH, *arrays)
