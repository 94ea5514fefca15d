"""Closed forms of what happens to a model that is fitted to its own samples, generation after generation.

Unless said otherwise a generation draws N tokens from the relative frequencies of the text before it (unsmoothed,
independent draws: Wright-Fisher drift of population genetics). For an n-gram model the formulas hold for each context
with N its number of visits. Heterozygosity is H(p) = 1 - sum_i p_i^2, the chance that two draws differ. Smoothing
changes the attractor: a smoothed sampler has no absorbing state and drifts towards noise instead.

Sources: Wright 1931 and Ewens 2004 (drift); Seddik et al. 2024 (arXiv 2404.05090), Shumailov et al. 2024 (Nature
631:755), Gerstgrasser et al. 2024 (arXiv 2404.01413), Feng et al. 2024 (arXiv 2406.07515), Mobahi et al. 2020 (arXiv
2002.05715), Good 1953 (missing mass).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import linalg, special

from epigone.errors import UserError


def heterozygosity(p: ArrayLike) -> np.ndarray:
    """H(p) = 1 - sum_i p_i^2 over the last axis; p sums to 1 there.

    >>> float(heterozygosity([0.5, 0.5]))
    0.5
    """
    return 1 - np.square(np.asarray(p, dtype=np.float64)).sum(axis=-1)


def heterozygosity_replace(h0: float, n: int, generations: ArrayLike) -> np.ndarray:
    """E[H_t] = H_0 (1 - 1/N)^t, when each generation of N tokens replaces the one before.

    >>> [round(float(h), 4) for h in heterozygosity_replace(0.8, 100, [0, 1, 100])]
    [0.8, 0.792, 0.2928]
    """
    _check(n >= 1, f"{n} tokens a generation: it must be 1 or more")
    return h0 * (1 - 1 / n) ** np.asarray(generations, dtype=np.float64)


def heterozygosity_accumulate(h0: float, n: int, generations: ArrayLike, held: int = 0) -> np.ndarray:
    """E[H_t] = H_0 prod_{k=1..t} (1 - 1/(N k^2)), when each generation adds N tokens to all that came before.

    H_0 belongs to the distribution from which generation 1 is drawn; the text of generation t has N t tokens. Where
    that distribution is itself the fit of `held` blocks of N tokens that stay in the text, k runs over held + 1 ..
    held + t.

    >>> [round(float(h), 4) for h in heterozygosity_accumulate(0.8, 100, [0, 1, 10])]
    [0.8, 0.792, 0.7877]
    >>> round(float(heterozygosity_accumulate(0.8, 100, 1, held=1)), 4)
    0.798
    """
    _check(n >= 1, f"{n} tokens a generation: it must be 1 or more")
    _check(held >= 0, f"{held} blocks held: it must be 0 or more")
    t = np.asarray(generations, dtype=np.int64)
    blocks = held + np.arange(1, int(t.max(initial=0)) + 1, dtype=np.float64)
    products = np.concatenate([[1.0], np.cumprod(1 - 1 / (n * blocks**2))])
    return h0 * products[t]


def heterozygosity_accumulate_limit(h0: float, n: int) -> float:
    """lim E[H_t] = H_0 sin(x) / x, x = pi / sqrt(N): accumulated text keeps all but about pi^2 / (6 N) of it.

    >>> round(heterozygosity_accumulate_limit(0.8, 100), 4)
    0.7869
    """
    _check(n >= 1, f"{n} tokens a generation: it must be 1 or more")
    return float(h0 * np.sinc(1 / np.sqrt(n)))


def heterozygosity_fresh(h0: float, n: int, alpha: float, generations: ArrayLike) -> np.ndarray:
    """E[H_t] where each generation is alpha N tokens from p_0 and (1 - alpha) N from its parent, in fixed numbers.

    With F = 1 - H:  F_{t+1} = (1-a)^2 F_t + (a^2 + 2 a (1-a)) F_0 + [(1-a)(1 - F_t) + a (1 - F_0)] / N.

    >>> [round(float(h), 4) for h in heterozygosity_fresh(0.9, 200, 0.1, [0, 1, 1000])]
    [0.9, 0.8955, 0.8769]
    """
    _check(n >= 1, f"{n} tokens a generation: it must be 1 or more")
    _check(0 <= alpha <= 1, f"fresh share {alpha}: it must lie in [0, 1]")
    t = np.asarray(generations, dtype=np.int64)
    f0, old = 1 - h0, 1 - alpha
    f = np.full(int(t.max(initial=0)) + 1, f0)
    for k in range(1, len(f)):
        f[k] = old**2 * f[k - 1] + (1 - old**2) * f0 + (old * (1 - f[k - 1]) + alpha * (1 - f0)) / n
    return 1 - f[t]


def heterozygosity_fresh_limit(h0: float, n: int, alpha: float) -> float:
    """Fixed point of `heterozygosity_fresh`: F* = [(1 - (1-a)^2) F_0 + (1 - a F_0) / N] / [1 - (1-a)^2 + (1-a) / N].

    >>> round(heterozygosity_fresh_limit(0.9, 200, 0.1), 4)
    0.8769
    """
    _check(n >= 1, f"{n} tokens a generation: it must be 1 or more")
    _check(0 <= alpha <= 1, f"fresh share {alpha}: it must lie in [0, 1]")
    f0, fresh = 1 - h0, 1 - (1 - alpha) ** 2
    return 1 - (fresh * f0 + (1 - alpha * f0) / n) / (fresh + (1 - alpha) / n)


class Block(NamedTuple):
    """A text of some tokens: drawn from the fit of a generation, or given as it is, or a random part of another.

    Attributes:
        tokens: N.
        writer: the generation (its place in a list of them) whose frequencies it is drawn from; None: a real text.
        part_of: place of the text of which these are `tokens` tokens, drawn without repetition; None: it is whole.
    """

    tokens: int
    writer: int | None = None
    part_of: int | None = None


def heterozygosity_of(
    texts: Sequence[Block], generations: Sequence[Sequence[int]], real_match: ArrayLike
) -> np.ndarray:
    """E[H] of each generation, whatever it reads: real texts, texts that any earlier one wrote, and parts of them.

    With m(j, k) = E[sum_i p_i p'_i] of two texts, the chance that a token of each is the same: generation g has
    frequencies p_g = sum_j w_j p_j, w_j = N_j / sum N, so its F_g = 1 - H_g = sum_jk w_j w_k m(j, k). A text k that g
    writes has m(j, k) = sum_l w_l m(j, l) with every text j before it, and m(k, k) = (1 - 1/N_k) F_g + 1/N_k. A part of
    r tokens meets any other text as its whole does, and itself with r in the place of N. The closed forms above are
    cases of it; given the real texts it is exact.

    Args:
        texts: each after the texts that its writer reads, and after the text that it is a part of.
        generations: of each the places of the texts that it reads.
        real_match: m(j, k) of the real texts [R, R], in their order: of their own frequencies.

    >>> chain = [Block(100), Block(100, writer=0), Block(100, writer=1)]
    >>> [round(float(h), 4) for h in heterozygosity_of(chain, [[0], [1], [2]], [[0.2]])]
    [0.8, 0.792, 0.7841]
    """
    match, mixtures = _matches(texts, generations, np.asarray(real_match, dtype=np.float64))
    return np.array([1 - weights @ match[np.ix_(read, read)] @ weights for read, weights in mixtures])


Mixture = tuple[list[int], np.ndarray]


def _matches(
    texts: Sequence[Block], generations: Sequence[Sequence[int]], real: np.ndarray
) -> tuple[np.ndarray, list[Mixture]]:
    """m(j, k) of all texts, and what each generation reads with its weights."""
    mixtures = [_mixture(texts, read) for read in generations]
    count = sum(_is_real(text) for text in texts)
    _check(real.shape == (count, count), f"real_match {real.shape} for {count} real texts")
    _check(all(_is_real(text) for text in texts[:count]), "real texts come first in the list of texts")
    match, apart = np.zeros((len(texts), len(texts))), np.zeros(len(texts))
    match[:count, :count] = real
    for k, text in enumerate(texts):
        if text.part_of is not None:
            # Another part of the same text meets this one as the whole does: at one token of N both have the same.
            others = [text.part_of if texts[j].part_of == text.part_of else j for j in range(k)]
            match[k, :k] = match[:k, k] = match[text.part_of, others]
            apart[k] = apart[text.part_of]
        elif text.writer is not None:
            read, weights = mixtures[text.writer]
            _check(max(read) < k, f"text {k} is written by a generation that reads text {max(read)}, which comes later")
            match[k, :k] = match[:k, k] = match[:k, read] @ weights
            apart[k] = weights @ match[np.ix_(read, read)] @ weights
        else:
            apart[k] = (text.tokens * match[k, k] - 1) / max(1, text.tokens - 1)
            continue
        match[k, k] = (1 - 1 / text.tokens) * apart[k] + 1 / text.tokens
    return match, mixtures


def _mixture(texts: Sequence[Block], read: Sequence[int]) -> Mixture:
    sizes = np.array([texts[j].tokens for j in read], dtype=np.float64)
    _check(bool(len(sizes) and (sizes >= 1).all()), f"texts of {sizes.tolist()} tokens: a generation reads 1 or more")
    return list(read), sizes / sizes.sum()


def _is_real(text: Block) -> bool:
    return text.writer is None and text.part_of is None


def survival(count: ArrayLike, generations: int) -> np.ndarray:
    """Chance that a type seen `count` times is still seen after so many replacing generations: 1 - q_t^count.

    q_t = exp(q_{t-1} - 1), q_0 = 0: each occurrence leaves a Poisson(1) number in the next text. That is the limit of
    many tokens, N >> count. Large t: 1 - q_t -> 2 / t.

    >>> [round(float(survival(1, t)), 3) for t in (0, 1, 2, 10)]
    [1.0, 0.632, 0.469, 0.158]
    """
    _check(generations >= 0, f"{generations} generations: it must be 0 or more")
    q = 0.0
    for _ in range(generations):
        q = float(np.exp(q - 1))
    return 1 - q ** np.asarray(count, dtype=np.float64)


def fixation_probability(p0: ArrayLike) -> np.ndarray:
    """P(type i is the last one left) = p_0(i) under replacement: p_t is a martingale, and only corners absorb.

    Takes counts or shares; types that are absent stay at 0.

    >>> fixation_probability([3, 1, 0]).tolist()
    [0.75, 0.25, 0.0]
    """
    p = np.asarray(p0, dtype=np.float64)
    _check(bool((p >= 0).all() and p.sum() > 0), "shares must not be negative, nor all 0")
    return p / p.sum()


def missing_mass_good_turing(counts: ArrayLike) -> float:
    """Good-Turing estimate n_1 / N of the probability of all types that a text of N tokens does not show.

    >>> missing_mass_good_turing([5, 3, 1, 1])
    0.2
    """
    c = np.asarray(counts)
    _check(bool(c.size and (c >= 0).all() and c.sum() > 0), "counts must not be negative, nor all 0")
    return float((c == 1).sum() / c.sum())


def missing_mass(p: ArrayLike, n: int) -> float:
    """E[M] = sum_i p_i (1 - p_i)^N: expected probability of the types that N draws from p do not show.

    >>> missing_mass([0.5, 0.5], 3)
    0.125
    """
    p = np.asarray(p, dtype=np.float64)
    return float((p * (1 - p) ** n).sum())


def gaussian_median_variance(n: int, generations: ArrayLike, variance: float = 1.0) -> np.ndarray:
    """Median of the variance refitted t times to n draws: about sigma^2 exp(-t / (n - 1)), for t >> 1 or n >> 1.

    With the unbiased estimate the *mean* over chains stays sigma^2 for ever, carried by ever fewer chains: report the
    median or the mean of the logarithm (`gaussian_mean_log_variance`, exact).

    >>> round(float(gaussian_median_variance(100, 200)), 3)
    0.133
    """
    _check(n >= 2, f"{n} draws: a variance needs 2 or more")
    return variance * np.exp(-np.asarray(generations, dtype=np.float64) / (n - 1))


def gaussian_mean_log_variance(n: int, generations: ArrayLike, variance: float = 1.0) -> np.ndarray:
    """E[log sigma_t^2] = log sigma^2 + t (digamma(m) - log m), m = (n - 1) / 2, with the unbiased estimate; exact.

    >>> round(float(gaussian_mean_log_variance(100, 200)), 3)
    -2.027
    """
    _check(n >= 2, f"{n} draws: a variance needs 2 or more")
    m = (n - 1) / 2
    return np.log(variance) + np.asarray(generations, dtype=np.float64) * (special.digamma(m) - np.log(m))


def regression_replace(noise_variance: float, dimension: int, samples: int, generations: ArrayLike) -> np.ndarray:
    """Excess error sigma^2 d / (T - d - 1) * n of least squares after n fits, each to the labels of the last alone.

    T samples of isotropic Gaussian inputs in d dimensions each time, fresh noise of variance sigma^2 on the labels; n
    = 1 is the fit to real labels.

    >>> regression_replace(1.0, 10, 111, [1, 5, 10]).tolist()
    [0.1, 0.5, 1.0]
    """
    return _regression_error(noise_variance, dimension, samples) * np.asarray(generations, dtype=np.float64)


def regression_accumulate(noise_variance: float, dimension: int, samples: int, generations: ArrayLike) -> np.ndarray:
    """Excess error sigma^2 d / (T - d - 1) * sum_{i<=n} i^-2 where every fit sees all earlier data too.

    Bounded by pi^2 / 6 of the first error; for T >> d (the exact value lies a little below).

    >>> [round(float(e), 4) for e in regression_accumulate(1.0, 10, 111, [1, 5, 10])]
    [0.1, 0.1464, 0.155]
    """
    n = np.asarray(generations, dtype=np.int64)
    sums = np.concatenate([[0.0], np.cumsum(np.arange(1, int(n.max(initial=0)) + 1, dtype=np.float64) ** -2)])
    return _regression_error(noise_variance, dimension, samples) * sums[n]


def _regression_error(noise_variance: float, dimension: int, samples: int) -> float:
    _check(
        samples > dimension + 1, f"{samples} samples in {dimension} dimensions: the error is finite above d + 1 samples"
    )
    return noise_variance * dimension / (samples - dimension - 1)


def verification_threshold(keep_correct: float, keep_wrong: float) -> float:
    """Label error p* = 1 / (1 + psi / phi) below which verified data teach the truth, above which its opposite.

    phi and psi are the shares of correct and wrong labels that the verifier keeps (linear model, infinite data);
    without a verifier phi = psi, and p* = 1/2.

    >>> verification_threshold(1.0, 1.0), verification_threshold(0.5, 0.25)
    (0.5, 0.6666666666666666)
    """
    _check(0 < keep_correct <= 1, f"share of correct labels kept {keep_correct}: it must lie in (0, 1]")
    _check(0 <= keep_wrong <= 1, f"share of wrong labels kept {keep_wrong}: it must lie in [0, 1]")
    return 1 / (1 + keep_wrong / keep_correct)


def kernel_ridge_distillation(kernel: ArrayLike, targets: ArrayLike, ridge: float, rounds: int) -> np.ndarray:
    """y_t = [K (K + lambda I)^-1]^t y_0: t rounds of kernel ridge regression, each on the values of the last fit.

    Each eigendirection j of the kernel shrinks by (d_j / (d_j + lambda))^t: every round regularises more.

    Args:
        kernel: [M, M], symmetric and positive semi-definite.
        targets: y_0 [M] or [M, outputs].
        ridge: lambda > 0.
        rounds: t >= 0.

    >>> kernel_ridge_distillation(np.diag([1.0, 3.0]), [1.0, 1.0], 1.0, 2).tolist()
    [0.25, 0.5625]
    """
    k, y = np.asarray(kernel, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    _check(ridge > 0, f"ridge {ridge}: it must be above 0")
    _check(rounds >= 0, f"{rounds} rounds: it must be 0 or more")
    _check(
        k.shape == (len(y), len(y)) and np.allclose(k, k.T), f"kernel {k.shape} is not symmetric over {len(y)} targets"
    )
    eigenvalues, vectors = linalg.eigh(k)
    eigenvalues = np.maximum(eigenvalues, 0)
    return (vectors * (eigenvalues / (eigenvalues + ridge)) ** rounds) @ (vectors.T @ y)


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UserError(otherwise)
