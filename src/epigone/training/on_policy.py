"""Learning from one's own texts: how much, how they are written, and what does not fit.

Generalised knowledge distillation (Agarwal et al. 2024): at a share of the steps the batch is not text but what the
student itself writes, with its weights of that step, and the teacher scores that. Prompts are the beginnings of the
documents in the step's own batch of text.
"""

from dataclasses import dataclass

from epigone.errors import UserError
from epigone.lessons.objective import Objective
from epigone.lessons.policy_gradient import reads_targets
from epigone.sampling.loop import Knobs, switches
from epigone.training.config import Training


@dataclass(frozen=True)
class OnPolicy:
    """How much, and how, a student learns from its own texts.

    Attributes:
        share: of the steps whose batch is the student's own (lambda of Agarwal et al. 2024), 0 to 1.
        prompt_tokens: tokens that are given of each document, beside its bos; the rest is written. Their weight is 0.
        max_new: tokens after which a text is cut.
        temperature: divides the logits before sampling.
        top_k: sample among the k most probable tokens only; 0 is off.
        top_p: sample in the smallest set that holds this probability; 1 is off.
        teacher_share: share m of the teacher where tokens are drawn from m P + (1 - m) S (alpha of Gu et al. 2024).
        importance: the weight of a drawn token is S / (the probability with which it was drawn), S at temperature 1;
            the importance weight of Gu et al. 2024, taken of one token as there, not of all before it.
        replay: own batches that are kept.
        reuse: steps that an own batch serves, on average: one is written at every such own step, and the others take
            one of those that are kept. 1: always a new one.
    """

    share: float = 1.0
    prompt_tokens: int = 16
    max_new: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    teacher_share: float = 0.0
    importance: bool = False
    replay: int = 0
    reuse: int = 1

    def __post_init__(self) -> None:
        for name in ("share", "teacher_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"on_policy: {name}={getattr(self, name)} is outside [0, 1]")
        for name, least in (("prompt_tokens", 0), ("max_new", 1), ("replay", 0), ("reuse", 1)):
            if getattr(self, name) < least:
                raise UserError(f"on_policy: {name}={getattr(self, name)} must be at least {least}")
        if not self.temperature >= 1e-6:
            raise UserError(f"on_policy: temperature={self.temperature} must be 1e-6 or more")
        switches(self.knobs)
        if (self.replay > 0) != (self.reuse > 1):
            raise UserError(
                f"on_policy: replay={self.replay} batches are kept and each serves reuse={self.reuse} steps: "
                "set both, or leave both (replay=0, reuse=1)"
            )

    @property
    def knobs(self) -> Knobs:
        """How the next token is chosen."""
        return Knobs(self.temperature, self.top_k, self.top_p)

    @property
    def written_share(self) -> float:
        """The share of steps at which an own batch is written."""
        return self.share / self.reuse


TEXT_ONLY = OnPolicy(share=0.0)
"""No own texts: every step learns from the batch of text."""


def check_on_policy(how: OnPolicy, objective: Objective, decodes: bool | None) -> None:
    """Refuse what would not be what it says.

    Args:
        how: share and sampling of own texts.
        objective: what the student is trained on.
        decodes: whether the teacher is a decoder; None where there is no teacher.

    Raises: UserError.
    """
    if reads_targets(objective.divergence):
        _check_drawn(how, objective)
    if how.share == 0.0:
        return
    if decodes is None or not objective.needs_teacher:
        raise UserError("on_policy: own texts are no text to learn by heart: name a teacher that scores them")
    if objective.hard_weight != 0.0:
        raise UserError(
            f"on_policy: hard_weight={objective.hard_weight} would teach the student's own tokens as if they were "
            "right: set hard_weight=0"
        )
    if how.teacher_share > 0.0 and not decodes:
        raise UserError(
            f"on_policy: teacher_share={how.teacher_share:g} draws tokens from the teacher within the student's "
            "program, and this teacher is no decoder of the student's tokens: set teacher_share=0, or take one that is"
        )


def _check_drawn(how: OnPolicy, objective: Objective) -> None:
    """A policy gradient is that of a divergence only for tokens that the student drew, or with their weights."""
    name = getattr(objective.divergence, "__name__", objective.divergence)
    if how.share < 1.0:
        raise UserError(f"{name} is of tokens that the student drew: set on_policy with share=1, not {how.share:g}")
    if how.top_k or how.top_p < 1.0 or objective.temperature != 1.0:
        raise UserError(
            f"{name} needs every token at its own probability: temperature=1 of the objective, top_k=0 and top_p=1 of "
            f"on_policy, not {objective.temperature}, {how.top_k} and {how.top_p:g}"
        )
    if (how.temperature != 1.0 or how.teacher_share > 0.0) and not how.importance:
        raise UserError(
            f"{name}: tokens drawn at temperature={how.temperature:g} with teacher_share={how.teacher_share:g} are not "
            "the student's: set importance=True, which weighs them, or temperature=1 and teacher_share=0"
        )


def check_run(how: OnPolicy, training: Training, reads: bool) -> None:
    """Refuse a teacher that cannot read what is new, and prompts that fill a row."""
    if not reads:
        raise UserError(
            "on_policy: the teacher has scores of some texts only, and own texts are new: take a teacher that is in "
            "memory and reads every batch"
        )
    if how.prompt_tokens >= training.sequence_length:
        raise UserError(
            f"on_policy: prompt_tokens={how.prompt_tokens} leaves nothing to write in a row of "
            f"{training.sequence_length} tokens: shorten the prompts or lengthen the rows"
        )
