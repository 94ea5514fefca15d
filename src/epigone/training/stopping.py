"""Stopping in good order: a first signal lets the step end and a checkpoint be written, a second one ends it hard."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While it is entered, SIGTERM and SIGINT are a wish to stop, seen by `at`.

    With several processes the wish reaches all of them through JAX's coordination service, whichever was signalled,
    and all see it at the same step.
    """

    def __init__(self, several_processes: bool = False) -> None:
        self._several = several_processes
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if not self._several and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()
        if kind is None and self._received is not None:
            # It came when there was nothing left to stop: whoever handled it before is told.
            signal.raise_signal(self._received)

    def at(self, step: int) -> bool:
        """Whether to stop after this step. With several processes it must be asked at every step."""
        if self._several:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._received is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
