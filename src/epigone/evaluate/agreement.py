"""How alike two models are: what they say next after the same words."""

from collections.abc import Sequence

import numpy as np
from scipy.special import rel_entr

from epigone.evaluate.contexts import score_contexts
from epigone.models.language_model import Document, LanguageModel


def compare_models(
    student: LanguageModel, teacher: LanguageModel, prefixes: Sequence[Document], *, padded: bool = False
) -> dict[str, float]:
    """Compare two models' next-token distributions, S and P, averaged over contexts (token ids before the place).

    Both distributions are taken at temperature 1, over the same vocabulary, in nats and float64. With S the student
    and P the teacher:

    - `top1`: share of contexts with the same most probable token; `top1_kappa` corrects it for chance (see
      `chance_corrected`; absent if undefined).
    - `top5`: shared tokens among both models' five most probable, over five (over the longer list, where a model gives
      fewer than five tokens any probability).
    - `forward_kl` = KL(P || S), `reverse_kl` = KL(S || P): the KL with its entropy term. One token to which only the
      first gives probability makes it inf; `forward_kl_infinite` and `reverse_kl_infinite` are the shares of such
      contexts.
    - `js`: Jensen-Shannon divergence, the mean of the KLs to the even mixture: symmetric, at most ln 2, finite always.

    `padded`: see `score_contexts`.

    Raises:
        UserError: the vocabularies differ.
    """
    comparison = Comparison()
    for scores_S, scores_P in score_contexts([student, teacher], prefixes, padded=padded):
        comparison.add(scores_S, scores_P)
    return comparison.means()


class Comparison:
    """What `compare_models` says, from the two models' normalised log-scores, chunk by chunk."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._first_S: list[np.ndarray] = []
        self._first_P: list[np.ndarray] = []

    def add(self, scores_S: np.ndarray, scores_P: np.ndarray) -> None:
        """Take in the scores [M, V] of the student and of the teacher at M places."""
        self._first_S.append(scores_S.argmax(axis=1))
        self._first_P.append(scores_P.argmax(axis=1))
        values = divergences(scores_P, scores_S) | {"top5": top_overlap(scores_S, scores_P, 5)}
        for name, value_M in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value_M.sum())

    def means(self) -> dict[str, float]:
        """Every measure over all places so far."""
        chosen_S, chosen_P = np.concatenate(self._first_S), np.concatenate(self._first_P)
        means = {name: total / len(chosen_S) for name, total in self._sums.items()}
        means["top1"] = float(np.mean(chosen_S == chosen_P))
        kappa = chance_corrected(chosen_S, chosen_P)
        return means if kappa is None else means | {"top1_kappa": kappa}


def divergences(teacher_MV: np.ndarray, student_MV: np.ndarray) -> dict[str, np.ndarray]:
    """Forward and reverse KL, where they are infinite, and Jensen-Shannon, [M] each, of normalised log-scores."""
    p_MV, s_MV = np.exp(teacher_MV), np.exp(student_MV)
    mixture_MV = 0.5 * (p_MV + s_MV)
    forward_M = _kl(p_MV, teacher_MV, student_MV)
    reverse_M = _kl(s_MV, student_MV, teacher_MV)
    return {
        "forward_kl": forward_M,
        "reverse_kl": reverse_M,
        "js": 0.5 * (rel_entr(p_MV, mixture_MV) + rel_entr(s_MV, mixture_MV)).sum(axis=1),
        "forward_kl_infinite": np.isinf(forward_M),
        "reverse_kl_infinite": np.isinf(reverse_M),
    }


def _kl(p_MV: np.ndarray, log_p_MV: np.ndarray, log_q_MV: np.ndarray) -> np.ndarray:
    # In logs: exp(log q) underflows to 0 where log q is still finite, and would make the divergence infinite.
    gap_MV = np.zeros_like(p_MV)
    np.subtract(log_p_MV, log_q_MV, out=gap_MV, where=p_MV > 0)
    return np.sum(p_MV * gap_MV, axis=1)


def top_overlap(a_MV: np.ndarray, b_MV: np.ndarray, top: int) -> np.ndarray:
    """Share [M] of tokens common to both rows' `top` highest scores; -inf is no member, the longer list divides."""
    in_a_MV, in_b_MV = (_members(scores_MV, top) for scores_MV in (a_MV, b_MV))
    longer_M = np.maximum(in_a_MV.sum(axis=1), in_b_MV.sum(axis=1))
    return (in_a_MV & in_b_MV).sum(axis=1) / longer_M


def _members(scores_MV: np.ndarray, top: int) -> np.ndarray:
    top = min(top, scores_MV.shape[1])
    best_MK = np.argpartition(-scores_MV, top - 1, axis=1)[:, :top]
    members_MV = np.zeros(scores_MV.shape, dtype=bool)
    np.put_along_axis(members_MV, best_MK, True, axis=1)
    return members_MV & (scores_MV > -np.inf)


def chance_corrected(a_M: np.ndarray, b_M: np.ndarray) -> float | None:
    """Cohen's kappa (c - e) / (1 - e) of two lists of choices; 1 is full agreement, 0 what chance gives.

    c is the share of equal choices, e = sum_o f_a(o) f_b(o) the share that two models with the same habits but no
    common reason would show: two models that both say "the" at half of all places agree at a quarter of them by that
    alone. None if both always make the same single choice (e = 1), where agreement tells nothing.
    """
    observed = np.mean(a_M == b_M)
    size = int(max(a_M.max(), b_M.max())) + 1
    expected = float(np.bincount(a_M, minlength=size) @ np.bincount(b_M, minlength=size)) / len(a_M) ** 2
    return None if expected >= 1 else float((observed - expected) / (1 - expected))
