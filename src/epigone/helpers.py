"""Several processes that grow one lineage: each takes a node whose parents are done and that nobody is at.

They share the run directory and nothing else, so it is the same whether they are on one machine or on many. A node is
held by a lock that ends with its process: what one leaves unfinished, another goes on with. A node does not depend on
who grows it, but for rounding where their numbers of processors differ.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from epigone.errors import Busy, Fault, UserError
from epigone.grow import check, finish, is_pending, measure_whole, pending
from epigone.lineage import Lineage, Node
from epigone.materials import Materials
from epigone.store import Store
from epigone.training.config import Hardware
from epigone.view import Terminal, View

HELPER = "EPIGONE_HELPER"
"""Set in a process that was started to help: its number."""

POLL = 0.25
"""Seconds between two looks for a node to take, or at what helpers have done."""

TOLD = 0.5
"""Seconds between two reports of a helper that trains."""

GOODBYE = 120.0
"""Seconds for a helper that is asked to stop to write a checkpoint; then it is killed."""


def grow_some(
    lineage: Lineage, run: Path, *, hardware: Hardware = Hardware(), data: Path | None = None, view: View
) -> list[str]:
    """Grow nodes beside other processes that do the same, until all are done; the keys of those that were grown here.

    Args: those of `epigone.grow.grow`.

    Raises:
        UserError: one process alone grows the whole run.
    """
    store, grown = Store(run, lineage, data), []
    materials, turns = Materials(store), _Turns(store)
    with store.share():
        with store.alone(run / "checks"):  # what it prepares, others find
            check(pending(store), materials)
            store.write_lineage()
        while not turns.is_over():
            for node in turns.ready():
                with contextlib.suppress(Busy), store.lock(node):
                    if is_pending(node, store):
                        finish(node, materials, hardware, view)
                        grown.append(node.key)
                        break
            else:
                view.stage("waits for others")
                time.sleep(POLL)
        with store.alone(run / "populations"):
            measure_whole(materials, view)
    return grown


class _Turns:
    """Which nodes can be taken now. What was seen to be done is not looked at again."""

    def __init__(self, store: Store) -> None:
        self._store, self._settled, self._grown = store, set[str](), set[str]()
        order = store.lineage.order
        place = {node.key: number for number, node in enumerate(order)}
        judge = store.lineage.evaluation.judge if store.lineage.evaluation else None

        def needs(node: Node) -> list[str]:
            """Its parents, and the models that it is measured beside, but for those that come after it."""
            beside = [*store.compared(node), *([judge] if judge else [])]
            return [key for key, _ in node.parents] + [key for key in beside if place[key] < place[node.key]]

        self._needs = {node.key: needs(node) for node in order}

    def is_over(self) -> bool:
        """Whether all is done. A node is measured anew where a model has been grown since that it is held against."""
        if all(self._is_settled(node) for node in self._store.lineage.order):
            self._settled -= {node.key for node in pending(self._store)}
            return len(self._settled) == len(self._store.lineage.nodes)
        return False

    def ready(self) -> Iterator[Node]:
        """Nodes that are to be done, whose parents are."""
        for node in self._store.lineage.order:
            if not self._is_settled(node) and all(map(self._is_grown, self._needs[node.key])):
                yield node

    def _is_settled(self, node: Node) -> bool:
        if node.key not in self._settled and self._is_grown(node.key) and not is_pending(node, self._store):
            self._settled.add(node.key)
        return node.key in self._settled

    def _is_grown(self, key: str) -> bool:
        if key not in self._grown and self._store.record(self._store.lineage[key]) is not None:
            self._grown.add(key)
        return key in self._grown


class Telling:
    """A view that tells another process what this one is at: a line of JSON at a time, on standard output."""

    def __init__(self) -> None:
        self._key, self._stage, self._last = "", "", 0.0

    def start(self, node: Node) -> None:
        self._key = node.key

    def stage(self, name: str, steps: int | None = None) -> None:
        if name != self._stage or self._key:
            self._stage = name
            self._tell(self._key, name)

    def step(self, report: Any) -> None:
        if time.monotonic() - self._last > TOLD:
            speed = f"{report.tokens_per_second:,.0f} tokens/s"
            self._tell(self._key, self._stage, f"step {report.step}/{report.steps}", speed)

    def finish(self, node: Node, record: dict[str, Any]) -> None:
        self._key = ""

    def _tell(self, *words: str) -> None:
        self._last = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more: `watch_parent` ends this process
            print(json.dumps(" ".join(word for word in words if word)), flush=True)


def watch_parent() -> None:
    """End this helper, in good order, when who started it is gone: its end of our standard input closes."""

    def wait() -> None:
        while os.read(0, 1024):  # not by sys.stdin, whose lock the end of this process would want
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def grow_with_helpers(arguments: Sequence[str], jobs: int, store: Store, view: Terminal) -> list[str]:
    """Let `jobs` processes grow what is to be done, show it, and return the keys of what was done meanwhile.

    Args:
        arguments: of `epigone run`, for the helpers to read again.
        jobs: how many.
        store: of the run.
        view: hears of what is done.

    Raises: UserError or Fault, in a helper's words, when one of them fails; the others are stopped.
    """
    waiting = {node.key: node for node in pending(store)}
    before = list(waiting)
    helpers: list[_Helper] = []
    try:
        helpers.extend(_Helper(arguments, number, jobs, view) for number in range(jobs))
        while any([helper.is_at_work() for helper in helpers]):  # all of them are asked: one may have failed
            _hear(waiting, store, view)
            time.sleep(POLL)
        _hear(waiting, store, view)
    finally:
        for helper in helpers:
            helper.ask_to_stop()
        for helper in helpers:
            helper.wait()
    return [key for key in before if key not in waiting]


def _hear(waiting: dict[str, Node], store: Store, view: View) -> None:
    """Tell the view of nodes that are done now."""
    for node in list(waiting.values()):
        if (record := store.record(node)) is not None and not is_pending(node, store):
            view.finish(waiting.pop(node.key), record)


class _Helper:
    """A process that grows nodes too, as long as this one lives and wants it."""

    def __init__(self, arguments: Sequence[str], number: int, jobs: int, view: Terminal) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - `wait` closes it
        with _part_of_processors(number, jobs):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "epigone", "run", *arguments],
                env={**os.environ, HELPER: str(number)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,  # an interrupt at the keyboard is for this process, which stops the helpers
            )
        threading.Thread(target=self._listen, args=(number, view), daemon=True).start()

    def is_at_work(self) -> bool:
        """Whether it still runs. Raises: what ended it, if it ended badly."""
        code = self._process.poll()
        if code:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            line = said[-1].removeprefix("epigone: ") if said else f"a helper ended with code {code}"
            raise (UserError if code == 2 else Fault)(line)
        return code is None

    def ask_to_stop(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]

    def wait(self) -> None:
        try:
            self._process.wait(GOODBYE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _listen(self, number: int, view: Terminal) -> None:
        for line in self._process.stdout:  # type: ignore[union-attr]
            with contextlib.suppress(ValueError):  # a library's own words
                view.beside(number, str(json.loads(line)))


@contextlib.contextmanager
def _part_of_processors(number: int, jobs: int) -> Iterator[None]:
    """Processes that are started now have every `jobs`-th processor, where the system can say so and has enough."""
    every = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(every) < jobs:
        yield
        return
    os.sched_setaffinity(0, every[number::jobs])
    try:
        yield
    finally:
        os.sched_setaffinity(0, every)
