"""Keys, quotas and the query log: what is on disk, what comes back after a kill, and whose file it is."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading

import numpy as np
import pytest

from epigone.arena.accounts import DAY, UNANSWERED, Accounts, Bounds, OverQuota, State, Used
from epigone.errors import Busy, Fault, UserError


@pytest.fixture
def accounts(tmp_path):
    with Accounts(tmp_path / "box.sqlite") as accounts:
        yield accounts


def test_a_key_is_found_by_its_secret_which_is_nowhere(accounts):
    secret = accounts.add("alice", 60, 1000)
    other = accounts.add("bob", 1, 10)
    assert secret != other
    key = accounts.find(secret)
    assert key == ("alice", State.OPEN, 60, 1000)
    assert accounts.find(secret[:-1]) is None
    assert accounts.find("") is None
    for path in accounts.path.parent.iterdir():
        assert secret.encode() not in path.read_bytes()
    assert accounts.path.stat().st_mode & 0o077 == 0


def test_a_key_is_degraded_refused_reopened_and_forgotten(accounts):
    secret = accounts.add("alice", 60, 1000)
    for state in (State.DEGRADED, State.REFUSED, State.OPEN):
        accounts.change("alice", state)
        assert accounts.find(secret).state == state
    with pytest.raises(UserError, match="has a key"):
        accounts.add("alice", 60, 1000)
    accounts.delete("alice")
    assert accounts.find(secret) is None
    for wrong in (accounts.delete, lambda name: accounts.change(name, State.OPEN)):
        with pytest.raises(UserError, match="nobody"):
            wrong("alice")
    with pytest.raises(UserError):
        accounts.add("../alice", 60, 1000)
    with pytest.raises(UserError):
        accounts.add("alice", 0, 1000)


def test_what_a_question_may_cost_is_held_back_until_it_is_settled(accounts):
    key = accounts.find(accounts.add("alice", 60, 100))
    number = accounts.note(key, "/v1/completions", [[1, 2, 3]], {"n": 2}, 60)
    assert accounts.used("alice") == Used(1, 60)
    with pytest.raises(OverQuota, match="10 tokens more") as over:
        accounts.note(key, "/v1/completions", [[1]], {}, 50)
    assert 0 < over.value.seconds <= DAY
    accounts.settle(number, 200, 3, 7, 0.5)
    assert accounts.used("alice") == Used(1, 10)
    accounts.note(key, "/v1/completions", [[1]], {}, 50)
    assert accounts.used("alice") == Used(2, 60)
    assert accounts.everyone() == [(key, Used(2, 60))]


def test_a_quota_is_of_one_day(accounts, monkeypatch):
    key = accounts.find(accounts.add("alice", 60, 100))
    now = 20_000 * DAY + 5.0
    monkeypatch.setattr("time.time", lambda: now - 10)
    late = accounts.note(key, "/", [[1]], {}, 100)
    monkeypatch.setattr("time.time", lambda: now)
    accounts.note(key, "/", [[1]], {}, 100)  # another day
    accounts.settle(late, 200, 1, 1, 10.0)  # is of the day on which it was asked
    with pytest.raises(OverQuota):
        accounts.note(key, "/", [[1]], {}, 1)
    monkeypatch.setattr("time.time", lambda: now - 10)
    assert accounts.used("alice").tokens == 2


def test_the_log_is_what_detectors_read(accounts):
    key = accounts.find(accounts.add("alice", 60, 100))
    accounts.note(key, "/", [[1, 2], [3]], {}, 1)
    accounts.note(key, "/", [[4]], {}, 1)
    log = list(accounts.log())
    assert [query.account for query in log] == ["alice"] * 3
    assert [query.prompt.tolist() for query in log] == [[1, 2], [3], [4]]
    assert all(query.prompt.dtype == np.int32 for query in log)
    assert [query.time for query in log] == sorted(query.time for query in log)
    assert list(accounts.log(since=log[-1].time + 1)) == []


SERVING = """
import sys, time
from pathlib import Path
from epigone.arena.accounts import Accounts
with Accounts(Path(sys.argv[1]), serving=True) as accounts:
    key = accounts.find(sys.argv[2])
    done = accounts.note(key, "/", [[1, 2, 3]], {}, 30)
    accounts.settle(done, 200, 3, 4, 0.1)
    accounts.note(key, "/", [[1, 2, 3]], {}, 30)
    print("noted", flush=True)
    time.sleep(600)
"""


def test_a_killed_server_loses_nothing_and_charges_nothing_that_it_did_not_answer(tmp_path):
    path = tmp_path / "box.sqlite"
    with Accounts(path) as accounts:
        secret = accounts.add("alice", 60, 1000)
    command = [sys.executable, "-c", SERVING, str(path), secret]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "noted\n"
    with pytest.raises(Busy, match="another server"), Accounts(path, serving=True):
        pass
    with Accounts(path) as beside:  # as 'epigone keys' does while the server runs
        assert beside.used("alice") == Used(2, 37)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with Accounts(path, serving=True) as again:
        assert again.used("alice") == Used(2, 7)
    rows = sqlite3.connect(path).execute("SELECT status, written, prompt FROM questions ORDER BY number").fetchall()
    assert [(status, written, json.loads(prompt)) for status, written, prompt in rows] == [
        (200, 4, [[1, 2, 3]]),
        (UNANSWERED, 0, [[1, 2, 3]]),
    ]


def test_two_programs_write_at_once(tmp_path):
    path = tmp_path / "box.sqlite"
    with Accounts(path) as accounts:
        key = accounts.find(accounts.add("alice", 60, 10**6))

    def work():
        with Accounts(path) as mine:
            for _ in range(50):
                mine.settle(mine.note(key, "/", [[1]], {}, 10), 200, 1, 1, 0.0)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    with Accounts(path) as accounts:
        assert accounts.used("alice") == Used(200, 400)


def test_a_file_of_another_kind_is_left_as_it_is(tmp_path):
    other, text = tmp_path / "other.sqlite", tmp_path / "text"
    with sqlite3.connect(other) as base:
        base.execute("CREATE TABLE mine (x)")
    text.write_text("no database at all, but some text that is long enough to be read as one" * 20)
    for path in (other, text):
        before = path.read_bytes()
        with pytest.raises(Fault, match=path.name), Accounts(path):
            pass
        assert path.read_bytes() == before
    with pytest.raises(Fault, match="cannot be used"), Accounts(text / "below" / "box.sqlite"):
        pass


def test_bounds_that_let_nothing_through_are_refused():
    for wrong in ({"body": 0}, {"texts": 0}, {"seconds": 0.0}, {"patience": -1.0}):
        with pytest.raises(UserError):
            Bounds(**wrong)
