"""An engine that many ask at once: what each is told, who waits, who is late, who leaves, and what breaks."""

import contextlib
import logging
import threading
import time
from collections import defaultdict

import jax
import numpy as np
import pytest
from decoder_variants import LLAMA, spread_params

from epigone.arena.engine import Ask, Engine, Full, Told, Why
from epigone.arena.policies import Best, Hidden, Policy, Showing, shown_scores
from epigone.errors import UserError
from epigone.sampling.decode import sample
from epigone.sampling.loop import Knobs

PARAMS = spread_params(LLAMA)
PROMPTS = [np.random.default_rng(n).integers(8, LLAMA.vocab_size, n).astype(np.int32) for n in (5, 0, 3)]


def engine(policy=Policy(), best=2, slots=4, waiting=64):
    return Engine(LLAMA, PARAMS, policy, best=best, slots=slots, waiting=waiting)


@contextlib.contextmanager
def compilations():
    """What is compiled, in any thread."""
    said, logger = [], logging.getLogger("jax")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage()) if "Compiling" in record.getMessage() else None
    logger.addHandler(handler)
    jax.config.update("jax_log_compiles", True)
    try:
        yield said
    finally:
        jax.config.update("jax_log_compiles", False)
        logger.removeHandler(handler)


class Hearing:
    """Collects what is told; `wait` until so many texts have ended."""

    def __init__(self):
        self.told = defaultdict(list)
        self.ends = threading.Semaphore(0)

    def __call__(self, number, told: Told):
        self.told[number].append(told)
        if told.why is not None:
            self.ends.release()

    def wait(self, count):
        for _ in range(count):
            assert self.ends.acquire(timeout=120)

    def tokens(self, number):
        return np.concatenate([told.tokens for told in self.told[number]])

    def why(self, number):
        return self.told[number][-1].why


def ask(prompt=PROMPTS[0], length=9, seed=0, sample=0, **knobs):
    return Ask(prompt, length, seed, sample, Knobs(**knobs))


def test_many_who_ask_at_once_are_told_what_each_would_be_told_alone():
    knobs = [{}, {"temperature": 0.0}, {"temperature": 0.5, "top_k": 5}, {"top_p": 0.7}]
    asks = [ask(PROMPTS[n % 3], 3 + n % 8, n, n % 2, **knobs[n % 4]) for n in range(24)]
    hearing = Hearing()
    with engine() as running:
        starts = [
            threading.Thread(target=lambda n=n: running.ask([asks[n]], lambda _, told, n=n: hearing(n, told), 300))
            for n in range(24)
        ]
        for start in starts:
            start.start()
        hearing.wait(24)
        assert running.load == (0, 0)
    for number, asked in enumerate(asks):
        given = {"samples": 2, "length": asked.length, "slots": 2} | asked.knobs._asdict()
        alone = sample(LLAMA, PARAMS, [asked.prompt], asked.seed, **given)[0][asked.sample].tokens
        np.testing.assert_array_equal(hearing.tokens(number), alone)
        ended = alone[-1] in (LLAMA.specials.eos, *LLAMA.specials.stops)
        assert hearing.why(number) == (Why.STOP if ended else Why.LENGTH)
        assert sum(told.why is not None for told in hearing.told[number]) == 1


def test_scores_are_shown_as_the_policy_says():
    for policy in (Policy(scores=(Best(1),)), Policy(scores=(Hidden(),))):
        hearing = Hearing()
        with engine(policy) as running:
            running.ask([ask(length=4)], hearing, 300)
            hearing.wait(1)
        own = np.concatenate([told.seen.own for told in hearing.told[0]])
        text = np.r_[PROMPTS[0], hearing.tokens(0)].astype(np.int32)[:9]
        (whole,) = shown_scores(LLAMA, PARAMS, policy, [text], 2)
        np.testing.assert_allclose(own[:4], whole.own[5:9], atol=2e-4)
        assert np.isnan(own).all() == (policy.scores == (Hidden(),))
        assert Showing(policy, 2).best == hearing.told[0][0].seen.ids.shape[1]


def test_texts_are_the_same_whether_scores_are_told_or_not():
    with engine(Policy(scores=(Best(2),))) as running:
        found = []
        for scores in (True, False):
            hearing = Hearing()
            running.ask([ask(sample=n)._replace(scores=scores) for n in range(6)], hearing, 300)
            hearing.wait(6)
            found.append([hearing.tokens(n).tolist() for n in range(6)])
            assert (hearing.told[0][0].seen is not None) == scores
    assert found[0] == found[1]


