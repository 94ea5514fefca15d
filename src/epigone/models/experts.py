"""Mixtures of experts: each token goes through a few of many feed-forwards, which a router chooses.

Letters as in `models/decoder.py`, and within this file: T tokens of one device, C experts a token takes, M rows: T C
pairs of a token and one of its experts, sorted by expert.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from epigone.devices import platform_in_use
from epigone.models.sharding import Sharding, in_mesh, placed

BLOCK_ROWS = 256
"""Rows of one expert in one product: enough to read its weights at no noticeable cost, few enough to waste none."""


def mixture(config: Any, sharding: Sharding, weights: dict[str, jax.Array], x_BTD: jax.Array) -> jax.Array:
    """sum over the chosen experts e of p_e feed_forward_e(x), with p = softmax(x router) in float32 [B, T, D].

    The `experts_per_token` largest p are chosen, and divided by their sum where `normalise_experts` says so (Shazeer
    et al. 2017; as in Mixtral and Qwen3-MoE). No token is dropped, and each is computed by its own experts alone.

    On a mesh every device has its share of each expert's features, over which one sum is exchanged. Where experts are
    cut too, their n devices gather each other's tokens, each computes what its own experts say, and the sums are
    scattered back: 2 (n - 1) D numbers a token, whatever the router says. (An all-to-all sends at most 2 C D, and how
    many of them to one device nobody knows before.)
    """
    names = ["router_LDE", *(["gate_LEDF"] if config.gated else []), "up_LEDF", "down_LEFD"]
    # A token is scored by the whole router.
    specs = [P(), *(sharding.gathered(name.split("_L")[1]) for name in names[1:])]
    used = [placed(weights[name], spec) for name, spec in zip(names, specs, strict=True)]
    if not in_mesh():
        return _local(config, (), 0, x_BTD, *used)
    hidden, rows, held = sharding.activation("BTD"), sharding.B, sharding.E
    everywhere = tuple(dict.fromkeys((*rows, *held, *sharding.F)))
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    shared = tuple(axis for axis in held if axis in rows and sizes[axis] > 1)
    summed = (*sharding.F, *(axis for axis in held if axis not in rows))

    def local(x_BTD: jax.Array, router_DE: jax.Array, *matrices: jax.Array) -> jax.Array:
        first = jax.lax.axis_index(held) * len(matrices[0]) if held else 0
        if shared:
            x_BTD = jax.lax.all_gather(x_BTD, shared, axis=0, tiled=True)
        x_BTD, router_DE = _varying(x_BTD, everywhere, rows), _varying(router_DE, everywhere)
        matrices = tuple(_varying(matrix, everywhere, (*held, *sharding.F)) for matrix in matrices)
        mixed_BTD = jax.lax.psum(_local(config, everywhere, first, x_BTD, router_DE, *matrices), summed)
        return jax.lax.psum_scatter(mixed_BTD, shared, scatter_dimension=0, tiled=True) if shared else mixed_BTD

    return jax.shard_map(local, in_specs=(hidden, *specs), out_specs=hidden)(x_BTD, *used)


def _varying(x: jax.Array, axes: tuple[str, ...], known: tuple[str, ...] = ()) -> jax.Array:
    """`x`, declared to differ along mesh axes over which it is the same: backward its gradient is summed over them.

    Along those that are known it differs already.
    """
    more = tuple(axis for axis in axes if axis not in known)
    return jax.lax.pcast(x, more, to="varying") if more else x


def _local(
    config: Any, axes: tuple[str, ...], first: Any, x_BTD: jax.Array, router_DE: jax.Array, *matrices: jax.Array
) -> jax.Array:
    """What one device's experts, from `first` on, say of its tokens, over its own share of the experts' features."""
    B, T, D = x_BTD.shape
    x_TD, dtype, here = x_BTD.reshape(B * T, D), config.compute_dtype, len(matrices[0])
    p_TC, experts_TC = route(config, x_TD, router_DE)
    # Counted from the first one here, so that rows of other devices' experts stand last.
    places_M = ((experts_TC - first) % config.experts).reshape(-1)
    order_M = jnp.argsort(places_M, stable=True)
    inverse_M = jnp.argsort(order_M)
    sizes_E = jnp.bincount(places_M, length=config.experts)
    own_M1 = None if here == config.experts else (places_M[order_M] < here)[:, None]
    rows_MD = jnp.broadcast_to(x_TD[:, None], (*p_TC.shape, D)).reshape(-1, D)
    rows_MD = _kept(own_M1, permuted(rows_MD, order_M, inverse_M))
    product = partial(grouped_product, sizes_E=sizes_E, axes=axes)
    *gate, up_MF = (product(rows_MD, w_EDF.astype(dtype)) for w_EDF in matrices[:-1])
    up_MF = config.activation(gate[0]) * up_MF if gate else config.activation(up_MF)
    given_MD = _kept(own_M1, product(_kept(own_M1, up_MF), matrices[-1].astype(dtype)))
    given_MD = permuted(given_MD, inverse_M, order_M)
    mixed_TD = jnp.einsum("tc,tcd->td", p_TC, given_MD.reshape(*p_TC.shape, D), preferred_element_type=jnp.float32)
    return mixed_TD.astype(dtype).reshape(B, T, D)


def _kept(own_M1: jax.Array | None, rows_MD: jax.Array) -> jax.Array:
    """Zeros, and no gradient, in rows of other devices' experts, of which a product may say anything."""
    return rows_MD if own_M1 is None else jnp.where(own_M1, rows_MD, 0)


