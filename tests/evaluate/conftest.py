"""A model whose every probability is written down: the next token depends on the last one only."""

import numpy as np
import pytest

BOS, EOS = 1, 2


class Bigram:
    def __init__(self, rows_VV, dtype=np.float64):
        with np.errstate(divide="ignore"):
            self.scores_VV = np.log(np.asarray(rows_VV, dtype=np.float64)).astype(dtype)
        self.vocab_size = len(self.scores_VV)
        self.largest_request = 0

    @classmethod
    def drawn(cls, size, seed, concentration=0.3):
        """Random rows in which pad and bos are never predicted."""
        rows = np.zeros((size, size))
        rows[:, 2:] = np.random.default_rng(seed).dirichlet(np.full(size - 2, concentration), size)
        return cls(rows)

    def log_probs(self, documents):
        return [
            self.scores_VV[np.concatenate([[BOS], d]).astype(int), np.concatenate([d, [EOS]]).astype(int)]
            for d in documents
        ]

    def next_log_probs(self, contexts):
        self.largest_request = max(self.largest_request, len(contexts))
        return self.scores_VV[[int(c[-1]) if len(c) else BOS for c in contexts]]

    def write(self, tokens, seed, *, temperature=1.0, top_k=0, top_p=1.0, max_length=256):
        rng, documents, written = np.random.default_rng(seed), [], 0
        rows = np.exp(self.scores_VV / temperature)
        cumulative = np.cumsum(rows / rows.sum(axis=1, keepdims=True), axis=1)
        while written < tokens:
            document, last = [], BOS
            while len(document) < max_length:
                last = int(np.searchsorted(cumulative[last], rng.random() * cumulative[last][-1], side="right"))
                if last == EOS:
                    break
                document.append(last)
            documents.append(np.array(document, dtype=np.int32))
            written += len(document) + 1
        return documents


@pytest.fixture
def bigram():
    return Bigram
