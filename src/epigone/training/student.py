"""What a run trains: all weights of a decoder, or low-rank adapters beside weights that stay as they are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from epigone.lessons.heads import Head, Hidden
from epigone.models import adapters, decoder
from epigone.models.adapters import LowRank
from epigone.models.config import DecoderConfig
from epigone.models.inside import Asked, Inside
from epigone.models.rules import Sharding
from epigone.models.sharding import spread
from epigone.teachers import Batch
from epigone.teachers.in_memory import DecoderStates, look_inside


@dataclass(frozen=True)
class Student:
    """A decoder in training. Equal for students of one shape, and without arrays in it, so that programs are shared.

    Attributes:
        config: the decoder's, its vocab_size filled in.
        adapters: which matrices have low-rank adapters, which alone are trained then; None trains all weights.
        sharding: its rules on the mesh.
    """

    config: DecoderConfig
    adapters: LowRank | None = None
    sharding: Sharding = Sharding()

    def __call__(self, trained: Any, frozen: Any, batch: Batch) -> Hidden:
        """Hidden states and head for a batch; traced.

        Args: what is trained; weights that are not, {} where all are.
        """
        return self.look_inside(trained, frozen, batch, Asked())[0]

    def look_inside(self, trained: Any, frozen: Any, batch: Batch, asked: Asked) -> tuple[Hidden, Inside]:
        """The same, and what is asked for of single layers."""
        if self.adapters is None:
            return DecoderStates(self.config, self.sharding).look_inside(trained, batch, asked)
        return look_inside(adapters.adapted(self.adapters, self.config, frozen, trained, self.sharding), batch, asked)

    @property
    def head(self) -> Head:
        """How its hidden states become logits."""
        return DecoderStates(self.config, self.sharding).head

    def begin(self, seed: int, weights: Callable[[], Any]) -> Any:
        """What is trained, at the beginning, on the mesh that is set."""
        return weights() if self.adapters is None else adapters.init(self.adapters, self.config, seed, self.sharding)

    def frozen(self, weights: Callable[[], Any]) -> Any:
        """What is not trained, on the mesh that is set. It is no part of a checkpoint: a resumed run makes it again."""
        return {} if self.adapters is None else weights()

    def abstract(self) -> Any:
        """Shapes and placements of what is trained."""
        if self.adapters is None:
            return decoder.abstract(self.config, self.sharding)
        return adapters.abstract(self.adapters, self.config, self.sharding)

    def whole(self, trained: Any, frozen: Any) -> Any:
        """Plain weights of the decoder: what is trained, or merged."""
        if self.adapters is None:
            return trained
        return adapters.merge(self.adapters, self.config, frozen, trained, self.sharding)

    def parameter_count(self) -> int:
        """Trained numbers."""
        if self.adapters is None:
            return decoder.parameter_count(self.config)
        return adapters.parameter_count(self.adapters, self.config)

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations of a training step for one token of a sequence of this length."""
        if self.adapters is None:
            return decoder.flops_per_token(self.config, length, training=True)
        return adapters.flops_per_token(self.adapters, self.config, length)


def first_weights(config: DecoderConfig, sharding: Sharding, seed: int, given: Callable[[], Any] | None) -> Any:
    """The weights that a run begins with, on the mesh that is set: those that are given, or random ones."""
    if given is None:
        return decoder.init(config, seed, sharding)
    return spread(given(), jax.tree.map(lambda leaf: leaf.sharding, decoder.abstract(config, sharding)))
