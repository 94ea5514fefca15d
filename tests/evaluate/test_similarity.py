"""Likeness of documents against nltk's BLEU, eigenvalues by hand, and areas that have a closed form."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from scipy.special import beta

from epigone.evaluate import similarity

texts = st.lists(st.lists(st.integers(0, 4), max_size=9), min_size=2, max_size=7).map(
    lambda rows: [np.array(row, dtype=np.int32) for row in rows]
)


def text(*rows):
    return [np.array(row, dtype=np.int32) for row in rows]


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(similarity).failed == 0


@given(texts)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_self_bleu_is_that_of_nltk(documents):
    rows = [document.tolist() for document in documents]
    expected = [
        sentence_bleu(rows[:i] + rows[i + 1 :], row, smoothing_function=SmoothingFunction().method1) if row else 0.0
        for i, row in enumerate(rows)
    ]
    assert similarity.self_bleu(documents) == pytest.approx(np.mean(expected), abs=1e-12)


def test_self_bleu_of_copies_is_one_and_of_strangers_nought():
    assert similarity.self_bleu(text([1, 2, 3, 4, 5]) * 3) == pytest.approx(1)
    assert similarity.self_bleu(text([1, 2, 3, 4], [5, 6, 7, 8])) == 0
    assert np.isnan(similarity.self_bleu(text([1, 2])))


def test_vendi_counts_what_is_different():
    assert similarity.vendi(np.ones((5, 5))) == pytest.approx(1)
    assert similarity.vendi(np.eye(5)) == pytest.approx(5)
    # Two groups of two and of one: eigenvalues 2/3 and 1/3.
    groups = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1.0]])
    assert similarity.vendi(groups) == pytest.approx(np.exp(-(2 / 3) * np.log(2 / 3) - (1 / 3) * np.log(1 / 3)))
    # A likeness of a: eigenvalues (1 + a) / 2 and (1 - a) / 2.
    p = np.array([0.8, 0.2])
    assert similarity.vendi([[1, 0.6], [0.6, 1]]) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert np.isnan(similarity.vendi(np.zeros((0, 0))))


def test_features_are_the_words_and_pairs_of_a_document():
    features = similarity.word_features(text([1, 2], [2, 1], [1, 2], [7], []))
    likeness = (features @ features.T).toarray()
    assert likeness[0, 2] == pytest.approx(1)
    # Two words in common of two words and a pair each.
    assert likeness[0, 1] == pytest.approx(2 / 3)
    assert likeness[0, 3] == 0
    assert np.diag(likeness).tolist() == pytest.approx([1, 1, 1, 1, 0])


def test_mauve_of_histograms_is_one_for_equals_and_a_beta_function_for_strangers():
    assert similarity.mauve_of_histograms([0.2, 0.3, 0.5], [0.2, 0.3, 0.5]) == pytest.approx(1)
    # Without a bucket in common KL(Q || R) = -log(1 - w) and KL(P || R) = -log w: the curve ((1 - w)^c, w^c).
    fine = similarity.mauve_of_histograms([1, 0], [0, 1], points=20_001)
    assert fine == pytest.approx(5 * beta(6, 5), rel=1e-4)
    # The coarse grid of the authors' code is a little above.
    assert similarity.mauve_of_histograms([1, 0], [0, 1]) == pytest.approx(5 * beta(6, 5), rel=0.1)


def test_mauve_falls_where_samples_part_and_not_where_they_are_of_one_kind():
    rng = np.random.default_rng(0)
    real, same, other = (rng.normal(size=(400, 8)) + shift for shift in (0, 0, 1.5))
    alike, apart = similarity.mauve(real, same), similarity.mauve(real, other)
    assert alike > 0.9 > 0.5 > apart
    assert similarity.mauve(real, real) == pytest.approx(1)
    assert similarity.mauve(other, real) == pytest.approx(apart, abs=0.05)
