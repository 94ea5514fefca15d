"""Rows that a model writes: their layout, and that tokens are drawn from what they should be drawn from."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest
import scipy.stats
from decoder_variants import LLAMA, VARIANTS, spread_params

from epigone.models.config import DecoderConfig
from epigone.models.decoder import apply, init
from epigone.models.language_model import BOS, EOS, PAD
from epigone.models.sharding import make_mesh
from epigone.sampling import own_rows
from epigone.sampling.loop import Knobs
from epigone.sampling.own_rows import Given, Writing, write_rows

forward = jax.jit(apply, static_argnums=0)

TINY = DecoderConfig(vocab_size=7, layers=1, model_size=8, heads=2, max_length=16)
OTHER = dataclasses.replace(TINY, model_size=12)
PLAIN = Writing(TINY, None, 0.0, 1, 2, Knobs(), False)
PROMPT = 4
"""The token that is given behind bos."""


def given(documents_of_rows, T):
    """Rows of documents, packed one after the other as they stand."""
    planes = np.zeros((3, len(documents_of_rows), T), np.int32)
    for row, documents in enumerate(documents_of_rows):
        column = 0
        for number, document in enumerate(documents, 1):
            part = slice(column, column + len(document) + 1)
            planes[:, row, part] = [BOS, *document], [*document, EOS], [number] * (len(document) + 1)
            column += len(document) + 1
    return Given(*planes)


def written(how, rows, step=0, seed=0, params=None, teacher=None):
    params = spread_params(how.student) if params is None else params
    return [np.asarray(x) for x in write_rows(how, params, teacher, rows, np.uint32(seed), np.uint32(step))]


def texts_of(planes, row):
    """The texts of a written row: (tokens read, targets, weights, positions) of each."""
    tokens, targets, weights, positions, segments = (x[row] for x in planes)
    assert list(segments) == sorted(segments)
    return [tuple(x[segments == s] for x in (tokens, targets, weights, positions)) for s in np.unique(segments)]


DOCUMENTS = [[[5, 9, 3, 7, 12], [6, 8], [20, 21, 22, 23]], [[7] * 11], [], [[30, 4], [11]]]


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_are_packed_texts_that_go_on_from_the_given_beginnings(name):
    """All but what is drawn follows from the rules; what is drawn is legal, and each family writes."""
    config = VARIANTS[name]
    T, prompt, limit = min(16, config.max_length), 3, 4
    how = Writing(config, None, 0.0, prompt, limit, Knobs(), False)
    rows = [[d for d in row if len(d) < T] for row in DOCUMENTS]
    planes = written(how, given(rows, T))
    for row, documents in enumerate(rows):
        if not documents:
            assert all((plane[row] == fill).all() for plane, fill in zip(planes, (PAD, PAD, 0, 0, 0), strict=True))
            continue
        texts = texts_of(planes, row)
        assert planes[4][row, 0] == 1
        assert sum(len(text[0]) for text in texts) == T
        for number, (tokens, targets, weights, positions) in enumerate(texts):
            document = documents[number % len(documents)]
            known = min(prompt, len(document), len(tokens))
            np.testing.assert_array_equal(positions, np.arange(len(tokens)))
            np.testing.assert_array_equal(tokens[1:], targets[:-1])
            assert tokens[0] == BOS
            np.testing.assert_array_equal(targets[:known], document[:known])
            np.testing.assert_array_equal(weights, np.arange(len(tokens)) >= known)
            drawn = targets[known:]
            assert len(drawn) <= limit
            assert (drawn[:-1] != EOS).all()
            assert number == len(texts) - 1 or drawn[-1] == EOS or len(drawn) == limit
            assert (drawn >= EOS).all()
            assert (drawn < config.vocab_size).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_read_while_writing_is_what_training_reads_of_the_rows(name):
    """The ratio of the probabilities at two temperatures, from the cache and from the forward pass over packed rows."""
    config = VARIANTS[name]
    rows = given([row for row in DOCUMENTS if row and max(map(len, row)) < 12], min(16, config.max_length))
    how = Writing(config, None, 0.0, 1, 5, Knobs(temperature=0.5), True)
    tokens, targets, weights, positions, segments = written(how, rows)
    logits = forward(config, spread_params(config), tokens, positions, segments)
    scores = [
        np.take_along_axis(np.asarray(jax.nn.log_softmax(x)), targets[..., None], 2)[..., 0]
        for x in (logits, logits / 0.5)
    ]
    drawn = weights > 0
    assert len(np.unique(segments)) > 2
    np.testing.assert_allclose(np.log(weights[drawn]), (scores[0] - scores[1])[drawn], atol=3e-5)
    assert np.ptp(np.log(weights[drawn])) > 0.1


def test_a_piece_that_goes_on_from_another_row_is_continued_without_a_bos():
    rows = Given(*(np.array([row], np.int32) for row in ([8, 9, 10, 11], [9, 10, 11, 12], [1] * 4)))
    tokens, targets, weights, *_ = written(Writing(LLAMA, None, 0.0, 2, 9, Knobs(), False), rows)
    assert list(tokens[0, :3]) == [8, 9, 10]
    assert list(weights[0]) == [0, 0, 1, 1]
    assert list(targets[0, :2]) == [9, 10]


def test_other_seeds_steps_and_rows_draw_other_tokens_and_the_same_ones_the_same():
    how = Writing(LLAMA, None, 0.0, 0, 9, Knobs(), False)
    rows = given([[[5, 6, 7]], [[5, 6, 7]]], 16)
    first, again, other_step, other_seed = (written(how, rows, *at) for at in ((3, 1), (3, 1), (4, 1), (3, 2)))
    np.testing.assert_array_equal(first, again)
    assert len({x[1][row].tobytes() for x in (first, other_step, other_seed) for row in (0, 1)}) == 6


# ------------------------------------------------------------------ what is drawn is drawn from
@cache
def next_probabilities(config, prefix, temperature=1.0):
    """Of the token after bos and a prefix, by the full forward pass."""
    row = np.array([[BOS, *prefix]])
    logits = forward(config, spread_params(config), row, np.arange(row.size)[None], np.ones_like(row))
    return np.asarray(jax.nn.softmax(logits[0, -1] / temperature), np.float64)


def pairs(choose):
    """The exact distribution of what is drawn behind the prompt: a token and the next one, or an end."""
    found = {}
    for first, p in enumerate(choose((PROMPT,))):
        if first == EOS:
            found[(EOS,)] = p
            continue
        for second, q in enumerate(choose((PROMPT, first))):
            found[first, second] = p * q
    return {pair: p for pair, p in found.items() if p > 0}


def counts(how, steps=40, **models):
    """How often each text was written. Three columns hold the prompt and two draws, so four texts are always whole.

    To count all that are whole would count short ones too often: a long one is more likely to be cut.
    """
    rows, found = given([[[PROMPT, 5, 6]]] * 64, 12), {}
    for step in range(steps):
        planes = written(how, rows, step, **models)
        for row in range(64):
            for _, targets, weights, _ in texts_of(planes, row)[:4]:
                text = tuple(map(int, targets[weights > 0]))
                found[text] = found.get(text, 0) + 1
    return found


def p_value(found, exact):
    """Chi-square of the counts; rare texts are one cell. A text that cannot be fails at once."""
    if set(found) - set(exact):
        return 0.0
    total = sum(found.values())
    cells = sorted((total * p, found.get(text, 0)) for text, p in exact.items())
    rare = [cell for cell in cells if cell[0] < 8]
    cells = [*(cell for cell in cells if cell[0] >= 8), *([tuple(map(sum, zip(*rare, strict=True)))] if rare else [])]
    wanted, seen = map(np.array, zip(*cells, strict=True))
    return scipy.stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue


def own(prefix):
    return next_probabilities(TINY, prefix)


def theirs(prefix):
    return next_probabilities(OTHER, prefix)


def test_texts_are_drawn_from_the_student():
    found = counts(PLAIN)
    assert sum(found.values()) > 5000
    assert p_value(found, pairs(own)) > 1e-3
    assert p_value(found, pairs(theirs)) < 1e-9
    assert p_value(found, pairs(lambda prefix: next_probabilities(TINY, prefix, 1.5))) < 1e-9


def test_with_a_teacher_they_are_drawn_from_the_mixture_token_by_token():
    how = PLAIN._replace(teacher=OTHER, teacher_share=0.4)
    found = counts(how, teacher=spread_params(OTHER))
    assert p_value(found, pairs(lambda prefix: 0.4 * theirs(prefix) + 0.6 * own(prefix))) > 1e-3
    assert p_value(found, pairs(own)) < 1e-9
    # Not a choice of the writer for each text.
    whole = {text: 0.4 * pairs(theirs).get(text, 0) + 0.6 * pairs(own).get(text, 0) for text in pairs(own)}
    assert p_value(found, whole) < 1e-3


def test_temperature_and_top_k_shape_the_mixture():
    knobs = Knobs(temperature=0.7, top_k=3)
    how = PLAIN._replace(teacher=OTHER, teacher_share=0.4, knobs=knobs)

    def limited(prefix):
        mixed = 0.4 * next_probabilities(OTHER, prefix, 0.7) + 0.6 * next_probabilities(TINY, prefix, 0.7)
        kept = np.where(mixed >= np.sort(mixed)[-3], mixed, 0.0)
        return kept / kept.sum()

    found = counts(how, teacher=spread_params(OTHER))
    assert p_value(found, pairs(limited)) > 1e-3
    assert p_value(found, pairs(own)) == 0.0


def test_importance_is_the_ratio_of_the_probabilities():
    how = PLAIN._replace(teacher=OTHER, teacher_share=0.4, importance=True, knobs=Knobs(temperature=0.8))
    rows = given([[[PROMPT, 5]]] * 8, 12)
    tokens, targets, weights, positions, _ = written(how, rows, teacher=spread_params(OTHER))
    checked = 0
    for row, column in zip(*np.nonzero(positions >= 1), strict=True):
        start = column - positions[row, column]
        prefix, y = tuple(map(int, tokens[row, start + 1 : column + 1])), targets[row, column]
        mixed = 0.4 * next_probabilities(OTHER, prefix, 0.8)[y] + 0.6 * next_probabilities(TINY, prefix, 0.8)[y]
        assert weights[row, column] == pytest.approx(own(prefix)[y] / mixed, rel=1e-4)
        checked += 1
    assert checked > 40
    assert (weights[positions == 0] == 0).all()
    assert weights[weights > 0].std() > 0.05


def test_a_teacher_alone_and_a_student_alone_are_the_ends_of_the_mixture():
    rows = given([[[PROMPT, 5]]] * 8, 12)
    alone = written(PLAIN, rows)
    np.testing.assert_array_equal(written(PLAIN._replace(teacher=OTHER), rows, teacher=spread_params(OTHER)), alone)
    teacher = written(PLAIN._replace(student=OTHER), rows)
    all_teacher = PLAIN._replace(teacher=OTHER, teacher_share=1.0)
    np.testing.assert_array_equal(written(all_teacher, rows, teacher=spread_params(OTHER)), teacher)


# ------------------------------------------------------------------ on any mesh, compiled once
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 4, 2), (2, 2, 2)], ids=str)
def test_a_mesh_changes_nothing(shape):
    how = Writing(LLAMA, LLAMA, 0.3, 2, 6, Knobs(top_p=0.9), True)
    rows = given([[[5, 9, 3, 7], [6, 8]], [[7] * 11]] * 4, 16)
    plain = written(how, rows, params=init(LLAMA, 0), teacher=init(LLAMA, 1))
    with jax.set_mesh(make_mesh(*shape)):
        cut = written(how, rows, params=init(LLAMA, 0), teacher=init(LLAMA, 1))
    for mine, wanted in zip(cut, plain, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-4)


def test_one_compilation_for_all_steps_seeds_and_texts(monkeypatch):
    how, traced, source = Writing(LLAMA, None, 0.0, 2, 5, Knobs(), False), [], own_rows._source
    monkeypatch.setattr(own_rows, "_source", lambda rows: traced.append(rows) or source(rows))
    for step, documents in enumerate(([[5, 9, 3, 7], [6, 8]], [[7] * 11], [[4]])):
        written(how, given([documents] * 2, 12), step, seed=step)
    assert len(traced) == 1
