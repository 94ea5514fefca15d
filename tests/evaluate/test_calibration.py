import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from epigone.errors import Fault
from epigone.evaluate import contexts as contexts_module
from epigone.evaluate import evaluation_contexts
from epigone.evaluate.calibration import (
    TopPredictions,
    expected_calibration_error,
    reliability_table,
    top_predictions,
)


def drawn(seed, size=5000, power=1.0):
    """First choices that are right with probability confidence ** power: calibrated at power 1."""
    rng = np.random.default_rng(seed)
    confidence = rng.beta(2, 2, size)
    return TopPredictions(confidence, rng.random(size) < confidence**power)


def test_hand_computed():
    top = TopPredictions(np.array([0.1, 0.2, 0.9, 1.0]), np.array([False, True, True, True]))
    low, high = reliability_table(top, bins=2)
    assert (low.count, low.confidence, low.accuracy) == (2, pytest.approx(0.15), 0.5)
    assert (high.count, high.confidence, high.accuracy) == (2, pytest.approx(0.95), 1.0)
    assert expected_calibration_error(top, bins=2) == pytest.approx((0.35 + 0.05) / 2)


def test_a_bin_holds_its_upper_edge():
    top = TopPredictions(np.array([0.5, 0.5, 0.75]), np.array([True, False, True]))
    assert [row.count for row in reliability_table(top, bins=2)] == [2, 1]


@pytest.mark.parametrize(("adaptive", "strategy"), [(False, "uniform"), (True, "quantile")])
def test_table_agrees_with_scikit_learn(adaptive, strategy):
    top = drawn(0)
    accuracy, confidence = calibration_curve(top.correct_M, top.confidence_M, n_bins=12, strategy=strategy)
    table = reliability_table(top, 12, adaptive=adaptive)
    assert [row.accuracy for row in table] == pytest.approx(accuracy.tolist())
    assert [row.confidence for row in table] == pytest.approx(confidence.tolist())
    assert sum(row.count for row in table) == len(top.confidence_M)


def test_adaptive_bins_are_of_one_size():
    counts = [row.count for row in reliability_table(drawn(1), 10, adaptive=True)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("adaptive", [False, True])
def test_calibrated_choices_measure_sampling_noise_and_others_do_not(adaptive):
    top = drawn(2)
    rows = reliability_table(top, adaptive=adaptive)
    noise = sum(np.sqrt(2 * r.count * r.accuracy * (1 - r.accuracy) / np.pi) for r in rows) / len(top.confidence_M)
    errors = [expected_calibration_error(drawn(seed), adaptive=adaptive) for seed in range(20)]
    assert np.mean(errors) == pytest.approx(noise, rel=0.2)
    for power in (0.5, 2.0):
        wrong = [expected_calibration_error(drawn(seed, power=power), adaptive=adaptive) for seed in range(20)]
        assert min(wrong) > 4 * max(errors)


@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.booleans()), min_size=1, max_size=60), st.integers(1, 20), st.booleans()
)
def test_bounds_and_order(rows, bins, adaptive):
    confidence, correct = (np.array(column) for column in zip(*rows, strict=True))
    error = expected_calibration_error(TopPredictions(confidence, correct), bins, adaptive=adaptive)
    turned = expected_calibration_error(TopPredictions(confidence[::-1], correct[::-1]), bins, adaptive=adaptive)
    assert 0 <= error <= 1
    assert turned == pytest.approx(error, abs=1e-12)
    # The triangle inequality: bins can only hide less than their union.
    assert error >= abs(confidence.mean() - correct.mean()) - 1e-12


def test_equal_confidences_share_a_bin():
    table = reliability_table(TopPredictions(np.full(30, 0.4), np.arange(30) % 5 < 2), adaptive=True)
    assert [(row.count, row.accuracy) for row in table] == [(30, 0.4)]


def test_a_model_is_calibrated_on_its_own_text_and_a_sharpened_one_is_not(bigram):
    model = bigram.drawn(40, 0, concentration=0.2)
    places = evaluation_contexts(model.write(20_000, 1), 4000)
    rows = np.exp(model.scores_VV * 3)
    sharp = bigram(rows / rows.sum(axis=1, keepdims=True))
    honest, proud = (expected_calibration_error(top_predictions(m, places)) for m in (model, sharp))
    assert honest < 0.03
    assert proud > 0.15
    assert np.array_equal(top_predictions(model, places).correct_M, top_predictions(sharp, places).correct_M)


def test_scores_are_held_a_chunk_at_a_time(bigram, monkeypatch):
    model = bigram.drawn(20, 0)
    places = evaluation_contexts(model.write(500, 1), 100)
    whole = top_predictions(model, places)
    monkeypatch.setattr(contexts_module, "CHUNK_SCORES", 20 * 7)
    model.largest_request = 0
    parts = top_predictions(model, places)
    assert model.largest_request == 7
    assert np.array_equal(whole.confidence_M, parts.confidence_M)
    assert np.array_equal(whole.correct_M, parts.correct_M)


@pytest.mark.parametrize("damage", [0.9, np.nan])
def test_rows_that_do_not_sum_to_one_are_a_fault(bigram, damage):
    model = bigram(np.full((5, 5), 0.2) * damage)
    with pytest.raises(Fault, match="sum to"):
        top_predictions(model, evaluation_contexts([np.array([3, 4])], 3))
