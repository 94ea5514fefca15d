"""`epigone serve` and `epigone keys` as commands: what they print, who gets in, and what a kill leaves."""

import json
import os
import re
import signal
import socket
import sys
import threading
import time

import httpx
import pytest
import tiny
from served import start

from epigone.arena.accounts import UNANSWERED, Accounts
from epigone.cli import main

POLICY = """
from epigone.arena.policies import Best, Policy, Rounded

def policy():
    return Policy(scores=(Best(3), Rounded(1)))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    config = tiny.write_config(folder)
    (folder / "policy.py").write_text(POLICY)
    for node in ("trigram@0", "teacher@0"):
        assert main(["run", str(config), "--run", str(folder / "run"), "--node", node]) == 0
    return folder / "run"


def key(box, capsys, name, *more):
    """A new key."""
    capsys.readouterr()
    assert main(["keys", str(box), "--add", name, *more]) == 0
    return capsys.readouterr().out.strip()


def asked(url, secret, **more):
    question = {"model": "run/teacher@0", "prompt": "the cat", "max_tokens": 5, "seed": 1} | more
    return httpx.post(f"{url}/completions", json=question, headers={"Authorization": f"Bearer {secret}"}, timeout=60)


def test_a_server_that_is_killed_goes_on_with_its_quotas_and_its_log(run, capsys, tmp_path):
    box = tmp_path / "box.sqlite"
    secret = key(box, capsys, "alice", "--a-day", "1000")
    process, url = start(run, "--box", str(box), "--policy", str(run.parent / "policy.py"), "--slots", "2")
    first = asked(url, secret, logprobs=5)
    scores = first.json()["choices"][0]["logprobs"]
    assert all(len(place) <= 3 + 1 for place in scores["top_logprobs"])
    assert all(x == pytest.approx(round(x, 1)) for place in scores["top_logprobs"] for x in place.values())
    used = first.json()["usage"]["total_tokens"]
    answers = []

    def ask(number):
        try:
            answers.append(asked(url, secret, n=16, seed=number, max_tokens=25).status_code)
        except httpx.TransportError:
            answers.append(None)

    waiting = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for one in waiting:
        one.start()
    deadline = time.monotonic() + 30
    with Accounts(box) as beside:
        while beside.used("alice").questions < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    said = process.communicate()
    for one in waiting:
        one.join()
    process, url = start(run, "--box", str(box))
    capsys.readouterr()
    assert main(["keys", str(box)]) == 0
    table = capsys.readouterr().out
    told = 2 - answers.count(None)
    assert re.search(rf"alice +open +{1 + 2} ", table)
    with Accounts(box) as beside:
        tokens = beside.used("alice").tokens
        statuses = [status for (status,) in beside._base.execute("SELECT status FROM questions ORDER BY number")]
        assert len(list(beside.log())) == 3
    assert statuses.count(200) == 1 + told
    assert statuses.count(UNANSWERED) == 2 - told
    assert tokens == used if told == 0 else tokens > used
    again = asked(url, secret)
    assert again.json()["choices"][0]["text"] == first.json()["choices"][0]["text"]
    assert main(["keys", str(box), "--refuse", "alice"]) == 0  # while it serves
    assert asked(url, secret).status_code == 403
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (143, "epigone: stopped by SIGTERM\n")
    assert secret not in "".join((*said, out, error))


def test_an_open_box_answers_whoever_asks_and_ctrl_c_ends_it(run, tmp_path):
    process, url = start(run, "--box", str(tmp_path / "box.sqlite"), "--open", "--policy", "text")
    assert httpx.get(f"{url}/models", timeout=60).json()["data"][0]["id"] == "run/teacher@0"
    assert asked(url, "anything").status_code == 200
    assert asked(url, "anything", logprobs=1).json()["error"]["code"] == "scores_hidden"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "epigone: interrupted\n")


def one_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "epigone keys"),
        (["--open", "--host", "0.0.0.0"], "--open on 0.0.0.0"),
        (["--open", "--policy", "txt"], "did you mean 'text'"),
        (["--open", "--policy", "nowhere.py"], "no config"),
        (["--open", "--port", "70000"], "cannot be served"),
        (["--open", "--slots", "0"], "slots=0"),
        (["--open", "--bounds.texts", "0"], "texts=0"),
    ],
)
def test_what_cannot_be_served_is_one_line(run, tmp_path, capsys, arguments, says):
    given = ["serve", "teacher@0", "--run", str(run), "--box", str(tmp_path / "box.sqlite"), "--port", "0", *arguments]
    assert main(given) == 2
    assert says in one_line(capsys)


def test_a_port_that_is_taken_a_model_that_counts_and_what_is_not_installed(run, tmp_path, capsys, monkeypatch):
    box = str(tmp_path / "box.sqlite")
    assert main(["serve", "trigram@0", "--run", str(run), "--box", box, "--port", "0", "--open"]) == 2
    assert "counts words" in one_line(capsys)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "teacher@0", "--run", str(run), "--box", box, "--port", port, "--open"]) == 2
        assert "in use" in one_line(capsys)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "teacher@0", "--run", str(run), "--box", box, "--open"]) == 2
    assert "pip install 'epigone[serve]'" in one_line(capsys)


def test_keys_are_made_shown_changed_and_forgotten(tmp_path, capsys):
    box = tmp_path / "box.sqlite"
    assert main(["keys", str(box)]) == 2
    assert "--add NAME" in one_line(capsys)
    assert not box.exists()
    secret = key(box, capsys, "alice", "--a-minute", "7")
    assert secret.startswith("epigone-")
    assert main(["keys", str(box), "--degrade", "alice"]) == 0
    assert main(["keys", str(box)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"alice +degraded +0 +0 +10,000,000 +7", shown)
    assert secret not in shown
    assert main(["keys", str(box), "--reopen", "alice"]) == 0
    assert main(["keys", str(box), "--delete", "alice"]) == 0
    assert main(["keys", str(box), "--delete", "alice"]) == 2
    assert "nobody" in one_line(capsys)
    assert main(["keys", str(box), "--add", "a", "--refuse", "b"]) == 2
    assert "one change" in one_line(capsys)
    box.write_text(json.dumps({"not": "a box"}) * 100)
    assert main(["keys", str(box)]) == 1
    assert "box.sqlite" in one_line(capsys)
