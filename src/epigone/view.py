"""What a person sees while a lineage grows: which node, how far, how long still."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from epigone.lineage import Node

COUNTING_WORK = 5e10
"""Work of a node that counts, in the FLOPs of a decoder that takes about as long."""

MEASURING_WORK = 3e11
"""Work of a decoder beside its training (to read, write and be measured), in the same unit."""

MEASURED_TOKENS = 20_000
"""Tokens that a decoder reads while it is measured: little for a small one, minutes for a large one."""

SHOWN = 6
"""Finished nodes that stay in sight."""

QUIET_SECONDS = 15
"""Without a terminal, a node that trains says so this often."""


def work_of(parameters: int | None, flops: int | None) -> float:
    """How much work a node will be, from its parameters and the FLOPs of its training, where they are known before."""
    if parameters is None:
        return COUNTING_WORK
    return (flops or 0) + MEASURING_WORK + 2.0 * parameters * MEASURED_TOKENS


class View(Protocol):
    """Hears what happens while a lineage grows."""

    def start(self, node: Node) -> None:
        """A node begins to grow."""

    def stage(self, name: str, steps: int | None = None) -> None:
        """It goes on to another kind of work, of a known number of steps or none."""

    def step(self, report: Any) -> None:
        """A training step is done: a `StepReport` of the trainer."""

    def finish(self, node: Node, record: dict[str, Any]) -> None:
        """It is done."""


@dataclass
class Terminal:
    """A live table on a terminal; plain lines anywhere else.

    Attributes:
        title: the lineage's name.
        work: how much work each node that is still to be grown will be, in any unit; the ETA is in proportion.
        console: where to show it.
    """

    title: str
    work: dict[str, float]
    console: Console = field(default_factory=Console)
    _began: float = field(default_factory=time.monotonic)
    _done: dict[str, float] = field(default_factory=dict)
    _recent: deque[tuple[Node, dict[str, Any]]] = field(default_factory=lambda: deque(maxlen=SHOWN))
    _node: Node | None = None
    _stage: str = ""
    _steps: int | None = None
    _report: Any = None
    _stage_began: float = 0.0
    _said: float = 0.0
    _beside: dict[int, str] = field(default_factory=dict)

    def __enter__(self) -> "Terminal":
        self._live = Live(get_renderable=self.render, console=self.console, refresh_per_second=4, transient=True)
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def start(self, node: Node) -> None:
        self._node, self._report = node, None

    def stage(self, name: str, steps: int | None = None) -> None:
        self._stage, self._steps, self._report = name, steps, None
        self._stage_began = time.monotonic()
        if self._node is not None:
            self._said = self._stage_began
        elif not self.console.is_terminal and self._stage_began - self._said > QUIET_SECONDS:
            self._said = self._stage_began
            self.console.print(f"  {name}", highlight=False, soft_wrap=True)

    def step(self, report: Any) -> None:
        resumed, self._report = self._report is None and report.step > 1, report
        if self.console.is_terminal:
            return
        if resumed:
            at = f"goes on at step {report.step} of {report.steps}"
            self.console.print(f"  {self._title()}: {at}", highlight=False, soft_wrap=True)
        if time.monotonic() - self._said > QUIET_SECONDS:
            self._said = time.monotonic()
            self.console.print(f"  {self._title()}: {self._progress()}", highlight=False, soft_wrap=True)

    def finish(self, node: Node, record: dict[str, Any]) -> None:
        self._done[node.key] = time.monotonic() - self._began
        self._recent.append((node, record))
        self._node, self._stage = None, ""
        if not self.console.is_terminal:
            done, left = f"{len(self._done)}/{len(self.work)}", clock(self.seconds_left())
            self.console.print(f"{done:>9}  {summary(node, record)}  left {left}", highlight=False, soft_wrap=True)

    def beside(self, number: int, at: str) -> None:
        """What one of several processes that grow nodes is at."""
        self._beside[number] = at
        if not self.console.is_terminal and time.monotonic() - self._said > QUIET_SECONDS:
            self._said = time.monotonic()
            for line in self._beside.values():
                self.console.print(f"  {line}", highlight=False, soft_wrap=True)

    def seconds_left(self) -> float | None:
        """Time so far, in proportion to the work that is left; None before anything is known."""
        whole, done = sum(self.work.values()), sum(self.work.get(key, 0.0) for key in self._done)
        if self._node and self._report and self._steps:
            done += self.work.get(self._node.key, 0.0) * self._report.step / self._steps
        elapsed = time.monotonic() - self._began
        return None if done <= 0 else max(0.0, elapsed * (whole - done) / done)

    def render(self) -> RenderableType:
        """The live view: the run, the node at hand, the nodes that were last done."""
        whole = Table.grid(padding=(0, 2))
        elapsed, left = time.monotonic() - self._began, self.seconds_left()
        whole.add_row(
            f"[bold]{self.title}[/]",
            ProgressBar(total=max(1, len(self.work)), completed=len(self._done), width=32),
            f"{len(self._done)}/{len(self.work)} nodes",
            f"{clock(elapsed)} gone, {clock(left)} left",
        )
        now = Table.grid(padding=(0, 2))
        if self._stage:
            bar = ProgressBar(total=self._steps or 1, completed=self._report.step if self._report else 0, width=32)
            now.add_row(f"[cyan]{self._title()}[/]", bar if self._steps else "", self._progress())
        for line in self._beside.values():
            now.add_row(f"[cyan]{line}[/]")
        lines = [f"[green]done[/] {summary(node, record)}" for node, record in self._recent]
        return Group(whole, now, *lines)

    def _title(self) -> str:
        return f"{self._node.key} {self._stage}" if self._node else self._stage

    def _progress(self) -> str:
        if self._report is None:
            return f"{time.monotonic() - self._stage_began:.0f} s"
        report, steps = self._report, self._steps or 0
        left = (time.monotonic() - self._stage_began) * (steps - report.step) / max(1, report.step)
        speed = f"{report.tokens_per_second:,.0f} tokens/s"
        loss = "" if report.loss is None else f"loss {report.loss:.3f}  "
        return f"step {report.step}/{steps}  {loss}{speed}  {clock(left)} left"


def summary(node: Node, record: dict[str, Any]) -> str:
    """One line for a node that is done."""
    metrics = record.get("metrics", {})
    parts = [f"{node.key:<26}"]
    if "perplexity" in metrics:
        parts.append(f"perplexity {metrics['perplexity']:>8.1f}")
    if "distinct_2" in metrics:
        parts.append(f"distinct-2 {metrics['distinct_2']:.3f}")
    return "  ".join([*parts, f"{record.get('seconds', 0.0):6.1f} s"])


def clock(seconds: float | None) -> str:
    """Minutes and seconds, with hours when there are any; '?' for what is not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
