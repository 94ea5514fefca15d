"""Draws are those of the distribution, and never of probability 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from epigone.sampling.draw import BLOCK, draw, pick, token_keys

DRAWS = 200_000


def keys(count, seed=0):
    index = jnp.arange(count)
    return token_keys(jax.random.key(seed), index * 0, index, index % 7)


def p_value(tokens, probabilities):
    """Chi-square of counts against probabilities; tokens that are rarer than 10 draws are put together."""
    counts, expected = np.bincount(tokens, minlength=len(probabilities)), probabilities * len(tokens)
    rare = expected < 10
    observed, wanted = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    return scipy.stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue


def test_draws_follow_the_softmax_and_the_test_would_see_a_small_error():
    logits = (np.random.default_rng(0).standard_normal(400) * 2).astype(np.float32)
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum()
    tokens = np.asarray(jax.jit(draw)(np.tile(logits, (DRAWS, 1)), keys(DRAWS)))
    assert p_value(tokens, probabilities) > 0.001
    warmer = np.exp(logits.astype(np.float64) / 1.05)
    assert p_value(tokens, warmer / warmer.sum()) < 1e-9


def test_probability_zero_is_never_drawn():
    logits = np.full((4096, 3 * BLOCK + 5), -np.inf, np.float32)
    logits[:, [BLOCK - 1, 2 * BLOCK, 3 * BLOCK + 4]] = [-30.0, 0.0, 1.0]
    logits[:, 7] = -1e9
    assert set(np.unique(draw(logits, keys(4096)))) <= {BLOCK - 1, 2 * BLOCK, 3 * BLOCK + 4}


def test_pick_at_the_ends_of_the_uniform_range():
    weights = jnp.array([[0.0, 0.25, 0.0, 0.75, 0.0]] * 4)
    uniform = jnp.array([0.0, 0.2499999, 0.25, 1 - 2.0**-24])
    assert pick(weights, uniform).tolist() == [1, 1, 3, 3]
    assert pick(jnp.array([[0.1, 0.2, 0.0]]), jnp.array([1.0])).tolist() == [1]


def test_rare_tokens_keep_their_share():
    """One token in 100,000, behind 60,000 others, over all uniform numbers at the upper end of the range."""
    probabilities = np.full(60_001, (1 - 1e-5) / 60_000)
    probabilities[-1] = 1e-5
    blocks = np.pad(probabilities, (0, -len(probabilities) % BLOCK)).reshape(-1, BLOCK).astype(np.float32)
    uniform = jnp.asarray(1 - np.arange(1, 4000) * 2.0**-19, jnp.float32)

    def share(weights):
        chosen = np.asarray(pick(jnp.tile(weights, (len(uniform), 1)), uniform))
        assert chosen.min() < np.flatnonzero(weights)[-1]
        return (chosen == np.flatnonzero(weights)[-1]).sum() * 2.0**-19

    assert share(blocks.sum(-1)) * share(blocks[-1]) == pytest.approx(1e-5, rel=0.01)


def test_a_running_sum_that_rises_at_probability_zero_draws_nothing_there(monkeypatch):
    """Sums in parallel, as on an accelerator, may differ in the last bit between neighbours."""
    monkeypatch.setattr("epigone.sampling.draw.jnp.cumsum", lambda x, axis: jnp.array([[0.3, 0.3001, 0.6]]))
    assert pick(jnp.array([[0.3, 0.0, 0.3]]), jnp.array([0.50005])).tolist() == [2]


def test_a_key_depends_on_its_own_row_alone():
    whole = jax.random.key_data(keys(16))
    part = token_keys(jax.random.key(0), jnp.zeros(2, int), jnp.array([3, 11]), jnp.array([3, 4]))
    np.testing.assert_array_equal(jax.random.key_data(part), whole[jnp.array([3, 11])])
    assert len(np.unique(np.asarray(whole), axis=0)) == 16
