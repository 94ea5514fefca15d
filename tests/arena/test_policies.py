"""Policies: text and scores have the same marks, each measure does what it says, and hides from one who looks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_variants import LLAMA, spread_params
from scipy import stats

from epigone.arena.leakage import hidden_size
from epigone.arena.policies import Best, Hidden, Noisy, Policy, Rounded, Showing, Tempered, shown_scores
from epigone.errors import UserError
from epigone.models.decoder import abstract
from epigone.models.sharding import make_mesh
from epigone.sampling import loop, scores, slots
from epigone.sampling.decode import DecoderLanguageModel, sample
from epigone.sampling.draw import draw
from epigone.sampling.watermark import GreenList, Gumbel, Tournament, hashes, is_green, seeds

PARAMS = spread_params(LLAMA)
V = LLAMA.vocab_size
RANDOM = np.random.default_rng(0)
TEXTS = [RANDOM.integers(8, V, n).astype(np.int32) for n in (5, 0, 12, 3, 15)]


def rows(policy, texts=TEXTS, **options):
    """What a policy shows of every place, as rows [V] with NaN for what it does not."""
    found = []
    for one in shown_scores(LLAMA, PARAMS, policy, texts, V, **options):
        row = np.full((len(one.own), V), np.nan)
        for place, ids, values in zip(row, one.ids, one.log_probs, strict=True):
            place[ids[ids >= 0]] = values[ids >= 0]
        found.append(row)
    return found


def contexts(text, width):
    """The tokens before each place, bos where there are none."""
    padded = np.r_[[LLAMA.specials.bos] * width, text].astype(np.int32)
    return np.stack([padded[n : n + width] for n in range(len(text) + 1)])


@pytest.fixture(scope="module")
def plain():
    return rows(Policy())


def test_without_measures_all_scores_are_those_of_the_model(plain):
    own = DecoderLanguageModel(LLAMA, PARAMS).log_probs(TEXTS)
    for text, row, shown, scored in zip(
        TEXTS, plain, shown_scores(LLAMA, PARAMS, Policy(), TEXTS, 3), own, strict=True
    ):
        np.testing.assert_allclose(shown.own, scored, atol=1e-5)
        np.testing.assert_allclose(row[np.arange(len(text) + 1), np.r_[text, LLAMA.specials.eos]], scored, atol=1e-5)
        np.testing.assert_allclose(np.nansum(np.exp(row), axis=1), 1, atol=1e-5)
        assert (np.diff(shown.log_probs) <= 0).all()
        np.testing.assert_array_equal(shown.ids[:, 0], np.nanargmax(row, axis=1))
        np.testing.assert_array_equal(np.flatnonzero(np.isnan(row).all(axis=0)), LLAMA.specials.never)


@pytest.mark.parametrize(
    "mark", [GreenList(3), GreenList(3, width=20), Gumbel(3), Tournament(3, width=1), Tempered(2.0)]
)
def test_a_mark_is_in_the_scores_of_every_place_with_the_tokens_before_it(mark, plain):
    for text, found, model in zip(TEXTS, rows(Policy((mark,))), plain, strict=True):
        logits = jnp.asarray(np.nan_to_num(model, nan=-np.inf), jnp.float32)
        expected = jax.nn.log_softmax(mark(logits, jnp.asarray(contexts(text, mark.width))))
        np.testing.assert_allclose(np.nan_to_num(found, nan=-np.inf), expected, atol=2e-4)


MARKS = [
    (GreenList(5, width=1, delta=2.0),),
    (Tournament(5, width=2),),
    (Tempered(1.7), GreenList(5, width=3), Tournament(6, width=1)),
]


@pytest.mark.parametrize("marks", MARKS, ids=["green", "tournament", "three of them"])
def test_what_is_drawn_follows_what_is_shown(marks):
    """Chi-square of 4,000 tokens after one prompt; the scores of the model without marks are refuted."""
    prompt, count = TEXTS[0], 4_000
    (texts,) = sample(LLAMA, PARAMS, [prompt], 1, samples=count, length=1, slots=64, marks=marks)
    seen = np.bincount([text.tokens[0] for text in texts], minlength=V)

    def p_value(policy):
        p = np.nan_to_num(np.exp(rows(policy, [prompt])[0][-1]))
        usual = p * count >= 5
        pooled = [np.append(x[usual], x[~usual].sum()) for x in (seen, p / p.sum() * count)]
        return stats.chisquare(pooled[0], pooled[1] + 1e-9 * (pooled[1] == 0)).pvalue

    assert p_value(Policy(marks)) > 1e-3
    assert p_value(Policy()) < 1e-6


def test_a_mark_in_the_text_alone_is_undone_by_drawing_from_the_scores():
    """An extractor that draws its own text from shown scores: it carries the mark only where the scores do."""
    mark = GreenList(11, width=1, gamma=0.25, delta=3.0)

    def green(policy):
        texts = [np.zeros(0, np.int32)] * 60
        for step in range(12):
            logits = np.nan_to_num([row[-1] for row in rows(policy, texts)], nan=-np.inf).astype(np.float32)
            logits[:, LLAMA.specials.eos] = -np.inf
            drawn = draw(jnp.asarray(logits), jax.random.split(jax.random.key(step), len(texts)))
            texts = [np.r_[text, int(token)].astype(np.int32) for text, token in zip(texts, drawn, strict=True)]
        pairs = {
            (int(a), int(b)) for text in texts for a, b in zip(np.r_[LLAMA.specials.bos, text], text, strict=False)
        }
        before, after = (jnp.array(x)[:, None] for x in zip(*sorted(pairs), strict=True))
        hits = np.asarray(is_green(hashes(seeds(mark.secret, before), after), mark.gamma)).sum()
        return stats.binomtest(int(hits), len(pairs), mark.gamma, alternative="greater").pvalue

    assert green(Policy((mark,))) < 1e-9, "the mark of the scores is in what was drawn from them"
    assert green(Policy()) > 1e-3, "where the sampler alone has the mark, scores know nothing of it"


def test_hidden_scores_and_the_best(plain):
    for one in shown_scores(LLAMA, PARAMS, Policy(scores=(Hidden(),)), TEXTS, 4):
        assert np.isnan(one.own).all()
        assert np.isnan(one.log_probs).all()
        assert (one.ids == -1).all()
    bare, own = (shown_scores(LLAMA, PARAMS, Policy(scores=(Best(3, own=own),)), TEXTS, V) for own in (False, True))
    for text, model, few, more in zip(TEXTS, plain, bare, own, strict=True):
        targets = np.r_[text, LLAMA.specials.eos]
        order = np.argsort(-np.nan_to_num(model, nan=-np.inf), axis=1, kind="stable")[:, :3]
        np.testing.assert_array_equal(few.ids[:, :3], order)
        assert (few.ids[:, 3:] == -1).all()
        among = (order == targets[:, None]).any(axis=1)
        np.testing.assert_array_equal(np.isfinite(few.own), among)
        assert np.isfinite(more.own).all()
        np.testing.assert_array_equal((more.ids >= 0).sum(axis=1), 3 + ~among)


def test_rounded_scores(plain):
    for found, model in zip(rows(Policy(scores=(Rounded(1),))), plain, strict=True):
        np.testing.assert_allclose(found * 10, np.round(found * 10), atol=1e-4)
        assert np.nanmax(np.abs(found - model)) <= 0.05 + 1e-4


def test_noise_is_normal_and_the_same_after_the_same_tokens(plain):
    policy = Policy(scores=(Noisy(9, spread=0.3, width=2),))
    noise = [found - model for found, model in zip(rows(policy), plain, strict=True)]
    all_ = np.concatenate([one[np.isfinite(one)] for one in noise])
    assert stats.kstest(all_[np.isfinite(all_)], stats.norm(scale=0.3).cdf).pvalue > 1e-3
    other = np.r_[TEXTS[2][:3] % 5 + 20, TEXTS[0][-2:]].astype(np.int32)
    (again,), (base,) = rows(policy, [other]), rows(Policy(), [other])
    np.testing.assert_allclose((again - base)[-1], noise[0][-1], atol=1e-4)
    (elsewhere,) = rows(Policy(scores=(Noisy(10, spread=0.3, width=2),)), [TEXTS[0]])
    assert np.nanmax(np.abs(elsewhere - plain[0] - noise[0])) > 0.1


def test_measures_act_in_their_order():
    first, last = Policy(scores=(Best(2), Noisy(1, 5.0))), Policy(scores=(Noisy(1, 5.0), Best(2)))
    ids = [[set(place) for one in shown_scores(LLAMA, PARAMS, p, TEXTS, 2) for place in one.ids] for p in (first, last)]
    best = [set(place) for one in shown_scores(LLAMA, PARAMS, Policy(), TEXTS, 2) for place in one.ids]
    assert ids[0] == best != ids[1]


def test_whole_rows_of_scores_tell_the_width_of_this_model_and_coarse_ones_do_not():
    texts = [RANDOM.integers(8, V, 15).astype(np.int32) for _ in range(12)]

    def told(*measures):
        shown = np.concatenate(rows(Policy(scores=measures), texts))
        return hidden_size(shown[:, np.isfinite(shown).all(axis=0)])

    size, gap = told()
    assert size == LLAMA.model_size
    assert gap > 3
    assert told(Rounded(0))[1] < 1


def test_long_rows_in_chunks_and_a_mesh_change_nothing(monkeypatch, plain):
    policy = Policy((GreenList(3, width=3), Tournament(4)), (Noisy(2, 0.1), Best(5, own=True)))
    expected = shown_scores(LLAMA, PARAMS, policy, TEXTS, 6)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        params = jax.tree.map(jax.device_put, PARAMS, jax.tree.map(lambda leaf: leaf.sharding, abstract(LLAMA)))
        assert_same(shown_scores(LLAMA, params, policy, TEXTS, 6), expected)
    monkeypatch.setattr(scores, "LOGITS", V * 4)
    assert_same(shown_scores(LLAMA, PARAMS, policy, TEXTS, 6), expected)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.own, other.own, atol=1e-4)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)
        np.testing.assert_array_equal(one.ids, other.ids)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Tempered(0.0), "temperature is 0.0"),
        (lambda: Best(0), "count is 0"),
        (lambda: Rounded(7), "decimals is 7"),
        (lambda: Noisy(-1, 0.1), "secret"),
        (lambda: Noisy(1, 0.0), "spread is 0.0"),
        (lambda: shown_scores(LLAMA, PARAMS, Policy(), TEXTS, -1), "best is -1"),
        (lambda: shown_scores(LLAMA, PARAMS, Policy(), [np.zeros(LLAMA.max_length, np.int32)], 1), "max_length"),
    ],
)
def test_bad_measures_are_told(make, told):
    with pytest.raises(UserError, match=told):
        make()


def test_a_policy_is_data_that_programs_are_compiled_for():
    policy = Policy((GreenList(1), Gumbel(2)), (Best(3),))
    assert hash(policy) == hash(dataclasses.replace(policy))
    assert policy.width == 4


@pytest.mark.parametrize("policy", [
    Policy(),
    Policy((GreenList(3, width=2),), (Noisy(5, 0.3), Best(2), Rounded(2))),
    Policy((Tempered(1.7), Gumbel(3)), (Hidden(),)),
])  # fmt: skip
def test_scores_that_are_shown_while_a_text_grows_are_those_of_the_whole_text(policy):
    """With a cache and token by token, beside the forward pass over the text that came of it."""
    prepared = loop.prepare(LLAMA, loop.Sharding(), PARAMS)
    growing = slots.Slots(LLAMA, loop.Sharding(), prepared, 2, 64, policy.marks, Showing(policy, 4), chunk=4)
    prompts, grown = [text[:5] for text in TEXTS[:3]], {0: [], 1: [], 2: []}
    waiting = [slots.Text(n, prompt, 9, (n, 0, 0), loop.Knobs()) for n, prompt in enumerate(prompts)]
    while waiting or growing.free < growing.count:
        while waiting and growing.free:
            growing.fill([waiting.pop()], 1)
        for piece in growing.grow(loop.switches(loop.Knobs()), loop.Until(4, 2)):
            grown[piece.owner].append(piece)
    for number, prompt in enumerate(prompts):
        tokens, seen = (
            np.concatenate([piece.tokens for piece in grown[number]]),
            jax.tree.map(lambda *parts: np.concatenate(parts), *[piece.seen for piece in grown[number]]),
        )
        ended = tokens[-1] in (LLAMA.specials.eos, *LLAMA.specials.stops)
        text = np.r_[prompt, tokens[:-1] if ended and tokens[-1] == LLAMA.specials.eos else tokens].astype(np.int32)
        (whole,) = shown_scores(LLAMA, PARAMS, policy, [text], 4)
        for ours, theirs in zip(seen, whole, strict=True):
            np.testing.assert_allclose(ours, theirs[len(prompt) :][: len(tokens)], atol=2e-4)
