"""What was asked of an endpoint and what it answered: one SQLite file, in which an answer stands before it counts.

A question is found by a hash of its prompt. Answers are written in groups, each with one flush to the disk; whoever
waits for an answer to be kept goes on when its group is there. So a process that is killed loses nothing that it
counted, and asks again only what was under way.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from epigone.errors import Busy, Fault, UserError

_APPLICATION = 0x45504732
_TABLES = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS answers (
    key BLOB PRIMARY KEY, prompt TEXT NOT NULL, answers TEXT NOT NULL, refused TEXT,
    read INTEGER NOT NULL, written INTEGER NOT NULL, time REAL NOT NULL) STRICT, WITHOUT ROWID;
"""
GROUP_SECONDS = 0.05
"""Answers that come within it are flushed to the disk together."""


class Kept(NamedTuple):
    """A question that is answered for good.

    Attributes:
        prompt: what was asked.
        answers: what was answered: objects with `text`, `why`, and `scores` where they were shown.
        refused: why the endpoint will not answer it; then there are no answers.
        read: tokens of the prompt, as the endpoint counts them.
        written: tokens of the answers.
    """

    prompt: str
    answers: Sequence[dict[str, Any]]
    refused: str | None
    read: int
    written: int


class Totals(NamedTuple):
    """What a journal holds: questions answered and refused, answers, and tokens read and written."""

    questions: int
    refused: int
    answers: int
    read: int
    written: int


def key_of(prompt: str) -> bytes:
    """What a question is found by."""
    return hashlib.blake2b(prompt.encode(errors="surrogatepass"), digest_size=16).digest()


class Journal:
    """The file, open; used as a context.

    Args:
        path: of the file; made if it is not there.
        settings: everything that an answer depends on beside its prompt. A file with others is refused.
        alone: nobody else may have it alone: who asks, or publishes.

    Raises UserError for a file with other settings, Busy where another program has it, Fault for a file of another kind
    and for a full disk.
    """

    def __init__(self, path: Path, settings: dict[str, Any], alone: bool = False) -> None:
        self.path, self._pending = path, list[tuple[list[Kept], asyncio.Future[None]]]()
        self._flushing: asyncio.Task[None] | None = None
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = path.with_suffix(".lock").open("w") if alone else None
            if self._lock is not None:
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._lock.close()
                    raise Busy(f"another program collects into {path}: wait for it, or give another --share") from None
            self._base = sqlite3.connect(path, timeout=10.0, isolation_level=None)
            try:
                self._open(settings)
            except BaseException:
                self._base.close()
                raise

    def _open(self, settings: dict[str, Any]) -> None:
        kind = self._base.execute("PRAGMA application_id").fetchone()[0]
        if kind != _APPLICATION and self._base.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            raise sqlite3.DatabaseError("it is another program's database")
        self._base.execute("PRAGMA journal_mode=WAL")
        self._base.execute("PRAGMA synchronous=FULL")  # an answer that is counted survives a power cut, too
        self._base.execute(f"PRAGMA application_id={_APPLICATION}")
        self._base.executescript(_TABLES)
        wanted = json.dumps(settings, sort_keys=True)
        self._base.execute("INSERT OR IGNORE INTO about VALUES ('settings', ?)", (wanted,))
        found = json.loads(self._base.execute("SELECT value FROM about WHERE name = 'settings'").fetchone()[0])
        if found != json.loads(wanted):
            names = sorted(n for n in {*found, *settings} if found.get(n) != json.loads(wanted).get(n))
            raise UserError(f"{self.path} holds answers to another {', '.join(names)}: give another folder with --to")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with _told(self.path):
            self._base.close()
            if self._lock is not None:
                self._lock.close()

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Those of the prompts that are not answered for good."""
        with _told(self.path):
            find = "SELECT 1 FROM answers WHERE key = ?"
            return [prompt for prompt in prompts if not self._base.execute(find, (key_of(prompt),)).fetchone()]

    @property
    def totals(self) -> Totals:
        """What it holds."""
        with _told(self.path):
            sums = "count(*), coalesce(sum(refused IS NOT NULL), 0), coalesce(sum(json_array_length(answers)), 0)"
            row = self._base.execute(f"SELECT {sums}, coalesce(sum(read), 0), coalesce(sum(written), 0) FROM answers")
            return Totals(*row.fetchone())

    async def put(self, kept: list[Kept]) -> None:
        """Keep answers; they are on the disk when this returns."""
        on_disk = asyncio.get_running_loop().create_future()
        self._pending.append((kept, on_disk))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        await on_disk

    async def _flush(self) -> None:
        await asyncio.sleep(GROUP_SECONDS)
        self.flush()

    def flush(self) -> None:
        """Write down at once what waits for it."""
        group, self._pending = self._pending, []
        try:
            self.write([one for kept, _ in group for one in kept])
        except BaseException as error:
            for _, on_disk in group:
                if not on_disk.done():
                    on_disk.set_exception(error)
            return  # who waits is told
        for _, on_disk in group:
            if not on_disk.done():
                on_disk.set_result(None)

    def write(self, kept: Sequence[Kept]) -> None:
        """Keep answers, all or none; a question that is kept already stays as it is."""
        now = time.time()
        rows = [
            (key_of(one.prompt), one.prompt, json.dumps(one.answers), one.refused, one.read, one.written, now)
            for one in kept
        ]
        with _told(self.path):
            self._base.execute("BEGIN IMMEDIATE")
            try:
                self._base.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            except BaseException:
                self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")

    def __iter__(self) -> Iterator[Kept]:
        """All that is kept, in the order of the hashes: the same whoever asked first."""
        with _told(self.path):
            rows = self._base.execute("SELECT prompt, answers, refused, read, written FROM answers ORDER BY key")
            for prompt, answers, refused, read, written in rows:
                yield Kept(prompt, json.loads(answers), refused, read, written)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Trouble with the file as one line."""
    try:
        yield
    except sqlite3.Error as error:
        raise Fault(f"{path}: {error}: is it a file of 'epigone collect', and is there room on the disk?") from error
    except OSError as error:
        raise Fault(f"{path} cannot be used: {error.strerror or error}") from error
