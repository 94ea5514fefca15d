"""Decoding with a cache equals the full forward pass, and a sample depends on its own index alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from compiled_names import compiled_names
from decoder_variants import LLAMA, VARIANTS, spread_params

from epigone.errors import UserError
from epigone.models.decoder import apply, init
from epigone.models.language_model import BOS, EOS, LanguageModel
from epigone.models.sharding import make_mesh
from epigone.sampling import loop
from epigone.sampling.decode import DecoderLanguageModel, sample
from epigone.sampling.scores import bucket, windows_of
from epigone.sampling.watermark import Gumbel

every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
PROMPTS = [np.array(p, np.int32) for p in ([5, 9, 3], [], [7, 8, 2, 30, 11, 4], [20])]


forward = jax.jit(apply, static_argnums=0)


def model(config=LLAMA, slots=8):
    return DecoderLanguageModel(config, spread_params(config), slots=slots)


def plain_log_probs(config, params, document):
    """Log-softmax of the full forward pass over the whole document, n + 1 rows."""
    row = np.zeros((3, 1, config.max_length), np.int32)
    count = len(document) + 1
    row[:, 0, :count] = np.r_[BOS, document], np.arange(count), np.ones(count)
    return np.asarray(jax.nn.log_softmax(forward(config, params, *row)))[0, :count]


@every_variant
def test_cached_decoding_equals_the_full_forward_pass(config):
    params = spread_params(config)
    for prompt, (drawn,) in zip(PROMPTS, sample(config, params, PROMPTS, 0, length=12, slots=4), strict=True):
        text = np.r_[prompt, drawn.tokens].astype(np.int32)
        rows = plain_log_probs(config, params, text[:-1])[len(prompt) :]
        np.testing.assert_allclose(drawn.log_probs, rows[np.arange(len(drawn.tokens)), drawn.tokens], atol=1e-5)
        assert len(text) == config.max_length or len(drawn.tokens) == 12 or drawn.tokens[-1] == EOS
        assert (drawn.tokens[:-1] != EOS).all()
        assert drawn.tokens.min() >= EOS
        assert drawn.tokens.max() < config.vocab_size


def test_samples_do_not_depend_on_their_company():
    params = spread_params(LLAMA)
    together = sample(LLAMA, params, PROMPTS, 0, samples=3, length=6, slots=4)
    alone = sample(LLAMA, params, PROMPTS[:3], 0, samples=2, length=6, slots=8)
    for few, many in zip(alone, together, strict=False):
        for a, b in zip(few, many, strict=False):
            np.testing.assert_array_equal(a.tokens, b.tokens)
    assert len({tuple(s.tokens) for s in together[0]}) > 1
    other = sample(LLAMA, params, PROMPTS, 1, samples=3, length=6, slots=4)
    assert any(not np.array_equal(a.tokens, b.tokens) for a, b in zip(other[0], together[0], strict=True))


def test_written_documents_do_not_depend_on_slots_and_are_samples_of_an_empty_prompt():
    few, many = model(slots=4).write(300, 5, max_length=10), model(slots=32).write(300, 5, max_length=10)
    assert len(few) == len(many)
    short = model().write(60, 5, max_length=10)
    for a, b in zip(few, many, strict=True):
        np.testing.assert_array_equal(a, b)
    for document, one in zip(few, short, strict=False):
        np.testing.assert_array_equal(document, one)
    (drawn,) = sample(LLAMA, spread_params(LLAMA), [PROMPTS[1]], 5, samples=6, length=10, slots=8)
    for document, one in zip(few, drawn, strict=False):
        np.testing.assert_array_equal(document, one.tokens[one.tokens != EOS])
    (continued,) = model().sample([PROMPTS[1]], 5, samples=3, length=10)
    for document, one in zip(few, continued, strict=False):
        np.testing.assert_array_equal(document, one)


def test_marks_are_in_all_that_is_written_and_in_no_score():
    """Every token of a Gumbel mark is the one that its hashes choose, whichever way a text is asked for."""
    mark = Gumbel(77, width=2)
    plain = model()
    marked = plain.marked((mark,))
    written, drawn = marked.write(60, 3), marked.sample(PROMPTS, 3, samples=2, length=8)
    parts = [(len(p), np.r_[p, d].astype(np.int32)) for p, row in zip(PROMPTS, drawn, strict=True) for d in row]
    grown = {(i, j): list[int]() for i in range(len(PROMPTS)) for j in range(2)}
    for i, j, tokens in marked.stream(PROMPTS, 3, samples=2, length=8):
        grown[i, j] += tokens.tolist()
    assert [grown[i, j] for i, j in grown] == [d.tolist() for row in drawn for d in row]
    for given, document in [*((0, d) for d in written), *parts]:
        logits = plain_log_probs(LLAMA, plain.params, document)
        before = np.stack([np.r_[[BOS] * 2, document][n : n + 2] for n in range(len(document) + 1)]).astype(np.int32)
        chosen = np.asarray(mark(jnp.asarray(logits), jnp.asarray(before))).argmax(axis=1)
        np.testing.assert_array_equal(document[given:], chosen[given:-1])
    for ours, theirs in zip(marked.log_probs(written), plain.log_probs(written), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [d.tolist() for d in plain.write(60, 3)] != [d.tolist() for d in written]


def test_what_is_written_fits_the_model_and_is_scored_in_one_window():
    documents = model().write(300, 0, max_length=99)
    assert max(len(d) for d in documents) == LLAMA.max_length - 1
    assert len(windows_of(documents, LLAMA.max_length, LLAMA.specials)) == len(documents)


@pytest.mark.parametrize("tokens", [1, 37, 500])
def test_written_text_just_reaches_its_tokens(tokens):
    documents = model().write(tokens, 1, max_length=10)
    counts = np.cumsum([len(d) + 1 for d in documents])
    assert counts[-1] >= tokens
    assert len(counts) == 1 or counts[-2] < tokens
    assert all(len(d) <= 10 and d.dtype == np.int32 and (d > EOS).all() for d in documents)


def test_writing_goes_on_over_chunks(monkeypatch):
    whole = model().write(400, 2, max_length=10)
    monkeypatch.setattr("epigone.sampling.decode.CHUNK", 7)
    for a, b in zip(model().write(400, 2, max_length=10), whole, strict=True):
        np.testing.assert_array_equal(a, b)


def test_lengths_and_first_tokens_follow_the_model():
    """Chi-square of the first tokens against the model's row; the model at temperature 1.1 is told apart."""
    subject = model(slots=64)
    documents = subject.write(30_000, 3, max_length=4)
    first = np.array([d[0] if len(d) else EOS for d in documents])
    row = np.exp(subject.next_log_probs([np.zeros(0, np.int32)])[0].astype(np.float64))

    def p_value(probabilities):
        expected = probabilities / probabilities.sum() * len(first)
        counts = np.bincount(first, minlength=37)
        assert counts[expected == 0].sum() == 0
        return scipy.stats.chisquare(counts[2:], expected[2:]).pvalue

    assert p_value(row) > 0.001
    assert p_value(row ** (1 / 1.2)) < 1e-4
    second = np.array([d[1] if len(d) > 1 else EOS for d in documents if len(d) and d[0] == first[first != EOS][0]])
    after = np.exp(subject.next_log_probs([np.array([first[first != EOS][0]], np.int32)])[0].astype(np.float64))
    expected = after / after.sum() * len(second)
    common = expected >= 5
    observed = np.bincount(second, minlength=37)
    pooled = [np.append(x[common], x[~common].sum()) for x in (observed, expected)]
    assert scipy.stats.chisquare(*pooled).pvalue > 0.001


