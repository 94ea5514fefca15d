"""What a student's logits are held against: a teacher's distribution, the text itself, or both."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from epigone.errors import UserError
from epigone.identity import WHERE_SET
from epigone.lessons.divergences import Divergence, cross_entropy, forward_kl
from epigone.lessons.ensemble import Several, combined
from epigone.lessons.inner import Match
from epigone.lessons.policy_gradient import Drawn, tokens_of, with_targets
from epigone.lessons.schedules import Schedule, at_step, ends
from epigone.lessons.sparse import Sparse, sparse_divergence
from epigone.lessons.terms import on_cut_rows


@dataclass(frozen=True)
class Objective:
    """(1 - hard_weight) * divergence(student, teacher) + hard_weight * cross_entropy(student, text) + inner, per token.

    Attributes:
        divergence: function of student and teacher logits, from `epigone.lessons.divergences`, or of the token that the
            student drew, from `epigone.lessons.policy_gradient`.
        temperature: divides both sets of logits in the divergence; the cross-entropy is always at 1. A number, or a
            schedule of `epigone.lessons.schedules`.
        temperature_squared: multiply the divergence by temperature^2 (Hinton et al. 2015).
        hard_weight: share of the cross-entropy with the text, 0 to 1, or a schedule; at 1 the teacher's scores do not
            count, and without `inner` there is no teacher.
        inner: what inside the teacher is learned too, by its weights: matches of `epigone.lessons.inner`.
    """

    divergence: Divergence = forward_kl
    temperature: float | Schedule = 1.0
    temperature_squared: bool = True
    hard_weight: float | Schedule = 0.0
    inner: tuple[Match, ...] = field(default=(), metadata={"identity": WHERE_SET})

    def __post_init__(self) -> None:
        if not all(0.0 <= weight <= 1.0 for weight in ends(self.hard_weight)):
            raise UserError(f"objective: hard_weight={self.hard_weight} is outside [0, 1]")
        if not all(temperature > 0.0 for temperature in ends(self.temperature)):
            raise UserError(f"objective: temperature={self.temperature} must be positive")

    @property
    def needs_scores(self) -> bool:
        """Whether the teacher's scores count."""
        return callable(self.hard_weight) or self.hard_weight < 1.0

    @property
    def needs_teacher(self) -> bool:
        """Whether its scores count, or what is inside it."""
        return self.needs_scores or bool(self.inner)

    def knobs(self, step: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """Temperature and hard weight after `step` steps, where one is on a schedule; None where both are constant."""
        if not (callable(self.temperature) or callable(self.hard_weight)):
            return None
        return at_step(self.temperature, step), at_step(self.hard_weight, step)

    def loss(
        self,
        student_logits_BTV: Float[Array, "B T V"],
        teacher: Float[Array, "B T V"] | Sparse | Several | None,
        targets_BT: Int[Array, "B T"] | Drawn,
        vocab_axis: str | None = None,
        knobs: tuple[jax.Array, jax.Array] | None = None,
    ) -> Float[Array, "B T"]:
        """Loss [B, T] of the logits in nats (times T^2 in its first part), float32, neither weighted nor averaged.

        `teacher`: its logits, what was kept of them, or the logits of several. `vocab_axis`: inside shard_map, the mesh
        axis over which V is cut. `knobs`: what `knobs` says of this step.

        Raises: UserError where a teacher is needed and there is none, and for a schedule without its knobs.
        """
        tokens_BT = tokens_of(targets_BT)
        if not self.needs_scores:
            return cross_entropy(student_logits_BTV, tokens_BT, vocab_axis=vocab_axis)
        if teacher is None:
            raise UserError(
                f"objective: hard_weight={self.hard_weight} leaves the rest to a teacher, and there is none: name a "
                "teacher, or set hard_weight=1 to learn from the text alone"
            )
        temperature, hard_weight = knobs or (self.temperature, self.hard_weight)
        if callable(temperature) or callable(hard_weight):
            raise UserError(f"objective: {self} changes with the steps: say at which, with knobs(step)")
        if isinstance(teacher, Several):
            teacher = combined(teacher, tokens_BT, temperature, vocab_axis)
        divergence: Callable[..., Any] = on_cut_rows(with_targets(self.divergence, targets_BT), vocab_axis)
        if isinstance(teacher, Sparse):
            divergence = partial(sparse_divergence, self.divergence, vocab_axis=vocab_axis)
        soft_BT = divergence(
            student_logits_BTV, teacher, temperature=temperature, temperature_squared=self.temperature_squared
        )
        if knobs is None and hard_weight == 0.0:
            return soft_BT
        hard_BT = cross_entropy(student_logits_BTV, tokens_BT, vocab_axis=vocab_axis)
        return (1.0 - hard_weight) * soft_BT + hard_weight * hard_BT


TEXT_ALONE = Objective(hard_weight=1.0)
"""Plain language modelling: no teacher."""
