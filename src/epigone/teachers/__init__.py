"""Teachers: the ways in which a teacher gives its signal, one file each, all with the protocol below."""

from collections.abc import Callable
from enum import Enum
from typing import Any, Protocol

import jax

from epigone.data.pipeline import Batch
from epigone.errors import UserError
from epigone.lessons.alignment import aligns
from epigone.lessons.divergences import forward_kl
from epigone.lessons.ensemble import Several
from epigone.lessons.heads import Head, Hidden
from epigone.lessons.inner import check as check_inner
from epigone.lessons.match_kinds import Sizes
from epigone.lessons.objective import Objective
from epigone.lessons.sparse import Rest, Sparse


class Signal(Enum):
    """What a teacher gives for a batch."""

    DENSE_LOGITS = "dense logits"
    HIDDEN_STATES = "hidden states and an output head"
    SPARSE_SCORES = "sparse scores"
    OTHER_TOKENS = "scores of tokens of its own"
    TEXT_ONLY = "text only"


class Teacher(Protocol):
    """Gives a signal for each batch: first on the host (`fetch`), then inside the training step (`scores`).

    Attributes:
        vocab_size: entries of a logits row.
        tokens: how many of them are tokens; the others, at the end, are padding. None: it is not known.
        tokenizer_identity: what says that two tokenizers are one (`Tokenizer.vocabulary`).
        tokenizer_name: its name, for messages.
        signal: what it gives.
        scores: `(params, batch, fetched)` -> logits [B, T, V], `Hidden` states with a head, or `Sparse`; traced. A
            function or a frozen dataclass, equal for teachers of one shape, and without arrays in it: steps are
            compiled once for all that are equal.
        head: how hidden states become logits, or that of each of several teachers; None where there are none.
    """

    vocab_size: int | None
    tokens: int | None
    tokenizer_identity: str
    tokenizer_name: str
    signal: Signal
    scores: Callable[[Any, Any, Any], jax.Array | Hidden | Sparse | Several]
    head: Head | tuple[Head | None, ...] | None

    def place(self) -> Any:
        """Parameters on the mesh that is set, an argument of the compiled step; {} where there are none."""
        ...

    def fetch(self, batch: Batch) -> dict[str, Any]:
        """Host arrays [B, T, ...] that `scores` needs for this process's part of a batch; {} where it needs none."""
        ...

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations for one token of a sequence of this length."""
        ...


def check_compatible(
    objective: Objective,
    teacher: Teacher | None,
    *,
    vocab_size: int | None,
    tokenizer_identity: str | None = None,
    tokenizer_name: str = "unnamed",
) -> None:
    """Refuse, before step 0, a teacher whose signal the objective cannot take.

    Args:
        objective: what the student is trained on.
        teacher: the teacher, or None.
        vocab_size: the student's vocabulary.
        tokenizer_identity: the student's tokenizer; None leaves it unchecked (where no tokenizer is at hand).
        tokenizer_name: its name, for messages.

    Raises:
        UserError: a teacher is missing, unused or without scores, or its vocabulary or tokenizer is another.
    """
    check_needed(objective, teacher is not None)
    if teacher is None:
        return
    if teacher.signal not in (taken := _taken(objective)):
        raise UserError(
            f"the teacher gives {teacher.signal.value}, and the objective takes {' or '.join(s.value for s in taken)}: "
            "choose a teacher with scores, or train on its text with hard_weight=1"
        )
    if teacher.signal is Signal.OTHER_TOKENS:
        return
    names = f"(tokenizers '{teacher.tokenizer_name}', '{tokenizer_name}')"
    another = tokenizer_identity is not None and teacher.tokenizer_identity != tokenizer_identity
    if teacher.vocab_size != vocab_size and (another or not _padded(teacher, vocab_size)):
        raise UserError(
            f"teacher vocabulary {teacher.vocab_size} != student vocabulary {vocab_size} {names}: "
            "give both one tokenizer"
        )
    if another:
        raise UserError(
            f"teacher and student read different tokenizers of the same size {vocab_size} {names}, identities "
            f"{teacher.tokenizer_identity} and {tokenizer_identity}: give both one tokenizer"
        )


def _taken(objective: Objective) -> tuple[Signal, ...]:
    """What an objective learns from."""
    if aligns(objective.divergence):
        return (Signal.OTHER_TOKENS,)
    return (Signal.DENSE_LOGITS, Signal.HIDDEN_STATES, Signal.SPARSE_SCORES)


def _padded(teacher: Teacher, vocab_size: int | None) -> bool:
    """Whether two vocabularies differ in padding alone: each holds all tokens."""
    if teacher.tokens is None or teacher.vocab_size is None or vocab_size is None:
        return False
    return min(teacher.vocab_size, vocab_size) >= teacher.tokens


def common_size(teacher: Teacher | None, vocab_size: int) -> int:
    """Ids that both can predict: where vocabularies differ in padding, what one of them lacks is masked in both."""
    return min(vocab_size, (teacher and teacher.vocab_size) or vocab_size)


def check_inside(objective: Objective, student: Sizes, teacher: Sizes | None) -> None:
    """Refuse an objective that looks inside a teacher where that cannot be, or at what is not there. Raises UserError.

    Args: the objective; sizes of the student; those of the teacher, if it is one decoder that reads each batch.
    """
    if not objective.inner:
        return
    if teacher is None:
        raise UserError(
            "objective: inner looks into the layers of a teacher, and here is none that shows them: it counts, reads "
            "other tokens, is one of several or the student's own average, or its scores are kept; name one decoder, "
            "with the student's tokenizer, and no Lesson.scores"
        )
    check_inner(objective.inner, student, teacher)


def check_kept(objective: Objective, kept: Any) -> None:
    """Refuse an objective that cannot learn from what a lesson keeps of the scores. Raises UserError."""
    rest = getattr(kept, "rest", None)
    drawn = rest == Rest.SAMPLED
    if rest is not None and callable(objective.temperature):
        raise UserError(
            f"scores are kept at one temperature, and the objective's changes, {objective.temperature}: give it a "
            "number, or keep hidden states (HiddenStates)"
        )
    if hasattr(kept, "policy") and objective.temperature != 1:
        raise UserError(
            f"a prompt box shows scores of temperature 1, and the objective's temperature is {objective.temperature}: "
            "set it to 1, or keep scores of a teacher that is at hand (TopK, TopP)"
        )
    if drawn and objective.divergence is not forward_kl:
        raise UserError(
            f"random draws estimate forward_kl alone, and the objective's divergence is {objective.divergence}: "
            "take forward_kl, or keep the best (TopK, TopP)"
        )


def check_needed(objective: Objective, has_teacher: bool) -> None:
    """Refuse an objective without the teacher that it needs, and a teacher that it does not. Raises UserError."""
    if objective.needs_teacher and not has_teacher:
        raise UserError(
            f"objective: hard_weight={objective.hard_weight} needs a teacher, and the lesson has none: "
            "name one, or set hard_weight=1"
        )
    if has_teacher and not objective.needs_teacher:
        raise UserError("objective: hard_weight=1 learns from the text alone, and the lesson names a teacher: drop one")
