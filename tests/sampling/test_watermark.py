"""Marks against what they promise: the distribution they draw from, and what a text without them looks like."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from epigone.errors import UserError
from epigone.sampling.draw import draw
from epigone.sampling.watermark import GreenList, Gumbel, Tournament, hashes, is_green, seeds, surprise, votes

SECRET = 2**40 + 12345
CONTEXTS = 20_000
P_V = np.array([0.3, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02])
LOGITS_V = np.log(P_V).astype(np.float32)


def contexts(count=CONTEXTS, width=3, vocabulary=500):
    """Different contexts, which stand for independent secrets."""
    numbers = np.random.default_rng(0).permutation(vocabulary**2)[:count]
    return np.stack([numbers // vocabulary, numbers % vocabulary, *[numbers % 7] * (width - 2)], axis=1).astype(
        np.int32
    )


def hashed(context_BH, tokens, secret=SECRET):
    return np.asarray(jax.jit(lambda c, t: hashes(seeds(secret, c), t))(context_BH, jnp.asarray(tokens)))


def applied(mark, logits_BV, context_BH):
    return np.asarray(jax.jit(mark)(jnp.asarray(logits_BV), context_BH))


def drawn(mark, logits_V=LOGITS_V, count=CONTEXTS):
    """One token for each of many contexts, drawn by the mark's distribution."""
    context_BH = contexts(count, width=mark.width)
    marked_BV = applied(mark, np.tile(logits_V, (count, 1)), context_BH)
    keys_B = jax.random.split(jax.random.key(7), count)
    return context_BH, np.asarray(jax.jit(draw)(marked_BV, keys_B))


def test_hashes_of_near_contexts_tokens_and_secrets_are_as_good_as_independent():
    """Correlations of 160,000 pairs are within five standard errors of 0, bit by bit; so are the shares of ones."""
    context_BH, tokens = contexts(), np.arange(8)
    found = hashed(context_BH, tokens)
    other_secret = hashed(context_BH, tokens, SECRET + 1)
    neighbours = hashed(context_BH + np.array([0, 0, 1], np.int32), tokens)
    turned = hashed(context_BH[:, ::-1], tokens)
    bits = found[..., None] >> np.arange(32) & 1
    assert np.abs(bits.mean(axis=(0, 1)) - 0.5).max() < 5 * 0.5 / np.sqrt(found.size)
    for one in (other_secret, neighbours, np.roll(found, 1, axis=1), np.roll(found, 1, axis=0)):
        agree = ((one[..., None] >> np.arange(32) & 1) == bits).mean(axis=(0, 1))
        assert np.abs(agree - 0.5).max() < 5 * 0.5 / np.sqrt(found.size)
    assert (turned != found).mean() > 0.9  # the order of the tokens before counts
    for byte in (found & 255, found >> 24):
        assert stats.chisquare(np.bincount(byte.ravel(), minlength=256)).pvalue > 1e-4


@pytest.mark.parametrize("mark", [Gumbel(SECRET), Tournament(SECRET), Tournament(SECRET, rounds=1)])
def test_over_contexts_tokens_are_drawn_as_without_the_mark(mark):
    """Chi-square; draws at temperature 1.1 are told apart."""
    counts = np.bincount(drawn(mark)[1], minlength=8)
    assert stats.chisquare(counts, CONTEXTS * P_V).pvalue > 1e-3
    hotter = np.bincount(drawn(mark, LOGITS_V / 1.1)[1], minlength=8)
    assert stats.chisquare(hotter, CONTEXTS * P_V).pvalue < 1e-6


def test_green_tokens_gain_delta_and_no_other():
    context_BH = contexts(200)
    marked_BV = applied(GreenList(SECRET, width=3, gamma=0.25, delta=1.5), np.tile(LOGITS_V, (200, 1)), context_BH)
    green_BV = hashed(context_BH, np.arange(8)) < 2**30
    np.testing.assert_allclose(marked_BV, LOGITS_V + 1.5 * green_BV, rtol=1e-6)
    assert 0.15 < green_BV.mean() < 0.35


