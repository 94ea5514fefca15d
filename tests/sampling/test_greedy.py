"""Scores of continuations against the full forward pass, one row at a time."""

import dataclasses

import jax
import numpy as np
import pytest
from decoder_variants import LLAMA, VARIANTS, spread_params

from epigone.models.decoder import apply, init
from epigone.models.sharding import Sharding, make_mesh
from epigone.sampling import scores
from epigone.sampling.greedy import continuation_scores

forward = jax.jit(apply, static_argnums=0)


def drawn_pieces(config, count=12, seed=0):
    """Pieces of all lengths up to max_length; inputs need not begin with bos."""
    draw = np.random.default_rng(seed)
    pieces = []
    for _ in range(count):
        T = int(draw.integers(1, config.max_length + 1))
        C = int(draw.integers(1, T + 1))
        pieces.append(tuple(draw.integers(2, config.vocab_size, size).astype(np.int32) for size in (T, C)))
    return pieces


def by_hand(config, params, inputs_T, targets_C):
    """Sum of log-probabilities in float64, and the most probable tokens at the targets' places."""
    row = np.zeros((3, 1, config.max_length), np.int32)
    T = len(inputs_T)
    row[:, 0, :T] = inputs_T, np.arange(T), np.ones(T)
    logits_CV = np.asarray(forward(config, params, *row), np.float64)[0, T - len(targets_C) : T]
    log_z_C = np.log(np.exp(logits_CV - logits_CV.max(1, keepdims=True)).sum(1)) + logits_CV.max(1)
    return (logits_CV[np.arange(len(targets_C)), targets_C] - log_z_C).sum(), logits_CV.argmax(1)


@pytest.mark.parametrize("config", [VARIANTS[name] for name in ("llama", "gpt2", "gemma2")])
def test_scores_equal_the_full_forward_pass(config):
    params, pieces = spread_params(config), drawn_pieces(config)
    for (inputs, targets), (log_prob, _) in zip(
        pieces, continuation_scores(config, Sharding(), params, pieces), strict=True
    ):
        np.testing.assert_allclose(log_prob, by_hand(config, params, inputs, targets)[0], rtol=1e-5, atol=1e-4)


def test_greedy_is_told_from_all_but_greedy():
    params, pieces = spread_params(LLAMA), drawn_pieces(LLAMA)
    best = [(inputs, by_hand(LLAMA, params, inputs, targets)[1].astype(np.int32)) for inputs, targets in pieces]
    assert all(flag for _, flag in continuation_scores(LLAMA, Sharding(), params, best))
    for place in (0, -1):
        spoiled = [(inputs, targets.copy()) for inputs, targets in best]
        for _, targets in spoiled:
            targets[place] = targets[place] % 30 + 4  # any other token
        assert not any(flag for _, flag in continuation_scores(LLAMA, Sharding(), params, spoiled))


def test_scores_do_not_depend_on_how_many_rows_fit(monkeypatch):
    params, pieces = spread_params(LLAMA), drawn_pieces(LLAMA)
    whole = continuation_scores(LLAMA, Sharding(), params, pieces)
    monkeypatch.setattr(scores, "TOKENS", 2 * LLAMA.max_length)
    parts = continuation_scores(LLAMA, Sharding(), params, pieces)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)


def test_same_scores_on_a_mesh():
    config = dataclasses.replace(LLAMA, vocab_size=40)
    pieces = drawn_pieces(config)
    alone = continuation_scores(config, Sharding(), init(config, 0), pieces)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        cut = continuation_scores(config, Sharding(), init(config, 0), pieces)
    np.testing.assert_allclose(cut, alone, rtol=1e-5, atol=1e-5)