def test_limits_of_the_choice():
    params = spread_params(LLAMA)
    row = plain_log_probs(LLAMA, params, PROMPTS[0])[-1]
    order = np.argsort(-row)
    options = {"samples": 64, "length": 1, "slots": 64}
    (greedy,) = sample(LLAMA, params, PROMPTS[:1], 0, temperature=0.0, **options)
    assert {int(s.tokens[0]) for s in greedy} == {int(order[0])}
    np.testing.assert_allclose(greedy[0].log_probs, row[order[:1]], atol=1e-5)
    (limited,) = sample(LLAMA, params, PROMPTS[:1], 0, top_k=3, **options)
    assert {int(s.tokens[0]) for s in limited} == set(order[:3].tolist())
    nucleus = int(np.searchsorted(np.cumsum(np.exp(row[order])), 0.5)) + 1
    (limited,) = sample(LLAMA, params, PROMPTS[:1], 0, top_p=0.5, **options)
    assert {int(s.tokens[0]) for s in limited} <= set(order[:nucleus].tolist())


def test_log_probs_and_next_log_probs_equal_the_full_forward_pass():
    config = dataclasses.replace(LLAMA, max_length=40)
    params = spread_params(config)
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 37, n).astype(np.int32) for n in (0, 1, 39, 20, 31, 32, 5)]
    subject = DecoderLanguageModel(config, params)
    assert isinstance(subject, LanguageModel)
    for document, scores in zip(documents, subject.log_probs(documents), strict=True):
        rows = plain_log_probs(config, params, document)
        np.testing.assert_allclose(scores, rows[np.arange(len(rows)), np.r_[document, EOS]], atol=1e-5)
    following = subject.next_log_probs(documents)
    for document, row in zip(documents, following, strict=True):
        np.testing.assert_allclose(row, plain_log_probs(config, params, document)[-1], atol=1e-5)
    np.testing.assert_allclose(np.exp(following).sum(-1), 1, atol=1e-5)
    assert (np.exp(following[:, :2]) == 0).all()