@pytest.mark.parametrize("gamma", [0.1, 0.25, 0.5])
def test_green_tokens_of_a_text_without_the_mark_are_binomial(gamma):
    """1,000 texts of 20 distinct pairs; those of the mark's own texts are far too many."""
    mark = GreenList(SECRET, width=2, gamma=gamma)
    context_BH, tokens = drawn(mark)
    own = np.asarray(is_green(hashed(context_BH, tokens[:, None])[:, 0], gamma))
    plain = np.asarray(is_green(hashed(context_BH, np.roll(tokens, 1)[:, None], SECRET + 9)[:, 0], gamma))
    hits = plain.reshape(-1, 20).sum(axis=1)
    expected = stats.binom.pmf(np.arange(21), 20, gamma) * len(hits)
    usual = expected >= 5
    seen = np.bincount(hits, minlength=21)
    pooled = [np.append(x[usual], x[~usual].sum()) for x in (seen, expected)]
    assert stats.chisquare(*pooled).pvalue > 1e-3
    assert stats.binom.sf(own.sum() - 1, len(own), gamma) < 1e-12


def test_surprise_of_a_text_without_the_mark_is_gamma_and_that_of_its_own_is_more():
    context_BH, tokens = drawn(Gumbel(SECRET))
    plain = np.asarray(surprise(hashed(context_BH, tokens[:, None], SECRET + 1)[:, 0])).reshape(-1, 20).sum(axis=1)
    assert stats.kstest(plain, stats.gamma(20).cdf).pvalue > 1e-3
    own = np.asarray(surprise(hashed(context_BH, tokens[:, None])[:, 0]))
    assert stats.gamma.sf(own.sum(), len(own)) < 1e-12


def test_gumbel_draws_by_r_to_the_1_over_p():
    context_BH = contexts(2_000, width=4)
    marked_BV = applied(Gumbel(SECRET), np.tile(LOGITS_V, (2_000, 1)), context_BH)
    r_BV = 1 - (hashed(context_BH, np.arange(8)).astype(np.float64) + 0.5) / 2**32
    expected = np.argmax(np.log(r_BV) / P_V, axis=1)
    np.testing.assert_array_equal(marked_BV.argmax(axis=1), expected)
    assert (np.isneginf(marked_BV).sum(axis=1) == 7).all()


def test_a_tournament_is_its_recursion_in_float64():
    context_BH = contexts(300, width=4)
    marked_BV = applied(Tournament(SECRET, rounds=30), np.tile(LOGITS_V, (300, 1)), context_BH)
    p_BV = np.tile(P_V, (300, 1))
    g_BVR = np.asarray(votes(jnp.asarray(hashed(context_BH, np.arange(8))), 30))
    for g_BV in np.moveaxis(g_BVR, -1, 0):
        p_BV = p_BV * (1 + g_BV - (g_BV * p_BV).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(np.exp(marked_BV), p_BV, atol=2e-5)
    np.testing.assert_allclose(np.exp(marked_BV).sum(axis=1), 1, atol=2e-5)


def test_votes_of_a_tournament_are_as_often_1_as_the_formula_says():
    """In the first round 1/2 + (1 - sum of p^2) / 4 for its own texts, and 1/2 without the mark: within 4 errors."""
    context_BH, tokens = drawn(Tournament(SECRET, rounds=1))
    error = 4 * 0.5 / np.sqrt(CONTEXTS)
    first = np.asarray(votes(jnp.asarray(hashed(context_BH, tokens[:, None])), 1)).mean()
    assert abs(first - (0.5 + (1 - (P_V**2).sum()) / 4)) < error
    other = np.asarray(votes(jnp.asarray(hashed(context_BH, tokens[:, None], SECRET + 1)), 1)).mean()
    assert abs(other - 0.5) < error


@pytest.mark.parametrize("mark", [GreenList(1), Gumbel(1), Tournament(1)])
def test_what_may_not_follow_never_does(mark):
    logits_BV = np.tile(np.where(np.arange(8) < 3, LOGITS_V, -np.inf).astype(np.float32), (500, 1))
    marked_BV = applied(mark, logits_BV, contexts(500, width=mark.width))
    assert not np.isnan(marked_BV).any()
    assert np.isneginf(marked_BV[:, 3:]).all()
    assert (marked_BV.max(axis=1) > -np.inf).all()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: GreenList(-1), "secret"),
        (lambda: Gumbel(2**63), "secret"),
        (lambda: Gumbel(1, width=0), "width is 0"),
        (lambda: GreenList(1, gamma=1.0), "gamma is 1.0"),
        (lambda: GreenList(1, delta=0.0), "delta 0.0"),
        (lambda: Tournament(1, rounds=33), "rounds is 33"),
    ],
)
def test_bad_marks_are_told(make, told):
    with pytest.raises(UserError, match=told):
        make()
