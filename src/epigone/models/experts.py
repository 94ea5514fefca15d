"""Mixtures of experts: each token goes through a few of many feed-forwards, which a router chooses.

Letters as in `models/decoder.py`, and within this file: T tokens of one device, C experts a token takes, M rows: T C
pairs of a token and one of its experts, sorted by expert.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from epigone.devices import platform_in_use
from epigone.models.sharding import Sharding, in_mesh, placed

BLOCK_ROWS = 256
"""Rows of one expert in one product: enough to read its weights at no noticeable cost, few enough to waste none."""


def mixture(config: Any, sharding: Sharding, weights: dict[str, jax.Array], x_BTD: jax.Array) -> jax.Array:
    """sum over the chosen experts e of p_e feed_forward_e(x), with p = softmax(x router) in float32 [B, T, D].

    The `experts_per_token` largest p are chosen, and divided by their sum where `normalise_experts` says so (Shazeer
    et al. 2017; as in Mixtral and Qwen3-MoE). No token is dropped, and each is computed by its own experts alone. On a
    mesh tokens stay where they are, every device has its share of each expert's features, and one sum is exchanged.
    """
    names = ["router_LDE", *(["gate_LEDF"] if config.gated else []), "up_LEDF", "down_LEFD"]
    specs = [sharding.gathered(name.split("_L")[1]) for name in names]
    used = [placed(weights[name], spec) for name, spec in zip(names, specs, strict=True)]
    if not in_mesh():
        return _local(config, (), x_BTD, *used)
    hidden, whole, cut = sharding.activation("BTD"), sharding.B, sharding.F

    def local(x_BTD: jax.Array, router_DE: jax.Array, *matrices: jax.Array) -> jax.Array:
        x_BTD, router_DE = _varying(x_BTD, cut), _varying(router_DE, (*whole, *cut))
        matrices = tuple(_varying(matrix, whole) for matrix in matrices)
        return jax.lax.psum(_local(config, (*whole, *cut), x_BTD, router_DE, *matrices), cut)

    return jax.shard_map(local, in_specs=(hidden, *specs), out_specs=hidden)(x_BTD, *used)


def _varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`x`, declared to differ along mesh axes over which it is the same: backward its gradient is summed over them."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _local(
    config: Any, axes: tuple[str, ...], x_BTD: jax.Array, router_DE: jax.Array, *matrices: jax.Array
) -> jax.Array:
    """The mixture of one device's tokens, over its own share of the experts' features."""
    B, T, D = x_BTD.shape
    x_TD, dtype = x_BTD.reshape(B * T, D), config.compute_dtype
    p_TC, experts_TC = route(config, x_TD, router_DE)
    order_M = jnp.argsort(experts_TC.reshape(-1), stable=True)
    inverse_M = jnp.argsort(order_M)
    sizes_E = jnp.bincount(experts_TC.reshape(-1), length=config.experts)
    rows_MD = jnp.broadcast_to(x_TD[:, None], (*p_TC.shape, D)).reshape(-1, D)
    rows_MD = permuted(rows_MD, order_M, inverse_M)
    product = partial(grouped_product, sizes_E=sizes_E, axes=axes)
    *gate, up_MF = (product(rows_MD, w_EDF.astype(dtype)) for w_EDF in matrices[:-1])
    up_MF = config.activation(gate[0]) * up_MF if gate else config.activation(up_MF)
    given_MD = permuted(product(up_MF, matrices[-1].astype(dtype)), inverse_M, order_M)
    mixed_TD = jnp.einsum("tc,tcd->td", p_TC, given_MD.reshape(*p_TC.shape, D), preferred_element_type=jnp.float32)
    return mixed_TD.astype(dtype).reshape(B, T, D)


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

    The sizes sum to M; `axes` are the mesh axes along which the inputs differ, inside a shard_map. On a TPU this is one
    kernel of the compiler; elsewhere that one would make E copies of all rows, and a loop over blocks of rows does only
    the work that there is.
    """
    if platform_in_use() == "tpu":
        return jax.lax.ragged_dot(x_MD, w_EDF, sizes_E)
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
    return x_gradient_MD, _rows_times_rows(x_MD, gradient_MF, sizes_E, axes).astype(w_EDF.dtype), None


blocked_product.defvjp(_blocked_forward, _blocked_backward)


def _rows_times_matrices(
    x_MD: jax.Array, w: jax.Array, sizes_E: jax.Array, axes: tuple[str, ...], contracted: int
) -> jax.Array:
    """Blocks run in order, so what one writes behind its group's end is overwritten by the next group's first."""
    M, features = len(x_MD), w.shape[2 - contracted]
    rows = block_rows(M, len(sizes_E))
    x_MD = jnp.pad(x_MD, ((0, rows), (0, 0)))

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        expert, start, _ = _block(i, sizes_E, rows)
        block = jax.lax.dynamic_slice_in_dim(x_MD, start, rows)
        product = jax.lax.dot_general(block, w[expert], (((1,), (contracted,)), ((), ())))
        return jax.lax.dynamic_update_slice_in_dim(y, product, start, axis=0)

    empty = _varying(jnp.zeros((M + rows, features), x_MD.dtype), axes)
    return jax.lax.fori_loop(0, _block_count(sizes_E, rows), step, empty)[:M]


def _rows_times_rows(x_MD: jax.Array, y_MF: jax.Array, sizes_E: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """x^T y within each group [E, D, F], in float32."""
    rows = block_rows(len(x_MD), len(sizes_E))
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
