"""What a student's logits are held against: a teacher's distribution, the text itself, or both."""

from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from epigone.errors import UserError
from epigone.lessons.divergences import Divergence, cross_entropy, forward_kl
from epigone.lessons.policy_gradient import with_targets
from epigone.lessons.terms import on_cut_rows


@dataclass(frozen=True)
class Objective:
    """(1 - hard_weight) * divergence(student, teacher) + hard_weight * cross_entropy(student, text), per token.

    Attributes:
        divergence: function of student and teacher logits, from `epigone.lessons.divergences`, or of the token that the
            student drew, from `epigone.lessons.policy_gradient`.
        temperature: divides both sets of logits in the divergence; the cross-entropy is always at 1.
        temperature_squared: multiply the divergence by temperature^2 (Hinton et al. 2015).
        hard_weight: share of the cross-entropy with the text, 0 to 1; at 1 there is no teacher.
    """

    divergence: Divergence = forward_kl
    temperature: float = 1.0
    temperature_squared: bool = True
    hard_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.hard_weight <= 1.0:
            raise UserError(f"objective: hard_weight={self.hard_weight} is outside [0, 1]")
        if not self.temperature > 0.0:
            raise UserError(f"objective: temperature={self.temperature} must be positive")

    @property
    def needs_teacher(self) -> bool:
        return self.hard_weight < 1.0

    def loss(
        self,
        student_logits_BTV: Float[Array, "B T V"],
        teacher_logits_BTV: Float[Array, "B T V"] | None,
        targets_BT: Int[Array, "B T"],
        vocab_axis: str | None = None,
    ) -> Float[Array, "B T"]:
        """Loss [B, T] in nats (times T^2 in its first part), float32, neither weighted nor averaged.

        `vocab_axis`: inside shard_map, the mesh axis over which V is cut.

        Raises: UserError where a teacher is needed and there is none.
        """
        if not self.needs_teacher:
            return cross_entropy(student_logits_BTV, targets_BT, vocab_axis=vocab_axis)
        if teacher_logits_BTV is None:
            raise UserError(
                f"objective: hard_weight={self.hard_weight} leaves {1 - self.hard_weight:g} to a teacher, and there is "
                "none: name a teacher, or set hard_weight=1 to learn from the text alone"
            )
        soft_BT = on_cut_rows(with_targets(self.divergence, targets_BT), vocab_axis)(
            student_logits_BTV,
            teacher_logits_BTV,
            temperature=self.temperature,
            temperature_squared=self.temperature_squared,
        )
        if self.hard_weight == 0.0:
            return soft_BT
        hard_BT = cross_entropy(student_logits_BTV, targets_BT, vocab_axis=vocab_axis)
        return (1.0 - self.hard_weight) * soft_BT + self.hard_weight * hard_BT


TEXT_ALONE = Objective(hard_weight=1.0)
"""Plain language modelling: no teacher."""
