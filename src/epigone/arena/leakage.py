"""What shown scores still tell: the size of the model behind them, and how many samples each is worth."""

import numpy as np

from epigone.errors import UserError


def hidden_size(log_probs_NV: np.ndarray) -> tuple[int, float]:
    """The width D of a model whose head is D numbers to V scores, from full rows of scores; and how clear that is.

    Rows of log-probabilities, each less its mean, lie in a space of D dimensions (Carlini et al. 2024,
    arXiv:2403.06634; Finlayson et al. 2024, arXiv:2403.09539): the answer is where the logarithms of neighbouring
    singular values differ most. The gap is that difference, in nats: tens where scores are exact, below 1 where
    noise or rounding has filled the other dimensions. A bias of the head adds one dimension.

    Raises UserError for fewer than 3 rows or columns, and for scores that are not shown.
    """
    rows, V = log_probs_NV.shape
    if rows < 3 or V < 3:
        raise UserError(
            f"{rows} rows of {V} scores: the hidden size needs at least 3 of both, and more rows than it is"
        )
    if not np.isfinite(log_probs_NV).all():
        raise UserError("some scores are not shown: the hidden size needs whole rows")
    centred_NV = log_probs_NV.astype(np.float64) - log_probs_NV.mean(axis=1, keepdims=True, dtype=np.float64)
    values = np.linalg.svd(centred_NV, compute_uv=False)[: min(rows, V - 1)]
    logs = np.log(np.maximum(values, np.finfo(np.float64).tiny))
    gaps = logs[:-1] - logs[1:]
    return int(np.argmax(gaps)) + 1, float(gaps.max())


def missing_nats(p_V: np.ndarray, is_shown_V: np.ndarray) -> float:
    """KL(p || q) in nats, where q has the shown probabilities and spreads what is missing evenly over the others."""
    hidden_V = ~is_shown_V & (p_V > 0)
    if not hidden_V.any():
        return 0.0
    even = p_V[hidden_V].sum() / (~is_shown_V).sum()
    return float(np.sum(p_V[hidden_V] * np.log(p_V[hidden_V] / even)))


def samples_worth(p_V: np.ndarray, is_shown_V: np.ndarray) -> float:
    """Samples of one context that tell as much as its shown scores do; infinite where they tell all.

    N samples leave E KL(p || estimate) of about (K - 1) / 2N over K outcomes (add-1/2 estimate, N much above K), which
    is set equal to what shown scores leave (`missing_nats`). Raises UserError for what is no distribution.
    """
    if p_V.shape != is_shown_V.shape or p_V.min() < 0 or abs(p_V.sum() - 1) > 1e-4:
        raise UserError(f"{p_V.shape} probabilities that sum to {p_V.sum():.4f}: give one distribution and its mask")
    left = missing_nats(p_V, is_shown_V)
    return float("inf") if left == 0 else (np.count_nonzero(p_V) - 1) / (2 * left)
