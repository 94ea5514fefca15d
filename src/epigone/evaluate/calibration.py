"""Is a model right as often as it says it is? Calibration of the most probable next token."""

from dataclasses import dataclass

import numpy as np

from epigone.evaluate.contexts import Contexts, score_contexts
from epigone.models.language_model import LanguageModel


@dataclass(frozen=True)
class TopPredictions:
    """A model's first choice at M places.

    Attributes:
        confidence_M: probability of the most probable token.
        correct_M: whether that token came next.
    """

    confidence_M: np.ndarray
    correct_M: np.ndarray


@dataclass(frozen=True)
class Bin:
    """One row of a reliability table: places whose confidence lies in (low, high], the lowest also at low."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def top_predictions(model: LanguageModel, contexts: Contexts) -> TopPredictions:
    """The model's most probable token at every place (the lowest id among equals), its probability, and the outcome."""
    chunks = [first_choices(scores_MV) for (scores_MV,) in score_contexts([model], contexts.prefixes)]
    confidence_M, chosen_M = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    return TopPredictions(confidence_M, chosen_M == contexts.targets_M)


def first_choices(scores_MV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability [M] and id [M] of the most probable token of each row of log-scores."""
    return np.exp(scores_MV.max(axis=1)), scores_MV.argmax(axis=1)


def reliability_table(top: TopPredictions, bins: int = 15, *, adaptive: bool = False) -> list[Bin]:
    """Mean confidence against accuracy by bin of confidence; empty bins are left out.

    Args:
        top: first choices, at least one.
        bins: number of bins.
        adaptive: bins with (nearly) equal numbers of places instead of equal widths on [0, 1]. Equal confidences
            always share a bin, so the table does not depend on the order of the places and may have fewer bins.
    """
    if adaptive:
        edges = np.unique(np.quantile(top.confidence_M, np.linspace(0, 1, bins + 1)))
    else:
        edges = np.linspace(0, 1, bins + 1)
    inner = edges[1:-1]
    owner_M = np.searchsorted(inner, top.confidence_M, side="left")
    size = len(inner) + 1
    count = np.bincount(owner_M, minlength=size)
    confidence = np.bincount(owner_M, weights=top.confidence_M, minlength=size)
    correct = np.bincount(owner_M, weights=top.correct_M, minlength=size)
    return [
        Bin(float(edges[i]), float(edges[min(i + 1, len(edges) - 1)]), int(n), confidence[i] / n, correct[i] / n)
        for i, n in enumerate(count)
        if n
    ]


def expected_calibration_error(top: TopPredictions, bins: int = 15, *, adaptive: bool = False) -> float:
    """ECE = sum_b (n_b / M) |accuracy_b - confidence_b|, a share in [0, 1] (some print per cent).

    Guo et al., On Calibration of Modern Neural Networks (2017), section 2; adaptive bins: Nixon et al., Measuring
    Calibration in Deep Learning (2019). A perfectly calibrated model measures above 0 too: the sampling noise of its
    bins, about sum_b sqrt(2 n_b a_b (1 - a_b) / pi) / M.
    """
    table = reliability_table(top, bins, adaptive=adaptive)
    return float(sum(row.count * abs(row.accuracy - row.confidence) for row in table) / len(top.confidence_M))
