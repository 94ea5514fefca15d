"""What every model can do, whether it counts words or multiplies matrices."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

PAD, BOS, EOS, UNK = 0, 1, 2, 3
"""Special token ids, the same in every tokenizer. PAD and BOS are never predicted."""

MAX_LENGTH = 256
"""Tokens after which a written document is cut, where nothing else is asked for."""

Document = np.ndarray
"""int32 token ids of one document, without specials."""


@runtime_checkable
class LanguageModel(Protocol):
    """A distribution over documents, factored token by token: p(x_1..x_n, eos | bos)."""

    @property
    def vocab_size(self) -> int:
        """Entries of a row of scores: one for each token id."""
        ...

    def log_probs(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Natural-log probabilities of x_1..x_n and eos, for each document: lengths n + 1."""
        ...

    def next_log_probs(self, contexts: Sequence[Document]) -> np.ndarray:
        """Log-probabilities [contexts, vocab_size] of the token that follows bos + context."""
        ...

    def write(
        self,
        tokens: int,
        seed: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        max_length: int = MAX_LENGTH,
    ) -> list[Document]:
        """Sample documents until their tokens (each with its eos) reach `tokens`; the same for the same seed.

        `top_k=0` and `top_p=1` are off. A document ends at eos, or after `max_length` tokens.
        """
        ...

    def sample(
        self,
        prompts: Sequence[Document],
        seed: int,
        *,
        samples: int = 1,
        length: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> list[list[Document]]:
        """`samples` continuations of bos + each prompt, each until eos (not included) or `length` tokens.

        Continuation j of prompt i is the same whatever else is asked for with the same seed.
        """
        ...