def test_long_documents_are_scored_once_with_half_a_window_of_context():
    documents = [np.arange(3, 3 + n, dtype=np.int32) for n in (15, 16, 50)]
    windows = windows_of(documents, 16, LLAMA.specials)
    for index, document in enumerate(documents):
        mine = [w for w in windows if w.document == index]
        scored = np.concatenate([w.targets[len(w.targets) - w.scored :] for w in mine])
        np.testing.assert_array_equal(scored, np.r_[document, EOS])
        assert all(len(w.inputs) <= 16 for w in mine)
        assert all(len(w.inputs) - w.scored >= 8 for w in mine[1:])
    (scores,) = model().log_probs([np.arange(50, dtype=np.int32) % 30 + 3])
    assert scores.shape == (51,)
    assert (scores < 0).all()
    assert model().next_log_probs([np.arange(50, dtype=np.int32) % 30 + 3]).shape == (1, 37)


def test_finished_rows_end_the_loop_early():
    prepared = loop.prepare(LLAMA, loop.Sharding(), spread_params(LLAMA))
    state = loop.start_empty(LLAMA, loop.Sharding(), 4, 96, prepared.params, 0)
    index = np.arange(4, dtype=np.int32)
    numbers = np.full((4, 1), BOS, np.int32), index * 0 + 1, np.array([3, 0, 2, 5], np.int32)
    texts = loop.Texts(index, *numbers, index * 0, index, np.uint32(index), loop.of_rows(loop.Knobs(), 4))
    state = loop.refill(LLAMA, loop.Sharding(), prepared, state, texts)
    switch, until = loop.switches(loop.Knobs()), loop.Until(64, 4)
    state, drawn = loop.decode(LLAMA, loop.Sharding(), 64, switch, prepared, state, until)
    assert int(state.step) == (np.asarray(drawn.samples_CB) >= 0).any(axis=1).sum() <= 5
    assert not np.asarray(state.live_B).any()
    assert (np.asarray(drawn.samples_CB)[:, 1] == loop.IDLE).all()


def test_same_text_on_a_mesh():
    config = dataclasses.replace(LLAMA, kv_heads=2)
    alone = DecoderLanguageModel(config, init(config, 0), slots=8).write(80, 0, max_length=8)
    prompted = sample(config, init(config, 0), PROMPTS, 0, length=4, slots=8)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        params = init(config, 0)
        cut = DecoderLanguageModel(config, params, slots=8)
        for a, b in zip(cut.write(80, 0, max_length=8), alone, strict=True):
            np.testing.assert_array_equal(a, b)
        for (a,), (b,) in zip(sample(config, params, PROMPTS, 0, length=4, slots=8), prompted, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
        assert cut.log_probs(alone[:2])[0].shape == (len(alone[0]) + 1,)


def test_models_of_one_config_share_what_is_compiled():
    model().write(90, 0, max_length=10)
    with compiled_names() as names:
        DecoderLanguageModel(LLAMA, spread_params(LLAMA, seed=1), slots=8).write(70, 9, max_length=9, temperature=0.7)
    assert not {"decode", "start_empty"} & set(names)


def test_buckets():
    assert [bucket(n) for n in (1, 32, 33, 64, 65, 128, 129)] == [32, 32, 64, 64, 128, 128, 256]


def test_bad_requests_are_refused():
    subject = model()
    for change, word in [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
    ]:
        with pytest.raises(UserError, match=word):
            subject.write(10, 0, **change)
    with pytest.raises(UserError, match=r"20 tokens.*max_length is 16"):
        sample(LLAMA, subject.params, [np.full(20, 5, np.int32)], 0)
    assert subject.write(0, 0) == []
