"""The whole game: thresholds hold on other users, extractors get what is counted, honest users pay what is told."""

from dataclasses import replace

import numpy as np
import pytest
from decoder_variants import LLAMA, spread_params

from epigone.arena.detectors import Query
from epigone.arena.policies import POLICIES, Best, Hidden, Noisy, Policy, Rounded, Tempered
from epigone.arena.traffic import DAY, Extractor, by_account, extraction
from epigone.arena.watch import ANY, TOGETHER, Guard, Watch, _honest, delays, utility, watch
from epigone.errors import UserError
from epigone.sampling.decode import DecoderLanguageModel
from epigone.sampling.watermark import GreenList

V = 200
RANDOM = np.random.default_rng(0)
CORPUS = [(4 + (RANDOM.zipf(1.3, 30) + 7 * topic) % (V - 4)).astype(np.int32) for topic in range(60) for _ in range(20)]
FRAMES = [np.array([5, 6, 7 + n], np.int32) for n in range(3)]
PLAIN, FRAMED = Extractor(400), Extractor(400, framed=1.0)
CONFIG = Watch(
    "teacher@0", None, {"plain": PLAIN, "framed": FRAMED, "hard": PLAIN}, ("hard",), users=60, days=4, window=20,
    rate=0.12, runs=2, limit=5
)  # fmt: skip


@pytest.fixture(scope="module")
def parts():
    return [_honest(CONFIG, CORPUS, FRAMES, part) for part in range(3)]


@pytest.fixture(scope="module")
def guard(parts):
    return Guard(CONFIG, *parts[:2])


@pytest.fixture(scope="module")
def found():
    return watch(CONFIG, CORPUS, FRAMES, V)


def test_the_three_parts_are_of_other_users(parts):
    users = [set(by_account(part)) for part in parts]
    assert all(len(one) > 15 for one in users)
    assert not users[0] & users[1]
    assert not users[1] & users[2]


def test_false_alarms_of_other_users_are_near_the_rate_that_was_asked_for(found):
    for name, one in found["detectors"].items():
        assert one["windows"] > 60, name
        assert one["low"] < CONFIG.rate < one["high"] or one["threshold"] == np.inf
        # Windows of one user are alike, so the shares spread more than the interval of independent ones says.
        assert one["false"] <= 3 * CONFIG.rate, name
        assert one["false_low"] <= one["false"] <= one["false_high"]


def test_one_who_asks_like_a_clock_for_all_there_is_is_refused_after_a_window(guard, parts):
    log = extraction(FRAMED, CORPUS, FRAMES, 3)
    got = {name: sum(accounts.values()) for name, accounts in guard.answered(guard.look(log, parts[2])).items()}
    assert got["regularity"] == got[ANY] == CONFIG.window
    assert got["repetition"] == CONFIG.window
    assert got[TOGETHER] == 400  # it is alone
    # 1,800 queries an hour: as many are answered as the busiest hour of honest users has.
    assert got["volume"] == guard.alone["volume"].value < 400
    assert set(got) == {*guard.scores, "volume", TOGETHER, ANY}


def test_an_honest_user_is_refused_at_the_first_false_alarm_and_not_before(guard, parts):
    seen = guard.look(parts[2])
    answered, refused = guard.answered(seen), 0
    for name in guard.scores:
        for account, queries in seen.accounts.items():
            n = answered[name][account]
            alarms = [value > guard.alone[name].value for value in seen.windows[account][name]]
            if n < len(queries):
                refused += 1
                assert alarms.index(True) == n // CONFIG.window - 1
            else:
                assert not any(alarms[:-1])
    assert 0 < refused < len(guard.scores) * len(seen.accounts)


def test_accounts_that_act_together_are_refused_when_the_day_is_over(guard, parts):
    today = extraction(Extractor(800, every=60.0, accounts=20, framed=1.0), CORPUS, FRAMES, 5)
    tomorrow = [query._replace(time=query.time + DAY) for query in today]
    got = guard.answered(guard.look([*today, *tomorrow], parts[2]))[TOGETHER]
    assert got == {account: len(queries) for account, queries in by_account(today).items()}


def test_all_is_told_of_each_extractor(found):
    assert set(found["extractors"]) == {"plain", "framed", "hard"}
    for one in found["extractors"].values():
        assert one["wanted"] == one["asked"] == 400
        assert all(len(runs) == 2 and max(runs) <= 400 for runs in one["got"].values())
        assert one["days"] == pytest.approx(400 * 2 / 86_400, rel=0.2) or one["days"] == 400 / CONFIG.limit / 1440
        assert min(one["got"][ANY]) <= min(one["got"]["regularity"])
    assert found["honest"]["refused"][ANY] < 0.8
    assert 0 < found["honest"]["delayed"] < 0.5


