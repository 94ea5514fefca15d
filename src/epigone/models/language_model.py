"""What every model can do, whether it counts words or multiplies matrices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

PAD, BOS, EOS, UNK = 0, 1, 2, 3
"""Special token ids of every tokenizer of Epigone's own; n-grams know no others. PAD and BOS are never predicted."""

MAX_LENGTH = 256
"""Tokens after which a written document is cut, where nothing else is asked for."""

Document = np.ndarray
"""int32 token ids of one document, without specials."""


@dataclass(frozen=True)
class Specials:
    """Token ids with a meaning of their own; a tokenizer and the models that read it have the same ones.

    A document x_1..x_n is read as bos x_1..x_n and predicted as x_1..x_n eos. A tokenizer from elsewhere may have one
    id for several of these, bos == eos among them.

    Attributes:
        pad: fills what is no text; any id of the vocabulary.
        bos: read before every document.
        eos: predicted at the end of every document.
        unk: stands for what the tokenizer cannot write; None where there is no such thing.
        stops: further ids at which a written document ends, such as the end of a turn.
        never: ids that have probability 0.
    """

    pad: int = PAD
    bos: int = BOS
    eos: int = EOS
    unk: int | None = UNK
    stops: tuple[int, ...] = ()
    never: tuple[int, ...] = (PAD, BOS)


@runtime_checkable
class LanguageModel(Protocol):
    """A distribution over documents, factored token by token: p(x_1..x_n, eos | bos)."""

    @property
    def vocab_size(self) -> int:
        """Entries of a row of scores: one for each token id."""
        ...

    @property
    def specials(self) -> Specials:
        """The ids that are no text."""
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

        At temperature 0 every token is the most probable one, and of equals the one with the lowest id.
        Continuation j of prompt i is the same whatever else is asked for with the same seed.
        """
        ...

    def beam(self, prompts: Sequence[Document], *, beams: int, length: int) -> list[Document]:
        """A very probable continuation of bos + each prompt, at most `length` tokens (`epigone.models.beam`)."""
        ...

    def stream(
        self,
        prompts: Sequence[Document],
        seed: int,
        *,
        samples: int = 1,
        length: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Iterator[tuple[int, int, Document]]:
        """The texts of `sample` while they grow: index of the prompt, index of the sample, and its new tokens."""
        ...
