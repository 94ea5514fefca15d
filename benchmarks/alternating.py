"""What benchmarks share: jobs one at a time in an order that rotates, ratios within a round, Liger without a GPU."""

import importlib
import os
import sys
import time
import types
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

PAUSE = 0.3
"""Seconds between two jobs, in which threads of the last one that still spin come to rest."""


def in_turn(jobs: dict[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    """What each job gives in each round. Every round calls every job once, and begins with another one."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE)
            found[name].append(jobs[name]())
    return {name: np.array(values) for name, values in found.items()}


def seconds_of(job: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    begun = time.perf_counter()
    job()
    return time.perf_counter() - begun


TRIES = 3
"""How often a job is repeated because others used the processor, before it counts as it is."""


def undisturbed(job: Callable[[], float], pid: int) -> float:
    """What `job` gives, which has process `pid` at work; again where others took a twentieth of the processor."""
    for _ in range(TRIES):
        begun, busy, own = time.perf_counter(), _busy_seconds(), _seconds_of(pid)
        found = job()
        others = (_busy_seconds() - busy) - (_seconds_of(pid) - own)
        if others < 0.05 * (time.perf_counter() - begun) * (os.cpu_count() or 1):
            break
        time.sleep(PAUSE)
    return found


def _busy_seconds() -> float:
    """Processor time of all processes so far, and what the host took."""
    user, nice, system, _, _, *more = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK")


def _seconds_of(pid: int) -> float:
    """Processor time of one process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def quartiles(values: Iterable[float], against: Iterable[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the ratio within a round."""
    low, middle, high = np.quantile(np.asarray(values) / np.asarray(against), (0.25, 0.5, 0.75))
    return low, middle, high


def liger_loss(**options: Any) -> Any:
    """Liger's chunked Jensen-Shannon loss. Its package imports GPU packages, which the chunked losses do not need."""
    if "liger_kernel" not in sys.modules:
        spec = find_spec("liger_kernel")
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("No module named 'liger_kernel'", name="liger_kernel")
        for name in ("liger_kernel", "liger_kernel.chunked_loss"):
            package = types.ModuleType(name)
            package.__path__ = [str(Path(spec.submodule_search_locations[0], *name.split(".")[1:]))]
            sys.modules[name] = package
    module = importlib.import_module("liger_kernel.chunked_loss.jsd_loss")
    return module.LigerFusedLinearJSDLoss(**options)
