"""N-gram models write what they score: chi-square tests against their own rows, each with a control that must fail."""

import time
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from epigone.errors import UserError
from epigone.models.language_model import EOS
from epigone.models.ngram import NGram, NGramModel
from epigone.models.ngram_sampling import filtered
from epigone.models.smoothing import kneser_ney, mle, witten_bell

V = 60
DRAWS = 1_000_000
CONTEXTS = {"frequent": [3, 4], "rare": [20, 30], "unseen": [59, 59], "start": []}


def zipf_documents(documents: int = 200) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, V - 2)
    return [(3 + rng.choice(V - 3, rng.poisson(9), p=p / p.sum())).astype(np.int32) for _ in range(documents)]


def fitted(smooth, order: int = 3, scale: float = 1.0) -> NGramModel:
    return NGramModel.fit(NGram(order, smooth, (scale,)), zipf_documents(), V)


def row(model: NGramModel, context: list[int]) -> np.ndarray:
    return np.exp(model.next_log_probs([np.array(context, np.int32)])[0])


def chi_square_p(draws: np.ndarray, p: np.ndarray) -> float:
    """p-value of the draws under p; tokens expected fewer than 10 times are taken together."""
    observed, expected = np.bincount(draws, minlength=len(p)), p * len(draws)
    if observed[p == 0].any():
        return 0.0
    common = expected >= 10
    observed = np.append(observed[common], observed[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    kept = expected > 0
    return (
        stats.chisquare(observed[kept], expected[kept] * observed.sum() / expected.sum()).pvalue
        if kept.sum() > 1
        else 1.0
    )


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
@pytest.mark.parametrize("smooth", [witten_bell, kneser_ney, mle])
def test_a_million_draws_follow_the_row(smooth, context):
    model = fitted(smooth, scale=0.5)
    draws = model.draw(np.array(context, np.int32), DRAWS, seed=1)
    assert chi_square_p(draws, row(model, context)) > 1e-4


@pytest.mark.parametrize("context", ["frequent", "start"])
def test_the_chi_square_test_sees_a_sampler_that_is_slightly_wrong(context):
    model, other = fitted(witten_bell), fitted(witten_bell, scale=0.9)
    draws = other.draw(np.array(CONTEXTS[context], np.int32), DRAWS, seed=1)
    assert chi_square_p(draws, row(model, CONTEXTS[context])) < 1e-6


def test_draws_from_seen_continuations_alone_would_fail():
    """What nltk's `generate` does: it never says a word that the context has not seen, whatever its scores say."""
    model, unsmoothed = fitted(witten_bell), fitted(mle)
    p = row(model, CONTEXTS["frequent"])
    draws = unsmoothed.draw(np.array(CONTEXTS["frequent"], np.int32), DRAWS, seed=1)
    assert p[row(unsmoothed, CONTEXTS["frequent"]) == 0].sum() > 0.05
    assert chi_square_p(draws, p) < 1e-6


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": 0.7},
        {"temperature": 1.5},
        {"top_k": 5},
        {"top_p": 0.8},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9},
    ],
)
def test_draws_follow_the_filtered_row(knobs):
    model = fitted(kneser_ney)
    p = row(model, CONTEXTS["frequent"])
    draws = model.draw(np.array(CONTEXTS["frequent"], np.int32), DRAWS, 2, **knobs)
    assert chi_square_p(draws, filtered(p[None], **knobs)[0]) > 1e-4
    assert chi_square_p(draws, p) < 1e-6


def test_written_documents_have_the_probability_that_they_are_scored_with():
    documents = [np.array(d, np.int32) for d in ([3, 3, 4], [3, 4], [4], [4, 3], [])]
    model = NGramModel.fit(NGram(2, witten_bell, (1.0,)), documents, 5)
    kinds = [kind for length in range(4) for kind in product((3, 4), repeat=length)]
    written = Counter(tuple(document.tolist()) for document in model.write(400_000, 3))
    shares = np.exp([scores.sum() for scores in model.log_probs([np.array(kind, np.int32) for kind in kinds])])
    observed = [written[kind] for kind in kinds]
    observed.append(written.total() - sum(observed))
    assert stats.chisquare(observed, np.append(shares, 1 - shares.sum()) * written.total()).pvalue > 1e-4


