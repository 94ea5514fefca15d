"""What scores tell, against models whose width is known and against counted samples."""

import numpy as np
import pytest

from epigone.arena.leakage import hidden_size, missing_nats, samples_worth
from epigone.errors import UserError

V, D, ROWS = 1_000, 32, 300


def rows(bias=False, seed=0):
    """Log-probabilities of a head with D inputs, over random states."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(ROWS, D)) @ random.normal(size=(D, V)) + bias * random.normal(size=V)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def zipf(count):
    weights = 1 / np.arange(1, count + 1)
    return weights / weights.sum()


@pytest.mark.parametrize(("bias", "size"), [(False, D), (True, D + 1)])
def test_whole_rows_tell_the_width(bias, size):
    found, gap = hidden_size(rows(bias))
    assert found == size
    assert gap > 20


def test_one_decimal_and_little_noise_still_tell_it_and_whole_numbers_do_not():
    """A matrix of no low rank is the control."""
    noise = np.random.default_rng(1).normal(size=(ROWS, V))
    for shown in (rows().round(1), rows() + 0.1 * noise):
        assert hidden_size(shown)[0] == D
    exact = hidden_size(rows())[1]
    for shown in (rows().round(0), rows() + 0.5 * noise, noise):
        assert hidden_size(shown)[1] < exact / 10
    assert hidden_size(noise)[0] != D


@pytest.mark.parametrize(("K", "shown", "samples"), [(50, 1, 68), (50, 5, 253), (50, 20, 3_641), (1_000, 20, 1_701)])
def test_the_best_scores_are_worth_so_many_samples(K, shown, samples):
    assert samples_worth(zipf(K), np.arange(K) < shown) == pytest.approx(samples, rel=0.01)


def test_so_many_samples_leave_as_much_as_the_scores_do():
    """A student that counts that many samples (add 1/2) is as far off, on average over 400, within four errors."""
    p = zipf(50)
    is_shown = np.arange(50) < 20
    N = round(samples_worth(p, is_shown))
    counts = np.random.default_rng(2).multinomial(N, p, size=400)
    estimates = (counts + 0.5) / (N + 25)
    left = (p * np.log(p / estimates)).sum(axis=1)
    assert abs(left.mean() - missing_nats(p, is_shown)) < 4 * left.std() / 20 + 0.05 * left.mean()


def test_all_scores_leave_nothing():
    p = np.array([0.5, 0.5, 0.0])
    assert samples_worth(p, np.array([True, True, False])) == float("inf")
    assert samples_worth(p, np.ones(3, bool)) == float("inf")


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda: hidden_size(np.zeros((2, 9))), "2 rows of 9"),
        (lambda: hidden_size(np.full((9, 9), -np.inf)), "not shown"),
        (lambda: samples_worth(np.array([0.5, 0.4]), np.ones(2, bool)), "sum to 0.9"),
    ],
)
def test_bad_scores_are_told(ask, told):
    with pytest.raises(UserError, match=told):
        ask()
