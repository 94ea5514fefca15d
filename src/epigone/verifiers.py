"""Verification between generations: what is kept of a text, by whose word, and what theory says of that.

A verifier is a frozen dataclass with `fitted(real, written)`: from documents of real text and of text that the writer
wrote it makes a function that scores documents, the better the higher. A rule is a function of one text.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from epigone.evaluate.collapse_theory import verification_threshold
from epigone.evaluate.similarity import word_features
from epigone.lineage import Text
from epigone.models.language_model import Document
from epigone.writing import Tally

MOST_REAL = 1_000
"""Held-out documents by which a choice is measured."""


@dataclass(frozen=True)
class RealOrWritten:
    """A classifier that tells real text from the writer's own: what it takes for real scores highest.

    A logistic regression on the words and neighbouring pairs of a document (`word_features`); the score is the
    log-odds that the document is real. Alemohammad et al. 2024 and Feng et al. 2024 choose text in this way.

    Attributes:
        real: the real text that it learns from.
        documents: how many it learns, of the real text and of the writer's each.
        strength: inverse of the penalty on its weights.
    """

    real: Text
    documents: int = 2_000
    strength: float = 1.0

    def fitted(
        self, real: Sequence[Document], written: Sequence[Document]
    ) -> Callable[[Sequence[Document]], np.ndarray]:
        """The score of documents after it has learned from both."""
        from sklearn.linear_model import LogisticRegression

        real, written = real[: self.documents], written[: self.documents]
        labels = np.repeat([1, 0], [len(real), len(written)])
        model = LogisticRegression(C=self.strength, class_weight="balanced", max_iter=1000)
        model.fit(word_features([*real, *written]), labels)
        return lambda documents: model.decision_function(word_features(documents))


def verification(
    tally: Tally,
    real: Sequence[Document],
    score: Callable[[Sequence[Document]], np.ndarray] | None,
    holds: Callable[[Document], bool] | None,
) -> dict[str, float]:
    """How selective a choice was, for the card of a text.

    `kept_of_written` (psi): share of the candidates that was kept. `kept_of_real` (phi): share of held-out real
    documents that keeps the rule and has at least the score from which one was kept. `label_error_threshold`: p* = 1 /
    (1 + psi / phi), the error of labels up to which so chosen data would teach a linear model the truth (Feng et al.
    2024); above 1/2 the choice helps.
    """
    written = tally.kept / max(1, tally.drawn)
    standing = [document for document in real[:MOST_REAL] if holds is None or holds(document)]
    if score is not None and tally.threshold is not None and standing:
        passed = int(np.count_nonzero(score(standing) >= tally.threshold))
    else:
        passed = len(standing)
    kept = passed / max(1, len(real[:MOST_REAL]))
    threshold = verification_threshold(kept, written) if kept else 0.0
    return {"kept_of_written": written, "kept_of_real": float(kept), "label_error_threshold": threshold}


def ends_as_a_sentence(text: str) -> bool:
    """A rule: the text ends with a full stop, a question mark or an exclamation mark."""
    return text.rstrip().endswith((".", "?", "!"))


def does_not_stutter(text: str) -> bool:
    """A rule: no word is at once said again."""
    return all(first != second for first, second in itertools.pairwise(text.split()))
