"""The n-grams of a text as sorted integer keys: counted once, looked up by binary search.

An n-gram here is n neighbouring tokens of one document. It never crosses into the next document, and bos and eos are no
part of it: a document of L tokens has max(0, L - n + 1) of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from epigone.models.language_model import Document


class Flat(NamedTuple):
    """Documents laid end to end (T tokens): the tokens, and how many of the document are left, from each on."""

    tokens_T: np.ndarray
    left_T: np.ndarray


def flatten(documents: Sequence[Document]) -> Flat:
    """Lay documents end to end, with what is needed never to read across a border."""
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    tokens_T = np.concatenate([np.empty(0, np.int64), *documents]).astype(np.int64)
    return Flat(tokens_T, np.repeat(np.cumsum(lengths), lengths) - np.arange(len(tokens_T)))


@dataclass(frozen=True)
class NGramIndex:
    """All distinct n-grams of a text for n = 1..order, their counts, and its documents' digests.

    The key of an n-gram is `rank * vocab_size + last token`, where rank is the place of its first n - 1 tokens in the
    sorted keys of that order (0 for n = 1). Keys are exact for every n, and below (tokens of the text) * vocab_size.

    Attributes:
        vocab_size: every token id is below it.
        keys: sorted distinct keys, one array an order.
        counts: occurrences of each key.
        digests: of whole documents.
    """

    vocab_size: int
    keys: tuple[np.ndarray, ...]
    counts: tuple[np.ndarray, ...]
    digests: frozenset[bytes]

    @classmethod
    def build(cls, documents: Sequence[Document], vocab_size: int, order: int = 4) -> "NGramIndex":
        """Count the n-grams of a text: one sort an order.

        Raises:
            ValueError: a token id is outside 0..vocab_size - 1.
        """
        flat = flatten(documents)
        if len(flat.tokens_T) and not 0 <= flat.tokens_T.min() <= flat.tokens_T.max() < vocab_size:
            raise ValueError(f"token ids {flat.tokens_T.min()}..{flat.tokens_T.max()} outside 0..{vocab_size - 1}")
        ranks = np.zeros(len(flat.tokens_T), dtype=np.int64)
        keys, counts = [], []
        for n in range(1, order + 1):
            at = np.flatnonzero(flat.left_T >= n)
            distinct, inverse, count = np.unique(
                ranks[at] * vocab_size + flat.tokens_T[at + n - 1], return_inverse=True, return_counts=True
            )
            ranks[at] = inverse
            keys.append(distinct)
            counts.append(count)
        return cls(vocab_size, tuple(keys), tuple(counts), frozenset(digest(document) for document in documents))

    @property
    def order(self) -> int:
        """The longest n-gram that is indexed."""
        return len(self.keys)

    def ranks(self, documents: Sequence[Document], n: int) -> np.ndarray:
        """Place in `keys[n - 1]` of every n-gram occurrence of the documents, in order; -1 if the text lacks it."""
        flat = flatten(documents)
        ranks = np.zeros(len(flat.tokens_T), dtype=np.int64)
        for k, keys in enumerate(self.keys[:n], start=1):
            at = np.flatnonzero((flat.left_T >= k) & (ranks >= 0))
            wanted = ranks[at] * self.vocab_size + flat.tokens_T[at + k - 1]
            found = np.searchsorted(keys, wanted)
            # A foreign token id would alias another key.
            known = (found < len(keys)) & (flat.tokens_T[at + k - 1] < self.vocab_size)
            known[known] = keys[found[known]] == wanted[known]
            ranks[at] = np.where(known, found, -1)
        return ranks[flat.left_T >= n]


def digest(document: Document) -> bytes:
    """16 bytes that stand for a whole document (chance of a mix-up among 10^9 documents: about 10^-21)."""
    return blake2b(np.asarray(document, dtype="<i8").tobytes(), digest_size=16).digest()
