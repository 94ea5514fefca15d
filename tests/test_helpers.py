"""Several processes at one lineage: who takes which node, what they make together, and how they end."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny
from rich.console import Console

from epigone import helpers
from epigone.cli import main
from epigone.errors import UserError
from epigone.grow import grow, pending
from epigone.helpers import grow_some
from epigone.store import Store
from epigone.verbs.run import load_config
from epigone.view import Terminal


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_config(tmp_path)
    return tmp_path


def records(run):
    found = [json.loads(path.read_text()) for path in run.glob("nodes/*/record.json")]
    return {record["key"]: record for record in found}


def test_what_two_grow_is_what_one_grows(folder, capsys):
    assert main(["run", "tiny.py", "--run", "runs/two", "--jobs", "2"]) == 0
    said = capsys.readouterr().out
    assert f"{len(tiny.NODES)} nodes grown" in said
    assert (folder / "runs/two/report.html").exists()
    assert main(["run", "tiny.py", "--run", "runs/one"]) == 0
    two, one = records(folder / "runs/two"), records(folder / "runs/one")
    assert sorted(two) == sorted(tiny.NODES)
    for key in tiny.NODES:
        assert two[key]["identity"] == one[key]["identity"]
        if one[key]["kind"] == "ngram":
            assert (two[key]["metrics"], two[key]["samples"]) == (one[key]["metrics"], one[key]["samples"])
        else:  # by helpers with a part of the processors, whose sums are rounded otherwise
            assert two[key]["metrics"]["perplexity"] == pytest.approx(one[key]["metrics"]["perplexity"], rel=1e-3)
    capsys.readouterr()
    assert main(["run", "tiny.py", "--run", "runs/two", "--jobs", "2"]) == 0
    assert "nothing to grow" in capsys.readouterr().out


def test_a_node_that_another_is_at_is_left_to_it_and_others_are_taken(folder):
    lineage = load_config(folder / "tiny.py")()
    store = Store(folder / "runs" / "tiny", lineage)
    grown, thread = [], None

    def work():
        grown.extend(grow_some(lineage, store.run, view=tiny.Silent()))

    with store.lock(lineage["teacher@0"]):
        thread = threading.Thread(target=work)
        thread.start()
        deadline = time.monotonic() + 120
        while store.record(lineage["copy@2"]) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(3 * helpers.POLL)
        assert {node.key for node in pending(store)} == {"teacher@0", "student@1", "reader@1"}
        assert thread.is_alive()
    thread.join(timeout=240)
    assert grown == tiny.NODES
    assert not pending(store)


def test_who_grows_alone_keeps_helpers_out(folder):
    lineage = load_config(folder / "tiny.py")()
    store = Store(folder / "runs" / "tiny", lineage)
    with store.lock(), pytest.raises(UserError, match="is being grown by process"):
        grow_some(lineage, store.run, view=tiny.Silent())
    assert not records(store.run)


def test_a_node_is_measured_again_beside_a_model_that_came_later(folder):
    """The student stands before what it is to be compared with; in one process the second run does it."""
    source = (folder / "tiny.py").read_text().replace("contexts=50,", "contexts=50, compare={'student': 'reader@1'},")
    (folder / "tiny.py").write_text(source)
    lineage = load_config(folder / "tiny.py")()
    grow_some(lineage, folder / "runs" / "some", view=tiny.Silent())
    for _ in range(2):
        grow(lineage, folder / "runs" / "one", view=tiny.Silent())
    found, wanted = records(folder / "runs" / "some"), records(folder / "runs" / "one")
    assert list(found["student@1"]["agreement"]) == ["teacher@0", "reader@1"]
    assert found["student@1"]["agreement"] == wanted["student@1"]["agreement"]


def start(folder, *arguments):
    command = [sys.executable, "-m", "epigone", "run", "tiny.py", "--run", "runs/tiny", "--jobs", "2", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def helpers_of(process):
    return list(map(int, open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()))


def is_gone(pid):
    try:
        return open(f"/proc/{pid}/stat").read().split()[2] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=["SIGTERM", "SIGKILL"])
def test_helpers_end_with_who_started_them_and_leave_what_can_go_on(folder, number, code):
    process = start(folder, "--set", "teacher.lesson.training.steps=100000")
    deadline, started = time.monotonic() + 120, folder / "runs" / "tiny"
    while not list(started.glob("nodes/teacher@0-*/training/events/*")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    helping = helpers_of(process)
    assert len(helping) == 2
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    while not all(map(is_gone, helping)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list(started.glob("nodes/teacher@0-*/training/checkpoints/*"))


def test_what_ends_a_helper_is_said_in_one_line_and_ends_the_run(folder):
    process = start(folder, "--set", "teacher.lesson.training.optimizer.learning_rate=1e30")
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 1
    assert said.startswith("epigone: node 'teacher@0': at step ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "0"], "--jobs 0: at least one process"),
        (["--jobs", "2", "--node", "teacher@0"], "give either"),
        (["--jobs", "two"], "--jobs"),
    ],
)
def test_jobs_that_cannot_be_are_refused(folder, capsys, arguments, said):
    assert main(["run", "tiny.py", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (folder / "runs").exists()


def test_jobs_grow_nodes_and_label_none(folder, capsys):
    assert main(["label", "tiny.py", "--jobs", "2"]) == 2
    assert "--jobs 2 grows nodes: give it to epigone run" in capsys.readouterr().err


def test_several_processes_that_a_launcher_joined_do_not_part_again(folder, capsys, monkeypatch):
    monkeypatch.setattr("epigone.processes.several", lambda: True)
    monkeypatch.setattr("epigone.cli.several", lambda: False)
    assert main(["run", "tiny.py", "--jobs", "2"]) == 2
    assert "leave it out" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system ties no process to processors")
def test_processors_are_shared_out_and_taken_back():
    every = os.sched_getaffinity(0)
    parts = []
    for number in range(len(every)):
        with helpers._part_of_processors(number, len(every)):
            parts.append(os.sched_getaffinity(0))
    assert sorted(cpu for part in parts for cpu in part) == sorted(every)
    with helpers._part_of_processors(0, len(every) + 1):
        assert os.sched_getaffinity(0) == every
    assert os.sched_getaffinity(0) == every


def test_the_view_shows_what_each_helper_is_at():
    view = Terminal("a run", {}, Console(file=io.StringIO(), width=100, force_terminal=True))
    view.beside(0, "teacher@0 train step 3/8")
    view.beside(1, "copy@1 write")
    view.console.print(view.render())
    shown = view.console.file.getvalue()
    assert "teacher@0 train step 3/8" in shown
    assert "copy@1 write" in shown
