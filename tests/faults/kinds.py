"""The kinds of fault: each disturbs the running command, and says what it saw that breaks a promise."""

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from faults.command import Running, checkpoints
from faults.place import Ground

SIGNAL_ENDS = 128 + signal.SIGTERM
HANG_SECONDS = 15
"""The product's time limit for a process that does not answer; on a busy machine 8 were too few for a first step."""


@dataclass
class Fault:
    """One that has happened.

    Attributes:
        kind: its name.
        told: what was done, for people.
        broken: promises that were broken.
        damaged: checkpoints of which files were damaged, and what shall be used instead.
    """

    kind: str
    told: str = ""
    broken: list[str] = field(default_factory=list)
    damaged: dict[Path, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        name: of it.
        inflict: does it; the command has made a checkpoint since it was started, unless `early`.
        processes: how many the program must have at least.
        early: whether it may come while the command starts.
        slow: whether the command is started on a slow file system for it.
        needs: whether this ground allows it.
    """

    name: str
    inflict: Callable[[Running, Fault, Ground, Random], None]
    processes: int = 1
    early: bool = False
    slow: bool = False
    needs: Callable[[Ground], bool] = lambda ground: True


def sigkill(running: Running, fault: Fault, ground: Ground, random: Random) -> None:
    """All processes at once, as when a machine dies."""
    running.kill()


def sigterm(running: Running, fault: Fault, ground: Ground, random: Random) -> None:
    """As a scheduler does before it takes the machine away."""
    running.process.send_signal(signal.SIGTERM)
    code = running.end()
    if code == 0 or (code == -signal.SIGTERM and running.last_line.startswith("report: ")):
        fault.told = "came when all was done"
    elif code in (-signal.SIGTERM, 1) and not running.output.strip():
        fault.told = "came before the command could listen"
    elif code != SIGNAL_ENDS or "the same command goes on from here" not in running.output:
        fault.broken.append(f"after SIGTERM: exit code {code}, '{running.last_line}'")


def sigstop(running: Running, fault: Fault, ground: Ground, random: Random) -> None:
    """One process stands still for a while, shorter than the time limit, and goes on."""
    worker, seconds = random.choice(running.workers()), random.uniform(0.3, 3.0)
    fault.told = f"for {seconds:.1f} s"
    os.kill(worker, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(worker, signal.SIGCONT)
    before = running.progress()
    running.until(lambda: running.progress() > before)
    if running.process.poll() not in (None, 0):
        fault.broken.append(f"after SIGSTOP and SIGCONT: exit code {running.process.poll()}, '{running.last_line}'")


def full_disk(running: Running, fault: Fault, ground: Ground, random: Random) -> None:
    """Not a byte is left, until the command has ended."""

    def filled() -> bool:
        ground.fill()
        return running.process.poll() is not None

    ground.fill()
    if not ground.is_full():
        fault.broken.append("the harness could not fill the disk")
    running.until(filled)
    ground.free()
    code = running.end()
    known = "No space left" in running.output or "disk is full" in running.output
    if code == 0:
        fault.told = "nothing was written any more"
    elif code != 1 or not known or "Traceback" in running.output:
        fault.broken.append(f"on a full disk: exit code {code}, '{running.last_line}'")


def slow_files(running: Running, fault: Fault, ground: Ground, random: Random) -> None:
    """Started so that all its files are slow; killed in the middle."""
    running.kill()


def truncated(running: Running, fault: Fault, ground: Ground, random: Random) -> None:
    """A file of the newest checkpoint ends early."""

    def cut(path: Path) -> None:
        os.truncate(path, random.randrange(path.stat().st_size))

    _damage(running, fault, random, cut)


def corrupted(running: Running, fault: Fault, ground: Ground, random: Random) -> None:
    """One bit of a file of the newest checkpoint is another."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(data)

    _damage(running, fault, random, flip)


def deleted(running: Running, fault: Fault, ground: Ground, random: Random) -> None:
    """A file of the newest checkpoint is gone."""
    _damage(running, fault, random, Path.unlink)


def _damage(running: Running, fault: Fault, random: Random, harm: Callable[[Path], None]) -> None:
    """Kill the command where a node has two checkpoints, and harm a file of the newer one."""

    def pair() -> tuple[Path, ...]:
        found = sorted(path for path, _ in checkpoints(running.command.run))
        last = [path for path in found if found and path.parent == found[-1].parent][-2:]
        return tuple(last) if len(last) == 2 else ()

    while running.until(lambda: bool(pair())) and running.process.poll() is None:
        running.kill()
    if not (both := pair()):
        return
    before, newest = both
    path = random.choice(sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size))
    harm(path)
    fault.told = f"{path.relative_to(newest)} of {newest.name}"
    fault.damaged = {newest: before}


def dropped_worker(running: Running, fault: Fault, ground: Ground, random: Random) -> None:
    """One process of several is killed: the others say which one, and end."""
    _lose(running, fault, random, signal.SIGKILL)


def hung_worker(running: Running, fault: Fault, ground: Ground, random: Random) -> None:
    """One process of several stands still for ever: after the time limit the others say which one, and end."""
    _lose(running, fault, random, signal.SIGSTOP)


def _lose(running: Running, fault: Fault, random: Random, number: signal.Signals) -> None:
    workers = running.workers()
    rank = random.randrange(len(workers))
    fault.told = f"process {rank}"
    os.kill(workers[rank], number)
    code = running.end()
    if code == 0:
        fault.told += " (all was done)"
    elif code != 1 or not re.search(rf"^\[\d+\] epigone: missing: process {rank} \(host ", running.output, re.M):
        fault.broken.append(f"process {rank} was lost: exit code {code}, '{running.last_line}' does not name it")


KINDS = (
    Kind("SIGKILL", sigkill, early=True),
    Kind("SIGTERM", sigterm, early=True),
    Kind("SIGSTOP, SIGCONT", sigstop),
    Kind("full disk", full_disk, needs=lambda ground: ground.own_disk),
    Kind("slow file system", slow_files, slow=True, needs=lambda ground: ground.slow is not None),
    Kind("truncated checkpoint", truncated),
    Kind("corrupted checkpoint", corrupted),
    Kind("deleted file", deleted),
    Kind("dropped worker", dropped_worker, processes=2),
    Kind("hung worker", hung_worker, processes=2),
)
