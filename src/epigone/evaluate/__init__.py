"""Measuring models and texts; the theory to hold the measures against.

`evaluate_model` and `evaluate_text` give a node's record its flat dict of metrics. What was not computed, or has no
value (an entropy of nothing), is absent, never 0. An impossible text has a perplexity of inf: a fact, and not the same
as absent.
"""

from collections.abc import Callable, Sequence

import numpy as np

from epigone.evaluate import calibration, diversity, quality, similarity
from epigone.evaluate.agreement import compare_models
from epigone.evaluate.coherence import mutual_information
from epigone.evaluate.contexts import Contexts, evaluation_contexts, predictions
from epigone.evaluate.diversity import first_tokens
from epigone.evaluate.ngrams import NGramIndex
from epigone.models.language_model import Document, LanguageModel

__all__ = [
    "Contexts",
    "NGramIndex",
    "compare_models",
    "embedding_metrics",
    "evaluate_model",
    "evaluate_text",
    "evaluation_contexts",
    "first_tokens",
    "predictions",
    "text_metrics",
    "top_metrics",
    "union_metrics",
]

ALIKE_DOCUMENTS = 150
"""Documents that are compared with each other: self-BLEU and Vendi take the square of their number."""

DISTANCES = (1, 2, 4, 8, 16)
"""Tokens between the two whose mutual information is measured."""

MAUVE_WIDTH = 256
"""Columns of the features that MAUVE clusters."""


def evaluate_model(
    model: LanguageModel,
    documents: Sequence[Document],
    byte_counts: Sequence[int] | None = None,
    contexts: Contexts | None = None,
) -> dict[str, float]:
    """Measure a model on held-out text.

    Args:
        model: the model under test.
        documents: held-out documents, token ids without specials.
        byte_counts: UTF-8 bytes of each document; without them no `bits_per_byte`.
        contexts: places for calibration (`evaluation_contexts`); without them no `ece`, `ece_adaptive`, `accuracy`,
            `confidence`.

    Returns:
        `nats_per_token` and `nats_per_token_error` (standard error over documents), `perplexity`, `tokens_evaluated`
        (ends included), `impossible` (share of events of probability 0), `nats_per_possible_token` if there are such
        events, and the above.
    """
    metrics = text_metrics(quality.likelihood(model, documents), byte_counts)
    return metrics if contexts is None else metrics | top_metrics(calibration.top_predictions(model, contexts))


def text_metrics(text: quality.Likelihood, byte_counts: Sequence[int] | None = None) -> dict[str, float]:
    """The part of `evaluate_model` that follows from the scores of the documents."""
    metrics = {
        "nats_per_token": quality.nats_per_token(text),
        "nats_per_token_error": quality.nats_per_token_error(text),
        "perplexity": quality.perplexity(text),
        "impossible": quality.impossible_share(text),
        "tokens_evaluated": int(text.events_M.sum()),
    }
    if metrics["impossible"] > 0:
        metrics["nats_per_possible_token"] = quality.possible_nats_per_token(text)
    if byte_counts is not None:
        metrics["bits_per_byte"] = quality.bits_per_byte(text, byte_counts)
    return _present(metrics)


def top_metrics(top: calibration.TopPredictions) -> dict[str, float]:
    """The part of `evaluate_model` that follows from the model's first choices."""
    return {
        "ece": calibration.expected_calibration_error(top),
        "ece_adaptive": calibration.expected_calibration_error(top, adaptive=True),
        "accuracy": float(top.correct_M.mean()),
        "confidence": float(top.confidence_M.mean()),
    }


