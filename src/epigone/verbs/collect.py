"""`epigone collect CONFIG`: ask an endpoint very many prompts, and keep what it answers as a data set."""

import asyncio
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from epigone.cli import Place, parse
from epigone.errors import Stopped, UserError
from epigone.storage.places import reached
from epigone.view import QUIET_SECONDS, clock


@dataclass(frozen=True)
class Collect:
    """Ask an endpoint what a config says, once: give the same command again and it goes on.

    The endpoint must be one that you run or may use. What it states of its limits is kept.

    Attributes:
        config: a Python file whose function 'collection' returns an epigone.arena.collector.Collection.
        to: the folder of journals and data set; by default collections/NAME.
        data: where corpora of prompts are prepared; by default beside the folder.
        share: which part of the prompts this program asks, as 3/8 for the fourth of eight; the same command on several
            machines, each with another share, asks all of them.
        dry_run: say what it may cost at most, and ask nothing.
        merge: make the data set of what all shares have collected, and ask nothing.
    """

    config: tyro.conf.Positional[Path]
    to: Path | None = None
    data: Place | None = None
    share: str = "0/1"
    dry_run: bool = False
    merge: bool = False


def collect_answers(arguments: Sequence[str]) -> None:
    """Collect, and publish the data set where this is the only share."""
    given: Collect = parse(Collect, arguments, "epigone collect")
    try:
        from epigone.arena.collector import Collection, Share, collect, estimate, publish
    except ModuleNotFoundError as error:
        raise UserError(f"'{error.name}' is missing: pip install 'epigone[collect]'") from None
    from epigone.arena.journal import Journal
    from epigone.verbs.run import load_function

    collection = load_function(given.config, "collection", "that returns a Collection")()
    if not isinstance(collection, Collection):
        raise UserError(f"'collection' of '{given.config}' returned {type(collection).__name__}, not a Collection")
    folder = given.to or Path("collections") / collection.name
    share = Share(*_share(given.share))
    console = Console(soft_wrap=True)
    if given.merge:
        _told(publish(collection, folder), folder)
        return
    data = given.data or reached(str(folder.parent / "data"))
    expected = estimate(collection, (prompt for prompt in collection.prompts(data) if share.has(prompt)))
    most = f"at most {expected.tokens:,} tokens" + (f" and {expected.money:,.2f} of money" if expected.money else "")
    count = f"{expected.prompts:,} prompts{'' if expected.is_all else ' (and more, which are not counted here)'}"
    console.print(
        f"{collection.name}: {count} for {collection.endpoint.model} at {collection.endpoint.url}; {most}",
        highlight=False,
    )
    if given.dry_run:
        return
    with (
        Journal(share.journal(folder), collection.settings, alone=True) as journal,
        _View(console, expected.prompts) as view,
    ):
        before = journal.totals
        work = collect(collection, journal, collection.prompts(data), share, view)
        done = asyncio.run(_until_told(work))
        if before.questions:
            console.print(f"{before.questions:,} had been asked before", highlight=False)
    spent = f"{done.now:,} asked now, {done.refused:,} refused; {done.tokens:,} tokens in all"
    console.print(spent + (f", {done.money:,.2f} of money" if done.money else ""), highlight=False)
    if done.stopped:
        console.print(f"stopped: {done.stopped}", highlight=False)
    if share.of == 1:
        _told(publish(collection, folder), folder)


def _share(given: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", given)
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(f"--share {given}: write 0/8 for the first of eight, 7/8 for the last")
    return int(found[1]), int(found[2])


def _told(card: dict, folder: Path) -> None:
    counts = card["collected"]
    print(f"{counts['answers']:,} answers to {counts['questions'] - counts['refused']:,} prompts: {folder / 'answers'}")


async def _until_told(work):
    """The result of some work, which SIGTERM ends as Ctrl-C does: what is answered is kept."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise Stopped("stopped by SIGTERM; the same command goes on from here") from None


class _View:
    """How far it is: a bar on a terminal, a line now and then anywhere else."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.said, self.began = console, total, time.monotonic(), time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, transient=True)
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> "_View":
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, progress) -> None:
        money = f"  {progress.money:,.2f}" if progress.money else ""
        line = f"{progress.asked:,}/{self.total:,}  {progress.tokens:,} tokens{money}  {progress.allowed} at once"
        if self.console.is_terminal:
            self.bar.update(self.task, completed=progress.asked, description=line)
        elif time.monotonic() - self.said > QUIET_SECONDS:
            self.said = time.monotonic()
            seconds = (self.said - self.began) / progress.now * max(0, self.total - progress.asked)
            self.console.print(f"  {line}  left {clock(seconds)}", highlight=False, soft_wrap=True)
