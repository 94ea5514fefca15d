"""How alike the documents of a text are, and how like real text the whole of it is.

Kernels and features are words and pairs of words: what a document says, not what it means. An embedding of another
model may take their place (`vendi`, `mauve` take any features). Documents are token ids without specials.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse
from scipy.special import rel_entr

from epigone.evaluate.ngrams import NGramIndex, flatten
from epigone.models.language_model import Document

METHOD1 = 0.1
"""What stands for a count of no match, so that one missing length does not make a score 0 (Chen and Cherry 2014)."""


def self_bleu(documents: Sequence[Document], order: int = 4) -> float:
    """Mean over documents of BLEU against all the others: 1 where each is said again (Zhu et al., Texygen, 2018).

    BLEU = BP exp(1/n sum_k log p_k), p_k the share of a document's k-grams that some other has as often, k = 1..n; a
    p_k without a match counts 0.1 of a k-gram (smoothing method 1 of Chen and Cherry 2014), no word in common is 0. BP
    = exp(1 - r / c) where c tokens are fewer than the r of the nearest in length. Grows with the number of documents:
    compare at equal number. nan for fewer than two documents.
    """
    if len(documents) < 2:
        return float("nan")
    lengths = np.array([len(document) for document in documents])
    matches_KM = np.array([_matches(documents, k) for k in range(1, order + 1)], dtype=np.float64)
    possible_KM = np.maximum(1, lengths - np.arange(order)[:, None])
    logs_KM = np.log(np.where(matches_KM > 0, matches_KM, METHOD1) / possible_KM)
    scores_M = np.where(matches_KM[0] > 0, np.exp(logs_KM.mean(axis=0) + _brevity(lengths)), 0.0)
    return float(scores_M.mean())


def _matches(documents: Sequence[Document], n: int) -> np.ndarray:
    """Of each document the n-grams that another has, each at most as often as the one that has it most [M]."""
    owners, grams, counts = _gram_counts(documents, n)
    order = np.lexsort((-counts, grams))
    starts = np.flatnonzero(np.diff(grams[order], prepend=-1))
    most, second = np.zeros(len(grams), np.int64), np.zeros(len(grams), np.int64)
    sizes = np.diff(starts, append=len(grams))
    most[order] = np.repeat(counts[order][starts], sizes)
    next_best = np.where(sizes > 1, counts[order][np.minimum(starts + 1, len(grams) - 1)], 0) if len(grams) else sizes
    second[order] = np.repeat(next_best, sizes)
    first = np.zeros(len(grams), bool)
    first[order[starts]] = True
    return np.bincount(owners, np.minimum(counts, np.where(first, second, most)), minlength=len(documents))


def _gram_counts(documents: Sequence[Document], n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, n-gram, count) of all n-grams that a document has, sorted by document."""
    size = 1 + max((int(document.max()) for document in documents if len(document)), default=0)
    ranks = NGramIndex.build(documents, size, n).ranks(documents, n)
    owners = np.repeat(np.arange(len(documents)), [max(0, len(document) - n + 1) for document in documents])
    types = int(ranks.max(initial=0)) + 1
    keys, counts = np.unique(owners * types + ranks, return_counts=True)
    return *np.divmod(keys, types), counts


def _brevity(lengths: np.ndarray) -> np.ndarray:
    """log of the brevity penalty of each document against the other that is nearest in length, the shorter in a tie."""
    order = np.argsort(lengths, kind="stable")
    ranked = lengths[order].astype(np.float64)
    below, above = np.r_[-np.inf, ranked[:-1]], np.r_[ranked[1:], np.inf]
    nearest = np.where(ranked - below <= above - ranked, below, above)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_penalty = np.where(ranked > nearest, 0.0, 1 - nearest / ranked)
    found = np.empty(len(lengths))
    found[order] = np.where(ranked > 0, log_penalty, -np.inf)
    return found


