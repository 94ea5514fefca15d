"""What a decoder is: one frozen dataclass, in which the families are data, and the sizes that follow from it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from epigone.errors import UserError
from epigone.models.layers import layer_norm, learned, rms_norm, rotary, silu


class Sizes(NamedTuple):
    """Every size by its letter; V counts the rows of the table, padding included."""

    L: int
    D: int
    N: int
    K: int
    H: int
    F: int
    V: int


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
        ff_size: features of the feed-forward; None for 4 model_size, or 8/3 of it when gated, in multiples of 32.
        norm: rms_norm or layer_norm.
        norm_epsilon: added to the variance in every norm.
        positions: rotary or learned.
        rope_theta: base of the rotary frequencies.
        activation: silu, gelu or exact_gelu.
        gated: multiply the activation by a second projection (SwiGLU, GEGLU).
        qk_norm: normalise queries and keys of each head.
        bias: add a bias to every projection, and to layer_norm.
        tied: the output head is the embedding table.
        window: tokens that a token sees, itself included; None for all before it.
        attention_softcap: bound of the attention scores; None for none.
        logit_softcap: bound of the logits; None for none.
        embedding_scale: factor on the embeddings.
        max_length: longest sequence that the model is made for.
        vocab_multiple: the table's rows are padded to a multiple of this.
        dtype: type of the computation; parameters and logits are float32.
        remat: what the backward pass keeps of each layer: save_nothing, save_products, or None for all.
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
    positions: Callable[..., Any] = rotary
    rope_theta: float = 10000.0
    activation: Callable[..., Any] = silu
    gated: bool = True
    qk_norm: bool = False
    bias: bool = False
    tied: bool = True
    window: int | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    max_length: int = 512
    vocab_multiple: int = 64
    dtype: str = "float32"
    remat: Callable[..., bool] | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "model_size", "heads", "max_length", "vocab_multiple"):
            _at_least_one(name, getattr(self, name))
        for name in ("vocab_size", "kv_heads", "head_size", "ff_size", "window"):
            if getattr(self, name) is not None:
                _at_least_one(name, getattr(self, name))
        if self.heads % (self.kv_heads or self.heads):
            raise UserError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        if self.head_size is None and self.model_size % self.heads:
            raise UserError(f"heads {self.heads} does not divide model_size {self.model_size}: give head_size")
        if self.positions is rotary and (self.head_size or self.model_size // self.heads) % 2:
            raise UserError("rotary positions need an even head_size")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"dtype '{self.dtype}' is not one of float32, bfloat16, float16")

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
        )

    @property
    def compute_dtype(self) -> Any:
        """The type of the computation."""
        return jnp.dtype(self.dtype)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} is {value}: at least 1")


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
    s = config.sizes
    depth = (2 * s.L) ** -0.5
    weights = {
        "query_LDNH": Weight((s.L, s.D, s.N, s.H), spread=s.D**-0.5),
        "key_LDKH": Weight((s.L, s.D, s.K, s.H), spread=s.D**-0.5),
        "value_LDKH": Weight((s.L, s.D, s.K, s.H), spread=s.D**-0.5),
        "mix_LNHD": Weight((s.L, s.N, s.H, s.D), spread=(s.N * s.H) ** -0.5 * depth),
        "up_LDF": Weight((s.L, s.D, s.F), spread=s.D**-0.5),
        "down_LFD": Weight((s.L, s.F, s.D), spread=s.F**-0.5 * depth),
    }
    if config.gated:
        weights["gate_LDF"] = Weight((s.L, s.D, s.F), spread=s.D**-0.5)
    if config.bias:
        weights |= _biases(weights)
    for name in ("attention_norm", "ff_norm"):
        weights |= _norm_weights(config, name, "LD", (s.L, s.D))
    if config.qk_norm:
        for name in ("query_norm", "key_norm"):
            weights |= _norm_weights(config, name, "LH", (s.L, s.H))
    return weights


def _norm_weights(config: DecoderConfig, name: str, letters: str, shape: tuple[int, ...]) -> dict[str, Weight]:
    weights = {f"{name}_scale_{letters}": Weight(shape, constant=1.0)}
    if config.bias and config.norm is layer_norm:
        weights[f"{name}_bias_{letters}"] = Weight(shape)
    return weights


def _biases(matrices: dict[str, Weight]) -> dict[str, Weight]:
    inputs = {"mix_LNHD": 2}
    biases = {}
    for name, weight in matrices.items():
        word, letters = name.split("_")
        taken = 1 + inputs.get(name, 1)
        biases[f"{word}_bias_L{letters[taken:]}"] = Weight((weight.shape[0], *weight.shape[taken:]))
    return biases
