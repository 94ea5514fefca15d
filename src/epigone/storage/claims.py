"""Who works at what, in a bucket: objects that one process makes, renews while it works, and deletes.

A claim is made by a conditional write (If-None-Match on S3, ifGenerationMatch on Google Cloud Storage), so that of two
processes one gets it. Its holder writes it anew every BEAT seconds. A holder that died stops doing so: who wants the
claim watches it, and takes it over once it has not changed for LIFE seconds; no clocks of two hosts are compared. A
holder on the same host whose process is gone is known to be dead at once. A holder that was only cut off finds that its
claim is another's.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from epigone.errors import Busy
from epigone.storage.places import entries, failing, key_value_store

BEAT = 10.0
"""Seconds between two writes of a claim that is held."""

LIFE = 60.0
"""Seconds without a write after which a claim is void."""

LONGEST_GIVING_UP = 10.0
"""Seconds that the end of a claim waits for a store that cannot be reached."""

_OURS: set[str] = set()
"""Claims that this process holds."""


class Claim:
    """A claim of this process, or another's that stands in its way.

    Attributes:
        path: the object.
        lives: whether another's was seen to be renewed.
    """

    def __init__(self, path: Path, when_lost: Callable[["Claim"], None] | None = None) -> None:
        """Args: the object; what to call, in a thread, when a claim that was taken became another's."""
        self.path, self.lives, self._when_lost = path, False, when_lost
        self._store, self._key = key_value_store(path.parent), path.name
        self._number, self._beat, self._generation, self._first = uuid.uuid4().hex, 0, b"", b""
        self._since, self._over = 0.0, threading.Event()
        self._thread: threading.Thread | None = None

    def is_free(self) -> bool:
        """Whether nobody has it."""
        return bool(self._store.read(self._key).result().state == "missing")

    def take(self) -> bool:
        """Try once: True if it is ours now, and renewed from now on; False while its holder lives, or may live."""
        read = self._store.read(self._key).result()
        generation = read.stamp.generation
        if read.state != "missing":
            if generation != self._generation:
                self.lives = bool(self._first)
                self._first, self._generation, self._since = self._first or generation, generation, time.monotonic()
            if time.monotonic() - self._since < LIFE and not _is_dead(_content(read.value)):
                return False
        _OURS.add(self._number)
        if not self._write(generation):
            _OURS.discard(self._number)
            return False
        self._thread = threading.Thread(target=self._renew, name=f"claim {self._key}", daemon=True)
        self._thread.start()
        return True

    def give_up(self) -> None:
        """Stop renewing, and delete it if it is still ours."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
        _OURS.discard(self._number)
        with contextlib.suppress(Exception):  # out of reach: it is void in a while
            self._store.write(self._key, None, if_equal=self._generation).result(timeout=LONGEST_GIVING_UP)

    def holder(self) -> str:
        """Who has it, for a message."""
        content = _content(self._store.read(self._key).result().value)
        return f"process {content.get('process', '?')} on {str(content.get('host', '?')).partition(' ')[0]}"

    def _renew(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(Exception):  # out of reach: the next try tells
                if not self._write(self._generation):
                    if self._when_lost is not None and not self._over.is_set():
                        self._when_lost(self)
                    return

    def _write(self, expected: bytes) -> bool:
        self._beat += 1
        # The count makes every write another content: a store whose generations are hashes sees each of them.
        said = {"host": _host(), "process": os.getpid(), "claim": self._number, "beat": self._beat}
        content = json.dumps(said).encode()
        self._store.write(self._key, content, if_equal=expected).result()
        # What counts is what lies there: a write that was made again after a lost answer meets its own first try.
        read = self._store.read(self._key).result()
        if read.value != content:
            return False
        self._generation = read.stamp.generation
        return True


@contextlib.contextmanager
def held(path: Path, shared: bool = False, patient: bool = False) -> Iterator[None]:
    """Hold a claim, as `flock` holds a file: alone, or shared with others that share it.

    Args:
        path: the object of whoever holds it alone; those who share it have objects in PATH.shared/.
        shared: keep out only who would hold it alone.
        patient: wait until others are done; else `Busy` names one that lives.
    """
    folder = path.with_name(f"{path.name}.shared")
    with failing(path):
        mine = Claim(folder / uuid.uuid4().hex if shared else path, _stop)
        _insist(mine, patient)
    try:
        # Ours is there before we look for theirs, and theirs before they look for ours: one of two sees the other.
        for other in [path] if shared else [folder / name for name in entries(folder)]:
            _clear(Claim(other), patient)
        yield
    finally:
        mine.give_up()


def _clear(other: Claim, patient: bool) -> None:
    """Go on when nobody has a claim that stands in the way."""
    if not other.is_free():
        _insist(other, patient)
        other.give_up()


def _insist(claim: Claim, patient: bool) -> None:
    """Take a claim whose holder is dead, or, patiently, done; it is watched until it is seen to live."""
    told = False
    while not claim.take():
        if claim.lives and not patient:
            raise Busy(f"{_what(claim)} is being grown by {claim.holder()}: wait, or stop it")
        if not told:
            warnings.warn(f"{_what(claim)} is claimed by {claim.holder()}: watching whether it lives", stacklevel=4)
        told = True
        time.sleep(min(1.0, BEAT / 4))


def _stop(claim: Claim) -> None:
    """Another process took over, since nothing had been heard of this one: two must not do the same work."""
    warnings.warn(f"{_what(claim)} was taken over by {claim.holder()}: this process stops", stacklevel=2)
    os.kill(os.getpid(), signal.SIGTERM)


def _what(claim: Claim) -> Path:
    return claim.path.parent.parent if claim.path.parent.name.endswith(".shared") else claim.path.parent


@cache
def _host() -> str:
    """Name and boot of this host: another machine may have the same name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def _content(value: bytes) -> dict[str, Any]:
    try:
        found = json.loads(value)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether a holder on this very host is gone."""
    process = holder.get("process")
    if holder.get("host") != _host() or not isinstance(process, int):
        return False
    if process == os.getpid():  # in a container that was started again a process has the number of the one before
        return holder.get("claim") not in _OURS
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