def word_features(documents: Sequence[Document], width: int = 4096) -> sparse.csr_array:
    """Words and neighbouring pairs of each document, counted in `width` hashed columns; rows of length 1 [M, width].

    Empty documents have rows of zeros. The hash depends on the ids alone, so that texts of one tokenizer compare.
    """
    tokens_T, left_T = flatten(documents)
    owner_T = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    pairs = np.flatnonzero(left_T >= 2)
    keys = np.concatenate([tokens_T + 1, (tokens_T[pairs] + 1) * 2**32 + tokens_T[pairs + 1] + 1]).astype(np.uint64)
    columns = (keys * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - int(width).bit_length() + 1)
    rows = np.concatenate([owner_T, owner_T[pairs]])
    counts = sparse.coo_array((np.ones(len(rows)), (rows, columns.astype(np.int64))), (len(documents), width)).tocsr()
    norms = np.sqrt(counts.multiply(counts).sum(axis=1))
    return sparse.csr_array(sparse.diags_array(1 / np.where(norms > 0, norms, 1.0)) @ counts)


def vendi(similarity_MM: ArrayLike) -> float:
    """exp(-sum_i l_i log l_i) over the eigenvalues of K / M: the effective number of different documents, 1..M.

    Friedman and Dieng, The Vendi Score (2023). K is symmetric, positive semi-definite, and 1 on its diagonal.
    """
    kernel_MM = np.asarray(similarity_MM, dtype=np.float64)
    if not len(kernel_MM):
        return float("nan")
    eigenvalues = np.linalg.eigvalsh(kernel_MM / len(kernel_MM))
    kept = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-np.sum(kept * np.log(kept))))


def mauve(
    real_MD: ArrayLike, written_ND: ArrayLike, *, buckets: int | None = None, scaling: float = 5.0, seed: int = 0
) -> float:
    """MAUVE of two samples of features, in (0, 1]: 1 where the two cannot be told apart (Pillutla et al. 2021).

    Rows are scaled to length 1, cut to the principal directions with 90 % of the variance, and quantised by k-means
    into `buckets` (a tenth of the smaller sample). Of the histograms P and Q the area under the curve
    (exp(-c KL(Q || R)), exp(-c KL(P || R))), R = w P + (1 - w) Q, is taken (`mauve_of_histograms`). Its authors use
    embeddings of a large model, samples of 5,000 and more, and say that smaller samples and other seeds move it:
    compare at equal size.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import normalize

    samples = [np.asarray(real_MD, dtype=np.float64), np.asarray(written_ND, dtype=np.float64)]
    smaller = min(len(sample) for sample in samples)
    if smaller < 2:
        return float("nan")
    reduced = PCA(0.9, svd_solver="covariance_eigh").fit_transform(normalize(np.concatenate(samples)))
    buckets = buckets or max(2, round(smaller / 10))
    labels = KMeans(buckets, n_init=1, random_state=seed).fit_predict(reduced)
    p, q = (np.bincount(part, minlength=buckets) / len(part) for part in np.split(labels, [len(samples[0])]))
    return mauve_of_histograms(p, q, scaling)


def mauve_of_histograms(p: ArrayLike, q: ArrayLike, scaling: float = 5.0, points: int = 25) -> float:
    """The area under the divergence curve of two histograms; the mean of both orientations, by the trapezoid rule.

    >>> round(mauve_of_histograms([0.5, 0.5], [0.5, 0.5]), 6)
    1.0
    """
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    weights_W = np.linspace(1e-6, 1 - 1e-6, points)[:, None]
    mixtures = weights_W * p + (1 - weights_W) * q
    x = np.r_[1.0, np.exp(-scaling * rel_entr(q, mixtures).sum(axis=1)), 0.0]
    y = np.r_[0.0, np.exp(-scaling * rel_entr(p, mixtures).sum(axis=1)), 1.0]
    # Of points above each other the highest comes first, so that the curve falls and equal histograms have the area 1.
    orders = [np.lexsort((-b, a)) for a, b in ((x, y), (y, x))]
    return float((np.trapezoid(y[orders[0]], x[orders[0]]) + np.trapezoid(x[orders[1]], y[orders[1]])) / 2)
