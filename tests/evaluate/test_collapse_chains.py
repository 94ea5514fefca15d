"""The chains that are simulated, against chains of drawn numbers and against theory; and theory of the other kind."""

import doctest

import numpy as np
import pytest

from epigone.errors import UserError
from epigone.evaluate import collapse_chains as chains
from epigone.evaluate import collapse_theory as theory


def off(found, expected):
    """Mean over chains in standard errors from what is expected, the largest over generations."""
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    return float(np.max(np.abs(found.mean(axis=0) - expected) / np.maximum(error, 1e-15)))


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(chains).failed == 0


def test_a_refitted_gaussian_keeps_its_mean_variance_and_loses_its_median():
    n, t = 20, np.arange(61)
    variances = chains.gaussian_variances(n, 60, 4000, seed=3)
    assert off(np.log(variances[:, 1:]), theory.gaussian_mean_log_variance(n, t[1:])) < 4
    assert np.median(variances[:, -1]) == pytest.approx(theory.gaussian_median_variance(n, 60), rel=0.25)
    assert np.median(variances[:, -1]) < 0.1 < variances[:, -1].mean()
    assert off(variances[:, 1:11], 1.0) < 4
    assert off(np.log(variances[:, 1:]), 0.0) > 8


def test_a_generation_of_it_is_the_variance_of_draws():
    drawn = np.random.default_rng(0).normal(size=(20_000, 6)).var(axis=1, ddof=1)
    found = chains.gaussian_variances(6, 1, 20_000, seed=1)[:, 1]
    for power in (1, 2, 3):
        error = np.hypot((drawn**power).std(), (found**power).std()) / np.sqrt(20_000)
        assert abs((drawn**power).mean() - (found**power).mean()) < 4 * error


def test_regression_error_grows_with_replacement_and_stays_bounded_with_accumulation():
    d, samples, n = 5, 60, np.arange(1, 6)
    replaced = chains.regression_errors(d, samples, 5, 1000, seed=6)
    accumulated = chains.regression_errors(d, samples, 5, 1000, accumulate=True, seed=7)
    assert off(replaced, theory.regression_replace(1.0, d, samples, n)) < 4
    assert off(accumulated, theory.regression_replace(1.0, d, samples, n)) > 8
    # The bound of Gerstgrasser et al. is exact for samples >> dimension, and lies a little above the truth here.
    assert accumulated.mean(axis=0) == pytest.approx(theory.regression_accumulate(1.0, d, samples, n), rel=0.1)


def test_a_chain_of_regressions_is_that_of_a_solver():
    rng = np.random.default_rng(5)
    inputs, labels = rng.normal(size=(1, 9, 2)), rng.normal(size=(1, 9))
    wanted = np.linalg.lstsq(inputs[0], labels[0])[0]
    assert chains.regression_errors(2, 9, 1, 1, seed=5)[0, 0] == pytest.approx(wanted @ wanted)


@pytest.mark.parametrize(("phi", "psi"), [(1.0, 1.0), (0.9, 0.3), (0.5, 0.6)])
def test_verified_labels_teach_the_truth_below_the_threshold_and_its_opposite_above(phi, psi):
    threshold = theory.verification_threshold(phi, psi)
    assert chains.verified_accuracy(threshold - 0.05, phi, psi) > 0.8
    assert chains.verified_accuracy(threshold + 0.05, phi, psi) < 0.2


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: chains.gaussian_variances(1, 3, 2),
        lambda: chains.regression_errors(10, 11, 1, 1),
        lambda: chains.verified_accuracy(1.5, 0.5, 0.5),
    ],
)
def test_arguments_outside_the_theory_are_user_errors(wrong):
    with pytest.raises(UserError):
        wrong()