def longest(window):
    return max(len(query.prompt) for query in window)


def test_the_same_seed_makes_the_same_game_and_a_detector_of_ones_own_is_in_it():
    few = replace(CONFIG, users=24, days=3, runs=1, rate=0.4, extractors={"hard": Extractor(60)})
    few = replace(few, more={"longest": longest})
    found = watch(few, CORPUS, FRAMES, V)
    assert found == watch(few, CORPUS, FRAMES, V)
    assert "longest" in found["detectors"]
    assert "longest" in found["extractors"]["hard"]["got"]


def test_who_asks_faster_than_the_limit_waits():
    log = [Query(float(time), "a", FRAMES[0]) for time in range(4)] + [Query(0.0, "b", FRAMES[0])]
    # The first two at once; the third when a minute is over since the first, the fourth since the second.
    assert delays(sorted(log), 2) == (2 / 5, 58.0)
    assert delays(sorted(log), 4) == (0.0, 0.0)


def test_what_a_policy_leaves_honest_users():
    model = DecoderLanguageModel(LLAMA, spread_params(LLAMA), slots=16)
    texts = [np.random.default_rng(n).integers(8, LLAMA.vocab_size, 10).astype(np.int32) for n in range(60)]
    prompts = [text[:2] for text in texts]
    boxes = {
        "all": Policy(), "none": Policy(scores=(Hidden(),)), "best": Policy(scores=(Best(3),)),
        "rounded": Policy(scores=(Rounded(0),)), "noisy": Policy(scores=(Noisy(3, 0.5),)),
        "flat": Policy((Tempered(3.0),)), "marked": Policy((GreenList(5, gamma=0.1, delta=9.0),)),
    }  # fmt: skip
    left = {name: utility(model, box, texts, prompts, 0) for name, box in boxes.items()}
    assert left["all"]["shown"] == 1
    assert left["all"]["error"] < 1e-5
    assert left["none"] == {name: left["all"][name] for name in ("text_nats", "distinct_2")} | {"shown": 0.0}
    assert 0 < left["best"]["shown"] < 0.7
    assert left["rounded"]["error"] == pytest.approx(0.25, abs=0.02)  # a uniform error of half a nat at most
    assert left["noisy"]["error"] == pytest.approx(0.5 * np.sqrt(2 / np.pi), abs=0.03)
    assert left["flat"]["text_nats"] > left["all"]["text_nats"] + 0.1
    assert left["marked"]["text_nats"] > left["all"]["text_nats"] + 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"days": 0.0}, "days=0.0 is above 0"),
        ({"rate": 1.0}, "rate=1.0 between 0 and 1"),
        ({"hard": ("slow",)}, r"hard names \['slow'\]"),
        ({"users": 2}, "users=2 must be at least 3"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Watch(**({"teacher": "t@0", "text": None, "extractors": {"plain": PLAIN}, "boxes": POLICIES} | changes))


def test_with_too_few_honest_windows_for_a_rate_there_is_no_alarm():
    few = replace(CONFIG, users=24, days=2.0, rate=1e-4, runs=1)
    found = watch(few, CORPUS, FRAMES, V)
    assert {one["threshold"] for one in found["detectors"].values()} == {np.inf}
    assert set(found["honest"]["refused"].values()) == {0.0}
    assert found["extractors"]["plain"]["got"][ANY] == [400]


def test_what_hides_an_extractor_is_no_part_of_what_it_gets():
    few = replace(CONFIG, users=24, days=2.0, rate=1e-4, runs=1, hard=())
    two = {"hidden": Extractor(400, mixed=0.75), "many": Extractor(400, every=60.0, accounts=40, jitter=0.0)}
    found = watch(replace(few, extractors=two), CORPUS, FRAMES, V)["extractors"]
    assert (found["hidden"]["wanted"], found["hidden"]["asked"]) == (400, 1_600)
    assert found["hidden"]["got"][ANY] == [400]
    assert found["many"]["days"] == pytest.approx(9 * 60 / 86_400, abs=60 / 86_400)  # ten queries of each, by the clock
    assert found["many"]["caught"]["coverage"] is None  # no account asks for a window
    assert found["many"]["caught"]["volume"][0] == 0  # of a day of each account
    assert found["many"]["caught"][TOGETHER][0] == 0
