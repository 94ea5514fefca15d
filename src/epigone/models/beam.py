"""Beam search: of all continuations of a prompt, one that the model holds very likely, kept by a few candidates a step.

Shapes: B prompts, K beams of each, R = B K rows, M candidates of a row. A model says what may come next; the search is
the same for all models.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from epigone.errors import UserError
from epigone.models.language_model import Document


class Next(NamedTuple):
    """The M most probable next tokens of each row, with their natural-log probabilities."""

    tokens_RM: np.ndarray
    log_probs_RM: np.ndarray


Step = Callable[[np.ndarray, np.ndarray], Next]
"""(row that each row goes on from [R], token that it reads [R]) -> what may come after it."""


class Beams:
    """The search for B prompts, side by side: feed it what may come next, until `done`.

    The score of a continuation is sum log p / n over its n tokens, its end among them where it has one (length
    normalisation of Wu et al. 2016 with exponent 1). A prompt is done when K of its continuations have ended and no
    beam can still be better, or after `length` tokens.
    """

    def __init__(self, prompts: int, beams: int, length: int, ends: Sequence[int]) -> None:
        if beams < 1:
            raise UserError(f"beams={beams}: a search keeps 1 or more")
        self.beams, self.length, self.ends = beams, length, set(ends)
        self.sums_BK = np.full((prompts, beams), -np.inf)
        self.sums_BK[:, 0] = 0.0  # all beams of a prompt are one until they part
        self.tokens: list[list[list[int]]] = [[[] for _ in range(beams)] for _ in range(prompts)]
        self.ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(prompts)]
        self.going_B = np.ones(prompts, bool)
        self.steps = 0

    @property
    def done(self) -> bool:
        """Whether nothing more is to be read."""
        return self.steps >= self.length or not self.going_B.any()

    def feed(self, found: Next) -> tuple[np.ndarray, np.ndarray]:
        """Choose among what may come next; the row that each row goes on from [R], and the token that it reads [R]."""
        prompts, beams = self.sums_BK.shape
        totals_BKM = self.sums_BK[:, :, None] + found.log_probs_RM.reshape(prompts, beams, -1)
        tokens_BKM = found.tokens_RM.reshape(totals_BKM.shape)
        parents, read = np.zeros((prompts, beams), np.int32), np.zeros((prompts, beams), np.int32)
        self.steps += 1
        for b in range(prompts):
            parents[b] = b * beams
            if self.going_B[b]:
                self._choose(b, totals_BKM[b], tokens_BKM[b], parents[b], read[b])
        return parents.ravel(), read.ravel()

    def _choose(
        self, b: int, totals_KM: np.ndarray, tokens_KM: np.ndarray, parents: np.ndarray, read: np.ndarray
    ) -> None:
        """The beams of one prompt after a step; writes where its rows come from and what they read."""
        beams, before = self.beams, self.tokens[b]
        best = np.argsort(-totals_KM, axis=None, kind="stable")[: 2 * beams]
        kept: list[tuple[float, int, int]] = []
        for rank, place in enumerate(best):
            beam, candidate = divmod(int(place), totals_KM.shape[1])
            total, token = float(totals_KM[beam, candidate]), int(tokens_KM[beam, candidate])
            if total == -np.inf or len(kept) == beams:
                break
            if token not in self.ends:
                kept.append((total, beam, token))
            elif rank < beams:
                self._end(b, total, before[beam])
        self.sums_BK[b] = -np.inf
        for k, (total, beam, token) in enumerate(kept):
            self.sums_BK[b, k], parents[k], read[k] = total, b * beams + beam, token
        self.tokens[b] = [[*before[beam], token] for _, beam, token in kept]
        self.tokens[b] += [[] for _ in range(beams - len(kept))]
        worst = min((score for score, _ in self.ended[b]), default=-np.inf)
        settled = len(self.ended[b]) >= beams and worst >= self.sums_BK[b, 0] / self.steps
        self.going_B[b] = bool(kept) and not settled

    def _end(self, b: int, total: float, tokens: list[int]) -> None:
        self.ended[b].append((total / self.steps, tokens))
        self.ended[b] = sorted(self.ended[b], key=lambda found: -found[0])[: self.beams]

    def best(self) -> list[Document]:
        """The best continuation of each prompt, without its end."""
        found = []
        for b, ended in enumerate(self.ended):
            open_ones = zip(self.sums_BK[b], self.tokens[b], strict=True)
            # A beam that never ended counts where the length ended it, and where nothing else was found.
            running = [(float(s) / max(1, self.steps), t) for s, t in open_ones if s > -np.inf]
            candidates = [*ended, *(running if self.going_B[b] or not ended else [])]
            found.append(np.array(max(candidates, key=lambda one: one[0])[1] if candidates else [], np.int32))
        return found


def search(step: Step, first: Next, beams: Beams) -> list[Document]:
    """Run a search to its end, from what may come after the prompts."""
    found = first
    while True:
        parents_R, tokens_R = beams.feed(found)
        if beams.done:
            return beams.best()
        found = step(parents_R, tokens_R)


def most_probable(log_probs_RV: np.ndarray, count: int) -> Next:
    """The best tokens of each row, ties to the lower id."""
    best_RM = np.argsort(-log_probs_RV, axis=1, kind="stable")[:, :count]
    return Next(best_RM, np.take_along_axis(log_probs_RV, best_RM, axis=1))
