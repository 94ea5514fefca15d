import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from sklearn.metrics import cohen_kappa_score

from epigone.errors import UserError
from epigone.evaluate import compare_models, evaluation_contexts
from epigone.evaluate.agreement import chance_corrected, divergences, top_overlap


@pytest.fixture
def places(bigram):
    return evaluation_contexts(bigram.drawn(15, 9, concentration=3.0).write(2000, 0), 150).prefixes


def test_against_scipy_one_context_at_a_time(bigram, places):
    student, teacher = bigram.drawn(15, 0), bigram.drawn(15, 1)
    got = compare_models(student, teacher, places)
    s = np.exp(student.next_log_probs(places))[:, 2:]
    p = np.exp(teacher.next_log_probs(places))[:, 2:]
    assert got["forward_kl"] == pytest.approx(np.mean([entropy(a, b) for a, b in zip(p, s, strict=True)]))
    assert got["reverse_kl"] == pytest.approx(np.mean([entropy(b, a) for a, b in zip(p, s, strict=True)]))
    assert got["js"] == pytest.approx(np.mean([jensenshannon(a, b) ** 2 for a, b in zip(p, s, strict=True)]))
    assert got["top1"] == np.mean(p.argmax(1) == s.argmax(1))
    assert got["top1_kappa"] == pytest.approx(cohen_kappa_score(p.argmax(1), s.argmax(1)))
    overlap = [len(set(np.argsort(a)[-5:]) & set(np.argsort(b)[-5:])) / 5 for a, b in zip(p, s, strict=True)]
    assert got["top5"] == pytest.approx(np.mean(overlap))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_model_agrees_with_itself_exactly(bigram, places, dtype):
    model = bigram(np.exp(bigram.drawn(15, 0).scores_VV), dtype)
    got = compare_models(model, model, places)
    assert got["forward_kl"] == got["reverse_kl"] == got["js"] == 0
    assert got["top1"] == got["top5"] == got["top1_kappa"] == 1
    assert got["forward_kl_infinite"] == got["reverse_kl_infinite"] == 0


def test_masked_logits_and_true_zeros_are_the_same_zero(bigram, places):
    student, teacher = bigram.drawn(15, 0), bigram.drawn(15, 1)
    expected = compare_models(student, teacher, places)
    teacher.scores_VV[teacher.scores_VV == -np.inf] = -1e9
    assert compare_models(student, teacher, places) == expected
    assert np.isfinite(expected["forward_kl"])


def test_a_masked_logit_is_as_infinitely_far_as_a_true_zero(bigram):
    wide, narrow = bigram(np.full((4, 4), 0.25)), bigram(np.tile([0.5, 0.5, 0, 0], (4, 1)))
    narrow.scores_VV[narrow.scores_VV == -np.inf] = -1e9
    got = compare_models(narrow, wide, [np.array([3])])
    assert got["forward_kl"] == np.inf
    assert got["top5"] == 0.5


def test_rounding_of_low_precision_scores_is_no_divergence(bigram, places):
    model, rounded = bigram.drawn(15, 0), bigram.drawn(15, 0)
    rounded.scores_VV = rounded.scores_VV + 4e-4
    got = compare_models(rounded, model, places)
    assert max(abs(got["forward_kl"]), abs(got["reverse_kl"]), abs(got["js"])) < 1e-12


def test_what_only_one_model_allows_is_infinite_in_one_direction(bigram):
    wide, narrow = np.tile([0, 0, 0.5, 0.25, 0.25], (5, 1)), np.tile([0, 0, 0.5, 0.25, 0.25], (5, 1))
    narrow[3] = [0, 0, 1, 0, 0]
    places = [np.array([3]), np.array([4])]
    got = compare_models(bigram(narrow), bigram(wide), places)
    assert got["forward_kl"] == np.inf
    assert (got["forward_kl_infinite"], got["reverse_kl_infinite"]) == (0.5, 0)
    assert got["reverse_kl"] == pytest.approx(np.log(2) / 2)
    assert got["js"] < np.log(2)
    # One possible token against three: one in common of the longer list.
    assert got["top5"] == pytest.approx((1 / 3 + 1) / 2)
    assert "top1_kappa" not in got


def test_a_tiny_probability_is_not_an_impossible_one():
    p, s = np.array([[np.log(0.5), np.log(0.5)]]), np.array([[-800.0, 0.0]])
    got = divergences(p, s)
    assert got["forward_kl"][0] == pytest.approx(0.5 * (np.log(0.5) + 800) + 0.5 * np.log(0.5))


@given(st.integers(0, 10**6), st.integers(2, 12))
def test_bounds_and_symmetry(seed, size):
    rng = np.random.default_rng(seed)
    p, s = (np.log(rng.dirichlet(np.full(size, 0.4), 6) + 1e-300) for _ in range(2))
    p, s = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, s))
    there, back = divergences(p, s), divergences(s, p)
    assert np.all(there["forward_kl"] >= -1e-12)
    assert np.all((there["js"] >= -1e-12) & (there["js"] <= np.log(2) + 1e-12))
    assert np.allclose(there["forward_kl"], back["reverse_kl"])
    assert np.allclose(there["js"], back["js"], atol=1e-14)
    overlap = top_overlap(p, s, 5)
    assert np.all((overlap >= 0) & (overlap <= 1))
    assert np.array_equal(overlap, top_overlap(s, p, 5))


def test_same_habits_without_common_reason_agree_by_chance_only():
    rng = np.random.default_rng(0)
    a, b = (rng.choice(4, 20_000, p=[0.7, 0.1, 0.1, 0.1]) for _ in range(2))
    assert np.mean(a == b) > 0.5
    assert chance_corrected(a, b) == pytest.approx(0, abs=0.03)
    assert chance_corrected(a, a) == 1
    assert chance_corrected(np.zeros(5, dtype=int), np.zeros(5, dtype=int)) is None


def test_a_closer_student_measures_closer(bigram, places):
    teacher, other = bigram.drawn(15, 1), bigram.drawn(15, 2)
    rows = [np.exp(m.scores_VV) for m in (teacher, other)]
    near, far = (bigram((1 - w) * rows[0] + w * rows[1]) for w in (0.2, 0.8))
    a, b = compare_models(near, teacher, places), compare_models(far, teacher, places)
    assert a["top1"] > b["top1"]
    assert a["top5"] > b["top5"]
    assert all(a[name] < b[name] for name in ("forward_kl", "reverse_kl", "js"))


def test_different_vocabularies_are_refused(bigram, places):
    with pytest.raises(UserError, match=r"\[15, 16\]"):
        compare_models(bigram.drawn(15, 0), bigram.drawn(16, 0), places)


def test_memory_does_not_grow_with_the_places_of_a_large_vocabulary():
    """262,144 tokens: one array of all scores would take 2 MiB a place."""

    class Large:
        vocab_size = 2**18

        def next_log_probs(self, contexts):
            return np.broadcast_to(np.float32(-np.log(self.vocab_size)), (len(contexts), self.vocab_size))

    def peak(count):
        tracemalloc.start()
        compare_models(Large(), Large(), [np.array([3])] * count)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(32) < 1.1 * peak(8) < 512 * 2**20
