"""What training tells: sums and counts until the last moment, and a curve for the record."""

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from epigone.errors import Fault

Pair = tuple[float, float]
"""A sum and a count: their quotient is the metric, and pairs add up over steps, micro-batches and hosts."""

RATE_WINDOW = 20
"""Steps over which tokens a second are measured: long enough to be steady, short enough to show a change."""


def demand_finite(key: str, step: int, loss: float, gradient_norm: float, learning_rate: float) -> None:
    """Raises Fault, which names the node, for a loss or a gradient that is not a number: a training ends there."""
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        raise Fault(
            f"node '{key}': at step {step} the loss is {loss:g} and the norm of its gradient {gradient_norm:g}: lower "
            f"the learning rate ({learning_rate:g}), lengthen the warm-up, or clip gradients"
        )


@dataclass(frozen=True)
class StepReport:
    """One finished step, for whoever watches.

    Attributes:
        step: steps done.
        steps: steps to do.
        loss: mean loss of this step, in nats a token (times temperature^2 where the objective says so); None of work
            that has none.
        tokens: tokens trained on so far.
        tokens_per_second: measured over the last steps.
        seconds: time so far, that of earlier runs of the same node included.
    """

    step: int
    steps: int
    loss: float | None
    tokens: int
    tokens_per_second: float
    seconds: float


@dataclass
class Progress:
    """All that a run knows about itself beside its arrays; it goes into every checkpoint.

    Attributes:
        tokens: sum of all weights of targets so far.
        seconds: training time so far.
        curve: finished points: step, tokens, seconds, and the mean of each metric since the point before; speed, and
            the comparison with teacher and text, where there are any.
        interval: open pairs of the point to come.
    """

    tokens: float = 0.0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    interval: dict[str, Pair] = field(default_factory=dict)

    def add(self, pairs: Mapping[str, Pair]) -> None:
        """Take in one step. The count of the loss is the number of tokens."""
        self.tokens += pairs["loss"][1]
        for name, (total, count) in pairs.items():
            before = self.interval.get(name, (0.0, 0.0))
            self.interval[name] = (before[0] + total, before[1] + count)

    def close(self, step: int, **more: float) -> dict[str, float]:
        """Finish the point at this step, with what else is known of it, and start the next."""
        means = {name: total / count for name, (total, count) in self.interval.items() if count}
        point = {"step": step, "tokens": round(self.tokens), "seconds": round(self.seconds, 3), **means, **more}
        self.curve.append(point)
        self.interval = {}
        return point


class Clock:
    """Time and speed of one process's run."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._before, self._began = progress, progress.seconds, time.monotonic()
        self._recent = deque([(self._began, progress.tokens)], maxlen=RATE_WINDOW)

    def tick(self) -> float:
        """Note the time of a finished step; returns tokens a second."""
        now, tokens = time.monotonic(), self._progress.tokens
        self._progress.seconds = self._before + now - self._began
        then, tokens_then = self._recent[0]
        self._recent.append((now, tokens))
        return (tokens - tokens_then) / max(now - then, 1e-9)
