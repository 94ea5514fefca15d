"""How varied a text is, and how much of it is new.

Most of these measures depend on how long the text is: twice the text has fewer distinct n-grams a token. So they are
taken at one fixed number of tokens (`first_tokens`), and only texts measured at the same number are compared. N-grams
stay inside documents and have no bos or eos (see `ngrams`). A measure of nothing (no n-gram long enough) is nan.
"""

import gzip
from collections.abc import Sequence

import numpy as np

from epigone.evaluate.ngrams import NGramIndex, digest, flatten
from epigone.models.language_model import Document


def first_tokens(documents: Sequence[Document], tokens: int) -> list[Document]:
    """The first `tokens` tokens, ends not counted: the last document is cut, empty ones are left out.

    Fewer where the text is shorter.
    """
    taken: list[Document] = []
    for document in documents:
        if tokens <= 0:
            break
        if len(document):
            taken.append(document[:tokens])
        tokens -= len(document)
    return taken


def distinct(index: NGramIndex, n: int) -> float:
    """distinct-n: different n-grams / n-grams of an indexed text, in (0, 1] (Li et al. 2016). Length-biased."""
    counts = index.counts[n - 1]
    return float(len(counts) / counts.sum()) if len(counts) else float("nan")


def expectation_adjusted_distinct(different: int, total: int, possible: int) -> float:
    """EAD = N / (V [1 - ((V-1)/V)^C]): different types against what C draws at random would show.

    Liu et al., Rethinking and Refining the Distinct Metric (ACL 2022). 1 for uniformly random text; less biased by
    length than distinct-n, not free of it for real text.

    Args:
        different: N, distinct tokens seen.
        total: C, tokens.
        possible: V, tokens in the vocabulary.
    """
    if not total:
        return float("nan")
    if possible == 1:
        return float(different)
    return float(different / (-possible * np.expm1(total * np.log1p(-1 / possible))))


def ngram_entropy(index: NGramIndex, n: int) -> float:
    """-sum p log p over the n-gram frequencies of an indexed text, in nats (plug-in: biased down on short text)."""
    counts = index.counts[n - 1]
    if not len(counts):
        return float("nan")
    p = counts / counts.sum()
    return float(-np.sum(p * np.log(p)))


def vocabulary_share(documents: Sequence[Document], real: NGramIndex) -> float:
    """Share of the real text's distinct tokens that the documents use. A short sample misses many by chance alone."""
    used = real.ranks(documents, 1)
    return float(len(np.unique(used[used >= 0])) / len(real.keys[0])) if len(real.keys[0]) else float("nan")


def seen(documents: Sequence[Document], real: NGramIndex, n: int) -> float:
    """Share of the documents' n-gram occurrences that the real text has too; novelty is 1 - seen."""
    ranks = real.ranks(documents, n)
    return float(np.mean(ranks >= 0)) if len(ranks) else float("nan")


def copied(documents: Sequence[Document], real: NGramIndex) -> float:
    """Share of documents that are, whole, a document of the real text."""
    return float(np.mean([digest(document) in real.digests for document in documents])) if documents else float("nan")


def repetition(documents: Sequence[Document], longest: int = 4) -> float:
    """Share of documents in which some run of 1..longest tokens is at once said again ("of the of the")."""
    if not documents:
        return float("nan")
    tokens_T, left_T = flatten(documents)
    owner_T = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    repeats = np.zeros(len(documents), dtype=bool)
    for n in range(1, longest + 1):
        at = np.flatnonzero(left_T >= 2 * n)
        again = np.ones(len(at), dtype=bool)
        for k in range(n):
            again &= tokens_T[at + k] == tokens_T[at + k + n]
        repeats[owner_T[at[again]]] = True
    return float(repeats.mean())


def self_repetition(documents: Sequence[Document], n: int = 4) -> float:
    """Mean over documents of log(1 + sum over its different n-grams of the other documents that have it).

    Salkar et al., Self-Repetition in Abstractive Neural Summarizers (2022), counted as in the `diversity` package of
    Shaib et al. Grows with the number of documents: compare at equal size.
    """
    if not documents:
        return float("nan")
    size = 1 + max((int(document.max()) for document in documents if len(document)), default=0)
    index = NGramIndex.build(documents, size, n)
    ranks = index.ranks(documents, n)
    owners = np.repeat(np.arange(len(documents)), [max(0, len(document) - n + 1) for document in documents])
    types = max(1, len(index.keys[n - 1]))
    owners, ranks = np.divmod(np.unique(owners * types + ranks), types)
    others = np.bincount(ranks, minlength=types)[ranks] - 1
    return float(np.mean(np.log1p(np.bincount(owners, weights=others, minlength=len(documents)))))


def zipf_slope(index: NGramIndex, least: int = 5) -> float:
    """Least-squares slope of log count on log rank of the tokens seen at least `least` times; near -1 in real text.

    Rarer tokens are left out: their counts are steps at 1, 2, 3... that bend the fit by the length of the text. nan
    for fewer than three tokens.
    """
    counts = np.sort(index.counts[0][index.counts[0] >= least])[::-1]
    if len(counts) < 3:
        return float("nan")
    slope, _ = np.polyfit(np.log(np.arange(1, len(counts) + 1)), np.log(counts), 1)
    return float(slope)


def gzip_ratio(text: str) -> float:
    """UTF-8 bytes / bytes after one gzip at level 9: larger is more repetitive.

    Length-biased, and not monotone over the generations of a smoothed sampler, whose noise does not compress.
    """
    raw = text.encode()
    return len(raw) / len(gzip.compress(raw, compresslevel=9, mtime=0)) if raw else float("nan")
