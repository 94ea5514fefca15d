"""Scores of long rows are found a chunk at a time, and in batches of no more rows than fit or are wanted."""

import dataclasses

import jax
import numpy as np
import pytest
from decoder_variants import LLAMA, VARIANTS, spread_params
from flax import nnx

from epigone.models.decoder import abstract, init, structure
from epigone.models.sharding import Sharding, make_mesh
from epigone.sampling import greedy, scores
from epigone.sampling.decode import DecoderLanguageModel
from epigone.sampling.scores import fitting_chunk, fitting_rows, next_scores, target_scores, windows_of, windows_scores

TEXTS = [np.random.default_rng(n).integers(3, 37, n).astype(np.int32) for n in (0, 1, 39, 20, 31, 32, 5)]
PIECES = [(text[:-1], text[n // 2 + 1 :]) for n, text in enumerate(TEXTS) if len(text) > 5]


def found(config, params):
    """Scores of windows, in order, and of continuations with their flags."""
    windows = windows_scores(config, Sharding(), params, windows_of(TEXTS, config.max_length, config.specials))
    return [values for _, values in windows], greedy.continuation_scores(config, Sharding(), params, PIECES)


def assert_equal(part, whole):
    """Other rows beside it round a row otherwise."""
    for a, b in zip(part[0], whole[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(part[1], whole[1], rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_chunk_at_a_time_gives_the_same(monkeypatch, name):
    config = dataclasses.replace(VARIANTS[name], max_length=40)
    params = spread_params(config)
    whole = found(config, params)
    monkeypatch.setattr(scores, "LOGITS", 7 * config.sizes.V)
    assert fitting_rows(config, Sharding(), 40, 40) == 1
    assert_equal(found(config, params), whole)


@pytest.mark.parametrize("chunk", [1, 7, 13, 20])
def test_chunks_of_every_size_give_the_same_scores(chunk):
    model = nnx.merge(structure(LLAMA, Sharding()), spread_params(LLAMA))
    hidden_BTD = jax.random.normal(jax.random.key(0), (3, 20, LLAMA.model_size))
    best_BT = np.argmax(model.logits(hidden_BTD), axis=-1)
    targets_BT = np.where(np.arange(20) % 3 == 0, best_BT, best_BT % 30 + 3)
    whole, part = (target_scores(model, size, hidden_BTD, targets_BT) for size in (20, chunk))
    np.testing.assert_allclose(part[0], whole[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(part[1], targets_BT == best_BT)


def test_a_chunk_at_a_time_gives_the_same_on_a_mesh(monkeypatch):
    config = dataclasses.replace(LLAMA, vocab_size=40, max_length=40)
    whole = found(config, init(config, 0))
    monkeypatch.setattr(scores, "LOGITS", 4 * 7 * config.sizes.V)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert fitting_chunk(config, fitting_rows(config, Sharding(), 40, 40)) == 7
        assert_equal(found(config, init(config, 0)), whole)


def test_the_logits_of_a_long_row_are_never_made_whole():
    config = dataclasses.replace(LLAMA, vocab_size=32_768, max_length=256)
    row = np.zeros((1, 256), np.int32)
    arguments = {
        scores._score: (row, row, np.array([200], np.int32)),
        greedy._score: (row, row, np.array([200], np.int32), np.array([90], np.int32)),
    }
    for score, rows in arguments.items():
        whole, part = (
            score.lower(config, Sharding(), abstract(config), *rows, chunk=chunk).compile() for chunk in (256, 16)
        )
        used = [compiled.memory_analysis().temp_size_in_bytes for compiled in (whole, part)]
        assert used[0] > 4 * 256 * 32_768 > 4 * used[1]


def test_rows_whose_tokens_and_logits_fit():
    def rows(T, C, wanted=scores.TOKENS, V=262_144):
        return fitting_rows(dataclasses.replace(LLAMA, vocab_size=V), Sharding(), T, C, wanted)

    assert rows(8192, 8192) == rows(16_384, 1) == rows(32, 1, 1) == rows(32, 1, 0) == 1
    assert rows(32, 1, 5) == 8
    assert rows(32, 32, V=512) == 256
    for T, V in ((8192, 262_144), (512, 49_152), (32, 37)):
        config = dataclasses.replace(LLAMA, vocab_size=V)
        size = fitting_rows(config, Sharding(), T, T)
        assert size * T <= scores.TOKENS
        assert size * fitting_chunk(config, size) * config.sizes.V <= scores.LOGITS
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert [rows(8192, 8192), rows(32, 1, 5), rows(32, 1, 8), rows(32, 1, 9)] == [4, 8, 8, 16]


def test_next_tokens_are_scored_in_no_more_rows_than_are_asked_for(monkeypatch):
    params, config = spread_params(LLAMA), LLAMA
    whole = next_scores(config, Sharding(), params, TEXTS)
    shapes = []

    def counted(config, sharding, params, tokens_BT, lengths_B):
        shapes.append(tokens_BT.shape)
        return compute(config, sharding, params, tokens_BT, lengths_B)

    compute = scores._next
    monkeypatch.setattr(scores, "_next", counted)
    alone = np.concatenate([next_scores(config, Sharding(), params, [text]) for text in TEXTS])
    next_scores(config, Sharding(), params, TEXTS * 5)
    assert [B for B, _ in shapes] == [1] * 7 + [32, 4]
    np.testing.assert_allclose(alone, whole, atol=1e-5)


def test_an_embedding_is_the_mean_of_the_last_states_whatever_stands_beside_it():
    model = DecoderLanguageModel(LLAMA, spread_params(LLAMA))
    documents = [np.array(d, np.int32) for d in ([], [5], [7, 9, 4], [8] * 12, [3, 4, 5, 6, 7, 8, 9, 10, 11])]
    together = model.embed(documents)
    assert together.shape == (5, LLAMA.model_size)
    for document, found in zip(documents, together, strict=True):
        np.testing.assert_allclose(model.embed([document])[0], found, rtol=1e-5, atol=1e-6)
        read = np.r_[LLAMA.specials.bos, document][None]
        decoder = nnx.merge(structure(LLAMA, Sharding()), model.params)
        states = decoder(read, np.arange(read.shape[1])[None], np.ones_like(read))
        np.testing.assert_allclose(found, np.asarray(states)[0].mean(axis=0), rtol=1e-4, atol=1e-5)
