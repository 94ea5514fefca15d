"""The work of one process: what it is given, and how it answers the process that times it."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TEMPERATURE, HARD_WEIGHT, LEARNING_RATE, WEIGHT_DECAY = 2.0, 0.5, 1e-4, 0.1


class Work(NamedTuple):
    """Where the weights of teacher and student lie, and the sizes of the batch."""

    folder: Path
    batch_size: int
    length: int
    threads: int

    def rows(self, vocab_size: int) -> np.ndarray:
        """Random tokens [B, T + 1]: inputs, and one further on the targets."""
        return np.random.default_rng(0).integers(4, vocab_size, (self.batch_size, self.length + 1)).astype(np.int32)

    def sizes(self, role: str) -> dict[str, Any]:
        """The config.json of `teacher` or `student`."""
        return json.loads((self.folder / role / "config.json").read_text())


class Answers:
    """Steps one at a time, as they are asked for by name on standard input; a line of JSON on standard output for each.

    A trainer with a loop of its own calls `done` at the end of each step, and so waits there for the next request.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no answer

    def ready(self) -> str:
        """All is at hand: waits for a request, and gives its name."""
        self._tell({"ready": True})
        return self._asked()

    def done(self, value: float | None) -> str:
        """The step is finished, as `ready`. `value`: its loss, or a speed, where that is known."""
        self._tell({"seconds": time.perf_counter() - self._begun, "value": value, "peak": peak_bytes()})
        return self._asked()

    def serve(self, **steps: Callable[[], float]) -> None:
        """Do each step when it is asked for."""
        name = self.ready()
        while True:
            name = self.done(steps[name]())

    def _tell(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self._out, flush=True)

    def _asked(self) -> str:
        name = sys.stdin.readline().strip()
        if not name:
            os._exit(0)
        self._begun = time.perf_counter()
        return name


def peak_bytes() -> int:
    """The most memory that this process has had so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


SHAPES = ((2048, 2048, 2048), (4096, 512, 8192), (4096, 4096, 1024))
"""Rows, depth and columns of the products that measure the machine's peak."""


def fastest_product(make: Callable[[int, int, int], Callable[[], Any]]) -> Callable[[], float]:
    """A step that gives the most FLOP/s of products [rows, depth] @ [depth, columns] in float32, found so far."""
    jobs = [(2.0 * np.prod(shape), make(*shape)) for shape in SHAPES]

    found = 0.0

    def step() -> float:
        nonlocal found
        for flops, job in jobs * 3:
            begun = time.perf_counter()
            job()
            found = max(found, flops / (time.perf_counter() - begun))
        return found

    return step
