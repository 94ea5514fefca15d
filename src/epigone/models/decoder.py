"""One decoder-only transformer; its families are fields of DecoderConfig.

Letters of the shape suffixes, everywhere in Epigone: B batch, T time, S source time, D model features,
N query heads, K key and value heads, H head features, F feed-forward features, V vocabulary, L layers,
C chunk, M samples or top-k entries.

    params = init(config, seed)                                  # nnx.State, cut over the mesh that is set
    logits_BTV = apply(config, params, tokens, positions, segments)

Inside a step of one's own: `model = nnx.merge(structure(config), params)`, `hidden = model(...)`,
`model.logits(hidden)`, and `model.head_VD` for losses that never make all logits.
"""

import zlib
from collections.abc import Callable
from functools import cache, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from epigone.errors import UserError
from epigone.models.attention import attend, causal_mask, choose_attention
from epigone.models.config import DecoderConfig, Weight, layer_weights, outer_weights
from epigone.models.language_model import BOS, PAD
from epigone.models.layers import Angles, learned, rotate, soft_cap
from epigone.models.sharding import Sharding, check, named, out, placed, suffix

NEVER = -1e9
"""The logit of what is never predicted: finite, and exactly 0 after a float32 softmax."""

Weights = dict[str, jax.Array]
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Decoder(nnx.Module):
    """The parameters of a decoder, and the two halves of its forward pass."""

    def __init__(self, config: DecoderConfig, key: jax.Array, sharding: Sharding = Sharding()) -> None:
        self.config = config
        self.sharding = sharding
        self.outer = nnx.Dict({n: _parameter(key, n, w, sharding) for n, w in outer_weights(config).items()})
        self.layers = nnx.Dict({n: _parameter(key, n, w, sharding) for n, w in layer_weights(config).items()})

    def __call__(
        self, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"], segments_BT: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm. A token sees itself and what is before it in its own segment.

        Raises UserError when learned positions are asked for more than max_length tokens.
        """
        config, sharding = self.config, self.sharding
        rows = (placed(x, sharding.activation("BT")) for x in (tokens_BT, positions_BT, segments_BT))
        tokens_BT, positions_BT, segments_BT = rows
        choice = choose_attention(config.sizes.H, config.dtype, config.attention_softcap)
        mask_BTS = causal_mask(segments_BT, config.window)
        angles = config.positions(positions_BT, config.sizes.H, config.rope_theta)

        def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            return attend(choice, sharding, q, k, v, mask_BTS, config.attention_softcap), None

        def layer(x_BTD: jax.Array, weights: Weights) -> tuple[jax.Array, None]:
            return block(config, sharding, weights, x_BTD, angles, mix)

        if config.remat is not None:
            layer = jax.checkpoint(layer, policy=config.remat, prevent_cse=False)
        x_BTD, _ = jax.lax.scan(layer, self.embed(tokens_BT, positions_BT), arrays(self.layers))
        return self.finish(x_BTD)

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The residual stream before the first layer [B, T, D]."""
        config, hidden = self.config, out(self.sharding.activation("BTD"))
        table_VD = placed(self.outer["embedding_VD"][...], self.sharding.gathered("VD"))
        x_BTD = table_VD.at[tokens_BT].get(out_sharding=hidden)
        x_BTD = x_BTD * config.embedding_scale
        if config.positions is learned:
            if tokens_BT.shape[1] > config.max_length:
                raise UserError(
                    f"{tokens_BT.shape[1]} tokens in a row, and learned positions end at max_length "
                    f"{config.max_length}: shorten the sequences or raise max_length"
                )
            table_TD = placed(self.outer["position_TD"][...], self.sharding.gathered("TD"))
            x_BTD = x_BTD + table_TD.at[positions_BT].get(out_sharding=hidden)
        return x_BTD.astype(config.compute_dtype)

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """The final norm."""
        return _norm(self.config, self.sharding, arrays(self.outer), "final_norm", "D", x_BTD)

    @property
    def head_VD(self) -> jax.Array:
        """The output head: logits are hidden @ head.T, padded rows included."""
        return self.outer["embedding_VD" if self.config.tied else "head_VD"][...]

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """float32 logits over the true vocabulary; pad and bos are at -1e9, padded rows are cut off.

        On a mesh V stays cut over its axis where no rows are padded, and is gathered where some are.
        """
        config, sharding = self.config, self.sharding
        head_VD = placed(self.head_VD.astype(config.compute_dtype), sharding.gathered("VD"))
        cut = sharding.activation("BTV")
        raw_BTV = jnp.einsum(
            "btd,vd->btv", hidden_BTD, head_VD, preferred_element_type=jnp.float32, out_sharding=out(cut)
        )
        return never_predicted(config, sharding, soft_cap(raw_BTV, config.logit_softcap))


def never_predicted(config: DecoderConfig, sharding: Sharding, logits_BTV: jax.Array) -> jax.Array:
    """Cut off the padded rows, and put pad and bos at -1e9."""
    V = config.vocab_size
    if logits_BTV.shape[-1] != V:
        logits_BTV = placed(logits_BTV, sharding.activation("BT_"))[..., :V]
    special_V = (jnp.arange(V) == PAD) | (jnp.arange(V) == BOS)
    return jnp.where(special_V, NEVER, logits_BTV)


def block(
    config: DecoderConfig, sharding: Sharding, weights: Weights, x_BTD: jax.Array, angles: Angles | None, mix: Attend
) -> tuple[jax.Array, Any]:
    """One layer: x + attention(norm(x)), then x + feed-forward(norm(x)).

    `mix` maps queries, keys and values to what each query takes, and to anything the caller wants to keep,
    such as a cache; `weights` are those of one layer, still under their stacked names.
    """
    project = partial(_project, config, sharding, weights)
    norm = partial(_norm, config, sharding, weights)
    h_BTD = norm("attention_norm", "LD", x_BTD)
    q, k, v = (project(h_BTD, name, "btd,dnh->btnh") for name in ("query_LDNH", "key_LDKH", "value_LDKH"))
    if config.qk_norm:
        q, k = norm("query_norm", "LH", q), norm("key_norm", "LH", k)
    mixed_BTNH, kept = mix(rotate(q, angles), rotate(k, angles), v)
    x_BTD = x_BTD + project(mixed_BTNH, "mix_LNHD", "btnh,nhd->btd")
    h_BTD = norm("ff_norm", "LD", x_BTD)
    up_BTF = project(h_BTD, "up_LDF", "btd,df->btf")
    if config.gated:
        up_BTF = config.activation(project(h_BTD, "gate_LDF", "btd,df->btf")) * up_BTF
    else:
        up_BTF = config.activation(up_BTF)
    return x_BTD + project(up_BTF, "down_LFD", "btf,fd->btd"), kept


def _project(
    config: DecoderConfig, sharding: Sharding, weights: Weights, x: jax.Array, name: str, formula: str
) -> jax.Array:
    word, letters = name.split("_")
    taken = 3 if formula.startswith("btnh") else 2
    weight = placed(weights[name].astype(config.compute_dtype), sharding.gathered(letters[1:]))
    y = jnp.einsum(formula, x, weight, out_sharding=out(sharding.activation("BT" + letters[taken:])))
    if not config.bias:
        return y
    bias = weights[f"{word}_bias_L{letters[taken:]}"].astype(config.compute_dtype)
    return y + placed(bias, sharding.gathered(letters[taken:]))


def _norm(
    config: DecoderConfig, sharding: Sharding, weights: Weights, name: str, letters: str, x: jax.Array
) -> jax.Array:
    scale = placed(weights[f"{name}_scale_{letters}"], sharding.gathered(letters[-1]))
    bias = weights.get(f"{name}_bias_{letters}")
    bias = None if bias is None else placed(bias, sharding.gathered(letters[-1]))
    return config.norm(x, scale, bias, config.norm_epsilon)


def arrays(group: nnx.Dict) -> Weights:
    """The arrays of a group of parameters, by name."""
    return {name: variable[...] for name, variable in group.items()}


def _parameter(key: jax.Array, name: str, weight: Weight, sharding: Sharding) -> nnx.Param:
    """The key is folded with the name, so that a new parameter does not change the others."""
    cut = out(sharding.weight(suffix(name)))
    if not weight.spread:
        return nnx.Param(jnp.full(weight.shape, weight.constant, jnp.float32, out_sharding=cut))
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return nnx.Param(weight.spread * jax.random.normal(key, weight.shape, jnp.float32, out_sharding=cut))


def _initial(config: DecoderConfig, key: jax.Array, sharding: Sharding) -> nnx.State:
    return nnx.split(Decoder(config, key, sharding))[1]


@cache
def _jitted_initial(backend: str) -> Callable[..., nnx.State]:
    """On a CPU the random bits of ten weights take 7 s to compile with all optimisations, and 1.5 s with few."""
    options = {"xla_backend_optimization_level": 1} if backend == "cpu" else None
    return jax.jit(_initial, static_argnames=("config", "sharding"), compiler_options=options)


def init(config: DecoderConfig, seed: int | jax.Array, sharding: Sharding = Sharding()) -> nnx.State:
    """Initial parameters for a seed (or a typed key), the same on every mesh, cut over the mesh that is set.

    Raises UserError when they cannot be cut so.
    """
    check(sharding, _shapes(config))
    key = jax.random.key(seed) if isinstance(seed, int) else seed
    return _jitted_initial(jax.default_backend())(config, key, sharding)


@cache
def structure(config: DecoderConfig, sharding: Sharding = Sharding()) -> nnx.GraphDef:
    """The part of a decoder that is no array: `nnx.merge(structure(config), params)` is the decoder."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, jax.random.key(0), sharding)))[0]


def abstract(config: DecoderConfig, sharding: Sharding = Sharding()) -> nnx.State:
    """Shapes and placements of the parameters on the mesh that is set: a target for restoring them."""
    state = nnx.split(nnx.eval_shape(lambda: Decoder(config, jax.random.key(0), sharding)))[1]

    def target(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = next(p.key for p in reversed(path) if hasattr(p, "key"))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named(sharding.weight(suffix(name))))

    return jax.tree_util.tree_map_with_path(target, state)


def apply(
    config: DecoderConfig | nnx.GraphDef,
    params: nnx.State,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"],
) -> Float[Array, "B T V"]:
    """float32 logits of every next token. Traced: call it inside jax.jit."""
    graph = structure(config) if isinstance(config, DecoderConfig) else config
    model = nnx.merge(graph, params)
    return model.logits(model(tokens_BT, positions_BT, segments_BT))


def _shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    return {name: weight.shape for name, weight in (outer_weights(config) | layer_weights(config)).items()}


def parameter_count(config: DecoderConfig) -> int:
    """Trained numbers, padded vocabulary rows included."""
    return sum(prod(shape) for shape in _shapes(config).values())


def flops_per_token(config: DecoderConfig, length: int, training: bool) -> int:
    """Floating-point operations of the matrix products for one token of a full sequence of `length`.

    2 x (weights of the products, output head included) + 4 N H x (mean context, itself included) in each
    layer; three times that in training (forward, and two products backward). Recomputation is not counted.
    """
    s = config.sizes
    matrices = s.L * (s.D * (2 * s.N + 2 * s.K) * s.H + (3 if config.gated else 2) * s.D * s.F) + s.V * s.D
    context = sum(min(t, config.window or length) for t in range(1, length + 1)) / length
    forward = 2 * matrices + 4 * s.L * s.N * s.H * context
    return round(forward * (3 if training else 1))
