"""One token at a time: keys and values of what was read before, in a ring that all rows share.

The ring is indexed by decoding step, not by a row's own position: at step t every row writes column t mod S, in
place and with no scatter, and sees the columns written since its own document began. So a row may start a new
document at any step, at no cost, and a prompt that has been read is laid into the columns just before step t.

What is kept of a token depends on what is before it alone, with one exception: where rotations depend on a row's length
(LongRopeScaling), a row that grows across the original length keeps what it has read by the factors of short rows, and
the forward pass over the whole row would read all of it by those of long ones.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from epigone.models.attention import MASKED
from epigone.models.config import DecoderConfig
from epigone.models.decoder import Decoder, Weights, arrays, block, never_predicted
from epigone.models.layers import soft_cap
from epigone.models.projections import on_grid
from epigone.models.sharding import Sharding, in_mesh, out, placed

Ring = tuple[jax.Array, jax.Array]
"""Keys and values of one layer, [B K, S, H] each. Rows and heads are one axis, as in the products that read them:
with two, the compiler would copy the ring at every step."""


def ring_sharding(sharding: Sharding) -> P:
    """Rings are cut over the axes of the batch and of the key heads; each device holds its own rows and heads."""
    return P((*sharding.B, *sharding.K) or None)


def empty_rings(model: Decoder, rows: int, columns: int) -> list[Ring]:
    """Rings in which nothing is written yet, one a layer: each its own array, so that it is updated in place."""
    s = model.config.sizes
    shape, cut = (rows * s.K, columns, s.H), out(ring_sharding(model.sharding))
    zeros = [jnp.zeros(shape, model.config.compute_dtype, out_sharding=cut) for _ in range(2 * s.L)]
    return list(zip(zeros[::2], zeros[1::2], strict=True))


def prefill(
    model: Decoder, columns: int, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array
) -> list[Ring]:
    """Rings with T tokens read, in columns 0 to T - 1. Rows may be padded on either side, with segment 0."""
    sharding = model.sharding
    keys, values = read_all(model, tokens_BT, positions_BT, segments_BT)
    return [(_ring(sharding, k, columns), _ring(sharding, v, columns)) for k, v in zip(keys, values, strict=True)]


def read_all(
    model: Decoder, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Keys and values [L, B, T, K, H] of whole rows, as in the forward pass."""
    config, sharding = model.config, model.sharding
    bound, at_layer = model.by_layer(positions_BT, segments_BT)

    def layer(x_BTD: jax.Array, slices: tuple[Weights, jax.Array | None]) -> tuple[jax.Array, Ring]:
        weights, bound = slices
        angles, attention = at_layer(bound)

        def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Ring]:
            return attention(q, k, v), (k, v)

        return block(config, sharding, weights, x_BTD, angles, mix)

    return jax.lax.scan(layer, model.embed(tokens_BT, positions_BT), (arrays(model.layers), bound))[1]


def _ring(sharding: Sharding, x_BTKH: jax.Array, columns: int) -> jax.Array:
    """Keys or values of T tokens as the first columns of a ring."""

    def local(x_BTKH: jax.Array) -> jax.Array:
        B, T, K, H = x_BTKH.shape
        return jnp.pad(x_BTKH.transpose(0, 2, 1, 3).reshape(B * K, T, H), ((0, 0), (0, columns - T), (0, 0)))

    if not in_mesh():
        return local(x_BTKH)
    cut = jax.shard_map(local, in_specs=(sharding.activation("BTKH"),), out_specs=ring_sharding(sharding))
    return cut(x_BTKH)


def lay(
    model: Decoder, rings: list[Ring], keys: jax.Array, values: jax.Array, slot_R: jax.Array, first: jax.Array
) -> list[Ring]:
    """The rings, in which R rows hold what `read_all` found for them, in columns first, first + 1, ... mod S.

    Whatever these rows held before is gone. `slot_R` says which rows they are; one that is named twice is the same
    both times. Keys and values are [L, R, T, K, H] with T at most S.
    """
    sharding, columns = model.sharding, rings[0][0].shape[1]
    whole = P(None, None, None, sharding.K or None, None)

    def local(ring: jax.Array, new_RTKH: jax.Array, slot_R: jax.Array, first: jax.Array) -> jax.Array:
        R, T, K, H = new_RTKH.shape
        rows = ring.shape[0] // K
        begin = _index(sharding.B) * rows
        padded = jnp.pad(new_RTKH.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, columns - T), (0, 0)))
        turned = jnp.roll(padded, first % columns, axis=2)

        def put(r: jax.Array, ring: jax.Array) -> jax.Array:
            row = slot_R[r] - begin
            at = (jnp.clip(row, 0, rows - 1) * K, 0, 0)
            old = jax.lax.dynamic_slice(ring, at, (K, columns, H))
            new = jnp.where((row >= 0) & (row < rows), turned[r], old)
            return jax.lax.dynamic_update_slice(ring, new, at)

        return jax.lax.fori_loop(0, R, put, ring)

    run, cut = local, ring_sharding(sharding)
    if in_mesh():
        keys, values = placed(keys, whole), placed(values, whole)
        run = jax.shard_map(local, in_specs=(cut, P(*whole[1:]), P(), P()), out_specs=cut)
    laid = [
        [run(ring, new, slot_R, first) for ring, new in zip(pair, news, strict=True)]
        for pair, news in zip(rings, zip(keys, values, strict=True), strict=True)
    ]
    return [(k, v) for k, v in laid]


