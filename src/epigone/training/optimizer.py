"""Optimizers and learning-rate schedules. Optax is imported when a step is built, so that configs stay light."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from epigone.errors import UserError


def constant(optimizer: "Optimizer", progress: Any) -> Any:
    """1 after the warm-up."""
    return progress * 0.0 + 1.0


def cosine(optimizer: "Optimizer", progress: Any) -> Any:
    """final + (1 - final) (1 + cos(pi progress)) / 2. Loshchilov & Hutter 2017."""
    import jax.numpy as jnp

    return optimizer.final_share + (1.0 - optimizer.final_share) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


def linear(optimizer: "Optimizer", progress: Any) -> Any:
    """1 - (1 - final) progress."""
    return 1.0 - (1.0 - optimizer.final_share) * progress


def warmup_stable_decay(optimizer: "Optimizer", progress: Any) -> Any:
    """1, and over the last decay_share of the steps linearly down to final. Hu et al. 2024 (MiniCPM)."""
    import jax.numpy as jnp

    fallen = jnp.maximum(progress - (1.0 - optimizer.decay_share), 0.0) / optimizer.decay_share
    return 1.0 - (1.0 - optimizer.final_share) * fallen


def adamw(optimizer: "Optimizer", rate: Callable[[Any], Any]) -> Any:
    """Adam with decoupled weight decay, multiplied by the learning rate. Loshchilov & Hutter 2019."""
    import optax

    return optax.adamw(
        rate,
        b1=optimizer.beta1,
        b2=optimizer.beta2,
        eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        mask=decayed,
    )


def muon(optimizer: "Optimizer", rate: Callable[[Any], Any], *, momentum: float = 0.95) -> Any:
    """Orthogonalised momentum for the matrices of the layers, Adam for the rest. Jordan 2024.

    Updates have the root mean square of AdamW's (0.2 sqrt(max(fan_in, fan_out)), Liu et al. 2025), so a learning rate
    that suits AdamW suits this too.
    """
    from optax.contrib import muon as optax_muon

    return optax_muon(
        rate,
        beta=momentum,
        eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        adam_b1=optimizer.beta1,
        adam_b2=optimizer.beta2,
        muon_weight_dimension_numbers=layer_matrices,
        consistent_rms=0.2,
    )


def adafactor(optimizer: "Optimizer", rate: Callable[[Any], Any]) -> Any:
    """Second moments kept as rows and columns; steps relative to each array's own scale. Shazeer & Stern 2018."""
    import optax

    return optax.adafactor(
        rate,
        weight_decay_rate=lambda count: rate(count) * optimizer.weight_decay,
        weight_decay_mask=decayed,
    )


@dataclass(frozen=True)
class Optimizer:
    """How gradients become steps.

    Attributes:
        rule: adamw, muon or adafactor.
        learning_rate: its peak.
        schedule: constant, cosine, linear or warmup_stable_decay.
        warmup_steps: steps over which the learning rate rises linearly; the first one already moves.
        final_share: learning rate at the last step, as a share of the peak.
        decay_share: share of the steps after the warm-up over which warmup_stable_decay falls.
        weight_decay: decay per unit of learning rate, of matrices alone: not of norms, biases and embeddings.
        clip_norm: largest global norm of the gradient; None for any.
        beta1: decay of Adam's first moment.
        beta2: decay of Adam's second moment.
        epsilon: added to the root of the second moment.
    """

    rule: Callable[..., Any] = adamw
    learning_rate: float = 3e-3
    schedule: Callable[..., Any] = cosine
    warmup_steps: int = 20
    final_share: float = 0.1
    decay_share: float = 0.2
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        limits = {
            "learning_rate": (0.0, float("inf")),
            "warmup_steps": (0, float("inf")),
            "final_share": (0.0, 1.0),
            "decay_share": (1e-6, 1.0),
            "weight_decay": (0.0, float("inf")),
            "clip_norm": (1e-12, float("inf")),
            "beta1": (0.0, 1.0),
            "beta2": (0.0, 1.0),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"optimizer: {name}={value} is outside [{low:g}, {high:g}]")


def learning_rate(optimizer: Optimizer, steps: int) -> Callable[[Any], Any]:
    """Learning rate of each step, counted from 0: linear to the peak over warmup_steps, then the schedule.

    The schedule sees progress from 0 at the end of the warm-up to 1 at the last step.
    """
    import jax.numpy as jnp

    warmup = optimizer.warmup_steps

    def rate(step: Any) -> Any:
        progress = jnp.clip((step - warmup) / max(steps - 1 - warmup, 1), 0.0, 1.0)
        share = optimizer.schedule(optimizer, progress)
        return optimizer.learning_rate * jnp.where(step < warmup, (step + 1) / max(warmup, 1), share)

    return rate


def transformation(optimizer: Optimizer, steps: int) -> Any:
    """The optax gradient transformation: clip to the global norm, then the rule."""
    import optax

    rule = optimizer.rule(optimizer, learning_rate(optimizer, steps))
    return rule if optimizer.clip_norm is None else optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), rule)


def decayed(params: Any) -> Any:
    """A tree of booleans: True for the matrices of products, False for norms, biases and tables of embeddings."""
    return _by_name(params, lambda name: not any(word in name for word in ("norm", "bias", "embedding", "position")))


def layer_matrices(params: Any) -> Any:
    """For each matrix of the layers its input and output axes, by the letters of its name; None for all else.

    L is the stack of layers, and E behind it that of experts, each orthogonalised alone; D, or the rank R of an
    adapter, is the output if it comes last, else the input.
    """
    from optax.contrib import MuonDimensionNumbers

    def axes(name: str) -> Any:
        letters = name.rsplit("_", 1)[-1]
        if letters[0] != "L" or len(letters) < 3 or "norm" in name or "bias" in name:
            return None
        first, last = 2 if letters[1] == "E" else 1, len(letters) - 1
        if letters[-1] in "DR":
            return MuonDimensionNumbers(tuple(range(first, last)), (last,))
        return MuonDimensionNumbers((first,), tuple(range(first + 1, last + 1)))

    return _by_name(params, axes)


def _by_name(params: Any, function: Callable[[str], Any]) -> Any:
    from jax.tree_util import DictKey, tree_map_with_path

    return tree_map_with_path(lambda path, _: function([k.key for k in path if isinstance(k, DictKey)][-1]), params)
