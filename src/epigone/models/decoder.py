"""One decoder-only transformer; its families are fields of DecoderConfig.

Letters of the shape suffixes, everywhere in Epigone: B batch, T time, S source time, D model features,
N query heads, K key and value heads, H head features, F feed-forward features, E experts, V vocabulary,
L layers, C chunk, M samples or top-k entries, R rank of an adapter.

    params = init(config, seed)                                  # nnx.State, cut over the mesh that is set
    logits_BTV = apply(config, params, tokens, positions, segments)

Inside a step of one's own: `model = nnx.merge(structure(config), params)`, `hidden = model(...)`,
`model.logits(hidden)`, and `model.head_VD` for losses that never make all logits.
"""

import zlib
from collections.abc import Callable
from functools import cache, partial, reduce
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from epigone.devices import platform_in_use
from epigone.errors import UserError
from epigone.models.attention import Attention, attend, choose_attention
from epigone.models.config import DecoderConfig, Weight, layer_weights, outer_weights
from epigone.models.experts import mixture
from epigone.models.inside import Asked, Heads, Inside, Kept, by_place, empty, keep, places
from epigone.models.layers import Angles, learned, rotate, soft_cap
from epigone.models.projections import on_grid, project
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
        self.outer = _parameters(config, key, outer_weights(config), sharding)
        self.layers = _parameters(config, key, layer_weights(config), sharding)

    def __call__(
        self, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"], segments_BT: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm. A token sees itself and what is before it in its own segment.

        Raises UserError when learned positions are asked for more than max_length tokens.
        """
        return self.look_inside(tokens_BT, positions_BT, segments_BT, Asked())[0]

    def look_inside(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, asked: Asked
    ) -> tuple[jax.Array, Inside]:
        """The same, and what is asked for of single layers; nothing costs nothing."""
        config, sharding = self.config, self.sharding
        rows = (placed(x, sharding.activation("BT")) for x in (tokens_BT, positions_BT, segments_BT))
        tokens_BT, positions_BT, segments_BT = rows
        bound, at_layer = self.by_layer(positions_BT, segments_BT)

        def layer(x_BTD: jax.Array, slices: tuple[Weights, jax.Array | None]) -> tuple[jax.Array, Heads | None]:
            weights, bound = slices
            angles, attention = at_layer(bound)

            def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Heads | None]:
                return attention(q, k, v), (q, k, v) if asked.heads else None

            return block(config, sharding, weights, x_BTD, angles, mix)

        if config.remat is not None:
            layer = jax.checkpoint(layer, policy=config.remat, prevent_cse=False)
        x_BTD, slices = self.embed(tokens_BT, positions_BT), (arrays(self.layers), bound)
        if asked == Asked():
            x_BTD, _ = jax.lax.scan(layer, x_BTD, slices)
            return self.finish(x_BTD), Inside({}, {})

        def watched(carry: tuple[jax.Array, Kept], slices: Any) -> tuple[tuple[jax.Array, Kept], None]:
            x_BTD, heads = layer(carry[0], slices[0])
            return (x_BTD, keep(carry[1], slices[1], x_BTD, heads)), None

        kept = empty(config, sharding, asked, *tokens_BT.shape)
        (x_BTD, kept), _ = jax.lax.scan(watched, (x_BTD, kept), (slices, places(config, asked)))
        return self.finish(x_BTD), by_place(kept, asked)

    def by_layer(
        self, positions_BT: jax.Array, segments_BT: jax.Array
    ) -> tuple[jax.Array | None, Callable[[jax.Array | None], tuple[Angles | None, Callable[..., jax.Array]]]]:
        """For a scan over layers: which ones the window binds [L], and what one of them rotates by and attends with.

        The second is a function of one entry of the first; attention maps q_BTNH, k_BTKH, v_BTKH to what each query
        takes.
        """
        config = self.config
        cap, scale = config.attention_softcap, config.score_scale
        choice = attention_of(config, segments_BT.shape[1])
        seen = [choice.seen(segments_BT, window) for window in (None, config.window)]
        bound, choose = by_layer(config, *zip(seen, self.angles(positions_BT), strict=True))

        def at_layer(bound: jax.Array | None) -> tuple[Angles | None, Callable[..., jax.Array]]:
            seen, angles = choose(bound)
            return angles, lambda q, k, v: attend(choice, self.sharding, q, k, v, seen, cap, scale)

        return bound, at_layer

    def angles(self, positions_BT: jax.Array) -> tuple[Angles | None, Angles | None]:
        """Rotations for the layers that the window does not bind, and for those that it does; None for none.

        They are one object where the two kinds of layer do not differ.
        """
        config = self.config
        size, theta = config.rotated_size, config.rope_local_theta
        angles = config.positions(positions_BT, size, config.rope_theta, config.rope_scaling)
        return angles, angles if theta is None else config.positions(positions_BT, size, theta, None)

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The residual stream before the first layer [B, T, D]."""
        config, hidden = self.config, out(self.sharding.activation("BTD"))
        table_VD = placed(self.outer["embedding_VD"][...], self.sharding.gathered("VD"))
        x_BTD = table_VD.at[tokens_BT].get(out_sharding=hidden).astype(config.compute_dtype)
        x_BTD = x_BTD * config.embedding_scale
        if config.positions is learned:
            if tokens_BT.shape[1] > config.max_length:
                raise UserError(
                    f"{tokens_BT.shape[1]} tokens in a row, and learned positions end at max_length "
                    f"{config.max_length}: shorten the sequences or raise max_length"
                )
            table_TD = placed(self.outer["position_TD"][...], self.sharding.gathered("TD"))
            x_BTD = x_BTD + table_TD.at[positions_BT].get(out_sharding=hidden).astype(config.compute_dtype)
        return x_BTD

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """The final norm."""
        return _norm(self.config, self.sharding, arrays(self.outer), "final_norm", "D", x_BTD)

    @property
    def head_VD(self) -> jax.Array:
        """The output head: logits are hidden @ head.T, padded rows included."""
        return self.outer["embedding_VD" if self.config.tied else "head_VD"][...]

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """float32 logits over the true vocabulary; what is never predicted is at -1e9, padded rows are cut off.

        On a mesh V stays cut over its axis where no rows are padded, and is gathered where some are.
        """
        config, sharding = self.config, self.sharding
        head_VD = placed(self.head_VD.astype(config.compute_dtype), sharding.gathered("VD"))
        cut = sharding.activation("BTV")
        raw_BTV = jnp.einsum(
            "btd,vd->btv", hidden_BTD, head_VD, preferred_element_type=jnp.float32, out_sharding=out(cut)
        )
        return never_predicted(config, sharding, soft_cap(raw_BTV, config.logit_softcap))


def attention_of(config: DecoderConfig, length: int, platform: str | None = None) -> Attention:
    """How a decoder attends within rows of this length, where it runs or on another platform."""
    size, cap = config.sizes.H, config.attention_softcap
    return choose_attention(size, config.dtype, cap, window=config.window, length=length, platform=platform)


def never_predicted(config: DecoderConfig, sharding: Sharding, logits_BTV: jax.Array) -> jax.Array:
    """Cut off the padded rows, and put the ids of `specials.never` at -1e9."""
    V = config.vocab_size
    if logits_BTV.shape[-1] != V:
        logits_BTV = placed(logits_BTV, sharding.activation("BT_"))[..., :V]
    if not config.specials.never:
        return logits_BTV
    never_V = reduce(jnp.logical_or, [jnp.arange(V) == token for token in config.specials.never])
    return jnp.where(never_V, NEVER, logits_BTV)


def by_layer(config: DecoderConfig, unbound: Any, bound: Any) -> tuple[jax.Array | None, Callable[[Any], Any]]:
    """For a scan over layers: which ones the window binds [L], and the choice between two trees by one entry of it.

    Where all layers are of one kind there is nothing to choose, and the entries are None.
    """
    kinds = config.windowed_layers
    if len(set(kinds)) == 1:
        return None, lambda _: bound if kinds[0] else unbound

    def choose(windowed: jax.Array) -> Any:
        return jax.tree.map(lambda b, u: b if b is u else jnp.where(windowed, b, u), bound, unbound)

    return jnp.array(kinds), choose


def block(
    config: DecoderConfig, sharding: Sharding, weights: Weights, x_BTD: jax.Array, angles: Angles | None, mix: Attend
) -> tuple[jax.Array, Any]:
    """One layer: x + attention(norm(x)), then x + feed-forward(norm(x)); or the norm behind them, or on both sides.

    `mix` maps queries, keys and values to what each query takes, and to anything the caller wants to keep,
    such as a cache; `weights` are those of one layer, still under their stacked names.
    """

    def pre(name: str, x_BTD: jax.Array) -> jax.Array:
        return _norm(config, sharding, weights, f"{name}_norm", "LD", x_BTD) if config.pre_norm else x_BTD

    def post(name: str, x_BTD: jax.Array) -> jax.Array:
        return _norm(config, sharding, weights, f"{name}_post_norm", "LD", x_BTD) if config.post_norm else x_BTD

    mixed_BTNH, kept = mix(*_queries_keys_values(config, sharding, weights, pre("attention", x_BTD), angles))
    x_BTD = x_BTD + post("attention", project(config, sharding, weights, mixed_BTNH, "mix_LNHD"))
    feed = mixture if config.experts else _feed_forward
    return x_BTD + post("ff", feed(config, sharding, weights, pre("ff", x_BTD))), kept


def _queries_keys_values(
    config: DecoderConfig, sharding: Sharding, weights: Weights, x_BTD: jax.Array, angles: Angles | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    norm = partial(_norm, config, sharding, weights)
    names = ("query_LDNH", "key_LDKH", "value_LDKH")
    q, k, v = (project(config, sharding, weights, x_BTD, name) for name in names)
    if config.qk_norm:
        q, k = norm("query_norm", "LH", q), norm("key_norm", "LH", k)
    if config.qk_norm_whole:
        q, k = norm("query_norm", "LNH", q), norm("key_norm", "LKH", k)
    return rotate(q, angles), rotate(k, angles), v


def _feed_forward(config: DecoderConfig, sharding: Sharding, weights: Weights, x_BTD: jax.Array) -> jax.Array:
    into = partial(project, config, sharding, weights, x_BTD)
    up_BTF = into("up_LDF")
    up_BTF = config.activation(into("gate_LDF")) * up_BTF if config.gated else config.activation(up_BTF)
    return project(config, sharding, weights, up_BTF, "down_LFD")


def _norm(
    config: DecoderConfig, sharding: Sharding, weights: Weights, name: str, letters: str, x: jax.Array
) -> jax.Array:
    spec = sharding.gathered(letters.removeprefix("L"))
    scale, bias = weights[f"{name}_scale_{letters}"], weights.get(f"{name}_bias_{letters}")
    return config.norm(x, placed(scale, spec), None if bias is None else placed(bias, spec), config.norm_epsilon)


def arrays(group: nnx.Dict) -> Weights:
    """The arrays of a group of parameters, by name."""
    return {name: variable[...] for name, variable in group.items()}


def _parameters(config: DecoderConfig, key: jax.Array, weights: dict[str, Weight], sharding: Sharding) -> nnx.Dict:
    values = {name: initial(key, name, weight, sharding) for name, weight in weights.items()}
    return nnx.Dict({name: nnx.Param(value.astype(config.weights_dtype)) for name, value in values.items()})


def initial(key: jax.Array, name: str, weight: Weight, sharding: Sharding) -> jax.Array:
    """Initial values of a parameter, float32. The key is folded with its name: a new one does not change the others."""
    cut, own = out(sharding.weight(suffix(name))), jax.random.fold_in(key, zlib.crc32(name.encode()))
    if weight.spread:
        return weight.spread * jax.random.normal(own, weight.shape, jnp.float32, out_sharding=cut)
    return jnp.full(weight.shape, weight.constant, jnp.float32, out_sharding=cut)


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
    return _jitted_initial(platform_in_use())(config, key, sharding)


@cache
def structure(config: DecoderConfig, sharding: Sharding = Sharding()) -> nnx.GraphDef:
    """The part of a decoder that is no array: `nnx.merge(structure(config), params)` is the decoder."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, jax.random.key(0), sharding)))[0]


def abstract(config: DecoderConfig, sharding: Sharding = Sharding()) -> nnx.State:
    """Shapes and placements of the parameters on the mesh that is set: a target for restoring them.

    Raises UserError when they cannot be cut so.
    """
    check(sharding, _shapes(config))
    state = nnx.split(nnx.eval_shape(lambda: Decoder(config, jax.random.key(0), sharding)))[1]

    def target(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = next(p.key for p in reversed(path) if hasattr(p, "key"))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named(sharding.weight(suffix(name))))

    return jax.tree_util.tree_map_with_path(target, state)


@partial(jax.jit, static_argnames=("config", "sharding"))
def multiplied(config: DecoderConfig, params: nnx.State, sharding: Sharding = Sharding()) -> nnx.State:
    """The parameters with matrices as they are multiplied: rounded where the config says so, else as they are."""
    model = nnx.merge(structure(config, sharding), params)
    model.layers = nnx.Dict({name: nnx.Param(w) for name, w in on_grid(config, arrays(model.layers)).items()})
    return nnx.split(model)[1]


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

    2 x (weights of the products that a token takes part in, output head included) + 4 N H x (mean context, itself
    included) in each layer; three times that in training (forward, and two products backward). Recomputation is not
    counted.
    """
    return round(sum(forward_flops(config, length)) * (3 if training else 1))


def forward_flops(config: DecoderConfig, length: int) -> tuple[float, float]:
    """Those of a forward pass: of the products with weights, and of those of attention, whose both sides are made."""
    s = config.sizes
    feed = (3 if config.gated else 2) * s.D * s.F
    feed = feed * config.experts_per_token + s.D * s.E if config.experts else feed
    matrices = s.L * (s.D * (2 * s.N + 2 * s.K) * s.H + feed) + s.V * s.D
    windows = [config.window if bound else length for bound in config.windowed_layers]
    context = sum(_mean_context(length, window) for window in windows)
    return 2 * matrices, 4 * s.N * s.H * context


def _mean_context(length: int, window: int | None) -> float:
    """The mean of min(t, window) over t = 1 .. length."""
    near = min(length, window or length)
    return (near * (near + 1) / 2 + (length - near) * near) / length
