"""How well a model predicts a text: nats per token, perplexity, bits per byte, and their errors.

Every figure comes from sums over documents and is divided last, so that long documents weigh by their tokens and two
parts of a text can be scored apart and added.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from epigone.errors import Fault
from epigone.evaluate.contexts import IMPOSSIBLE
from epigone.models.language_model import Document, LanguageModel


@dataclass(frozen=True)
class Likelihood:
    """What a text cost a model, one entry a document (M documents); `+` joins the scores of two texts.

    Attributes:
        nats_M: -sum of log p over the document's events that are possible under the model.
        events_M: predicted events: its tokens and its eos.
        impossible_M: events to which the model gives probability 0 (an unsmoothed n-gram does).
        end_nats_M: the part of `nats_M` that the document's eos cost.
    """

    nats_M: np.ndarray
    events_M: np.ndarray
    impossible_M: np.ndarray
    end_nats_M: np.ndarray

    def __add__(self, other: "Likelihood") -> "Likelihood":
        return Likelihood(
            np.concatenate([self.nats_M, other.nats_M]),
            np.concatenate([self.events_M, other.events_M]),
            np.concatenate([self.impossible_M, other.impossible_M]),
            np.concatenate([self.end_nats_M, other.end_nats_M]),
        )

    def __getitem__(self, order: np.ndarray) -> "Likelihood":
        """The scores of some documents, in the order of their indices."""
        return Likelihood(self.nats_M[order], self.events_M[order], self.impossible_M[order], self.end_nats_M[order])


def likelihood(model: LanguageModel, documents: Sequence[Document], *, cut_at: int | None = None) -> Likelihood:
    """Score documents under a model, events x_1..x_n and eos of each.

    Args:
        model: the judge: of held-out text the model under test, of generated text generation 0 or another model.
        documents: token ids without specials.
        cut_at: the length at which a writer cut documents off. Those have no true end, and so no eos to score.

    Raises:
        Fault: a score is not a number or is above 0, or there are not n + 1 of them.
    """
    sums = []
    for document, scores in zip(documents, model.log_probs(documents), strict=True):
        if len(scores) != len(document) + 1:
            raise Fault(f"a model gave {len(scores)} scores for a document of {len(document)} tokens and an end")
        events = len(document) if cut_at is not None and len(document) >= cut_at else len(document) + 1
        scored = np.asarray(scores[:events], dtype=np.float64)
        if not np.all(scored <= 1e-3):
            raise Fault(f"a model's log-probability is {np.max(scored)}: it must be a number and at most 0")
        possible = scored > IMPOSSIBLE
        end = -scored[-1] if events > len(document) and possible[-1] else 0.0
        sums.append((-scored[possible].sum(), events, events - np.count_nonzero(possible), end))
    nats_M, events_M, impossible_M, end_nats_M = np.array(sums, dtype=np.float64).reshape(-1, 4).T
    return Likelihood(nats_M, events_M.astype(np.int64), impossible_M.astype(np.int64), end_nats_M)


def nats_per_token(text: Likelihood) -> float:
    """-1/N sum log p over the N events of the text, in nats; inf if one event is impossible, nan for no event."""
    if text.impossible_M.any():
        return float("inf")
    return possible_nats_per_token(text)


def possible_nats_per_token(text: Likelihood) -> float:
    """The same over the possible events only; read it with `impossible_share`: it flatters a model that gives up."""
    possible = text.events_M.sum() - text.impossible_M.sum()
    return float(text.nats_M.sum() / possible) if possible else float("nan")


def impossible_share(text: Likelihood) -> float:
    """Share of the events to which the model gives probability 0."""
    events = text.events_M.sum()
    return float(text.impossible_M.sum() / events) if events else float("nan")


def perplexity(text: Likelihood) -> float:
    """exp(nats per token); inf if one event is impossible."""
    with np.errstate(over="ignore"):
        return float(np.exp(nats_per_token(text)))


def nats_per_token_error(text: Likelihood) -> float:
    """Standard error of the nats per token, with documents as the independent units (`ratio_error`).

    Tokens within a document are not independent; the naive error over tokens would be too small. nan for fewer than
    two documents or an infinite estimate. The error of the perplexity is perplexity * this.
    """
    return ratio_error(text.nats_M, text.events_M) if np.isfinite(nats_per_token(text)) else float("nan")


def ratio_error(cost_M: np.ndarray, size_M: np.ndarray) -> float:
    """Standard error of R = sum y_i / sum n_i over m documents.

    That of the linearised ratio: sqrt(m/(m-1) sum (y_i - R n_i)^2) / sum n_i (Cochran, Sampling Techniques, 1977,
    chapter 6). nan for fewer than two documents.
    """
    m = len(cost_M)
    if m < 2:
        return float("nan")
    residuals_M = cost_M - cost_M.sum() / size_M.sum() * size_M
    return float(np.sqrt(m / (m - 1) * np.sum(residuals_M**2)) / size_M.sum())


def paired_difference(first: Likelihood, second: Likelihood, size_M: np.ndarray) -> tuple[float, float]:
    """How much more nats the first model pays than the second for a unit of the same documents, and its error.

    The difference is taken document by document before its error, so what makes a document hard for both models is no
    part of that: it is mostly far below the errors of the two.

    Args:
        first: scores of the documents under one model.
        second: under the other, which may cut the same texts into other tokens.
        size_M: what is counted of each document: its events, where both models have the same, or its bytes.

    Returns:
        difference and standard error (`ratio_error`); nan where an event is impossible under either model.
    """
    if first.impossible_M.any() or second.impossible_M.any():
        return float("nan"), float("nan")
    gap_M, size_M = first.nats_M - second.nats_M, np.asarray(size_M, np.float64)
    return float(gap_M.sum() / size_M.sum()), ratio_error(gap_M, size_M)


def nats_per_end(text: Likelihood) -> float:
    """Mean nats that the end of a document costs; inf if an event of the text is impossible.

    High for a model that never learned where such documents end, such as one made for conversations: then the other
    figures tell less of the text than of that.
    """
    if text.impossible_M.any():
        return float("inf")
    return float(text.end_nats_M.mean()) if len(text.end_nats_M) else float("nan")


def bits_per_byte(text: Likelihood, byte_counts: Sequence[int]) -> float:
    """Total nats / ln 2 / total UTF-8 bytes: comparable between tokenizers, as perplexity is not.

    The ends of documents are paid for in the nats and have no bytes. A tokenizer that loses text (lower-casing,
    unknown words) makes the figure too small: compare only tokenizers that give the text back.

    Args:
        text: the documents' scores.
        byte_counts: bytes of each document's text, in the same order.
    """
    if len(byte_counts) != len(text.nats_M):
        raise ValueError(f"{len(byte_counts)} byte counts for {len(text.nats_M)} documents")
    if text.impossible_M.any():
        return float("inf")
    total = float(np.sum(np.asarray(byte_counts, dtype=np.float64)))
    return float(text.nats_M.sum() / np.log(2) / total) if total else float("nan")