def route(config: Any, x_TD: jax.Array, router_DE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights [T, C] in float32 and indices [T, C] of the experts that each token takes, largest first."""
    scores_TE = jnp.einsum("td,de->te", x_TD, router_DE.astype(x_TD.dtype), preferred_element_type=jnp.float32)
    p_TC, experts_TC = jax.lax.top_k(jax.nn.softmax(scores_TE, axis=-1), config.experts_per_token)
    return p_TC / p_TC.sum(-1, keepdims=True) if config.normalise_experts else p_TC, experts_TC


@jax.custom_vjp
def permuted(x_MD: jax.Array, order_M: jax.Array, inverse_M: jax.Array) -> jax.Array:
    """The rows of x in another order. Backward it is the inverse order: a gather, where autodiff would scatter."""
    return x_MD[order_M]


def _permuted_forward(x_MD: jax.Array, order_M: jax.Array, inverse_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x_MD[order_M], inverse_M


def _permuted_backward(inverse_M: jax.Array, gradient_MD: jax.Array) -> tuple[jax.Array, None, None]:
    return gradient_MD[inverse_M], None, None


permuted.defvjp(_permuted_forward, _permuted_backward)


def grouped_product(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
    """Rows of group e times matrix e [M, F]: the first sizes_E[0] rows are of group 0, the next sizes_E[1] of group 1.

    The sizes sum to M. There may be fewer matrices than groups: the rows of the last groups then are anything.
    `axes` are the mesh axes along which the inputs differ, inside a shard_map. On a TPU this is one kernel of the
    compiler; elsewhere that one would make E copies of all rows, and a loop over blocks of rows does only the work that
    there is.
    """
    if platform_in_use() == "tpu":
        return jax.lax.ragged_dot(x_MD, w_EDF, sizes_E[: len(w_EDF)])
    return blocked_product(x_MD, w_EDF, sizes_E, axes)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def blocked_product(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
    """`grouped_product`, block by block."""
    return _rows_times_matrices(x_MD, w_EDF, sizes_E, axes, contracted=0)


def _blocked_forward(
    x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, axes: tuple[str, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return blocked_product(x_MD, w_EDF, sizes_E, axes), (x_MD, w_EDF, sizes_E)


def _blocked_backward(
    axes: tuple[str, ...], kept: tuple[jax.Array, ...], gradient_MF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_MD, w_EDF, sizes_E = kept
    x_gradient_MD = _rows_times_matrices(gradient_MF, w_EDF, sizes_E, axes, contracted=1)
    w_gradient_EDF = _rows_times_rows(x_MD, gradient_MF, sizes_E, len(w_EDF), axes)
    return x_gradient_MD, w_gradient_EDF.astype(w_EDF.dtype), None


blocked_product.defvjp(_blocked_forward, _blocked_backward)


@partial(jax.jit, static_argnames=("axes", "contracted"))
def _rows_times_matrices(
    x_MD: jax.Array, w: jax.Array, sizes_E: jax.Array, axes: tuple[str, ...], contracted: int
) -> jax.Array:
    """Blocks run in order, so what one writes behind its group's end is overwritten by the next group's first.

    A function of its own name in what is traced: how long its loop is nobody can know before (`planning/costs.py`).
    """
    M, features = len(x_MD), w.shape[2 - contracted]
    rows = block_rows(M, len(sizes_E))
    sizes_E = sizes_E[: len(w)]
    x_MD = jnp.pad(x_MD, ((0, rows), (0, 0)))

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        expert, start, _ = _block(i, sizes_E, rows)
        block = jax.lax.dynamic_slice_in_dim(x_MD, start, rows)
        product = jax.lax.dot_general(block, w[expert], (((1,), (contracted,)), ((), ())))
        return jax.lax.dynamic_update_slice_in_dim(y, product, start, axis=0)

    empty = _varying(jnp.zeros((M + rows, features), x_MD.dtype), axes)
    return jax.lax.fori_loop(0, _block_count(sizes_E, rows), step, empty)[:M]


@partial(jax.jit, static_argnames=("count", "axes"))
def _rows_times_rows(
    x_MD: jax.Array, y_MF: jax.Array, sizes_E: jax.Array, count: int, axes: tuple[str, ...]
) -> jax.Array:
    """x^T y within each of the first `count` groups [count, D, F], in float32."""
    rows = block_rows(len(x_MD), len(sizes_E))
    sizes_E = sizes_E[:count]
    x_MD, y_MF = (jnp.pad(a, ((0, rows), (0, 0))) for a in (x_MD, y_MF))

    def step(i: jax.Array, sums_EDF: jax.Array) -> jax.Array:
        expert, start, end = _block(i, sizes_E, rows)
        x, y = (jax.lax.dynamic_slice_in_dim(a, start, rows) for a in (x_MD, y_MF))
        x = jnp.where((start + jnp.arange(rows) < end)[:, None], x, 0)
        product = jax.lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return sums_EDF.at[expert].add(product)

    zeros = jnp.zeros((len(sizes_E), x_MD.shape[1], y_MF.shape[1]), jnp.float32)
    zeros = _varying(zeros, axes)
    return jax.lax.fori_loop(0, _block_count(sizes_E, rows), step, zeros)


def block_rows(rows: int, experts: int) -> int:
    """The power of two from 8 to 256 that takes in an expert's mean share of the rows."""
    return min(BLOCK_ROWS, max(8, 1 << (-(-rows // experts) - 1).bit_length()))


def _block_count(sizes_E: jax.Array, rows: int) -> jax.Array:
    return jnp.sum(-(-sizes_E // rows))


def _block(i: jax.Array, sizes_E: jax.Array, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Block i: its expert, its first row, and where its group ends."""
    last_E = jnp.cumsum(-(-sizes_E // rows))
    expert = jnp.sum(last_E <= i)
    end = jnp.cumsum(sizes_E)[expert]
    behind = last_E[expert] - i
    blocks = -(-sizes_E[expert] // rows)
    return expert, end - sizes_E[expert] + (blocks - behind) * rows, end
