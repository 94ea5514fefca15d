"""What a decoder is: one frozen dataclass, in which the families are data, and the sizes that follow from it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax.numpy as jnp

from epigone.errors import UserError
from epigone.identity import WHERE_SET
from epigone.models.language_model import Specials
from epigone.models.layers import learned, offset_rms_norm, rms_norm, rotary, silu
from epigone.models.quantization import Quantization
from epigone.models.rope import RopeScaling

DTYPES = ("float32", "bfloat16", "float16")


class Sizes(NamedTuple):
    """Every size by its letter; V counts the rows of the table, padding included; E is 0 without experts."""

    L: int
    D: int
    N: int
    K: int
    H: int
    F: int
    V: int
    E: int


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    Attributes:
        vocab_size: tokens that can be predicted or read; None takes the tokenizer's.
        layers: number of blocks.
        model_size: features of the residual stream.
        heads: query heads.
        kv_heads: key and value heads, a divisor of heads; None for as many as heads.
        head_size: features of a head; None for model_size / heads.
        ff_size: features of the feed-forward, or of one expert; None for 4 model_size, or 8/3 of it when gated, in
            multiples of 32.
        norm: rms_norm, offset_rms_norm or layer_norm.
        norm_epsilon: added to the variance in every norm.
        norm_bias: add a bias in every norm.
        pre_norm: normalise what attention and feed-forward take.
        post_norm: normalise what attention and feed-forward give, before it is added to the stream.
        qk_norm: normalise queries and keys of each head.
        qk_norm_whole: normalise queries and keys over all heads at once (OLMo 2).
        positions: rotary or learned.
        rope_theta: base of the rotary frequencies.
        rope_fraction: share of a head's features that is rotated: the first ones.
        rope_scaling: how the frequencies are stretched to longer texts, one of models/rope.py; None for not at all.
        rope_local_theta: base of unscaled frequencies for the layers that the window binds; None for those of all.
        activation: silu, gelu or exact_gelu.
        gated: multiply the activation by a second projection (SwiGLU, GEGLU).
        qkv_bias: add a bias to queries, keys and values.
        mix_bias: add a bias to what attention gives.
        ff_bias: add a bias to the projections of the feed-forward.
        experts: feed-forwards of a layer, of which each token takes a few; None for one that all take.
        experts_per_token: experts that a token takes: those with the largest router probabilities.
        normalise_experts: divide the probabilities of the chosen experts by their sum.
        tied: the output head is the embedding table.
        window: tokens that a token sees, itself included; None for all before it.
        window_pattern: which layers the window binds, repeated over the layers.
        attention_scale: factor on the products of queries and keys; None for 1 / sqrt(head_size).
        attention_softcap: bound of the attention scores; None for none.
        logit_softcap: bound of the logits; None for none.
        embedding_scale: factor on the embeddings.
        max_length: longest sequence that the model is made for.
        vocab_multiple: the table's rows are padded to a multiple of this.
        specials: the tokens with a meaning of their own.
        dtype: type of the computation; logits are float32.
        weights_dtype: type of the parameters.
        remat: what the backward pass keeps of each layer: save_nothing, save_products, or None for all.
        quantization: the shorter types in which the products of the layers are taken, in training and ever after; the
            weights themselves keep their own. None for none.
    """

    vocab_size: int | None = None
    layers: int = 4
    model_size: int = 256
    heads: int = 4
    kv_heads: int | None = None
    head_size: int | None = None
    ff_size: int | None = None
    norm: Callable[..., Any] = rms_norm
    norm_epsilon: float = 1e-6
    norm_bias: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    positions: Callable[..., Any] = rotary
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None
    activation: Callable[..., Any] = silu
    gated: bool = True
    qkv_bias: bool = False
    mix_bias: bool = False
    ff_bias: bool = False
    experts: int | None = None
    experts_per_token: int = 2
    normalise_experts: bool = True
    tied: bool = True
    window: int | None = None
    window_pattern: tuple[bool, ...] = (True,)
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    max_length: int = 512
    vocab_multiple: int = 64
    specials: Specials = Specials()
    dtype: str = "float32"
    weights_dtype: str = "float32"
    remat: Callable[..., bool] | None = None
    quantization: Quantization | None = field(default=None, metadata={"identity": WHERE_SET})

    def __post_init__(self) -> None:
        for name in ("layers", "model_size", "heads", "max_length", "vocab_multiple", "experts_per_token"):
            _at_least_one(name, getattr(self, name))
        for name in ("vocab_size", "kv_heads", "head_size", "ff_size", "window", "experts"):
            if getattr(self, name) is not None:
                _at_least_one(name, getattr(self, name))
        for name in ("norm_epsilon", "rope_theta"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}: a number above 0 is wanted")
        _check_heads(self)
        _check_positions(self)
        _check_layers(self)
        for name in ("dtype", "weights_dtype"):
            if getattr(self, name) not in DTYPES:
                raise UserError(f"{name} '{getattr(self, name)}' is not one of {', '.join(DTYPES)}")

    @property
    def sizes(self) -> Sizes:
        """Every size; raises UserError while vocab_size is open."""
        if self.vocab_size is None:
            raise UserError("vocab_size is open: fill it with the tokenizer's size before the model is built")
        gated_size = -(-8 * self.model_size // 3 // 32) * 32
        return Sizes(
            L=self.layers,
            D=self.model_size,
            N=self.heads,
            K=self.kv_heads or self.heads,
            H=self.head_size or self.model_size // self.heads,
            F=self.ff_size or (gated_size if self.gated else 4 * self.model_size),
            V=-(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple,
            E=self.experts or 0,
        )

    @property
    def windowed_layers(self) -> tuple[bool, ...]:
        """Which layers the window binds, one entry a layer; all False when there is no window."""
        pattern = self.window_pattern if self.window is not None else (False,)
        return (pattern * self.layers)[: self.layers]

    @property
    def rotated_size(self) -> int:
        """How many features of a head are rotated."""
        return int((self.head_size or self.model_size // self.heads) * self.rope_fraction)

    @property
    def score_scale(self) -> float:
        """The factor on the products of queries and keys."""
        if self.attention_scale is not None:
            return self.attention_scale
        return (self.head_size or self.model_size // self.heads) ** -0.5

    @property
    def on_grid(self) -> "DecoderConfig":
        """That of a model whose matrices are rounded already (`projections.on_grid`)."""
        how = self.quantization
        if how is None or how.weights is None:
            return self
        rest = replace(how, weights=None, block=None) if how.activations else None
        return replace(self, quantization=rest)

    @property
    def compute_dtype(self) -> Any:
        """The type of the computation."""
        return jnp.dtype(self.dtype)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} is {value}: at least 1")


def _check_heads(config: DecoderConfig) -> None:
    if config.heads % (config.kv_heads or config.heads):
        raise UserError(f"kv_heads {config.kv_heads} does not divide heads {config.heads}")
    if config.head_size is None and config.model_size % config.heads:
        raise UserError(f"heads {config.heads} does not divide model_size {config.model_size}: give head_size")
    if config.qk_norm and config.qk_norm_whole:
        raise UserError("qk_norm and qk_norm_whole are both on: queries and keys are normalised in one way")


def _check_positions(config: DecoderConfig) -> None:
    if config.positions is learned:
        for name in ("rope_scaling", "rope_local_theta"):
            if getattr(config, name) is not None:
                raise UserError(f"{name} {getattr(config, name)} with learned positions: it is for rotary ones")
        return
    size = config.rotated_size
    if not 0 < config.rope_fraction <= 1 or size < 2 or size % 2:
        raise UserError(
            f"rotary positions need an even head_size: rope_fraction {config.rope_fraction} of "
            f"{config.head_size or config.model_size // config.heads} features rotates {size}"
        )
    if config.rope_scaling is not None:
        config.rope_scaling.frequencies(size, config.rope_theta)
    if config.rope_local_theta is not None and config.window is None:
        raise UserError(f"rope_local_theta {config.rope_local_theta} without a window: it is for layers in a window")


def _check_layers(config: DecoderConfig) -> None:
    if not config.window_pattern:
        raise UserError("window_pattern is empty: give at least one entry, such as (True,)")
    if config.experts is not None and config.experts_per_token > config.experts:
        raise UserError(f"experts_per_token {config.experts_per_token} is more than experts {config.experts}")
    if config.experts is not None and config.ff_bias:
        raise UserError(f"ff_bias with experts {config.experts}: experts have no biases")
    if config.experts is not None and config.quantization is not None:
        raise UserError(f"quantization with experts {config.experts}: the products of experts are not rounded")
    special = max((config.specials.pad, config.specials.bos, config.specials.eos, *config.specials.never))
    if config.vocab_size is not None and special >= config.vocab_size:
        raise UserError(f"special token {special} lies outside a vocabulary of vocab_size {config.vocab_size}")


class Weight(NamedTuple):
    """One parameter: its shape, the spread of its normal initial values, or the constant it starts from."""

    shape: tuple[int, ...]
    spread: float = 0.0
    constant: float = 0.0


def outer_weights(config: DecoderConfig) -> dict[str, Weight]:
    """Parameters outside the layers. A name ends in its axis letters."""
    s = config.sizes
    weights = {"embedding_VD": Weight((s.V, s.D), spread=0.02)}
    if config.positions is learned:
        weights["position_TD"] = Weight((config.max_length, s.D), spread=0.02)
    if not config.tied:
        weights["head_VD"] = Weight((s.V, s.D), spread=0.02)
    return weights | _norm_weights(config, "final_norm", "D", (s.D,))


def layer_weights(config: DecoderConfig) -> dict[str, Weight]:
    """Parameters of all layers, stacked on L.

    Matrices start normal with variance 1 / inputs; the two that write to the residual stream are smaller
    by sqrt(2 L), so that the stream's size does not grow with depth (Radford et al. 2019).
    """
    return _attention_weights(config) | _feed_forward_weights(config) | _layer_norm_weights(config)


def _attention_weights(config: DecoderConfig) -> dict[str, Weight]:
    s = config.sizes
    weights = {
        "query_LDNH": Weight((s.L, s.D, s.N, s.H), spread=s.D**-0.5),
        "key_LDKH": Weight((s.L, s.D, s.K, s.H), spread=s.D**-0.5),
        "value_LDKH": Weight((s.L, s.D, s.K, s.H), spread=s.D**-0.5),
        "mix_LNHD": Weight((s.L, s.N, s.H, s.D), spread=(s.N * s.H) ** -0.5 * _shrink(s)),
    }
    if config.qkv_bias:
        weights["query_bias_LNH"] = Weight((s.L, s.N, s.H))
        weights["key_bias_LKH"] = Weight((s.L, s.K, s.H))
        weights["value_bias_LKH"] = Weight((s.L, s.K, s.H))
    if config.mix_bias:
        weights["mix_bias_LD"] = Weight((s.L, s.D))
    return weights


def _feed_forward_weights(config: DecoderConfig) -> dict[str, Weight]:
    """With experts each matrix has an axis E behind L, and the router chooses."""
    s = config.sizes
    e, E = ("E", (s.E,)) if config.experts else ("", ())
    weights = {
        f"up_L{e}DF": Weight((s.L, *E, s.D, s.F), spread=s.D**-0.5),
        f"down_L{e}FD": Weight((s.L, *E, s.F, s.D), spread=s.F**-0.5 * _shrink(s)),
    }
    if config.gated:
        weights[f"gate_L{e}DF"] = Weight((s.L, *E, s.D, s.F), spread=s.D**-0.5)
    if config.experts:
        weights["router_LDE"] = Weight((s.L, s.D, s.E), spread=s.D**-0.5)
    if config.ff_bias:
        weights |= {"up_bias_LF": Weight((s.L, s.F)), "down_bias_LD": Weight((s.L, s.D))}
        weights |= {"gate_bias_LF": Weight((s.L, s.F))} if config.gated else {}
    return weights


def _shrink(s: Sizes) -> float:
    return (2 * s.L) ** -0.5


def _layer_norm_weights(config: DecoderConfig) -> dict[str, Weight]:
    s = config.sizes
    weights: dict[str, Weight] = {}
    for on, end in ((config.pre_norm, "norm"), (config.post_norm, "post_norm")):
        for part in ("attention", "ff") if on else ():
            weights |= _norm_weights(config, f"{part}_{end}", "LD", (s.L, s.D))
    if config.qk_norm:
        for name in ("query_norm", "key_norm"):
            weights |= _norm_weights(config, name, "LH", (s.L, s.H))
    if config.qk_norm_whole:
        weights |= _norm_weights(config, "query_norm", "LNH", (s.L, s.N, s.H))
        weights |= _norm_weights(config, "key_norm", "LKH", (s.L, s.K, s.H))
    return weights


def _norm_weights(config: DecoderConfig, name: str, letters: str, shape: tuple[int, ...]) -> dict[str, Weight]:
    start = 0.0 if config.norm is offset_rms_norm else 1.0
    weights = {f"{name}_scale_{letters}": Weight(shape, constant=start)}
    if config.norm_bias:
        weights[f"{name}_bias_{letters}"] = Weight(shape)
    return weights
