"""Several processes: a collective that waits for one that is gone or stuck ends with a line that names it.

Each process writes into the key-value store of JAX's coordination service, over no device and no collective, that it is
alive, how far it is and where in the code it stands, and reads what others write. Threads do it: no step waits for it.
Time is that of the reader's own clock, so the clocks of hosts need not agree.
"""

import contextlib
import ctypes
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from epigone.errors import UserError
from epigone.liveness import LIMIT, Seen, Sign, described, missing, standing

DEFAULT_SECONDS = 600
"""Longer than a step or the writing of a checkpoint takes. Compiling, and work before the first step, do not count."""

BEAT_SECONDS = 2.0
"""From one sign of life to the next, where the limit is not short."""

KEY = "epigone/alive/"

_BROKEN = ("Gloo", "NCCL", "coordination service", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Barrier", "onnection closed")
"""In the text of an error that may come from the end of another process."""


def seconds() -> int:
    """The time limit. Raises: UserError for what is none."""
    given = os.environ.get(LIMIT, str(DEFAULT_SECONDS))
    if not given.isdigit() or int(given) < 1:
        raise UserError(f"{LIMIT}={given} is no whole number of seconds, 1 or more")
    return int(given)


class Watchdog:
    """Tells the others how this process is, watches them, and ends it where one is missing.

    Args:
        client: of the coordination service: `key_value_set` and `key_value_dir_get`.
        rank: the number of this process.
        count: how many there are.
        limit: seconds.
        end: called with the line; does not return.
    """

    def __init__(self, client: Any, rank: int, count: int, limit: float, end: Callable[[str], None]) -> None:
        self._client, self._rank, self._limit, self._end = client, rank, limit, end
        self._pause = min(BEAT_SECONDS, limit / 10)
        self._main = threading.main_thread().ident
        self._place, self._over = "", threading.Event()
        self._step: int | None = 0
        self._stood: tuple[str, str] | None = None
        now = time.monotonic()
        self._signs, self._heard, self._moved = [Sign()] * count, [now] * count, [now] * count

    def start(self) -> None:
        """Begin."""
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Say that this process has come to its end in good order, and end the watch."""
        self._over.set()
        try:
            self._client.key_value_set(f"{KEY}{self._rank}", "left", True)
        except Exception:
            return

    def at(self, place: str, step: int | None) -> None:
        """This process has done `step` of what it trains; None: all steps."""
        self._place, self._step = place, step

    def seen(self) -> list[Seen]:
        """All processes as they are known here."""
        now = time.monotonic()
        told = zip(self._signs, self._heard, self._moved, strict=True)
        return [Seen(sign, now - heard, now - moved) for sign, heard, moved in told]

    def gone(self) -> tuple[list[int], str] | None:
        """Who has missed a few beats: enough to know it where something has failed already."""
        found = missing(self.seen(), 4 * self._pause)
        return found and self._without_coordinator(found)

    def lost(self, error: BaseException) -> str | None:
        """The line on who is gone, after a collective has failed in the main thread; None where all are alive.

        It ends within seconds, and the process with it: SIGTERM, by which a launcher ends who is left, may wait for it.
        """
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        self._stood = standing(trace.tb_frame if trace else None)
        for _ in range(16):
            time.sleep(self._pause / 2)
            if found := self.gone():
                return described((found[0], "it is gone, which ended a collective"), self.seen())
        return None

    def _beat(self) -> None:
        """Write and read; a coordinator that does not answer holds this thread, and no other."""
        for beat in range(2**62):
            if self._over.wait(self._pause if beat else 0):
                return
            state, code = self._stood or standing(sys._current_frames().get(self._main or 0))
            said = [beat, platform.node(), self._place, self._step, state, code]
            try:
                self._client.key_value_set(f"{KEY}{self._rank}", json.dumps(said), True)
                self._hear(self._client.key_value_dir_get(KEY))
            except Exception:
                continue

    def _hear(self, said: list[tuple[str, str]]) -> None:
        now = time.monotonic()
        for key, value in said:
            rank = int(key.rpartition("/")[2])
            before = self._signs[rank]
            sign = before if value == "left" else Sign(*json.loads(value))
            if sign != before or value == "left":
                self._heard[rank] = now
            if sign.moved() != before.moved() or value == "left":
                self._moved[rank] = now
            self._signs[rank] = sign

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(self._pause):
            before, looked = looked, time.monotonic()
            if (gap := looked - before) > 2 * self._pause + 1:
                # This process itself stood still: what it did not hear then says nothing of the others.
                self._heard = [heard + gap for heard in self._heard]
                self._moved = [moved + gap for moved in self._moved]
            if found := missing(self.seen(), self._limit):
                self._end(described(self._without_coordinator(found), self.seen()))

    def _without_coordinator(self, found: tuple[list[int], str]) -> tuple[list[int], str]:
        """Where nothing is heard of anybody, it is the first process, which passes on all signs, that is silent."""
        if self._rank == 0 or len(found[0]) < len(self._signs):
            return found
        return [0], f"it coordinates the others, and has not answered for {self.seen()[0].silent:.0f} s"


_dog: Watchdog | None = None
_on_abort: Any = None


def watch(client: Any, rank: int, count: int) -> None:
    """Start the watch of this process, one of several."""
    global _dog
    _dog = Watchdog(client, rank, count, seconds(), _leave)
    _dog.start()
    _explain_abort()


def at(place: str, step: int | None) -> None:
    """Tell the others how far this process is; nothing where it is alone. Costs nothing: the next beat says it."""
    if _dog is not None:
        _dog.at(place, step)


def stop() -> None:
    """This process ends in good order."""
    global _dog
    if _dog is not None:
        dog, _dog = _dog, None
        dog.stop()


def explained(error: BaseException) -> str | None:
    """The line for an error that comes from the end of another process; None for any other error."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    broken = any(sign in f"{type(one).__name__} {one}" for one in chain for sign in _BROKEN)
    return _dog.lost(error) if broken and _dog is not None else None


def _leave(line: str) -> None:
    """End at once: the main thread waits in a collective, and cannot be interrupted."""
    os.write(2, f"epigone: {line}\n".encode(errors="replace"))
    os._exit(1)


def _explain_abort() -> None:
    """JAX aborts a process whose coordinator is gone, from a thread of its own: let our line be the last one."""
    global _on_abort

    def aborted(_: int) -> None:
        if _dog is None:
            os._exit(128 + signal.SIGABRT)
        ended = ([0], "it coordinates the others, and its connection has ended")
        _leave(described(_dog.gone() or ended, _dog.seen()))

    _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, type(_on_abort)], ctypes.c_void_p
    libc.signal(signal.SIGABRT, _on_abort)