def _index(axes: tuple[str, ...]) -> jax.Array | int:
    """Which part of an array that is cut over these axes is on this device; 0 when no mesh is set."""
    return jax.lax.axis_index(axes) if in_mesh() and axes else 0


def ready(config: DecoderConfig, group: nnx.Dict) -> Weights:
    """The arrays of a group of parameters as they are multiplied, matrices in the type of the computation.

    `config.on_grid` is the config of a model that has them.
    """
    kind = config.compute_dtype
    weights = on_grid(config, arrays(group))
    return {n: w if "norm" in n or w.dtype == kind else w.astype(kind) for n, w in weights.items()}


def unstacked(model: Decoder) -> list[Weights]:
    """The weights of each layer. Sliced and converted once, before the loop, they are not copied at every step."""
    weights = ready(model.config, model.layers)
    return [{name: w[i] for name, w in weights.items()} for i in range(model.config.layers)]


def read_one(
    model: Decoder,
    layers: list[Weights],
    rings: list[Ring],
    step: jax.Array,
    token_B: jax.Array,
    position_B: jax.Array,
) -> tuple[jax.Array, list[Ring]]:
    """Logits [B, V] after one more token in each row, which is written into column `step` mod S.

    A row at position p sees itself and the p columns before, or those of them that lie in a layer's window.
    """
    config, sharding = model.config, model.sharding
    columns = rings[0][0].shape[1]
    column = step % columns
    age_S = (column - jnp.arange(columns)) % columns

    def seen(window: int | None) -> jax.Array:
        last_B = jnp.minimum(position_B, (window or columns) - 1)
        return placed(age_S[None, :] <= last_B[:, None], sharding.activation("BS"))

    one = sharding.activation("BT")
    tokens_B1, positions_B1 = (placed(x[:, None], one) for x in (token_B, position_B))
    masks, angles = (seen(None), seen(config.window)), model.angles(positions_B1)
    x_B1D, written = model.embed(tokens_B1, positions_B1), []
    for weights, ring, bound in zip(layers, rings, config.windowed_layers, strict=True):
        mix = _ring_mix(model, ring, column, masks[bound])
        x_B1D, ring = block(config.on_grid, sharding, weights, x_B1D, angles[bound], mix)
        written.append(ring)
    return _next_logits(model, model.finish(x_B1D)), written


def _next_logits(model: Decoder, hidden_B1D: jax.Array) -> jax.Array:
    """`model.logits` [B, V] of one token a row, by a product with the vocabulary first: on a CPU it is a third faster.

    Of many tokens a row it would not be, for the result is turned round.
    """
    config, sharding = model.config, model.sharding
    head_VD = placed(model.head_VD.astype(config.compute_dtype), sharding.gathered("VD"))
    cut = out(sharding.activation("VB"))
    hidden_BD = hidden_B1D[:, 0]
    raw_VB = jnp.einsum("vd,bd->vb", head_VD, hidden_BD, preferred_element_type=jnp.float32, out_sharding=cut)
    return never_predicted(config, sharding, soft_cap(raw_VB.T[:, None], config.logit_softcap))[:, 0]


def _ring_mix(
    model: Decoder, ring: Ring, column: jax.Array, mask_BS: jax.Array
) -> Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Ring]]:
    """Attention of one query a row over the ring, after its own key and value are written into it."""
    sharding, cap, scale = model.sharding, model.config.attention_softcap, model.config.score_scale

    def local(q, k, v, keys, values, mask, column):
        B, _, N, H = q.shape
        K, S = k.shape[2], keys.shape[1]
        keys = jax.lax.dynamic_update_slice_in_dim(keys, k.reshape(B * K, 1, H), column, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(values, v.reshape(B * K, 1, H), column, axis=1)
        q = (q * scale).reshape(B * K, N // K, H)
        scores = jax.lax.dot_general(q, keys, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None], soft_cap(scores, cap).reshape(B, K, N // K, S), MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype).reshape(B * K, N // K, S)
        mixed = jax.lax.dot_general(weights, values, (((2,), (1,)), ((0,), (0,))))
        return mixed.reshape(B, 1, N, H), keys, values

    def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Ring]:
        run = local
        if in_mesh():
            heads, groups = sharding.activation("BTNH"), sharding.activation("BTKH")
            cache, mask = ring_sharding(sharding), sharding.activation("BS")
            specs = (heads, groups, groups, cache, cache, mask, P())
            run = jax.shard_map(local, in_specs=specs, out_specs=(heads, cache, cache))
        out_B1NH, keys, values = run(q, k, v, *ring, mask_BS, column)
        return out_B1NH, (keys, values)

    return mix
