"""Made-up traffic is what its kind says, and detectors calibrated on honest windows keep their rate on new ones."""

import numpy as np
import pytest

from epigone.arena import detectors, traffic
from epigone.arena.detectors import calibrated, detected
from epigone.arena.traffic import DAY, KINDS, Extractor, Honest, by_account, daily, extraction, honest, windows
from epigone.errors import UserError

RANDOM = np.random.default_rng(0)
WORDS = 2_000


def made_corpus():
    """4,000 documents in 100 topics of neighbours, each half of words of its own, half of Zipf's."""
    p = 1 / np.arange(1, WORDS + 1)
    found = []
    for _ in range(100):
        own = RANDOM.integers(10, WORDS, 80)
        for _ in range(40):
            size = RANDOM.integers(15, 40)
            usual, topical = RANDOM.choice(WORDS, size, p=p / p.sum()), RANDOM.choice(own, size)
            found.append(np.where(RANDOM.random(size) < 0.5, usual, topical).astype(np.int32))
    return found


CORPUS = made_corpus()
FRAMES = [RANDOM.integers(10, WORDS, 4).astype(np.int32) for _ in range(30)]


@pytest.fixture(scope="module")
def crowd():
    """400 honest users of all kinds over 5 days."""
    kinds = [*KINDS.values(), KINDS["visitor"]]
    users = [honest(kinds[n % 5], f"h{n}", CORPUS, FRAMES, 5, n) for n in range(400)]
    return [query for log in users for query in log]


def test_honest_users_ask_as_often_as_their_kind_and_about_their_topics():
    kind = Honest(sessions=4, queries=5, gap=10, topics=1, breadth=300, framed=0.5, again=0.2)
    logs = [honest(kind, "a", CORPUS, FRAMES, 30, seed) for seed in range(40)]
    counts = np.array([len(log) for log in logs])
    assert abs(counts.mean() - 4 * 5 * 30) < 4 * counts.std() / np.sqrt(40)
    assert all(np.diff([query.time for query in log]).min() >= 0 for log in logs)
    assert all(query.time >= 0 for log in logs for query in log)
    frames = [max(sum(np.array_equal(q.prompt[:4], f) for q in log) for f in FRAMES) / len(log) for log in logs]
    assert abs(np.mean(frames) - 0.5) < 0.05
    distinct = [len({q.prompt.tobytes() for q in log}) / len(log) for log in logs]
    assert abs(np.mean(distinct) - 0.8) < 0.05
    again = honest(kind, "a", CORPUS, FRAMES, 30, 3)
    assert all(a.time == b.time and np.array_equal(a.prompt, b.prompt) for a, b in zip(again, logs[3], strict=True))


def test_extractors_ask_all_over_the_corpus_from_so_many_accounts():
    plan = Extractor(600, every=10, accounts=6, framed=0.5, mixed=0.25, jitter=0)
    log = extraction(plan, CORPUS, FRAMES, 1)
    accounts = by_account(log)
    assert len(accounts) == 6
    assert {len(queries) for queries in accounts.values()} == {100 + 33}
    gaps = np.diff([query.time for query in accounts["x1-0"]])
    np.testing.assert_allclose(gaps, 10)
    (frame,) = [f for f in FRAMES if sum(np.array_equal(q.prompt[:4], f) for q in log) > 100]
    assert abs(sum(np.array_equal(q.prompt[:4], frame) for q in log) / 600 - 0.5) < 0.1
    plain = extraction(Extractor(300), CORPUS, (), 1)
    assert len({query.prompt.tobytes() for query in plain}) == 300


def test_hard_prompts_are_those_of_which_most_is_expected():
    def length(pieces):
        return np.array([len(piece) for piece in pieces])

    hard = extraction(Extractor(200, hard=length), CORPUS, (), 2)
    plain = extraction(Extractor(200), CORPUS, (), 2)
    assert np.mean([len(q.prompt) for q in hard]) > np.mean([len(q.prompt) for q in plain]) + 5


def test_windows_are_of_one_account_and_overlap_nowhere(crowd):
    found = windows(crowd, 30)
    assert all(len(w) == 30 and len({q.account for q in w}) == 1 for w in found)
    assert sum(map(len, found)) == sum(len(log) // 30 * 30 for log in by_account(crowd).values())
    days = daily(crowd)
    assert sum(map(len, days)) == len(crowd)
    assert all(len({(q.account, q.time // DAY) for q in day}) == 1 for day in days)


def test_calibrated_on_a_thousand_honest_windows_new_ones_are_rarely_flagged(crowd):
    """One per cent is asked for; of 1,000 new windows fewer are flagged than the interval and four errors allow."""
    found = windows(crowd, 20)
    shuffled = [found[i] for i in np.random.default_rng(1).permutation(len(found))]
    reference = [query for w in shuffled[:20] for query in w[:5]]
    seen = detectors.pairs([query for w in shuffled[:300] for query in w])
    old, new = shuffled[300:1_300], shuffled[1_300:2_300]
    assert len(new) == 1_000
    every = {
        "regularity": detectors.regularity,
        "coverage": detectors.coverage,
        "repetition": detectors.repetition,
        "novelty": lambda w: detectors.novelty(w, seen),
        "mmd": lambda w: detectors.mmd(w, reference),
    }
    plain = windows(extraction(Extractor(1_500), CORPUS, FRAMES, 7), 20)
    caught = {}
    for name, detector in every.items():
        threshold = calibrated([detector(w) for w in old], 0.01)
        share, _, _ = detected([detector(w) for w in new], threshold)
        assert share < threshold.high + 4 * np.sqrt(0.01 / 1_000), name
        caught[name] = detected([detector(w) for w in plain], threshold)[0]
    assert caught["regularity"] > 0.8, "who asks every two seconds is no person"
    assert caught["mmd"] < 0.05, "prompts from the corpus that honest users ask about are like theirs"


def test_volume_finds_who_asks_much_and_misses_who_asks_slowly(crowd):
    threshold = calibrated([detectors.volume(day) for day in daily(crowd)], 0.01)
    rates = {}
    for every in (2.0, 600.0):
        days = daily(extraction(Extractor(2_000, every=every, jitter=1.0), CORPUS, FRAMES, 3))
        rates[every] = detected([detectors.volume(day) for day in days], threshold)[0]
    assert rates == {2.0: 1.0, 600.0: 0.0}


def test_accounts_of_one_extractor_are_found_among_honest_ones(crowd):
    log = by_account(extraction(Extractor(3_000, every=300, accounts=30, framed=0.5), CORPUS, FRAMES, 7))
    people = dict(list(by_account(crowd).items())[:60])
    found = detectors.coordination({**people, **log})
    assert np.mean([found[account] >= 20 for account in log]) > 0.9
    assert np.mean([found[account] > 0 for account in people]) < 0.05


def test_a_plan_that_asks_nothing_is_told():
    for plan in (Extractor(0), Extractor(5, accounts=0), Extractor(5, mixed=1.0)):
        with pytest.raises(UserError, match="give 1, 1 and below 1"):
            extraction(plan, CORPUS, (), 0)
    assert traffic.windows([], 3) == []
