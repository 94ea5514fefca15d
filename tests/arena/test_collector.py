"""Very many prompts: each is asked once, nothing is lost, limits are kept, and what may be spent is not exceeded."""

import asyncio
import dataclasses
import sqlite3
import time
from collections import Counter

import httpx
import numpy as np
import pytest
from stub_endpoints import Stub, refusal

from epigone.arena import endpoint as endpoints
from epigone.arena.collector import Budget, Collection, Share, collect, estimate, publish
from epigone.arena.endpoint import Asking, Endpoint
from epigone.arena.journal import Journal, Kept, Totals
from epigone.data.corpora import Collected
from epigone.data.datasets import read_text
from epigone.errors import Busy, Fault, UserError


def given(count):
    """A strategy."""
    return lambda data_dir: (f"prompt {number}" for number in range(count))


def collection(count=50, budget=Budget(), asking=Asking(), **how):
    where = {"url": "http://stub/v1", "model": "m", "at_once": 8} | how
    return Collection("mine", Endpoint(**where), given(count), asking, budget)


def run(folder, wanted, stub, share=Share(), on_progress=lambda progress: None):
    with Journal(share.journal(folder), wanted.settings) as journal:
        return asyncio.run(collect(wanted, journal, wanted.prompts(folder), share, on_progress, stub))


def kept(folder, wanted, share=Share()):
    with Journal(share.journal(folder), wanted.settings) as journal:
        return {one.prompt: one for one in journal}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(endpoints, "FIRST_WAIT", 0.01)


