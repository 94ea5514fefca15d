"""Which tokens are left, against a sort."""

import jax
import numpy as np
import pytest

from epigone.sampling.processors import temperature, top_k, top_p

LOGITS = np.random.default_rng(0).standard_normal((6, 301)).astype(np.float32) * 3
LOGITS[0, :4] = [-1e9, -np.inf, 0.0, -0.0]


def kept(logits):
    return np.isfinite(np.asarray(logits))


@pytest.mark.parametrize("k", [1, 2, 17, 300])
def test_top_k_keeps_exactly_the_largest(k):
    left = jax.jit(top_k)(LOGITS, k)
    expected = np.zeros_like(LOGITS, bool)
    np.put_along_axis(expected, np.argsort(-LOGITS, axis=-1)[:, :k], True, axis=-1)
    np.testing.assert_array_equal(kept(left), expected & np.isfinite(LOGITS))
    np.testing.assert_array_equal(np.asarray(left)[kept(left)], LOGITS[kept(left)])


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_reach_p(p):
    left = kept(jax.jit(top_p)(LOGITS, p))
    probabilities = np.exp(LOGITS.astype(np.float64))
    probabilities /= probabilities.sum(-1, keepdims=True)
    for row, probability in zip(left, probabilities, strict=True):
        ordered = np.sort(probability)[::-1]
        count = int(np.searchsorted(np.cumsum(ordered), p)) + 1
        assert row.sum() == count
        assert set(np.flatnonzero(row)) == set(np.argsort(-probability)[:count])


def test_ties_at_the_border_are_kept():
    logits = np.array([[2.0, 1.0, 1.0, 0.0, -0.0, -3.0]], np.float32)
    assert kept(top_k(logits, 2)).tolist() == [[True, True, True, False, False, False]]
    assert kept(top_k(logits, 4)).tolist() == [[True, True, True, True, True, False]]
    assert kept(top_p(logits, 0.6)).tolist() == [[True, True, True, False, False, False]]


def test_temperature_divides():
    np.testing.assert_array_equal(temperature(LOGITS, 2.0), LOGITS / 2)


def test_top_p_after_top_k_renormalises():
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    assert kept(top_p(logits, 0.6)).sum() == 2
    assert kept(top_p(top_k(logits, 2), 0.55)).sum() == 1