def evaluate_text(
    documents: Sequence[Document],
    real: NGramIndex,
    fixed_tokens: int,
    *,
    decode: Callable[[Document], str] | None = None,
    like: Sequence[Document] | None = None,
    judge: LanguageModel | None = None,
    cut_at: int | None = None,
) -> dict[str, float]:
    """Measure a text, usually one that a node wrote, against the real text.

    Args:
        documents: the text, token ids without specials. Its first `fixed_tokens` tokens (ends not counted) are the
            sample.
        real: index of the real text up to 4-grams, built once for all nodes.
        fixed_tokens: size of the sample. A shorter text lacks the measures that depend on length, since they would
            not compare: `distinct_n`, `ead`, `entropy_n`, `vocabulary`, `vocabulary_share`, `self_repetition`,
            `zipf_slope`, `information_d` (d of `DISTANCES`), `gzip_ratio`.
        decode: the tokenizer's `decode`; without it no `gzip_ratio`.
        like: held-out real documents; without them no `mauve`.
        judge: the model whose perplexity of the text is wanted, such as generation 0; without it no `real_perplexity`.
        cut_at: the `max_length` of the writer, so that no true end is scored where it was cut.

    Returns:
        The above; of the first `ALIKE_DOCUMENTS` documents, where there are so many, `self_bleu`, `vendi` (by words and
        pairs of words) and `mauve` (of these features, against as many of `like`); `sample_tokens`, `novelty_n` and
        `seen_n` (n = 2..4) of the sample; `repetition`, `copied` and `sentence_length` (mean tokens a document) of all
        documents, whole.
    """
    sample = diversity.first_tokens(documents, fixed_tokens)
    sampled = sum(len(document) for document in sample)
    metrics: dict[str, float] = {"sample_tokens": sampled}
    if sampled == fixed_tokens:
        metrics |= _length_biased(sample, real)
        if decode is not None:
            metrics["gzip_ratio"] = diversity.gzip_ratio("\n".join(decode(document) for document in sample))
    for n in range(2, real.order + 1):
        metrics[f"seen_{n}"] = diversity.seen(sample, real, n)
        metrics[f"novelty_{n}"] = 1 - metrics[f"seen_{n}"]
    if documents:
        metrics["sentence_length"] = float(np.mean([len(document) for document in documents]))
    metrics |= _alike(documents[:ALIKE_DOCUMENTS], None if like is None else like[:ALIKE_DOCUMENTS])
    metrics["repetition"] = diversity.repetition(documents)
    metrics["copied"] = diversity.copied(documents, real)
    if judge is not None:
        metrics["real_perplexity"] = quality.perplexity(quality.likelihood(judge, documents, cut_at=cut_at))
    return _present(metrics)


def _length_biased(sample: Sequence[Document], real: NGramIndex) -> dict[str, float]:
    index = NGramIndex.build(sample, real.vocab_size, order=4)
    types, tokens = len(index.keys[0]), int(index.counts[0].sum())
    return {
        **{f"distinct_{n}": diversity.distinct(index, n) for n in range(1, 5)},
        **{f"entropy_{n}": diversity.ngram_entropy(index, n) for n in range(1, 5)},
        "ead": diversity.expectation_adjusted_distinct(types, tokens, real.vocab_size),
        "vocabulary": types,
        "vocabulary_share": diversity.vocabulary_share(sample, real),
        "self_repetition": diversity.self_repetition(sample),
        "zipf_slope": diversity.zipf_slope(index),
        **{f"information_{d}": mutual_information(sample, d) for d in DISTANCES},
    }


def _alike(documents: Sequence[Document], like: Sequence[Document] | None) -> dict[str, float]:
    """Measures that compare documents with each other; they grow with the number of these, so it is fixed."""
    if len(documents) < ALIKE_DOCUMENTS:
        return {}
    features = similarity.word_features(documents)
    metrics = {
        "self_bleu": similarity.self_bleu(documents),
        "vendi": similarity.vendi((features @ features.T).toarray()),
    }
    if like is None or len(like) < ALIKE_DOCUMENTS:
        return metrics
    real, written = (similarity.word_features(part, MAUVE_WIDTH).toarray() for part in (like, documents))
    return metrics | {"mauve": similarity.mauve(real, written)}


def embedding_metrics(real_MD: np.ndarray, written_MD: np.ndarray, name: str) -> dict[str, float]:
    """`NAME_vendi` and `NAME_mauve` of embeddings of written documents, against as many of real ones.

    The real ones' mean is taken off all of them first: states of a language model point all in one direction.
    """
    centre_D = real_MD.mean(axis=0)
    real, written = real_MD - centre_D, written_MD - centre_D
    norms = np.linalg.norm(written, axis=1, keepdims=True)
    directions = written / np.where(norms > 0, norms, 1.0)
    found = {"vendi": similarity.vendi(directions @ directions.T), "mauve": similarity.mauve(real, written)}
    return _present({f"{name}_{measure}": value for measure, value in found.items()})


def union_metrics(texts: Sequence[Sequence[Document]], vocab_size: int) -> dict[str, float]:
    """How varied the texts of several writers are together: `union_distinct_n`, `union_vocabulary`, `union_vendi`.

    Vendi takes equally many documents of each, `ALIKE_DOCUMENTS` in all, and is absent where there are fewer.
    """
    together = [document for text in texts for document in text]
    index = NGramIndex.build(together, vocab_size, order=3)
    metrics = {f"union_distinct_{n}": diversity.distinct(index, n) for n in range(1, 4)}
    metrics["union_vocabulary"] = len(index.keys[0])
    each = ALIKE_DOCUMENTS // len(texts)
    if each and all(len(text) >= each for text in texts):
        features = similarity.word_features([document for text in texts for document in text[:each]])
        metrics["union_vendi"] = similarity.vendi((features @ features.T).toarray())
    return _present(metrics)


def _present(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not np.isnan(value)}
