"""Texts that take turns in a few slots: each is what it would be alone, and none waits for the longest."""

import dataclasses
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_names import compiled_names
from decoder_variants import LLAMA, spread_params

from epigone.models.decoder import abstract, apply
from epigone.models.language_model import Specials
from epigone.models.sharding import make_mesh
from epigone.sampling import loop, slots
from epigone.sampling.decode import DecoderLanguageModel, sample
from epigone.sampling.draw import draw, token_keys
from epigone.sampling.loop import Knobs
from epigone.sampling.watermark import GreenList, Gumbel, Tournament

CONFIG = dataclasses.replace(
    LLAMA, max_length=40, window=9, window_pattern=(False, True), specials=Specials(2, 2, 2, stops=(5, 6), never=(7,))
)
PARAMS = spread_params(CONFIG)
PROMPTS = [np.random.default_rng(n).integers(8, 37, n).astype(np.int32) for n in (3, 0, 17, 1, 6, 2, 20, 4, 4, 0, 9)]
LENGTH = 9
SEED = 5

forward = jax.jit(apply, static_argnums=0)
drawn_from = jax.jit(draw)
applied = jax.jit(lambda mark, logits, before: mark(logits, before), static_argnums=0)


def next_logits(text):
    """The full forward pass over bos and the text, without a cache: logits [1, V] of the next token."""
    row = np.zeros((3, 1, CONFIG.max_length), np.int32)
    count = len(text) + 1
    row[:, 0, :count] = np.r_[CONFIG.specials.bos, text], np.arange(count), np.ones(count)
    return forward(CONFIG, PARAMS, *row)[:, count - 1]


def alone(i, j, greedy=False, mark=None, temperature=1.0):
    """Sample j of prompt i, token by token, with nothing kept from one to the next."""
    text = PROMPTS[i]
    while len(text) < min(len(PROMPTS[i]) + LENGTH, CONFIG.max_length):
        logits = next_logits(text)
        if mark:
            before = np.r_[[CONFIG.specials.bos] * mark.width, text][-mark.width :].astype(np.int32)
            if mark.before_temperature:
                logits = applied(mark, logits, before[None]) / temperature
            elif not greedy:
                logits = applied(mark, logits / temperature, before[None])
        key = token_keys(jax.random.key(SEED), *(jnp.array([n]) for n in (i, j, len(text))))
        text = np.r_[text, int(jnp.argmax(logits) if greedy else drawn_from(logits, key)[0])].astype(np.int32)
        if text[-1] in (2, 5, 6):
            break
    return text[len(PROMPTS[i]) :]


@pytest.fixture(scope="module")
def together():
    """Two samples of eleven prompts in four slots."""
    return sample(CONFIG, PARAMS, PROMPTS, SEED, samples=2, length=LENGTH, slots=4)


def test_every_text_is_what_it_would_be_alone(together):
    ends = [text.tokens[-1] for row in together for text in row]
    assert {2, 5, 6} & set(ends)
    assert sum(end not in (2, 5, 6) for end in ends) > 2
    for i, row in enumerate(together):
        for j, text in enumerate(row):
            np.testing.assert_array_equal(text.tokens, alone(i, j))
            for n in (0, len(text.tokens) - 1):
                scores = jax.nn.log_softmax(next_logits(np.r_[PROMPTS[i], text.tokens[:n]]))[0]
                assert text.log_probs[n] == pytest.approx(float(scores[text.tokens[n]]), abs=1e-5)


def test_greedy_texts_in_turns_are_those_of_the_full_forward_pass():
    found = sample(CONFIG, PARAMS, PROMPTS, SEED, length=LENGTH, temperature=0.0, slots=4)
    for i, (text,) in enumerate(found):
        np.testing.assert_array_equal(text.tokens, alone(i, 0, greedy=True))


MARKS = [GreenList(3, width=2), GreenList(3, width=23), Gumbel(3, width=3), Tournament(3, width=1)]
"""Contexts that are shorter than a prompt, and one that is longer than every prompt."""


def marked_and_temperature(mark):
    return sample(CONFIG, PARAMS, PROMPTS, SEED, samples=2, length=LENGTH, slots=4, temperature=0.8, marks=(mark,))


@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_reads_the_tokens_before_of_its_own_text(mark, together):
    found = marked_and_temperature(mark)
    for i, row in enumerate(found):
        for j, text in enumerate(row):
            np.testing.assert_array_equal(text.tokens, alone(i, j, mark=mark, temperature=0.8))
            for n in (0, len(text.tokens) - 1):
                scores = jax.nn.log_softmax(next_logits(np.r_[PROMPTS[i], text.tokens[:n]]))[0]
                assert text.log_probs[n] == pytest.approx(float(scores[text.tokens[n]]), abs=1e-5)
    pairs = zip(chain(*found), chain(*together), strict=True)
    assert any(not np.array_equal(a.tokens, b.tokens) for a, b in pairs)


