"""Claims in buckets: one holder, whatever dies, whoever sleeps."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from object_stores import trouble

from epigone.errors import UserError
from epigone.storage import claims
from epigone.storage.claims import Claim, held
from epigone.storage.places import entries, write_whole


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.1)
    monkeypatch.setattr(claims, "LIFE", 0.5)


def elsewhere(path, process=1):
    """A holder on another host, that wrote its claim and then died."""
    write_whole(path, json.dumps({"host": "far away", "process": process, "claim": "x", "beat": 1}).encode())


def test_one_at_a_time_and_free_afterwards(folder):
    for _ in range(2):
        with held(folder / "lock"):
            assert list(entries(folder)) == ["lock"]
            with (
                pytest.warns(UserWarning, match="is claimed by process"),
                pytest.raises(UserError, match=rf"is being grown by process {os.getpid()} on \S+: wait, or stop it"),
                held(folder / "lock"),
            ):
                pass
    assert entries(folder) == {}


def test_many_at_once_one_wins(folder):
    found = [Claim(folder / "lock") for _ in range(8)]
    won = []
    threads = [threading.Thread(target=lambda claim=claim: won.append(claim.take())) for claim in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(won) == 1
    for claim in found:
        if claim._thread:
            claim.give_up()


def test_who_shares_keeps_out_who_would_be_alone_and_nobody_else(folder):
    with held(folder / "lock", shared=True), held(folder / "lock", shared=True):
        assert len(entries(folder)) == 2
        with (
            pytest.warns(UserWarning, match="is claimed by"),
            pytest.raises(UserError, match=f"{folder} is being grown"),
            held(folder / "lock"),
        ):
            pass
        assert len(entries(folder)) == 2
    with (
        held(folder / "lock"),
        pytest.warns(UserWarning, match="is claimed by"),
        pytest.raises(UserError),
        held(folder / "lock", shared=True),
    ):
        pass
    assert entries(folder) == {}


@pytest.mark.filterwarnings("ignore:.*is claimed by")
@pytest.mark.parametrize("shared", [False, True])
def test_a_holder_that_died_elsewhere_is_watched_and_then_succeeded(folder, shared):
    elsewhere(folder / "lock.shared" / "y" if shared else folder / "lock")
    began = time.monotonic()
    with held(folder / "lock"):
        assert time.monotonic() - began >= 0.5
    assert entries(folder) == {}


@pytest.mark.filterwarnings("ignore:.*is claimed by")
def test_a_holder_that_is_alive_is_never_succeeded(folder):
    with held(folder / "lock"):
        claim = Claim(folder / "lock")
        ends = time.monotonic() + 0.9
        while time.monotonic() < ends:
            assert not claim.take()
            time.sleep(0.05)
        assert claim.lives


def test_a_holder_on_this_host_that_was_killed_is_succeeded_at_once(folder, stores):
    code = (
        "import sys, os; from epigone.storage.claims import Claim; from epigone.storage.places import place;"
        "assert Claim(place(sys.argv[1])).take(); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(folder / "lock")], env=os.environ | stores)
    assert killed.returncode == -9
    assert list(entries(folder)) == ["lock"]
    claims.LIFE = 1000.0
    with held(folder / "lock"):
        pass


def test_a_container_that_was_started_again_succeeds_itself(folder):
    write_whole(folder / "lock", json.dumps({"host": claims._host(), "process": os.getpid(), "claim": "old"}).encode())
    claims.LIFE = 1000.0
    with held(folder / "lock"):
        pass


def test_a_holder_that_was_succeeded_is_told_and_deletes_nothing(folder):
    lost = []
    claim = Claim(folder / "lock", lost.append)
    assert claim.take()
    elsewhere(folder / "lock")
    ends = time.monotonic() + 5
    while not lost and time.monotonic() < ends:
        time.sleep(0.02)
    claim.give_up()
    assert lost == [claim]
    assert json.loads((folder / "lock").read_text())["host"] == "far away"


@pytest.mark.filterwarnings("ignore:.*is claimed by")
def test_who_is_patient_waits(folder):
    order = []

    def second():
        with held(folder / "lock", patient=True):
            order.append("second")

    with held(folder / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(1.0)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_claim_survives_a_store_that_is_busy(folder):
    with trouble(failing=0.3) as met:
        claim = Claim(folder / "lock")
        assert claim.take()
        time.sleep(0.5)
        assert not Claim(folder / "lock").take()
        claim.give_up()
    assert met.failed
    assert entries(folder) == {}
