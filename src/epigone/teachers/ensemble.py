"""Several teachers of one student: all score each batch, and count as the lesson says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from epigone.data.packing import Rows
from epigone.data.pipeline import Batch
from epigone.errors import UserError
from epigone.lessons.ensemble import Combine, Several, Weigh, mean_of_probabilities
from epigone.teachers import Signal, Teacher
from epigone.teachers.score_files import segments


@dataclass(frozen=True)
class Ensemble:
    """How several teachers become one, the value of `Lesson.ensemble`.

    Attributes:
        weights: of each teacher, in the order of the lesson; None: all the same.
        combine: `mean_of_probabilities` or `mean_of_logits` of `epigone.lessons.ensemble`.
        weigh: factor on a teacher's weight at each token: `by_confidence` or `by_likelihood`; None for none.
        route: for each source of the lesson's text the key of the one teacher that scores it; None: all score all.
    """

    weights: tuple[float, ...] | None = None
    combine: Combine = mean_of_probabilities
    weigh: Weigh | None = None
    route: tuple[str, ...] | None = None

    def check(self, teachers: Sequence[str], sources: int) -> None:
        """Refuse what does not fit the lesson. Raises UserError."""
        if len(set(teachers)) < max(2, len(teachers)):
            raise UserError(f"an ensemble has two or more different teachers, not {', '.join(teachers) or 'none'}")
        if self.weights is not None and (len(self.weights) != len(teachers) or min(self.weights) <= 0):
            raise UserError(f"ensemble: weights {list(self.weights)} are not {len(teachers)} positive numbers")
        if self.route is None:
            return
        if len(self.route) != sources or not set(self.route) <= set(teachers):
            raise UserError(
                f"ensemble: route {list(self.route)} does not name one of the teachers {', '.join(teachers)} for each "
                f"of the {sources} sources of text"
            )


@dataclass(frozen=True)
class SeveralScores:
    """What each of several teachers gives for a batch."""

    members: tuple[Any, ...]
    combine: Combine
    weigh: Weigh | None

    def __call__(self, params: Any, batch: Batch, fetched: dict[str, Any]) -> Several:
        parts = zip(self.members, params["members"], fetched["members"], strict=True)
        given = tuple(member(own, batch, own_fetched) for member, own, own_fetched in parts)
        return Several(given, fetched["weights_BTM"], self.combine, self.weigh)


class EnsembleTeacher:
    """Several teachers with one vocabulary, but for padding; what one of them lacks is masked in all.

    Where texts are routed, a segment is known by its content: so in any order and batch.
    """

    def __init__(self, members: Sequence[Teacher], how: Ensemble, routes: Mapping[bytes, int] | None = None):
        self.members, self.how, self.routes = list(members), how, routes
        first = self.members[0]
        self.vocab_size = min((member.vocab_size for member in self.members if member.vocab_size), default=None)
        self.tokens = first.tokens
        self.tokenizer_identity, self.tokenizer_name = first.tokenizer_identity, first.tokenizer_name
        self.signal = Signal.HIDDEN_STATES
        self.scores = SeveralScores(tuple(member.scores for member in self.members), how.combine, how.weigh)
        self.head: Any = tuple(member.head for member in self.members)

    def place(self) -> Any:
        """The parameters of all."""
        return {"members": [member.place() for member in self.members]}

    def fetch(self, batch: Batch) -> dict[str, Any]:
        """What the members fetch, and the weight of each at every token [B, T, M]."""
        weights_M = np.array(self.how.weights or [1.0] * len(self.members), np.float32)
        weights_BTM = np.tile(weights_M / weights_M.sum(), (*batch.tokens_BT.shape, 1))
        if self.routes is not None:
            for segment in segments(np.asarray(batch.tokens_BT), np.asarray(batch.segments_BT)):
                place = slice(segment.first, segment.first + segment.length)
                weights_BTM[segment.row, place] = np.arange(len(self.members)) == self.routes[segment.key]
        return {"members": [member.fetch(batch) for member in self.members], "weights_BTM": weights_BTM}

    def flops_per_token(self, length: int) -> int:
        """Those of all: also a teacher whose weight is 0 reads the text."""
        return sum(member.flops_per_token(length) for member in self.members)


def routes_of(rows: Sequence[Rows], chosen: Sequence[int]) -> dict[bytes, int]:
    """Which teacher scores each segment, from the teacher chosen for each source of text."""
    found: dict[bytes, int] = {}
    for source, teacher in zip(rows, chosen, strict=True):
        planes = source.planes_R3T
        found |= {segment.key: teacher for segment in segments(planes[:, 0], planes[:, 2])}
    return found