@pytest.mark.parametrize("mark", [GreenList(3), Gumbel(3)])
def test_a_mark_that_stands_in_for_the_draw_has_no_say_in_greedy_text(mark):
    found = sample(CONFIG, PARAMS, PROMPTS, SEED, length=LENGTH, temperature=0.0, slots=4, marks=(mark,))
    plain = sample(CONFIG, PARAMS, PROMPTS, SEED, length=LENGTH, temperature=0.0, slots=4)
    for i, (text,) in enumerate(found):
        np.testing.assert_array_equal(text.tokens, alone(i, 0, greedy=True, mark=mark))
    same = [np.array_equal(a.tokens, b.tokens) for (a,), (b,) in zip(found, plain, strict=True)]
    assert all(same) != mark.before_temperature


def assert_same(found, expected):
    for a, b in zip(chain(*found), chain(*expected), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)


def test_one_slot_and_four_give_the_same(together):
    assert_same(sample(CONFIG, PARAMS, PROMPTS, SEED, samples=2, length=LENGTH, slots=1), together)


def steps_of(monkeypatch, share, prompts, count):
    """Steps of the loop for one sample of each prompt, and the lengths of the texts."""
    total = []

    def counted(config, sharding, chunk, switch, prepared, state, *rest):
        before = int(state.step)
        after, record = loop.decode(config, sharding, chunk, switch, prepared, state, *rest)
        total.append(int(after.step) - before)
        return after, record

    monkeypatch.setattr(slots, "decode", counted)
    monkeypatch.setattr(slots, "SHARE", share)
    found = sample(CONFIG, PARAMS, prompts, SEED, length=LENGTH, slots=count)
    return sum(total), [len(text.tokens) for (text,) in found]


