"""Who is missing, and real processes of which one is stopped or killed: the others name it and end."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from compiler_flags import QUICK

from epigone import watchdog
from epigone.errors import UserError
from epigone.liveness import LIMIT, Seen, Sign, described, missing, standing
from epigone.processes import VARIABLES


def at(step, state="waits", silent=0.0, still=0.0, place="student@1"):
    return Seen(Sign(7, "host", place, step, state, "training/loop.py:1 (train)"), silent, still)


@pytest.mark.parametrize(
    ("seen", "ranks"),
    [
        ([at(5), at(5)], None),
        ([at(5), at(5, silent=11)], [1]),
        ([at(5, place=""), at(5, place="", silent=11)], [1]),
        ([at(5, still=11), at(4, still=11)], [1]),
        ([at(5, still=11), at(4, still=9)], None),
        ([at(5, still=11), at(5, "works", still=11)], [1]),
        ([at(5, still=11), at(5, still=11)], []),
        ([at(0, still=11), at(0, "works", still=11)], None),
        ([at(0, still=11), at(0, still=11)], []),
        ([at(None, still=99), at(5, still=11)], [1]),
        ([at(None, still=99), at(None, "works", still=99)], None),
        ([at(5, still=11), at(5, still=11, place="other@2")], None),
        ([at(5, still=11, place=""), at(5, "works", still=11, place="")], None),
    ],
    ids=[
        "all go on",
        "silent",
        "silent outside training",
        "behind, and does not come",
        "behind, and not yet late",
        "at work where others wait",
        "all wait",
        "before the first step one may work long",
        "all wait for the first step",
        "the others have ended",
        "all have ended and one measures",
        "in different nodes",
        "one prepares, others wait",
    ],
)
def test_who_is_missing(seen, ranks):
    found = missing(seen, 10)
    assert (found and found[0]) == ranks


def test_one_that_compiles_goes_on():
    assert Sign(1, state="compiles").moved() != Sign(2, state="compiles").moved()
    assert Sign(1, state="waits").moved() == Sign(2, state="waits").moved()


def test_the_line_names_the_missing_and_where_each_one_was():
    seen = [at(42, still=11), at(41, "works", still=11), *[at(42, still=11)] * 12]
    line = described(missing(seen, 10), seen)
    assert "\n" not in line
    assert line.startswith("missing: process 1 (host host): it has not gone on for 10 s, and the others wait for it. ")
    assert "process 0, 2, 3, 4, 5, 6, 7, 8 and 5 more: student@1, step 42 done, waits at training/loop.py:1" in line
    assert "process 1: student@1, step 41 done, works at" in line
    assert f"the same command goes on from the last checkpoint (time limit: {LIMIT})" in line
    everyone = [at(3, still=11)] * 2
    assert described(missing(everyone, 10), everyone).startswith("a collective hangs, and all processes wait in it")


def test_a_thread_is_read_from_its_stack():
    assert standing(None) == ("works", "?")
    here, gone = threading.Event(), threading.Event()

    def waits():
        here.set()
        gone.wait()

    thread = threading.Thread(target=waits)
    thread.start()
    here.wait()
    assert standing(sys._current_frames()[thread.ident]) == ("works", "?")
    gone.set()
    code = compile("def f():\n    return sys._getframe()", "/x/jax/_src/compiler.py", "exec")
    names = {"sys": sys}
    exec(code, names)
    outside = compile("def g():\n    return f()", "/x/epigone/training/loop.py", "exec")
    exec(outside, names)
    assert standing(names["g"]()) == ("compiles", "training/loop.py:2 (g)")


class Service:
    """The key-value store of several processes in one."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, overwrite):
        assert overwrite
        self.values[key] = value

    def key_value_dir_get(self, key):
        return list(self.values.items())


