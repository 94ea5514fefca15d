import gzip
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy, linregress

from epigone.evaluate import NGramIndex, evaluate_text
from epigone.evaluate import diversity as d

texts = st.lists(st.lists(st.integers(0, 5), max_size=9), min_size=1, max_size=8).map(
    lambda rows: [np.array(row, dtype=np.int32) for row in rows]
)


def grams(documents, n):
    """Brute force: every n-gram inside a document."""
    return [tuple(x[i : i + n].tolist()) for x in documents for i in range(len(x) - n + 1)]


def text(*rows):
    return [np.array(row, dtype=np.int32) for row in rows]


def zipf(tokens, seed, size=2000):
    """Documents from a first-order chain with Zipf-like successors: real text has order, its shuffle has not."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, 31)
    steps = rng.choice(30, tokens, p=p / p.sum())
    ids = np.empty(tokens, dtype=np.int64)
    last = 0
    for i, step in enumerate(steps):
        ids[i] = last = (last * 31 + int(step) ** 2 + 7) % (size - 3)
    return np.split((ids + 3).astype(np.int32), range(20, tokens, 20))


@given(texts, texts)
def test_counts_and_membership_against_dictionaries(real, written):
    index, own = NGramIndex.build(real, 6), NGramIndex.build(written, 6)
    for n in range(1, 5):
        known, mine = Counter(grams(real, n)), Counter(grams(written, n))
        ranks = index.ranks(written, n)
        assert (ranks >= 0).tolist() == [g in known for g in grams(written, n)]
        occurrences = [known[g] for g in grams(written, n) if g in known]
        assert index.counts[n - 1][ranks[ranks >= 0]].tolist() == occurrences
        assert sorted(own.counts[n - 1]) == sorted(mine.values())
        if mine:
            assert d.distinct(own, n) == len(mine) / mine.total()
            assert d.ngram_entropy(own, n) == pytest.approx(entropy(list(mine.values())))
            assert d.seen(written, index, n) == pytest.approx(
                len([g for g in mine.elements() if g in known]) / mine.total()
            )
        else:
            assert np.isnan(d.distinct(own, n))
            assert np.isnan(d.seen(written, index, n))


@given(texts)
def test_repetition_and_self_repetition_against_brute_force(documents):
    def stutters(x):
        return any(
            len(x) >= i + 2 * n and x[i : i + n].tolist() == x[i + n : i + 2 * n].tolist()
            for n in range(1, 5)
            for i in range(len(x))
        )

    assert d.repetition(documents) == np.mean([stutters(x) for x in documents])
    own = [set(grams([x], 4)) for x in documents]
    spread = Counter(g for s in own for g in s)
    assert d.self_repetition(documents) == pytest.approx(
        np.mean([np.log(1 + sum(spread[g] - 1 for g in s)) for s in own])
    )


@given(texts, st.randoms(use_true_random=False))
def test_order_of_documents_does_not_matter(documents, random):
    turned = random.sample(documents, len(documents))
    real = NGramIndex.build(text([0, 1, 2, 3, 4, 5], [5, 4, 3]), 6)
    size = sum(len(x) for x in documents)
    first, second = (evaluate_text(x, real, size) for x in (documents, turned))
    assert first.keys() == second.keys()
    assert all(second[name] == pytest.approx(value) for name, value in first.items())
    shares = [
        v for k, v in first.items() if k.startswith(("distinct", "seen", "novelty")) or k in ("copied", "repetition")
    ]
    assert all(0 <= v <= 1 for v in shares)


def test_hand_computed():
    real = NGramIndex.build(text([3, 4, 5, 6], [7, 3]), 10)
    written = text([3, 4, 5], [5, 6, 7], [7, 3])
    got = evaluate_text(written, real, 8)
    # 2-grams: 34 45 | 56 67 | 73; only 67 is new (in the real text it would cross a border). 3-grams: 345 567.
    assert got["novelty_2"] == pytest.approx(1 / 5)
    assert got["seen_3"] == 0.5
    assert "seen_4" not in got
    assert got["distinct_1"] == 5 / 8
    assert got["vocabulary"] == 5
    assert got["vocabulary_share"] == 1
    assert got["copied"] == pytest.approx(1 / 3)
    assert got["sentence_length"] == pytest.approx(8 / 3)
    assert got["ead"] == pytest.approx(5 / (10 * (1 - 0.9**8)))
    assert got["repetition"] == 0


def test_novelty_of_a_copy_is_nothing_and_of_a_shuffle_is_large():
    real = zipf(40_000, 0)
    index = NGramIndex.build(real, 2000)
    copy = evaluate_text(real[:500], index, 10_000)
    assert copy["novelty_2"] == copy["novelty_3"] == copy["novelty_4"] == 0
    assert copy["copied"] == 1
    fresh = evaluate_text(zipf(10_000, 1), index, 10_000)
    mixed = np.random.default_rng(2).permutation(np.concatenate(real[:500]))
    shuffled = evaluate_text(np.split(mixed, range(20, 10_000, 20)), index, 10_000)
    assert shuffled["distinct_1"] == copy["distinct_1"]
    assert shuffled["copied"] == 0
    assert copy["novelty_2"] < fresh["novelty_2"] < shuffled["novelty_2"]
    assert shuffled["novelty_4"] > fresh["novelty_4"] > 0.1


def test_distinct_falls_with_length_which_a_fixed_count_prevents():
    short, long = zipf(5_000, 0), zipf(20_000, 0)
    real = NGramIndex.build(zipf(1_000, 3), 2000)
    assert d.distinct(NGramIndex.build(long, 2000), 1) < 0.7 * d.distinct(NGramIndex.build(short, 2000), 1)
    assert evaluate_text(long, real, 5_000)["distinct_1"] == evaluate_text(short, real, 5_000)["distinct_1"]


def test_a_text_below_the_fixed_count_lacks_what_would_not_compare():
    real = NGramIndex.build(zipf(1_000, 3), 2000)
    enough, short = (evaluate_text(zipf(900, 1), real, n, decode=str) for n in (900, 901))
    gone = set(enough) - set(short)
    assert {"distinct_1", "distinct_4", "ead", "vocabulary", "gzip_ratio", "self_repetition"} <= gone
    assert {"novelty_2", "seen_4", "copied", "sentence_length", "repetition"} <= set(short)
    assert set(evaluate_text([], real, 10)) == {"sample_tokens"}


def test_the_sample_is_exactly_as_long_as_asked():
    documents = text([1, 2, 3], [], [4, 5, 6], [7])
    assert [x.tolist() for x in d.first_tokens(documents, 5)] == [[1, 2, 3], [4, 5]]
    assert [len(x) for x in d.first_tokens(documents, 3)] == [3]
    assert sum(len(x) for x in d.first_tokens(documents, 99)) == 7


def test_uniform_text_has_an_ead_of_one_and_a_narrow_one_less():
    rng = np.random.default_rng(0)
    for total in (500, 5_000):
        seen = np.mean([len(np.unique(rng.integers(0, 800, total))) for _ in range(50)])
        assert d.expectation_adjusted_distinct(seen, total, 800) == pytest.approx(1, abs=0.01)
    assert d.expectation_adjusted_distinct(400, 5_000, 800) == pytest.approx(0.5, abs=0.01)
    assert d.expectation_adjusted_distinct(1, 9, 1) == 1


def test_zipf_slope_against_scipy():
    counts = np.round(3000 / np.arange(1, 200) ** 1.1).astype(int)
    index = NGramIndex.build([np.repeat(np.arange(199), counts)], 199, order=1)
    kept = counts[counts >= 5]
    assert d.zipf_slope(index) == pytest.approx(linregress(np.log(np.arange(len(kept)) + 1), np.log(kept)).slope)
    assert d.zipf_slope(index) == pytest.approx(-1.1, abs=0.02)
    assert np.isnan(d.zipf_slope(NGramIndex.build(text([1, 1, 1, 1, 1, 2]), 5)))


def test_gzip_compresses_once():
    words = "the same again " * 300
    assert d.gzip_ratio(words) == len(words) / len(gzip.compress(words.encode(), mtime=0))
    twice = len(words) / len(gzip.compress(gzip.compress(words.encode())))
    assert d.gzip_ratio(words) != twice
    noise = bytes(np.random.default_rng(0).integers(97, 123, 4500).astype(np.uint8)).decode()
    assert d.gzip_ratio(noise) < 2 < d.gzip_ratio(words)


def test_the_judge_scores_the_text(bigram):
    model, stranger = bigram.drawn(30, 0), bigram.drawn(30, 1)
    written = model.write(3000, 2, max_length=8)
    real = NGramIndex.build(model.write(3000, 3), 30)
    own, foreign, cut = (
        evaluate_text(written, real, 500, judge=judge, cut_at=cut_at)["real_perplexity"]
        for judge, cut_at in ((model, None), (stranger, None), (model, 8))
    )
    # The ends of documents that were cut are no events of the model: scoring them overstates its perplexity.
    assert cut < own < foreign
    assert "real_perplexity" not in evaluate_text(written, real, 500)


def test_a_hundred_thousand_tokens_take_well_under_a_second():
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, 6001)
    real, written = (np.split(rng.choice(6000, 100_000, p=p / p.sum()), range(25, 100_000, 25)) for _ in range(2))
    index = NGramIndex.build(real, 6000)
    start = time.process_time()
    evaluate_text(written, index, 100_000)
    assert time.process_time() - start < 1
