"""How far apart words of one document still know of each other."""

from collections.abc import Sequence

import numpy as np

from epigone.evaluate.ngrams import flatten
from epigone.models.language_model import Document


def mutual_information(
    documents: Sequence[Document], distance: int, *, words: int = 100, shuffles: int = 4, seed: int = 0
) -> float:
    """I(d) = sum p(a, b) log p(a, b) / (p(a) p(b)) of tokens `distance` apart in one document, in nats, without bias.

    Real text falls like a power of the distance (Lin and Tegmark 2017); a model that sees k tokens forgets faster. All
    but the most frequent `words` tokens count as one, so that a short text has enough of each pair; what the same
    tokens would show in pairs that are dealt at random (the mean of a few deals) is taken off, since a finite text
    always shows some. About 0, of either sign, where nothing is left. nan without pairs.
    """
    tokens_T, left_T = flatten(documents)
    at = np.flatnonzero(left_T > distance)
    if not len(at):
        return float("nan")
    kinds, ranks_T = np.unique(tokens_T, return_inverse=True)
    frequent = np.argsort(-np.bincount(ranks_T), kind="stable")[:words]
    class_K = np.full(len(kinds), len(frequent))
    class_K[frequent] = np.arange(len(frequent))
    first, second = class_K[ranks_T[at]], class_K[ranks_T[at + distance]]
    order = np.lexsort((second, first))  # so that the order of the documents does not matter
    first, second = first[order], second[order]
    rng = np.random.default_rng(seed)
    by_chance = [_information(first, rng.permutation(second), len(frequent) + 1) for _ in range(shuffles)]
    return _information(first, second, len(frequent) + 1) - float(np.mean(by_chance))


def _information(first: np.ndarray, second: np.ndarray, classes: int) -> float:
    joint = np.bincount(first * classes + second, minlength=classes**2).reshape(classes, classes) / len(first)
    expected = joint.sum(axis=1)[:, None] * joint.sum(axis=0)
    seen = joint > 0
    return float(np.sum(joint[seen] * np.log(joint[seen] / expected[seen])))