def test_scores_of_texts_that_are_there_are_told_beside_texts_that_grow():
    hearing, reading = Hearing(), Hearing()
    policy = Policy(scores=(Best(2),))
    texts = [PROMPTS[0], PROMPTS[2], PROMPTS[1], np.r_[PROMPTS[0], PROMPTS[2]].astype(np.int32)]
    with engine(policy, slots=3) as running:
        running.ask([ask(length=9, sample=n) for n in range(6)], hearing, 300)
        running.read(texts, reading, 300)
        with pytest.raises(UserError, match="tokens"):
            running.read([np.zeros(16, np.int32)], reading, 300)
        with pytest.raises(Full):
            running.read(texts * 20, reading, 300)
        reading.wait(4)
        hearing.wait(6)
    for number, whole in enumerate(shown_scores(LLAMA, PARAMS, policy, texts, 2)):
        (told,) = reading.told[number]
        np.testing.assert_allclose(told.seen.own, whole.own, atol=1e-5)
        np.testing.assert_array_equal(told.seen.ids, whole.ids)


def test_a_line_that_is_full_takes_all_of_a_question_or_nothing():
    hearing = Hearing()
    running = engine(slots=1, waiting=3)
    with pytest.raises(Full):  # it does not run yet
        running.ask([ask()], hearing, 300)
    with running:
        running.ask([ask(sample=n) for n in range(3)], hearing, 300)
        with pytest.raises(Full, match="of 3 that may"):
            running.ask([ask(sample=n) for n in range(4)], hearing, 300)
        hearing.wait(3)
    assert sorted(hearing.told) == [0, 1, 2]


def test_who_gives_up_makes_room_and_hears_no_more():
    gone, hearing = Hearing(), Hearing()
    with engine(slots=1) as running:
        tickets = running.ask([ask(sample=n, length=10) for n in range(20)], gone, 300)
        running.give_up(tickets)
        running.ask([ask(seed=5)], hearing, 300)
        hearing.wait(1)
        told = {number: len(all_) for number, all_ in gone.told.items()}
        assert sum(any(one.why for one in all_) for all_ in gone.told.values()) < 3
    assert {number: len(all_) for number, all_ in gone.told.items()} == told
    alone = sample(LLAMA, PARAMS, [PROMPTS[0]], 5, samples=1, length=9, slots=1)[0][0].tokens
    np.testing.assert_array_equal(hearing.tokens(0), alone)


def test_whose_time_is_over_is_told_so_and_others_go_on():
    late, hearing = Hearing(), Hearing()
    with engine(slots=1) as running:
        running.ask([ask(sample=n) for n in range(5)], hearing, 300)
        running.ask([ask()], late, 0.0)
        late.wait(1)
        hearing.wait(5)
    assert late.why(0) == Why.TIME
    assert {hearing.why(n) for n in range(5)} <= {Why.STOP, Why.LENGTH}


def test_what_breaks_is_told_to_all_who_wait_and_nobody_may_ask_then():
    hearing = Hearing()
    running = engine(slots=1)
    running._slots.grow = lambda *_: (_ for _ in ()).throw(MemoryError("no room on the device"))
    with running:
        running.ask([ask(sample=n) for n in range(3)], hearing, 300)
        hearing.wait(3)
        assert {hearing.why(n) for n in range(3)} == {Why.ERROR}
        with pytest.raises(Full, match="no room on the device"):
            running.ask([ask()], hearing, 300)


def test_what_breaks_while_texts_are_read_is_told_to_who_wait_for_them():
    hearing = Hearing()
    running = engine(slots=2)
    running._shown = lambda _: (_ for _ in ()).throw(MemoryError("no room on the device"))
    with running:
        running.read(PROMPTS, hearing, 300)
        hearing.wait(3)
    assert {hearing.why(n) for n in range(3)} == {Why.ERROR}


def test_who_waits_is_told_when_the_engine_is_closed():
    hearing = Hearing()
    with engine(slots=1) as running:
        running.ask([ask(sample=n) for n in range(30)], hearing, 300)
    hearing.wait(30)
    assert Why.ERROR in {hearing.why(n) for n in range(30)}


@pytest.mark.parametrize("wrong", [
    lambda: engine(slots=0),
    lambda: engine(best=-1),
    lambda: engine().ask([ask(np.zeros(16, np.int32))], print, 1),
    lambda: engine().ask([ask(length=0)], print, 1),
    lambda: engine().ask([ask(temperature=-1.0)], print, 1),
])  # fmt: skip
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(UserError):
        wrong()


def test_a_warm_engine_compiles_nothing_for_any_length_and_knobs(monkeypatch):
    hearing = Hearing()
    with engine(Policy(scores=(Best(2),))) as running:
        running.warm()
        assert running.load == (0, 0)
        with compilations() as compiled:
            knobs = [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5, "temperature": 0.7}]
            asks = [ask(np.full(n % 15, 9, np.int32), 1 + n % 2, **knobs[n % 4]) for n in range(30)]
            running.ask([one._replace(scores=False) for one in asks[:10]], hearing, 300)
            hearing.wait(10)
            running.ask(asks[10:], hearing, 300)
            running.read([np.full(n, 9, np.int32) for n in range(4)], hearing, 300)
            hearing.wait(24)
    assert not compiled


def test_an_engine_that_nobody_asks_costs_nothing():
    with engine():
        begun = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - begun < 0.15