@pytest.mark.parametrize("together", [1, 7])
def test_every_prompt_is_asked_once_and_kept(tmp_path, together):
    stub, wanted = Stub(0.002), collection(100, together=together, asking=Asking(n=2))
    done = run(tmp_path, wanted, stub)
    prompts = [prompt for group in stub.asked for prompt in group]
    assert sorted(prompts) == sorted(wanted.prompts(None))
    assert stub.most == min(8, -(-100 // together))
    found = kept(tmp_path, wanted)
    assert {prompt: [answer["text"] for answer in one.answers] for prompt, one in found.items()} == {
        prompt: [prompt[::-1]] * 2 for prompt in prompts
    }
    letters = sum(map(len, prompts))
    assert (done.asked, done.now, done.tokens, done.held) == (100, 100, 3 * letters, (0, 0.0))
    again = Stub()
    assert run(tmp_path, wanted, again).now == 0
    assert not again.asked
    assert all(header["User-Agent"].startswith("epigone/") for header in stub.headers)


def test_a_collection_that_is_interrupted_goes_on_and_asks_nothing_twice_that_was_kept(tmp_path):
    first, wanted, seen = Stub(0.005), collection(60), []

    def stop(progress):
        seen.append(progress.asked)
        if progress.asked >= 20:
            raise RuntimeError("the power is gone")

    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path, wanted, first, on_progress=stop)
    before = kept(tmp_path, wanted)
    assert len(before) >= max(seen)
    second = Stub()
    done = run(tmp_path, wanted, second)
    asked = [prompt for group in second.asked for prompt in group]
    assert sorted([*before, *asked]) == sorted(wanted.prompts(None))
    assert done.asked == 60
    assert done.now == len(asked)


def test_an_answer_counts_when_it_is_on_the_disk(tmp_path, monkeypatch):
    wanted, path = collection(30), Share().journal(tmp_path)

    def check(progress):
        with sqlite3.connect(path) as other:  # as another program sees it
            assert other.execute("SELECT count(*) FROM answers").fetchone()[0] >= progress.asked

    run(tmp_path, wanted, Stub(0.002), on_progress=check)
    monkeypatch.setattr(Journal, "write", lambda self, kept: (_ for _ in ()).throw(Fault("the disk is full")))
    with pytest.raises(Fault, match="disk is full"):
        run(tmp_path, collection(40), Stub())


@pytest.mark.parametrize("wrong", [
    refusal(429, "slow down"), refusal(500), refusal(503), refusal(408), httpx.Response(200, text="<html>"),
    httpx.Response(200, json={"choices": []}), httpx.Response(200, json={"choices": [{"text": None}]}),
    httpx.ConnectError("nobody is there"), httpx.ReadTimeout("too slow"),
])  # fmt: skip
def test_what_may_be_better_later_is_tried_again(tmp_path, wrong):
    def script(number, body):
        return wrong if number % 3 == 0 else None

    stub, wanted = Stub(script=script), collection(30, at_once=4)
    done = run(tmp_path, wanted, stub)
    assert done.asked == 30
    assert done.refused == 0
    assert done.waits == len(stub.asked) - 30 > 5


def test_what_never_gets_better_stops_the_collection_and_keeps_what_there_is(tmp_path):
    stub, wanted = (
        Stub(script=lambda number, _: refusal(500, "on fire") if number >= 10 else None),
        collection(tries=3, at_once=1),
    )
    with pytest.raises(Fault, match=r"3 tries: HTTP 500: on fire"):
        run(tmp_path, wanted, stub)
    assert len(kept(tmp_path, wanted)) == 10
    for status in (401, 403, 404):
        with pytest.raises(UserError, match=f"HTTP {status}: not you"):
            run(tmp_path, wanted, Stub(script=lambda *_, status=status: refusal(status, "not you")))
    assert run(tmp_path, wanted, Stub()).asked == 50


def test_the_time_that_an_endpoint_states_is_kept_by_all(tmp_path):
    times = []

    def script(number, body):
        times.append(time.monotonic())
        return refusal(429, **{"Retry-After": "1"}) if number == 5 else None

    done = run(tmp_path, collection(60, at_once=4), Stub(0.01, script))
    assert done.asked == 60
    told = times[5]
    after = [at - told for at in times[6:]]
    assert sum(at < 0.95 for at in after) <= 3  # those under way when it was told
    assert min(at for at in after if at > 0.5) >= 0.95


def test_fewer_are_asked_at_once_where_there_are_too_many(tmp_path):
    stub = Stub(0.01)
    stub.script = lambda number, body: refusal(429) if stub.under_way > 3 else None
    allowed = []
    done = run(tmp_path, collection(200, at_once=16, tries=100), stub, on_progress=lambda p: allowed.append(p.allowed))
    assert done.asked == 200
    assert np.median(allowed[50:]) <= 5
    assert done.waits < 200


def test_who_must_wait_for_longer_than_its_patience_stops(tmp_path):
    stub = Stub(
        script=lambda number, _: refusal(429, "your day is over", **{"Retry-After": "40000"}) if number > 4 else None
    )
    with pytest.raises(Fault, match=r"come back in 40,000 s .*your day is over"):
        run(tmp_path, collection(at_once=1), stub)
    assert len(stub.asked) == 6


def test_a_prompt_that_is_refused_is_not_asked_again_and_harms_no_other(tmp_path):
    def script(number, body):
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        return refusal(400, "too long") if "prompt 7" in prompts else None

    wanted = collection(20, together=5)
    done = run(tmp_path, wanted, Stub(script=script))
    assert (done.asked, done.refused) == (20, 1)
    assert kept(tmp_path, wanted)["prompt 7"].refused == "HTTP 400: too long"
    again = Stub()
    assert run(tmp_path, wanted, again).now == 0


def test_where_all_is_refused_the_question_is_wrong_and_nothing_is_noted(tmp_path):
    wanted, calls = collection(60), Stub(script=lambda *_: refusal(400, "unknown field"))
    with pytest.raises(UserError, match=r"all refused \(HTTP 400: unknown field\)"):
        run(tmp_path, wanted, calls)
    assert not kept(tmp_path, wanted)
    assert run(tmp_path, wanted, Stub()).refused == 0
    few = collection(3)
    assert run(tmp_path / "few", few, calls).refused == 3  # a few may be wrong
    assert run(tmp_path / "few", few, Stub()).now == 0
    for status in (301, 405, 415):
        with pytest.raises(UserError, match=f"refuses us: HTTP {status}"):
            run(tmp_path / "other", wanted, Stub(script=lambda *_, status=status: refusal(status)))


def test_an_endpoint_that_counts_nothing_is_counted_at_its_most(tmp_path):
    def script(number, body):
        return httpx.Response(200, json={"choices": [{"text": "x", "index": n} for n in range(2)]})

    wanted = collection(50, Budget(tokens=500), Asking(n=2, max_tokens=12))
    done = run(tmp_path, wanted, Stub(script=script))
    assert 400 < done.tokens <= 500
    assert done.tokens == sum(len(prompt) + 2 + 24 for prompt in kept(tmp_path, wanted))


def test_answers_go_to_their_prompts_or_to_none(tmp_path):
    def script(number, body):  # numbers each prompt's answers from 0
        choices = [{"text": prompt, "index": n} for prompt in body["prompt"] for n in range(2)]
        return httpx.Response(200, json={"choices": choices})

    wanted = collection(8, together=2, asking=Asking(n=2), tries=2)
    with pytest.raises(Fault, match="not numbered from 0"):
        run(tmp_path, wanted, Stub(script=script))
    assert not kept(tmp_path, wanted)


def test_an_answer_without_text_is_an_answer(tmp_path):
    def script(number, body):
        message = {"role": "assistant", "content": None}
        return httpx.Response(200, json={"choices": [{"message": message, "finish_reason": "content_filter"}]})

    wanted = collection(3, chat=True)
    assert run(tmp_path, wanted, Stub(script=script)).asked == 3
    assert {one.answers[0]["text"] for one in kept(tmp_path, wanted).values()} == {""}


def test_what_is_answered_alone_after_a_group_was_refused_is_kept_at_once(tmp_path):
    def script(number, body):
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        return refusal(400) if "prompt 1" in prompts else refusal(500) if prompts == ["prompt 4"] else None

    wanted = collection(5, together=5, at_once=1, tries=2)
    with pytest.raises(Fault, match="HTTP 500"):
        run(tmp_path, wanted, Stub(script=script))
    assert set(kept(tmp_path, wanted)) == {f"prompt {n}" for n in range(4)}


def test_what_is_paid_and_never_read_counts_against_the_budget(tmp_path):
    asking = Asking(max_tokens=40)
    stub = Stub(script=lambda number, _: httpx.ReadTimeout("gone") if number % 2 else None)
    done = run(tmp_path, collection(100, Budget(tokens=1000), asking, at_once=1), stub)
    assert len(stub.asked) * 50 > 800
    assert done.tokens < 500


def test_one_program_at_a_time_has_a_journal(tmp_path):
    wanted = collection(3)
    run(tmp_path, wanted, Stub())
    with Journal(Share().journal(tmp_path), wanted.settings, alone=True):
        with pytest.raises(Busy, match="another program"):
            Journal(Share().journal(tmp_path), wanted.settings, alone=True)
        with pytest.raises(Busy):
            publish(wanted, tmp_path)
    publish(wanted, tmp_path)


def test_a_data_set_stays_as_it_is_until_the_next_is_whole(tmp_path, monkeypatch):
    wanted = collection(3)
    run(tmp_path, wanted, Stub())
    publish(wanted, tmp_path)
    before = list(read_text(tmp_path / "answers"))
    more = collection(5)
    run(tmp_path, more, Stub())
    with monkeypatch.context() as broken:
        full = "epigone.arena.collector.write_text", lambda *_: (_ for _ in ()).throw(Fault("the disk is full"))
        broken.setattr(*full)
        with pytest.raises(Fault):
            publish(more, tmp_path)
    assert list(read_text(tmp_path / "answers")) == before
    publish(more, tmp_path)
    assert len(read_text(tmp_path / "answers")) == 5
    assert not list(tmp_path.glob(".answers*"))


def test_a_prompt_that_comes_again_is_asked_once(tmp_path):
    wanted, stub = dataclasses.replace(collection(), prompts=lambda _: iter(["a", "b", "a", "\ud83d", "a"])), Stub()
    assert run(tmp_path, wanted, stub).now == 3
    assert sorted(prompt for group in stub.asked for prompt in group) == ["?", "a", "b"]


@pytest.mark.parametrize("seconds", [0.0, 0.005])
def test_no_budget_is_exceeded_whatever_is_under_way(tmp_path, seconds):
    asking, price = Asking(n=2, max_tokens=12), {"read_price": 1000.0, "write_price": 2000.0}
    for limit, spent in (
        (Budget(questions=17), lambda done: done.asked == 17),
        (Budget(tokens=900), lambda done: 900 - 60 < done.tokens <= 900),
        (Budget(money=2.0), lambda done: 1.9 < done.money <= 2.0),
    ):
        wanted = collection(200, limit, asking, at_once=5, **price)
        folder = tmp_path / str(limit)
        done = run(folder, wanted, Stub(seconds))
        assert done.stopped.startswith("the budget of")
        assert spent(done), done
        totals = Totals(
            done.asked, 0, 2 * done.asked, *np.sum([one[3:] for one in kept(folder, wanted).values()], axis=0)
        )
        with Journal(Share().journal(folder), wanted.settings) as journal:
            assert journal.totals == totals
        more = Stub()
        assert run(folder, wanted, more).now == 0  # what was spent before counts
        assert not more.asked


def test_shares_ask_all_prompts_once_and_are_merged(tmp_path):
    wanted, stubs = collection(300), [Stub() for _ in range(3)]
    for number, stub in enumerate(stubs):
        run(tmp_path, wanted, stub, Share(number, 3))
    asked = [prompt for stub in stubs for group in stub.asked for prompt in group]
    assert sorted(asked) == sorted(wanted.prompts(None))
    assert all(60 < len(stub.asked) < 140 for stub in stubs)
    run(tmp_path, wanted, Stub())  # all of it again, in a journal of its own
    card = publish(wanted, tmp_path)
    assert card["collected"]["questions"] == card["collected"]["answers"] == 300
    documents = list(read_text(tmp_path / "answers"))
    assert Counter(documents) == Counter(prompt + prompt[::-1] for prompt in wanted.prompts(None))


def test_a_data_set_says_where_it_is_from_and_is_the_same_whoever_came_first(tmp_path):
    asking = Asking(scores=1)
    for folder, seconds in ((tmp_path / "a", 0.0), (tmp_path / "b", 0.01)):
        wanted = collection(40, asking=asking)
        run(folder, wanted, Stub(seconds))
        publish(wanted, folder)
    one, other = (Collected(str(tmp_path / name)).prepare(tmp_path)["train"] for name in "ab")
    assert list(one) == list(other)
    assert one.card["answers_sha256"] == other.card["answers_sha256"]
    assert one.card["source"] == "m at http://stub/v1"
    assert one.card["settings"]["scores"] == 1
    run(tmp_path / "a", collection(60, asking=asking), Stub())
    publish(collection(60, asking=asking), tmp_path / "a")
    assert len(Collected(str(tmp_path / "a")).prepare(tmp_path)["train"]) == 60
    with pytest.raises(UserError, match="no answers"):
        Collected(str(tmp_path / "c")).prepare(tmp_path)
    with pytest.raises(UserError, match="no answers"):
        publish(wanted, tmp_path / "c")


@pytest.mark.parametrize(("chat", "shape"), [(False, "legacy"), (False, "chat"), (True, "chat")])
def test_scores_of_either_shape_are_kept(tmp_path, chat, shape):
    wanted = collection(3, asking=Asking(scores=2), chat=chat)
    run(tmp_path, wanted, Stub(shape=shape))
    best = [["x", -1.0]] if shape == "chat" else [["0", -0.5], ["x", -1.0]]
    assert kept(tmp_path, wanted)["prompt 0"].answers[0]["scores"][0] == ["0", -0.5, best]
    publish(wanted, tmp_path)
    wanted_text = "0 tpmorp" if chat else "prompt 00 tpmorp"
    assert wanted_text in set(read_text(tmp_path / "answers"))


def test_a_folder_of_other_settings_and_a_file_of_another_kind_are_left_alone(tmp_path):
    wanted = collection(5)
    run(tmp_path, wanted, Stub())
    with pytest.raises(UserError, match="another max_tokens"):
        run(tmp_path, dataclasses.replace(wanted, asking=Asking(max_tokens=9)), Stub())
    run(tmp_path, dataclasses.replace(wanted, endpoint=dataclasses.replace(wanted.endpoint, at_once=2)), Stub())
    path = tmp_path / "other.sqlite"
    for content in (b"no database, but long enough to be taken for one" * 50, None):
        if content is None:
            path.unlink()
            with sqlite3.connect(path) as base:
                base.execute("CREATE TABLE mine (x)")
        else:
            path.write_bytes(content)
        before = path.read_bytes()
        with pytest.raises(Fault, match=r"other\.sqlite"):
            Journal(path, {})
        assert path.read_bytes() == before


def test_what_a_collection_may_cost_at_most_is_known_before(tmp_path):
    wanted = collection(10, asking=Asking(n=3, max_tokens=20), read_price=1e6, write_price=1e6)
    found = estimate(wanted, wanted.prompts(None))
    assert (found.prompts, found.is_all) == (10, True)
    assert found.tokens == found.money == sum(len(prompt) + 2 + 60 for prompt in wanted.prompts(None))
    assert estimate(wanted, wanted.prompts(None), look_at=4)[0::3] == (4, False)
    assert run(tmp_path, wanted, Stub()).tokens <= found.tokens


def test_the_key_is_sent_and_kept_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "a-secret-of-mine")
    wanted, stub = collection(5, key="MY_KEY"), Stub()
    run(tmp_path, wanted, stub)
    publish(wanted, tmp_path)
    assert {header["Authorization"] for header in stub.headers} == {"Bearer a-secret-of-mine"}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"a-secret-of-mine" in path.read_bytes()]


@pytest.mark.parametrize("wrong", [
    lambda: Endpoint("http://me:secret@host/v1", "m"), lambda: Endpoint("http://host/v1?key=1", "m"),
    lambda: Endpoint("localhost:8000", "m"), lambda: Endpoint("http://x", "m", at_once=0),
    lambda: Endpoint("http://x", "m", chat=True, together=2), lambda: Asking(n=0), lambda: Asking(temperature=-1),
    lambda: Budget(tokens=0), lambda: Budget(money=0.0), lambda: Collection("../x", None, None),
])  # fmt: skip
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(UserError):
        wrong()


def test_the_first_answer_stays(tmp_path):
    with Journal(tmp_path / "j.sqlite", {}) as journal:
        journal.write([Kept("a", [{"text": "1"}], None, 1, 1)])
        journal.write([Kept("a", [{"text": "2"}], None, 1, 1), Kept("b", [], "no", 0, 0)])
        assert [one.answers for one in journal if one.prompt == "a"] == [[{"text": "1"}]]
        assert journal.totals == Totals(2, 1, 1, 1, 1)
        assert journal.missing(["a", "b", "c"]) == ["c"]