def dogs(service, limit=0.4, count=2):
    lines = [[] for _ in range(count)]
    made = [watchdog.Watchdog(service, i, count, limit, lines[i].append) for i in range(count)]
    return made, lines


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_one_that_never_speaks_is_named_and_one_that_left_is_not():
    (first, second), lines = dogs(Service())
    first.start()
    until(lambda: lines[0])
    assert "missing: process 1 (host ?): nothing was heard of it for 0.4 s" in lines[0][0]
    assert "process 1: nothing heard yet" in lines[0][0]
    first.stop()
    (first, second), lines = dogs(Service())
    second.stop()
    first.start()
    time.sleep(1.2)
    first.stop()
    assert lines == [[], []]


def test_a_coordinator_that_does_not_answer_is_named():
    service = Service()
    (first, second), lines = dogs(service)
    second.start()
    first.start()
    second.at("student@1", 3)
    until(lambda: second.seen()[1].sign.step == 3)
    stuck = threading.Event()
    service.key_value_set = lambda *_: stuck.wait()
    until(lambda: lines[1])
    assert lines[1][0].startswith("missing: process 0 (host ")
    assert "it coordinates the others, and has not answered for" in lines[1][0]
    assert "process 1: student@1, step 3 done" in lines[1][0]
    stuck.set()
    first.stop()
    second.stop()


@pytest.mark.parametrize("value", ["0", "soon", "-1", "1.5"])
def test_a_limit_that_is_none_is_refused(value, monkeypatch):
    monkeypatch.setenv(LIMIT, value)
    with pytest.raises(UserError, match=f"{LIMIT}={value} is no whole number of seconds"):
        watchdog.seconds()


CHILD = """
import time
from epigone import cli, processes, watchdog

def steps(_):
    from jax.experimental import multihost_utils
    rank = processes.join()
    watchdog.at("student@1", 0)
    for step in range(1, 1000):
        multihost_utils.process_allgather(step)
        watchdog.at("student@1", step)
        if all(one.sign.step for one in watchdog._dog.seen()):
            print(step, flush=True)
        time.sleep(0.1)

cli.VERBS["steps"] = ("", steps)
raise SystemExit(cli.main(["steps"]))
"""


class Pair:
    """Two processes that exchange a number at each step, and print it once each has heard of the other's steps."""

    def __init__(self, folder: Path, name: str) -> None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        self.outputs = [folder / f"{name}-{rank}" for rank in (0, 1)]
        self.processes = [self.start(address, rank) for rank in (0, 1)]

    def start(self, address: str, rank: int) -> subprocess.Popen:
        variables = dict(zip(VARIABLES, (address, "2", str(rank)), strict=True)) | {LIMIT: "4", "XLA_FLAGS": QUICK}
        output = self.outputs[rank].open("w")
        command = [sys.executable, "-c", CHILD]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | variables)

    def steps(self) -> int:
        return min(len(path.read_text().splitlines()) for path in self.outputs)

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def test_who_is_killed_or_stopped_is_named_by_the_other(tmp_path):
    """First process (which coordinates) and second, SIGKILL and SIGSTOP, all four side by side."""
    kinds = [(number, rank) for number in (signal.SIGKILL, signal.SIGSTOP) for rank in (0, 1)]
    pairs = [Pair(tmp_path, f"{number.name}-{rank}") for number, rank in kinds]
    try:
        for pair in pairs:
            until_steps(pair, 3)
        for pair, (number, rank) in zip(pairs, kinds, strict=True):
            pair.processes[rank].send_signal(number)
        for pair, (number, rank) in zip(pairs, kinds, strict=True):
            code = pair.processes[1 - rank].wait(timeout=60)
            output = pair.outputs[1 - rank].read_text()
            assert code == 1, f"{number.name} to {rank}: exit code {code}\n{output}"
            last = output.splitlines()[-1]
            assert last.startswith(f"epigone: missing: process {rank} (host {os.uname().nodename})"), output
            assert "student@1, step " in last, last
            assert "Traceback" not in output
    finally:
        for pair in pairs:
            pair.end()


def until_steps(pair, steps):
    end = time.monotonic() + 120
    while pair.steps() < steps:
        assert time.monotonic() < end, "\n".join(path.read_text() for path in pair.outputs)
        time.sleep(0.1)
