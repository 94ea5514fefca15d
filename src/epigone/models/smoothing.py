"""How counts become probabilities: every smoothing is one interpolation, told by weights and an escape mass.

For a seen context h and h' = h without its oldest token

    p(w | h) = (weight(h w) + escape(h) p(w | h')) / (sum_w weight(h w) + escape(h)),

an unseen context has p(w | h) = p(w | h'), and below the empty context stands the uniform distribution over the V - 2
predictable tokens (all but pad and bos). So rows sum to one by construction, and a row is a mixture that can be sampled
level by level without being formed.

`scale` multiplies the counts before smoothing: ten copies of a text at scale 0.1 weigh as much as one. The seen and
unseen words then keep the balance they had in the one copy, where unscaled counts would leave too little escape mass.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from epigone.models.counts import Counts, Level
from epigone.models.language_model import BOS

FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""Discounts of counts 1, 2, 3 and more where the text gives no estimate (KenLM's `--discount_fallback`)."""


class Mass(NamedTuple):
    """Unnormalised interpolation of one level: `weights_E` of its n-grams, `escape_C` of its contexts."""

    weights_E: np.ndarray
    escape_C: np.ndarray


Smoothing = Callable[[Counts, float], list[Mass]]


def witten_bell(counts: Counts, scale: float) -> list[Mass]:
    """Witten-Bell interpolation: p(w | h) = (s c(h w) + T(h) p(w | h')) / (s N(h) + T(h)).

    T(h) is the number of distinct tokens seen after h, N(h) = sum_w c(h w). Copies of a text leave T as it is and
    multiply c, so the scale s acts on c alone. Source: Witten and Bell 1991, method C.
    """
    return [
        Mass(scale * counts_E, np.diff(level.starts).astype(np.float64))
        for level, counts_E in zip(counts.levels, counts.counts, strict=True)
    ]


def mle(counts: Counts, scale: float) -> list[Mass]:
    """Relative frequencies: p(w | h) = c(h w) / N(h), whatever the scale.

    An unseen context falls back to the longest seen shorter one; after a seen context an unseen token has probability
    zero, a log-probability of -inf.
    """
    return [
        Mass(counts_E.astype(np.float64), np.zeros(len(level.context_keys_C)))
        for level, counts_E in zip(counts.levels, counts.counts, strict=True)
    ]


def kneser_ney(counts: Counts, scale: float) -> list[Mass]:
    """Interpolated modified Kneser-Ney: p(w | h) = (max(c - D(c), 0) + escape(h) p(w | h')) / N(h).

    Occurrences count, times the scale, for the longest n-grams and for those whose context begins with bos (nothing can
    stand before them); for all others c is the number of distinct tokens before them, which copies of a text do not
    change, and the scale leaves alone. D(c) is one of three discounts a level, for counts 1, 2, 3 and more (a scaled
    count is rounded to choose), and escape(h) is the sum of what the discounts took.

    At scale 1 this is Chen and Goodman 1998, eq. 26, with KenLM's treatment of bos and its fallback where the discounts
    cannot be estimated; KenLM puts one bos before a text, here there are order - 1.
    """
    adjusted = _adjusted_counts(counts, scale)
    return [_discounted(level, counts_E) for level, counts_E in zip(counts.levels, adjusted, strict=True)]


def _adjusted_counts(counts: Counts, scale: float) -> list[np.ndarray]:
    adjusted = []
    for level, raw_E, left_E in zip(counts.levels, counts.counts, counts.continuations, strict=False):
        starts_with_bos_C = level.context_keys_C % level.vocab_size == BOS
        starts_with_bos_E = np.repeat(starts_with_bos_C, np.diff(level.starts))
        adjusted.append(np.where(starts_with_bos_E, scale * raw_E, left_E))
    return [*adjusted, scale * counts.counts[-1]]


def _discounted(level: Level, counts_E: np.ndarray) -> Mass:
    classes_E = np.clip(np.rint(counts_E), 1, 5).astype(np.int64)
    discounts_E = np.array(discounts(np.bincount(classes_E, minlength=6)[1:5]))[np.minimum(classes_E, 3) - 1]
    taken_E = np.minimum(counts_E, discounts_E)
    return Mass(counts_E - taken_E, np.add.reduceat(taken_E, level.starts[:-1]))


def discounts(counts_of_counts: np.ndarray) -> tuple[float, float, float]:
    """Discounts of counts 1, 2 and 3+: D_j = j - (j + 1) Y n_{j+1} / n_j with Y = n_1 / (n_1 + 2 n_2).

    `counts_of_counts` is [n_1, n_2, n_3, n_4]. Where n_1, n_2 or n_3 is zero or a D_j leaves [0, j], all three are
    `FALLBACK_DISCOUNTS`: text that a model wrote, or text seen many times, may have no singletons. Source: Chen and
    Goodman 1998, eq. 26; KenLM, lm/builder/adjust_counts.cc.

    >>> [round(d, 3) for d in discounts(np.array([100, 30, 15, 10]))]
    [0.625, 1.062, 1.333]
    >>> discounts(np.array([0, 30, 15, 10]))
    (0.5, 1.0, 1.5)
    """
    n1, n2, n3, n4 = (float(n) for n in counts_of_counts)
    if not (n1 and n2 and n3):
        return FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    estimates = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    in_range = all(0 <= estimate <= j for j, estimate in enumerate(estimates, start=1))
    return estimates if in_range else FALLBACK_DISCOUNTS