def test_lengths_are_not_biased_by_stopping_at_a_token_count():
    """Wald: the tokens less 10 a document have mean 0 at the stop; kept in order of completion, short ones crowd in."""
    model = NGramModel.fit(NGram(1, mle), [np.full(9, 3, np.int32)], 4)
    lengths = [np.array([len(document) + 1 for document in model.write(2000, seed)]) for seed in range(200)]

    def deviations(texts) -> float:
        excess = sum(int(text.sum()) - 10 * len(text) for text in texts)
        return abs(excess) / np.sqrt(90 * sum(map(len, texts)))

    by_completion = [np.sort(text)[: np.searchsorted(np.cumsum(np.sort(text)), 1900)] for text in lengths]
    assert deviations(lengths) < 4 < deviations(by_completion)


@pytest.mark.parametrize("knobs", [{}, {"temperature": 0.8, "top_k": 30}])
def test_writing_is_deterministic_and_fills_the_count(knobs):
    model = fitted(witten_bell)
    first, again, other = (model.write(3000, seed, max_length=12, **knobs) for seed in (1, 1, 2))
    assert all(map(np.array_equal, first, again))
    assert [d.tolist() for d in first] != [d.tolist() for d in other]
    lengths = [len(document) + 1 for document in first]
    assert sum(lengths) >= 3000 > sum(lengths[:-1])
    assert max(lengths) == 13
    assert all(document.dtype == np.int32 and (document >= 3).all() for document in first)


def test_greedy_writing_takes_the_most_likely_token():
    model = fitted(kneser_ney)
    document = model.write(1, 0, top_k=1, max_length=5)[0]
    assert len(document)
    for n, token in enumerate(document):
        assert token == row(model, document[:n].tolist()).argmax()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=12).filter(lambda p: sum(p) > 0.1),
    st.floats(0.2, 3),
    st.integers(0, 12),
    st.floats(0.05, 1),
)
def test_filters_keep_the_most_likely(p, temperature, top_k, top_p):
    p = np.array(p) / sum(p)
    kept = filtered(p[None], temperature, top_k, top_p)[0]
    assert kept.sum() == pytest.approx(1, abs=1e-12)
    alive = kept > 0
    if top_k:
        assert alive.sum() <= top_k
    sharpened = (p / p.max()) ** (1 / temperature)
    assert sharpened[alive].min() >= sharpened[~alive].max(initial=0)
    np.testing.assert_allclose(kept[alive], sharpened[alive] / sharpened[alive].sum(), rtol=1e-9)


def test_bad_knobs_are_named():
    model = fitted(mle)
    for knobs, message in (
        ({"temperature": -0.5}, "temperature -0.5"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"max_length": 0}, "max_length 0"),
    ):
        with pytest.raises(UserError, match=message):
            model.write(10, 0, **knobs)
    with pytest.raises(UserError, match="0 tokens"):
        model.write(0, 0)


def test_fitting_and_writing_are_fast_on_one_core():
    """Process time, so that other work on the machine does not count; the best of some runs, for the same reason."""
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, 9001)
    words = (3 + rng.choice(9000, 100_000, p=p / p.sum())).astype(np.int32)
    documents = np.split(words, np.arange(25, 100_000, 25))

    def seconds(work) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    model = NGramModel.fit(NGram(3, witten_bell), documents, 9003)
    assert min(seconds(lambda: NGramModel.fit(NGram(3, witten_bell), documents, 9003)) for _ in range(5)) < 0.05
    assert min(seconds(lambda: model.write(100_000, 1)) for _ in range(5)) < 100_000 / 400_000


def test_a_continuation_depends_on_prompt_seed_and_its_own_number_alone():
    model = fitted(witten_bell)
    prompts = [np.array([5, 6], np.int32), np.array([7], np.int32)]
    many = model.sample(prompts, 3, samples=4, length=20)
    few = model.sample(prompts[:1], 3, samples=2, length=20)
    other = model.sample(prompts, 4, samples=4, length=20)
    for j in range(2):
        np.testing.assert_array_equal(few[0][j], many[0][j])
    assert len({tuple(text) for row in many for text in row}) > 4
    assert [text.tolist() for text in other[0]] != [text.tolist() for text in many[0]]


@pytest.mark.parametrize("smooth", [witten_bell, kneser_ney])
def test_the_first_token_of_a_continuation_follows_the_row_after_its_prompt(smooth):
    model = fitted(smooth, scale=0.5)
    prompt = np.array([5, 6], np.int32)
    texts = model.sample([prompt], 1, samples=4000, length=1)[0]
    draws = np.array([text[0] if len(text) else EOS for text in texts])
    assert chi_square_p(draws, row(model, [5, 6])) > 1e-4
    assert chi_square_p(draws, row(model, [9, 9])) < 1e-4
