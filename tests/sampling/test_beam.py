"""Beam search with a decoder: beside the same search on whole rows, and transformers' own."""

import numpy as np
import pytest
from decoder_variants import LLAMA, VARIANTS, spread_params

from epigone.errors import UserError
from epigone.models.beam import Beams, most_probable, search
from epigone.models.sharding import make_mesh
from epigone.sampling.decode import DecoderLanguageModel

PROMPTS = [np.array(p, np.int32) for p in ([], [5], [7, 9, 4], [11, 6], [8, 8, 8, 5])]


def reference(model, prompt, beams, length):
    """The search on whole rows, without a cache."""
    rows = [list(prompt)] * beams

    def found():
        return most_probable(model.next_log_probs([np.array(row, np.int32) for row in rows]), 2 * beams)

    def step(parents, tokens):
        nonlocal rows
        rows = [[*rows[parent], int(token)] for parent, token in zip(parents, tokens, strict=True)]
        return found()

    return search(step, found(), Beams(1, beams, length, (model.specials.eos, *model.specials.stops)))[0]


@pytest.mark.parametrize("name", ["llama", *sorted(VARIANTS)][:4])
def test_the_cache_finds_what_whole_rows_find(name):
    config = VARIANTS.get(name, LLAMA)
    model = DecoderLanguageModel(config, spread_params(config))
    for prompt, found in zip(PROMPTS, model.beam(PROMPTS, beams=3, length=8), strict=True):
        np.testing.assert_array_equal(found, reference(model, prompt, 3, 8))


def test_one_beam_is_greedy():
    model = DecoderLanguageModel(LLAMA, spread_params(LLAMA))
    greedy = [row[0] for row in model.sample(PROMPTS, 0, length=8, temperature=0)]
    for one, other in zip(model.beam(PROMPTS, beams=1, length=8), greedy, strict=True):
        np.testing.assert_array_equal(one, other)


def test_parts_and_their_filling_change_nothing(monkeypatch):
    model = DecoderLanguageModel(LLAMA, spread_params(LLAMA))
    whole = model.beam(PROMPTS, beams=2, length=6)
    monkeypatch.setattr("epigone.sampling.beam.ROWS", 4)
    for one, other in zip(model.beam(PROMPTS, beams=2, length=6), whole, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_does_not_fit_and_a_mesh_are_refused():
    import jax

    model = DecoderLanguageModel(LLAMA, spread_params(LLAMA))
    with pytest.raises(UserError, match=r"4 tokens and .* more: the model reads"):
        model.beam(PROMPTS, beams=2, length=LLAMA.max_length)
    with jax.set_mesh(make_mesh(8)), pytest.raises(UserError, match="one device"):
        model.beam(PROMPTS, beams=2, length=4)