@pytest.mark.parametrize("tokens", [1, 32, 64])
def test_no_more_prompts_are_read_together_than_fit(monkeypatch, together, tokens):
    shapes = []

    def counted(config, sharding, prepared, state, texts):
        shapes.append(texts.tokens_RT.shape)
        return loop.refill(config, sharding, prepared, state, texts)

    monkeypatch.setattr(slots, "refill", counted)
    monkeypatch.setattr(slots, "TOKENS", tokens)
    monkeypatch.setattr(slots, "SHARE", 2)
    assert_same(sample(CONFIG, PARAMS, PROMPTS, SEED, samples=2, length=LENGTH, slots=4), together)
    assert not [shape for shape in shapes if shape[0] > max(1, tokens // max(16, shape[1] - 1))]
    assert shapes[0] == (max(1, tokens // 32), 33)
    assert max(R for R, _ in shapes) == {1: 1, 32: 2, 64: 2}[tokens]


def test_what_is_read_together_is_cut_over_the_mesh():
    assert [slots._readable(length, 1) for length in (0, 16, 17, 3000, 9000)] == [8192, 512, 256, 2, 1]
    assert [slots._readable(length, 4) for length in (0, 16, 3000, 9000)] == [8192, 512, 4, 4]
    assert slots._readable(100, 3) == 48


def test_no_text_waits_for_the_longest(monkeypatch):
    prompts = PROMPTS * 4
    refilled, lengths = steps_of(monkeypatch, 4, prompts, 4)
    waiting, same = steps_of(monkeypatch, 1, prompts, 4)  # slots are refilled when all of them are free
    assert lengths == same
    assert refilled < sum(lengths) / 4 + 2 * LENGTH
    assert waiting > 1.2 * refilled


def test_a_stream_gives_the_texts_of_sample_while_they_grow(together):
    model = DecoderLanguageModel(CONFIG, PARAMS, slots=4)
    whole = model.sample(PROMPTS, SEED, samples=2, length=LENGTH)
    texts = {(i, j): [] for i in range(len(PROMPTS)) for j in range(2)}
    order = []
    with compiled_names() as names:
        for i, j, tokens in model.stream(PROMPTS, SEED, samples=2, length=LENGTH):
            assert 0 < len(tokens) <= 8
            texts[i, j] += tokens.tolist()
            order.append((i, j))
    assert max(order.count(key) for key in texts) > 1
    assert not {"decode", "refill"} & set(names)
    for (i, j), text in texts.items():
        assert text == whole[i][j].tolist()
        assert not {2, 5, 6} & set(text)
        plain = together[i][j].tokens
        assert text == plain[: len(plain) - (plain[-1] in (2, 5, 6))].tolist()


def test_one_text_is_shown_in_small_pieces():
    config = dataclasses.replace(CONFIG, specials=Specials(never=(0, 1, 2)))
    model = DecoderLanguageModel(config, PARAMS)
    pieces = [tokens for _, _, tokens in model.stream([PROMPTS[0]], 0, length=20)]
    assert [len(piece) for piece in pieces] == [8, 8, 4]
    ((whole,),) = model.sample([PROMPTS[0]], 0, length=20)
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_turns_on_a_mesh(together):
    with jax.set_mesh(make_mesh(2, 2, 2)):
        params = jax.tree.map(jax.device_put, PARAMS, placements())
        assert_same(sample(CONFIG, params, PROMPTS, SEED, samples=2, length=LENGTH, slots=4), together)


@pytest.mark.parametrize("mark", MARKS[1:])
def test_marks_on_a_mesh(mark):
    expected = marked_and_temperature(mark)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        params = jax.tree.map(jax.device_put, PARAMS, placements())
        knobs = {"samples": 2, "length": LENGTH, "slots": 4, "temperature": 0.8}
        assert_same(sample(CONFIG, params, PROMPTS, SEED, marks=(mark,), **knobs), expected)


def placements():
    """Where each parameter lies on the mesh that is set."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract(CONFIG))


def test_weights_of_a_smaller_type_give_what_the_forward_pass_gives():
    config = dataclasses.replace(CONFIG, weights_dtype="bfloat16", dtype="float32")
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), PARAMS)
    ((text,),) = sample(config, params, PROMPTS[:1], 0, length=6, slots=4)
    whole = np.r_[config.specials.bos, PROMPTS[0], text.tokens[:-1]]
    row = np.array([[whole], [np.arange(len(whole))], [np.ones(len(whole))]]).astype(np.int32)
    logits = forward(config, params, *row)[0, len(PROMPTS[0]) :]
    expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(text.tokens)), text.tokens]
    np.testing.assert_allclose(text.log_probs, expected, atol=1e-5)


def test_nothing_asked_for_is_nothing():
    assert sample(CONFIG, PARAMS, [], 0) == []
    assert sample(CONFIG, PARAMS, PROMPTS[:1], 0, samples=0) == [[]]
    ((text,),) = sample(CONFIG, PARAMS, PROMPTS[:1], 0, length=0)
    assert text.tokens.shape == text.log_probs.shape == (0,)


KNOBS = [Knobs(), Knobs(0.0), Knobs(0.6, 5), Knobs(1.3, 0, 0.8), Knobs(0.8, 7, 0.9), Knobs(0.0), Knobs(2.0)]


def mixed_texts():
    """Texts that each have a prompt, a length, a seed and knobs of their own."""
    wanted = zip(KNOBS, range(100), (9, 3, LENGTH, 1, LENGTH, 7, 5), strict=False)
    return [
        slots.Text(number, PROMPTS[number % len(PROMPTS)], length, (seed, 2, number), knobs)
        for number, (knobs, seed, length) in enumerate(wanted)
    ]


def written_together(texts, count, dropped=()):
    """Tokens of each text by its number; so many slots."""
    growing = slots.Slots(CONFIG, loop.Sharding(), loop.prepare(CONFIG, loop.Sharding(), PARAMS), count, 64)
    waiting, found, complete = list(texts), {text.owner: [] for text in texts}, set()
    switch = loop.switches(*(text.knobs for text in texts))
    while waiting or growing.free < growing.count:
        while waiting and growing.free:
            growing.fill([waiting.pop(0)], 1)
        for grown in growing.grow(switch, loop.Until(2, growing.count)):
            assert grown.owner not in complete
            found[grown.owner].extend(grown.tokens)
            if grown.is_complete:
                complete.add(grown.owner)
        for owner in dropped:
            growing.drop(owner)
    return found, complete


def test_texts_with_knobs_and_seeds_of_their_own_are_those_that_each_is_alone():
    texts = mixed_texts()
    assert loop.switches(*KNOBS) == loop.Switches(False, True, True, mixed=True)
    together, complete = written_together(texts, 3)
    assert complete == {text.owner for text in texts}
    for text in texts:
        assert written_together([text], 1)[0][text.owner] == together[text.owner], text
        assert len(together[text.owner]) <= text.length
    for number, knobs in enumerate(KNOBS):
        if knobs.temperature == 0:
            (best,), *_ = sample(CONFIG, PARAMS, [texts[number].prompt], 5, length=texts[number].length, temperature=0)
            assert list(best.tokens) == together[number]


def test_a_text_that_is_dropped_makes_room_and_changes_no_other():
    texts = mixed_texts()
    whole, _ = written_together(texts, 2)
    longest = max(whole, key=lambda owner: len(whole[owner]))
    found, complete = written_together(texts, 2, dropped=[longest])
    assert complete == set(whole) - {longest}
    assert found[longest] == whole[longest][: len(found[longest])]
    assert len(found[longest]) < len(whole[longest])
    assert all(found[owner] == whole[owner] for owner in complete)
