"""A student that is its own teacher: the scores are those of the running average of its weights.

Mean teacher (Tarvainen & Valpola 2017): theta'_t = d theta'_(t-1) + (1 - d) theta_t, d the training's `ema_decay`, and
the scores of step t + 1 are those of theta'_t. The average is part of the training state: so nothing is copied, and a
run that was killed goes on with it.
"""

from dataclasses import dataclass
from typing import Any

from epigone.errors import UserError
from epigone.lessons.objective import Objective
from epigone.lessons.schedules import ends
from epigone.models.config import DecoderConfig
from epigone.teachers.in_memory import DecoderStates, DecoderTeacher


@dataclass(frozen=True)
class AverageStates(DecoderStates):
    """Forward pass of the student's averaged weights, which the step has in its state.

    The step reads a batch with them as with the student's own: with adapters, beside weights that are not trained.
    """


class MeanTeacher(DecoderTeacher):
    """The running average of the student's weights."""

    def __init__(self, config: DecoderConfig, tokenizer_identity: str, tokenizer_name: str = "unnamed") -> None:
        super().__init__(config, {}, tokenizer_identity, tokenizer_name)
        self.scores = AverageStates(config)

    def place(self) -> Any:
        """Nothing: the weights are in the training state."""
        return {}


def weights_of(scores: Any, state: dict[str, Any], teacher_params: Any) -> Any:
    """The weights with which a teacher scores a step: its own, or the average in the state before the step."""
    return state["ema"] if isinstance(scores, AverageStates) else teacher_params


def check_mean_teacher(objective: Objective, ema_decay: float | None, own_share: float = 0.0) -> None:
    """Refuse an average that is not there, and what nothing can be learned from. Raises UserError."""
    if not ema_decay:
        raise UserError(
            f"mean_teacher: ema_decay={ema_decay} of the training leaves no average of the weights that could teach: "
            "set it above 0, as to 0.99"
        )
    if set(ends(objective.hard_weight)) == {0.0}:
        raise UserError(
            "mean_teacher: hard_weight=0 teaches nothing, since a student and its average agree from the start: set "
            "hard_weight above 0"
        )
    if own_share:
        raise UserError(
            f"mean_teacher: an average of the student's weights cannot correct the student's own texts (on_policy, "
            f"share={own_share:g}): name a teacher, or learn from text"
        )
