"""Low-rank adapters beside the matrices of a decoder that itself stays as it is (LoRA, Hu et al. 2021).

    how = LowRank(rank=8, alpha=16.0, targets=("query", "value"))
    trained = init(how, config, seed)                            # {name: array}, float32
    model = adapted(how, config, params, trained)                # products x W + (alpha / rank) (x A) B
    params = merge(how, config, params, trained)                 # plain weights that compute the same

B starts at zero, so that the model begins as it is, to the bit.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from flax import nnx

from epigone.errors import UserError
from epigone.models.config import DecoderConfig, Weight, layer_weights
from epigone.models.decoder import Decoder, forward_flops, initial, structure
from epigone.models.projections import MATRICES, adapter_names, axes_of, word_of
from epigone.models.sharding import Sharding, check, named, out, suffix

Adapters = dict[str, jax.Array]
"""A and B of every target, by name, stacked on L."""


@dataclass(frozen=True)
class LowRank:
    """Which matrices have an adapter, and how large it is: what is added to each is (alpha / rank) A B.

    Attributes:
        rank: columns of A and rows of B.
        alpha: the sum is multiplied by alpha / rank, so that another rank needs no other learning rate.
        targets: matrices that have one: query, key, value, mix (what attention gives), gate, up, down; None for all
            that the model has. Experts have none.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0.0 < self.alpha < float("inf"):
            raise UserError(f"adapters: rank={self.rank} must be at least 1, and alpha={self.alpha:g} above 0")
        for target in self.targets or ():
            if target not in MATRICES:
                near = get_close_matches(target, MATRICES, n=1)
                advice = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(MATRICES)}"
                raise UserError(f"adapters: no target '{target}'; {advice}")
        if self.targets is not None and len(set(self.targets)) != max(1, len(self.targets)):
            raise UserError(f"adapters: targets {self.targets} must name each matrix once; None takes all")

    @property
    def scale(self) -> float:
        """The factor on A B."""
        return self.alpha / self.rank


def adapter_weights(how: LowRank, config: DecoderConfig) -> dict[str, Weight]:
    """Shapes and initial values of A, normal with variance 1 / inputs, and of B, zero.

    Raises UserError for a target that the model does not have, and for a rank above that of its matrix.
    """
    s = config.sizes._asdict() | {"R": how.rank}
    weights: dict[str, Weight] = {}
    for name in _matrices(how, config):
        inputs, outputs = axes_of(name)
        sizes = [prod(s[letter] for letter in letters) for letters in (inputs, outputs)]
        if how.rank > min(sizes):
            raise UserError(
                f"adapters: rank={how.rank} is more than that of '{word_of(name)}', {sizes[0]} x {sizes[1]}: "
                f"at most {min(sizes)}, or train all weights"
            )
        a, b = adapter_names(name)
        shapes = [tuple(s[letter] for letter in suffix(one)) for one in (a, b)]
        weights |= {a: Weight(shapes[0], spread=sizes[0] ** -0.5), b: Weight(shapes[1])}
    return weights


def _matrices(how: LowRank, config: DecoderConfig) -> list[str]:
    """Names of the matrices that have adapters."""
    words = MATRICES[:4] if config.experts else MATRICES
    having = {word_of(name): name for name in layer_weights(config) if word_of(name) in words}
    for target in how.targets or ():
        if target not in having:
            why = "one of experts, which have none" if config.experts else "not in this model"
            raise UserError(f"adapters: target '{target}' is {why}: choose among {', '.join(having)}")
    return [name for word, name in having.items() if how.targets is None or word in how.targets]


def init(how: LowRank, config: DecoderConfig, seed: int, sharding: Sharding = Sharding()) -> Adapters:
    """Initial adapters for a seed, the same on every mesh, float32, cut over the mesh that is set.

    Raises UserError for what `adapter_weights` refuses, and when they cannot be cut so.
    """
    check(sharding, {name: weight.shape for name, weight in adapter_weights(how, config).items()})
    return _initial(how, config, jax.random.key(seed), sharding)


@partial(jax.jit, static_argnames=("how", "config", "sharding"))
def _initial(how: LowRank, config: DecoderConfig, key: jax.Array, sharding: Sharding) -> Adapters:
    return {name: initial(key, name, weight, sharding) for name, weight in adapter_weights(how, config).items()}


def abstract(how: LowRank, config: DecoderConfig, sharding: Sharding = Sharding()) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and placements of the adapters on the mesh that is set. Raises UserError as `init` does."""
    shapes = {name: weight.shape for name, weight in adapter_weights(how, config).items()}
    check(sharding, shapes)
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=named(sharding.weight(suffix(name))))
        for name, shape in shapes.items()
    }


def adapted(
    how: LowRank, config: DecoderConfig, params: nnx.State, trained: Adapters, sharding: Sharding = Sharding()
) -> Decoder:
    """The decoder with its adapters; traced. No product of A and B is made, and no gradient of the matrix."""
    model = nnx.merge(structure(config, sharding), params)
    for name, array in trained.items():
        # On the small B the factor costs nothing.
        model.layers[name] = nnx.Param(array * how.scale if "_lora_b_" in name else array)
    return model


@partial(jax.jit, static_argnames=("how", "config", "sharding"))
def merge(
    how: LowRank, config: DecoderConfig, params: nnx.State, trained: Adapters, sharding: Sharding = Sharding()
) -> nnx.State:
    """Plain weights W + (alpha / rank) A B, summed in float32, and rounded once where weights are of a shorter type."""
    model = nnx.merge(structure(config, sharding), params)
    for name in _matrices(how, config):
        (a, b), (inputs, outputs) = adapter_names(name), (letters.lower() for letters in axes_of(name))
        more = jnp.einsum(
            f"l{inputs}r,lr{outputs}->l{inputs}{outputs}",
            trained[a],
            trained[b] * how.scale,
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=out(sharding.weight(suffix(name))),
        )
        weight = model.layers[name][...]
        model.layers[name] = nnx.Param((weight.astype(jnp.float32) + more).astype(weight.dtype))
    return nnx.split(model)[1]


def parameter_count(how: LowRank, config: DecoderConfig) -> int:
    """Trained numbers."""
    return sum(prod(weight.shape) for weight in adapter_weights(how, config).values())


def flops_per_token(how: LowRank, config: DecoderConfig, length: int) -> int:
    """Of a training step: as `decoder.flops_per_token`, but with no gradient of the decoder's own weights.

    2 x products with weights (forward, and the gradient of their inputs) + 3 x those of attention and of adapters.
    """
    matrices, attention = forward_flops(config, length)
    return round(2 * matrices + 3 * (attention + 2 * parameter_count(how, config)))
