"""How far long work is and how long it will still take, on standard error."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 15
"""Without a terminal, a line so often."""


@contextlib.contextmanager
def progress(title: str, total: float) -> Iterator[Callable[[float], None]]:
    """Give a function that hears of each further part of the `total` that is done; the bar goes when all is."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(title, total, console).advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


class _Lines:
    """Plain lines, for a log."""

    def __init__(self, title: str, total: float, console: Console) -> None:
        self.title, self.total, self.console = title, total, console
        self.done, self.began = 0.0, time.monotonic()
        self.said = self.began

    def advance(self, done: float) -> None:
        self.done += done
        now = time.monotonic()
        if now - self.said > QUIET_SECONDS and 0 < self.done < self.total:
            self.said, left = now, (now - self.began) * (self.total - self.done) / self.done
            self.console.print(f"{self.title} {self.done / self.total:.0%}, {left:.0f} s left", highlight=False)
