"""Who asks in order to copy? One function a detector, over windows of a query log; thresholds that hold what they say.

A detector gives a number, higher where traffic looks more like extraction. What number is too high is not chosen but
calibrated on the windows of honest users (`calibrated`): the rate of false alarms then holds for any detector, with an
exact interval, as long as tomorrow's honest windows are like those.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy import sparse, stats
from scipy.sparse.csgraph import connected_components

from epigone.errors import UserError
from epigone.evaluate.similarity import vendi, word_features
from epigone.models.language_model import Document


class Query(NamedTuple):
    """One line of a query log: when (seconds), who, and the tokens of what was asked."""

    time: float
    account: str
    prompt: Document


Window = Sequence[Query]
"""Queries of one account, in the order of their times."""


def volume(window: Window, span: float = 3600.0) -> float:
    """The most queries within `span` seconds."""
    return float(np.max(running(window, span), initial=0))


def running(window: Window, span: float = 3600.0) -> np.ndarray:
    """At each query, how many there are in the `span` seconds up to it, itself counted."""
    times = np.array([query.time for query in window])
    return np.arange(1, len(times) + 1) - np.searchsorted(times, times - span, side="right")


def regularity(window: Window) -> float:
    """Minus the coefficient of variation of the gaps between queries: 0 for a clock, about -1 for a Poisson process.

    People come in bursts, and are far below -1. Fewer than 3 queries have no gaps to compare: minus infinity.
    """
    gaps = np.diff([query.time for query in window])
    if len(gaps) < 2 or gaps.mean() == 0:
        return -np.inf
    return float(-gaps.std() / gaps.mean())


def coverage(window: Window) -> float:
    """The effective number of different prompts (Vendi score), as a share of the queries.

    One who wants all that a model knows asks for something else every time; people stay with what they do.
    """
    if not window:
        return 0.0
    features = word_features([query.prompt for query in window])
    return vendi((features @ features.T).toarray()) / len(window)


def novelty(window: Window, seen: frozenset[tuple[int, int]]) -> float:
    """The share of pairs of neighbouring tokens that are not in `seen` (`pairs` of honest traffic)."""
    asked = Counter(pair for query in window for pair in _pairs(query.prompt))
    total = asked.total()
    return sum(count for pair, count in asked.items() if pair not in seen) / total if total else 0.0


def pairs(log: Sequence[Query]) -> frozenset[tuple[int, int]]:
    """The pairs of neighbouring tokens that were asked: what `novelty` compares with."""
    return frozenset(pair for query in log for pair in _pairs(query.prompt))


def _pairs(prompt: Document) -> list[tuple[int, int]]:
    tokens = np.asarray(prompt).tolist()
    return list(pairwise(tokens))


def repetition(window: Window, ends: int = 3) -> float:
    """The share of queries that have the most common frame: the same first, or the same last `ends` tokens."""
    if not window:
        return 0.0
    return max(Counter(frames).most_common(1)[0][1] for frames in _frames(window, ends)) / len(window)


def _frames(window: Window, ends: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """How each query begins, and how it ends; each frame says which of both it is."""
    tokens = [np.asarray(query.prompt).tolist() for query in window]
    return [(0, *one[:ends]) for one in tokens], [(1, *one[-ends:]) for one in tokens]


def prada(window: Window, least: int = 20) -> float:
    """1 - W of Shapiro and Wilk for distances of queries to those before them (PRADA, Juuti et al. 2019, 1805.02628).

    Distances of honest queries to the nearest of a growing set are near to normal; made-up ones are not. The set grows
    by queries that are further off than the mean of its distances less their standard deviation; distances beyond
    three standard deviations are left out. One class here, since text has none; 0 for fewer than `least` distances.
    """
    features = word_features([query.prompt for query in window]).toarray()
    kept = list(features[:1])
    distances: list[float] = []
    threshold = 0.0
    growing: list[float] = []
    for row in features[1:]:
        nearest = float(np.min(np.linalg.norm(np.stack(kept) - row, axis=1)))
        distances.append(nearest)
        if nearest > threshold:
            kept.append(row)
            growing.append(nearest)
            threshold = max(threshold, float(np.mean(growing) - np.std(growing)))
    found = np.array(distances)
    found = found[np.abs(found - found.mean()) <= 3 * found.std()] if len(found) else found
    if len(found) < max(3, least) or np.ptp(found) == 0:
        return 0.0
    return 1 - float(stats.shapiro(found).statistic)


def mmd(window: Window, honest: Window) -> float:
    """MMD^2 between the prompts of a window and those of honest users, without bias; 0 on average where they are alike.

    sum_{i != j} k(x_i, x_j) / m (m - 1) + sum_{i != j} k(y_i, y_j) / n (n - 1) - 2 mean k(x, y) (Gretton et al. 2012),
    where k is the mean of three Gaussians of half, once and twice the median distance among the honest ones.
    """
    if len(window) < 2 or len(honest) < 2:
        raise UserError(f"MMD of {len(window)} and {len(honest)} queries: it needs at least 2 of both")
    m = len(window)
    features = word_features([query.prompt for query in (*window, *honest)])
    cosines = (features @ features.T).toarray()
    norms = np.diag(cosines)
    squares = np.maximum(norms[:, None] + norms[None] - 2 * cosines, 0)
    honest_squares = squares[m:, m:][~np.eye(len(honest), dtype=bool)]
    median = np.median(np.sqrt(honest_squares)) or 1.0
    kernel = np.mean([np.exp(-squares / (2 * (scale * median) ** 2)) for scale in (0.5, 1.0, 2.0)], axis=0)
    within = [
        (part.sum() - np.trace(part)) / (len(part) * (len(part) - 1)) for part in (kernel[:m, :m], kernel[m:, m:])
    ]
    return float(sum(within) - 2 * kernel[:m, m:].mean())


def coordination(log: Mapping[str, Window], span: float = 600.0, ends: int = 3, least: int = 3) -> dict[str, float]:
    """For each account, with how many others it shares both frames and times, itself not counted.

    A frame that an account uses `least` times is one of its own; accounts that are together in a graph share one, and
    are active in the same pieces of `span` seconds more often than independent ones would be in 99.9 of 100 cases
    (hypergeometric). The number is the size of the connected part of that graph, less 1.
    """
    accounts = list(log)
    own = [_own_frames(log[account], ends, least) for account in accounts]
    begins = min((window[0].time for window in log.values() if window), default=0.0)
    ends_at = max((window[-1].time for window in log.values() if window), default=0.0)
    pieces = int((ends_at - begins) // span) + 1
    active = np.zeros((len(accounts), pieces), bool)
    for row, account in zip(active, accounts, strict=True):
        row[[int((query.time - begins) // span) for query in log[account]]] = True
    together = active.astype(np.int64) @ active.T.astype(np.int64)
    linked = np.zeros((len(accounts), len(accounts)), bool)
    for i in range(len(accounts)):
        for j in range(i):
            if own[i] & own[j]:
                by_chance = stats.hypergeom.sf(together[i, j] - 1, pieces, active[i].sum(), active[j].sum())
                linked[i, j] = by_chance < 1e-3
    _, parts = connected_components(sparse.csr_array(linked), directed=False)
    sizes = np.bincount(parts, minlength=1)
    return {account: float(sizes[part] - 1) for account, part in zip(accounts, parts, strict=True)}


def _own_frames(window: Window, ends: int, least: int) -> frozenset[tuple[int, ...]]:
    counts = Counter(frame for frames in _frames(window, ends) for frame in frames)
    return frozenset(frame for frame, count in counts.items() if count >= least)


@dataclass(frozen=True)
class Threshold:
    """Above `value` is an alarm.

    Attributes:
        value: of the detector.
        rate: the most false alarms that were asked for, as a share of honest windows.
        low: lower end of the 95 % interval of the rate that this threshold really has, for new honest windows.
        high: upper end of it.
        windows: honest windows that it was calibrated on.
    """

    value: float
    rate: float
    low: float
    high: float
    windows: int

    def alarm(self, score: float) -> bool:
        """Whether this is too much."""
        return score > self.value

    def __str__(self) -> str:
        rates = f"{self.rate:.2%} (95 % interval {self.low:.2%} to {self.high:.2%})"
        return f"above {self.value:.4g}, where at most {rates} of honest windows are, by {self.windows:,} of them"


def calibrated(honest: Sequence[float], rate: float) -> Threshold:
    """The threshold that new honest windows pass with probability `rate` at most, by conformal calibration.

    It is the ceil((n + 1) (1 - rate))-th smallest of n numbers. Whatever their distribution, the rate of false alarms
    given these windows is Beta(n + 1 - k, k) distributed for that k, or below where numbers are equal (Vovk 2012,
    arXiv:1209.2673); the interval is that distribution's. Raises UserError where n is too small for such a rate.
    """
    n = len(honest)
    if not 0 < rate < 1 or (n + 1) * rate < 1:
        raise UserError(f"a rate of {rate} of {n} honest windows: give more than 1 / (windows + 1), below 1")
    k = int(np.ceil(round((n + 1) * (1 - rate), 9)))
    low, high = stats.beta.ppf([0.025, 0.975], n + 1 - k, k)
    return Threshold(float(np.sort(honest)[k - 1]), rate, float(low), float(high), n)


def detected(scores: Sequence[float], threshold: Threshold) -> tuple[float, float, float]:
    """The share of windows with an alarm, and its exact 95 % interval (Clopper and Pearson)."""
    alarms = sum(map(threshold.alarm, scores))
    interval = stats.binomtest(alarms, len(scores)).proportion_ci(method="exact")
    return alarms / len(scores), float(interval.low), float(interval.high)
