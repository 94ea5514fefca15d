"""How much each part of a decoder does on given text: what is kept where a student is smaller than its teacher.

Let agg(a) = sqrt(sum over rows b of (mean over the tokens t of row b of |a_bt|)^2): the mean over the sequence and the
L2 norm over the batch, the pair that Muralidharan et al. 2024 ("Compact Language Models via Pruning and Knowledge
Distillation", section 2.2 and its ablation of aggregations) found best. Then

    head n of a layer           agg(|| what head n mixes from the values ||_2)
    feed-forward unit f         agg(what `down` reads: activation(h gate) * (h up), or activation(h up))
    unit f of expert e          the same, times the share of e at each token
    expert e                    agg(share of e), 0 where a token does not take it
    feature d of the stream     agg(what the layer's attention reads) + agg(what its feed-forward reads), summed over
                                the layers that are kept, + agg(what the head reads): the norms' outputs
    layer                       mean over tokens of 1 - cos(x_in, x_out): block influence (Men et al. 2024, ShortGPT)

The paper sums X W_1 for a feed-forward unit; where the unit is gated or its activation is not monotone, what the next
product reads is meant, as in the authors' code. Padding (segment 0) counts nowhere.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from epigone.errors import UserError
from epigone.models.config import DecoderConfig
from epigone.models.decoder import Weights, arrays, block, structure
from epigone.models.experts import route
from epigone.models.sharding import Sharding, check_batch, in_mesh, named, out, placed, spread

Tokens = tuple[Any, Any, Any]
"""tokens_BT, positions_BT, segments_BT."""


class Activity(NamedTuple):
    """A score for every unit of a decoder, float32; units with higher scores are kept.

    influence_L of the layers, stream_LD and final_D of the stream's features as the layers and the head read them,
    heads_LN of the query heads, experts_LE (E is 0 without experts), ff_LF of the feed-forward's units: [L, E, F] with
    experts.
    """

    influence_L: Any
    stream_LD: Any
    final_D: Any
    heads_LN: Any
    experts_LE: Any
    ff_LF: Any


def measure(
    config: DecoderConfig, params: nnx.State, batches: Iterable[Tokens], sharding: Sharding = Sharding()
) -> Activity:
    """The activity of every unit on `batches` of one shape, on the mesh that is set: one program, one pass.

    Every process gives the same whole batches. Raises UserError when there is no token in them.
    """
    sums, tokens = None, 0
    for batch in batches:
        check_batch(sharding, len(batch[0]))
        tokens += int((np.asarray(batch[2]) > 0).sum())
        rows = spread(tuple(batch), (named(sharding.activation("BT")),) * 3) if in_mesh() else batch
        more = _sums(config, sharding, params, *rows)
        sums = more if sums is None else jax.tree.map(jnp.add, sums, more)
    if sums is None or not tokens:
        raise UserError("no text to weigh the teacher's units on: give calibration batches with at least one token")
    influence_L, *squares = map(np.asarray, sums)
    stream_LPD, *rest = map(np.sqrt, squares)
    return Activity(influence_L / tokens, stream_LPD.sum(1), *rest)


@partial(jax.jit, static_argnums=(0, 1))
def _sums(
    config: DecoderConfig, sharding: Sharding, params: nnx.State, tokens_BT: Any, positions_BT: Any, segments_BT: Any
) -> Activity:
    """Of one batch: squared means summed over its rows, and 1 - cos summed over its tokens; stream [L, 2, D]."""
    model = nnx.merge(structure(config, sharding), params)
    mask_BT = (segments_BT > 0).astype(jnp.float32)
    bound, at_layer = model.by_layer(positions_BT, segments_BT)
    square = partial(_square, mask_BT)

    def layer(x_BTD: jax.Array, slices: Any) -> tuple[jax.Array, Any]:
        weights, bound = slices
        angles, attention = at_layer(bound)

        def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            mixed_BTNH = attention(q, k, v)
            return mixed_BTNH, square(jnp.linalg.norm(mixed_BTNH.astype(jnp.float32), axis=-1))

        y_BTD, heads_N = block(config, sharding, weights, x_BTD, angles, mix)
        between_BTD, _ = block(config, sharding, _without_feed_forward(weights), x_BTD, angles, mix)
        reads = [_read(config, weights, name, x) for name, x in (("attention", x_BTD), ("ff", between_BTD))]
        experts_E, ff_F = _feed_forward(config, sharding, weights, reads[1], square)
        stream_PD = jnp.stack([square(read_BTD) for read_BTD in reads])
        return y_BTD, (_turned(mask_BT, x_BTD, y_BTD), stream_PD, heads_N, experts_E, ff_F)

    start_BTD = model.embed(tokens_BT, positions_BT)
    x_BTD, (influence, stream, heads, experts, ff) = jax.lax.scan(layer, start_BTD, (arrays(model.layers), bound))
    sums = Activity(influence, stream, square(model.finish(x_BTD)), heads, experts, ff)
    return jax.tree.map(lambda x: placed(x, P()), sums)


def _square(mask_BT: jax.Array, a_BTU: jax.Array) -> jax.Array:
    """Sum over rows of (mean over the row's tokens of |a|)^2, [units]; a row without tokens adds 0."""
    share_BT = mask_BT / jnp.maximum(mask_BT.sum(1, keepdims=True), 1.0)
    mean_BU = jnp.einsum("bt,btu->bu", share_BT, jnp.abs(a_BTU.astype(jnp.float32)))
    return jnp.sum(mean_BU**2, axis=0)


def _turned(mask_BT: jax.Array, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
    """1 - cos(x, y), summed over tokens."""
    x, y = x_BTD.astype(jnp.float32), y_BTD.astype(jnp.float32)
    sizes_BT = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.sum(mask_BT * (1.0 - (x * y).sum(-1) / jnp.maximum(sizes_BT, 1e-30)))


def _without_feed_forward(weights: Weights) -> Weights:
    """The same layer with a feed-forward that gives 0, so that what comes out is what the feed-forward took."""
    silent = ("down_", "ff_post_norm_")
    return {name: jnp.zeros_like(w) if name.startswith(silent) else w for name, w in weights.items()}


def _read(config: DecoderConfig, weights: Weights, name: str, x_BTD: jax.Array) -> jax.Array:
    """What the attention or the feed-forward of a layer reads from the stream."""
    if not config.pre_norm:
        return x_BTD
    scale, bias = weights[f"{name}_norm_scale_LD"], weights.get(f"{name}_norm_bias_LD")
    return config.norm(x_BTD, placed(scale, P()), None if bias is None else placed(bias, P()), config.norm_epsilon)


def _feed_forward(
    config: DecoderConfig, sharding: Sharding, weights: Weights, h_BTD: jax.Array, square: Callable[..., jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """_square of the experts' shares [E], and of what `down` reads [F]; [E, F] with experts, one after the other."""
    names = ("up", "gate") if config.gated else ("up",)
    if not config.experts:
        linear = [_linear(config, sharding, weights, name, h_BTD) for name in names]
        return jnp.zeros(0), square(_activated(config, *linear))
    shares_BTE = _shares(config, sharding, weights, h_BTD)

    def one(slices: tuple[Weights, jax.Array]) -> jax.Array:
        linear = [_linear(config, sharding, slices[0], name, h_BTD) for name in names]
        return square(slices[1][:, :, None] * _activated(config, *linear))

    # One expert after the other, on all devices.
    where = replace(sharding, E=()).weight("EDF")
    matrices = {f"{name}_LDF": placed(weights[f"{name}_LEDF"], where) for name in names}
    return square(shares_BTE), jax.lax.map(one, (matrices, jnp.moveaxis(shares_BTE, 2, 0)))


def _activated(config: DecoderConfig, up_BTF: jax.Array, gate_BTF: jax.Array | None = None) -> jax.Array:
    return config.activation(up_BTF) if gate_BTF is None else config.activation(gate_BTF) * up_BTF


def _shares(config: DecoderConfig, sharding: Sharding, weights: Weights, h_BTD: jax.Array) -> jax.Array:
    """The weight of each expert at each token, 0 for those that it does not take."""
    router_DE = placed(weights["router_LDE"], P())
    p_BTC, experts_BTC = jax.vmap(lambda h_TD: route(config, h_TD, router_DE))(h_BTD)
    return jnp.sum(p_BTC[..., None] * jax.nn.one_hot(experts_BTC, config.sizes.E), axis=2)


def _linear(config: DecoderConfig, sharding: Sharding, weights: Weights, name: str, h_BTD: jax.Array) -> jax.Array:
    weight_DF = placed(weights[f"{name}_LDF"].astype(config.compute_dtype), sharding.gathered("DF"))
    y_BTF = jnp.einsum("btd,df->btf", h_BTD, weight_DF, out_sharding=out(sharding.activation("BTF")))
    bias = weights.get(f"{name}_bias_LF")
    return y_BTF if bias is None else y_BTF + placed(bias.astype(config.compute_dtype), sharding.gathered("F"))
