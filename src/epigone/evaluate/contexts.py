"""Places in held-out text at which models are asked for the next token, and what they answer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from epigone.errors import Fault, UserError
from epigone.models.language_model import EOS, Document, LanguageModel

IMPOSSIBLE = -1e8
"""A log-probability at or below this is probability 0: n-grams say -inf, masked logits come out near -1e9."""

CHUNK_SCORES = 2**21
"""Scores held at once: 16 MiB of float64, whatever the vocabulary."""


@dataclass(frozen=True)
class Contexts:
    """Prefixes of documents and what really came next.

    Attributes:
        prefixes: token ids before the place, without bos; may be empty.
        targets_M: the true next token of each prefix, eos at a document's end.
    """

    prefixes: tuple[Document, ...]
    targets_M: np.ndarray

    def __len__(self) -> int:
        return len(self.prefixes)


class Readable(Protocol):
    """The part of a tokenizer that a display needs."""

    def decode(self, ids: Document) -> str: ...

    def token(self, id: int) -> str: ...


def evaluation_contexts(
    documents: Sequence[Document], count: int, seed: int = 0, *, longest: int | None = None, eos: int = EOS
) -> Contexts:
    """Draw `count` different places among all events x_1..x_n, eos of the documents, each event equally likely.

    The places come ordered by length of prefix, so that a chunk of neighbours needs little padding. The same
    documents, count and seed give the same places. Fewer events than `count`: all of them.

    Args:
        documents: held-out documents, token ids without specials.
        count: places wanted.
        seed: of the draw.
        longest: places with a prefix of more tokens are left out (a decoder has a maximum length).
        eos: id of the token that ends a document.

    Raises:
        UserError: no event is left to draw from.
    """
    events = np.array([len(document) + 1 for document in documents], dtype=np.int64)
    if longest is not None:
        events = np.minimum(events, longest + 1)
    ends = np.cumsum(events)
    if len(ends) == 0 or count < 1:
        raise UserError(f"{count} contexts were asked for from {len(documents)} held-out documents: both must be >= 1")
    total = int(ends[-1])
    drawn = np.random.default_rng(seed).choice(total, size=min(count, total), replace=False, shuffle=False)
    owners = np.searchsorted(ends, drawn, side="right")
    lengths = drawn - (ends - events)[owners]
    order = np.lexsort((owners, lengths))
    places = [(documents[int(i)], int(n)) for i, n in zip(owners[order], lengths[order], strict=True)]
    targets = [document[n] if n < len(document) else eos for document, n in places]
    return Contexts(tuple(document[:n] for document, n in places), np.array(targets, dtype=np.int64))


def score_contexts(
    models: Sequence[LanguageModel], prefixes: Sequence[Document], *, padded: bool = False
) -> Iterator[list[np.ndarray]]:
    """Next-token log-probabilities of the same prefixes under each model, chunk by chunk and in order.

    `padded`: the models have one tokenizer, and where their vocabularies differ it is by padding at the end, which is
    left out.

    Yields one float64 array [chunk, V] a model, normalised to sum_v exp = 1 and with -inf for every impossible token,
    so that no float32 rounding leaks into a divergence. No array over all prefixes and the vocabulary is ever made.

    Raises:
        UserError: the models' vocabularies differ.
        Fault: a model's probabilities are not numbers, or do not sum to 1 within 1e-3.
    """
    sizes = {model.vocab_size for model in models}
    if len(sizes) > 1 and not padded:
        raise UserError(f"vocabularies of {sorted(sizes)} tokens cannot be compared token by token")
    step = max(1, CHUNK_SCORES // max(sizes))
    for start in range(0, len(prefixes), step):
        rows = [normalised(model.next_log_probs(prefixes[start : start + step])) for model in models]
        yield rows if len(sizes) == 1 else [_renormalised(scores_MV[:, : min(sizes)]) for scores_MV in rows]


def _renormalised(scores_MV: np.ndarray) -> np.ndarray:
    """Of some of the tokens, exp summing to 1 again."""
    return scores_MV - np.log(np.exp(scores_MV).sum(axis=1))[:, None]


def normalised(log_probs_MV: np.ndarray) -> np.ndarray:
    """The same in float64, exp summing to 1 to float64 precision, -inf where the probability is 0.

    Raises:
        Fault: a row has NaN, or its sum of probabilities is off by more than 1e-3.
    """
    scores_MV = np.array(log_probs_MV, dtype=np.float64)
    scores_MV[scores_MV <= IMPOSSIBLE] = -np.inf
    sums_M = np.exp(scores_MV).sum(axis=1)
    wrong_M = ~(np.abs(sums_M - 1) <= 1e-3)
    if wrong_M.any():
        raise Fault(f"a model's next-token probabilities sum to {sums_M[wrong_M][0]}, not 1: its scores are damaged")
    scores_MV -= np.log(sums_M)[:, None]
    return scores_MV


def predictions(
    model: LanguageModel, prefixes: Sequence[Document], tokenizer: Readable, top: int = 10
) -> list[dict[str, object]]:
    """The model's most probable next tokens after each prefix, for a reader's eyes.

    Returns:
        `[{"context": text, "top": [[token text, probability], ...]}, ...]`, most probable first, ties by token id;
        tokens of probability 0 are left out, so that a list may be shorter than `top`.
    """
    shown: list[dict[str, object]] = []
    for (scores_MV,) in score_contexts([model], prefixes):
        for scores_V in scores_MV:
            best = [int(v) for v in np.argsort(-scores_V, kind="stable")[:top] if scores_V[v] > -np.inf]
            ranked = [[tokenizer.token(v), float(np.exp(scores_V[v]))] for v in best]
            shown.append({"context": tokenizer.decode(prefixes[len(shown)]), "top": ranked})
    return shown
