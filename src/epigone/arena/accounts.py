"""API keys, what each may use, and the query log: one SQLite file, in which a question stands before it is answered.

Keys are kept as SHA-256 hashes: they are 256 random bits, which nobody guesses, so a slower hash would protect nothing.
A question is written down with what it may cost at most, and settled when it is answered; what a killed server had not
answered is given back at the next start, and stands in the log as unanswered.
"""

import contextlib
import fcntl
import hashlib
import json
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from epigone.arena.detectors import Query
from epigone.errors import Busy, Fault, UserError, check_name, check_sizes

DAY = 86_400
UNANSWERED = 0
"""The status of a question whose answer never left."""

_APPLICATION = 0x45504731
_TABLES = """
CREATE TABLE IF NOT EXISTS keys (
    name TEXT PRIMARY KEY, hash BLOB NOT NULL UNIQUE, state TEXT NOT NULL, made REAL NOT NULL,
    a_minute INTEGER NOT NULL, a_day INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS used (
    name TEXT NOT NULL, day INTEGER NOT NULL, questions INTEGER NOT NULL, tokens INTEGER NOT NULL,
    PRIMARY KEY (name, day)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS questions (
    number INTEGER PRIMARY KEY, time REAL NOT NULL, name TEXT NOT NULL, path TEXT NOT NULL, prompt TEXT NOT NULL,
    settings TEXT NOT NULL, reserved INTEGER NOT NULL, status INTEGER, written INTEGER, seconds REAL) STRICT;
CREATE INDEX IF NOT EXISTS open_questions ON questions (number) WHERE status IS NULL;
"""


class State(StrEnum):
    """What is done to a key: nothing, its questions get no scores, or it is refused."""

    OPEN = "open"
    DEGRADED = "degraded"
    REFUSED = "refused"


class Key(NamedTuple):
    """A key.

    Attributes:
        name: whose it is.
        state: what is done to it.
        a_minute: questions that it may ask in a minute.
        a_day: tokens that it may read and write in a day (UTC).
    """

    name: str
    state: State
    a_minute: int
    a_day: int


class Used(NamedTuple):
    """What a key used today: questions, and tokens read and written."""

    questions: int
    tokens: int


@dataclass(frozen=True)
class Bounds:
    """What one question may want.

    Attributes:
        body: bytes of a question.
        seconds: for its texts to be written, from when it is asked.
        patience: seconds for a client to send a whole question.
        texts: prompts times n.
    """

    body: int = 2**18
    seconds: float = 120.0
    patience: float = 10.0
    texts: int = 16

    def __post_init__(self) -> None:
        check_sizes(self, body=1, texts=1)
        if min(self.seconds, self.patience) <= 0:
            raise UserError(f"seconds={self.seconds}, patience={self.patience}: both must be above 0")


class OverQuota(Exception):
    """A key has used what it may in a day; `seconds` until the next one."""

    def __init__(self, key: Key, tokens: int, seconds: int) -> None:
        super().__init__(f"{tokens} tokens more than are left of {key.a_day} a day; the day ends in {seconds} s (UTC)")
        self.seconds = seconds


class Accounts:
    """The file, open; used as a context. `serving` holds it alone, as a server must.

    Raises Fault where the file is none of this kind or cannot be written, Busy where another server holds it.
    """

    def __init__(self, path: Path, serving: bool = False) -> None:
        self.path, self._stack = path, contextlib.ExitStack()
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if serving:
                self._hold()
            path.touch(mode=0o600)  # prompts are nobody else's business
            self._base = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
            self._stack.callback(self._base.close)
            self._open(serving)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def _hold(self) -> None:
        file = self._stack.enter_context(self.path.with_name(f"{self.path.name}.server").open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another server uses {self.path}: stop it, or give another file with --box") from None

    def _open(self, serving: bool) -> None:
        kind = self._base.execute("PRAGMA application_id").fetchone()[0]
        tables = self._base.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if kind != _APPLICATION and tables:
            raise sqlite3.DatabaseError("it is another program's database")
        self._base.execute("PRAGMA journal_mode=WAL")
        self._base.execute("PRAGMA synchronous=NORMAL")  # in WAL, a killed process loses nothing by it
        if kind != _APPLICATION:
            self._base.execute(f"PRAGMA application_id={_APPLICATION}")
        self._base.executescript(_TABLES)
        if serving:
            for (number,) in self._base.execute("SELECT number FROM questions WHERE status IS NULL").fetchall():
                self.settle(number, UNANSWERED, 0, 0, 0.0)

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[sqlite3.Connection]:
        with _told(self.path):
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield self._base
            except BaseException:
                self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")

    def add(self, name: str, a_minute: int, a_day: int) -> str:
        """Make a key and return it; it is kept nowhere. Raises UserError for a name that has one."""
        check_name(name)
        if a_minute < 1 or a_day < 1:
            raise UserError(f"a_minute={a_minute} and a_day={a_day}: at least 1 question and 1 token")
        secret = f"epigone-{secrets.token_urlsafe(32)}"
        row = (name, _hash(secret), State.OPEN, time.time(), a_minute, a_day)
        with self._all_or_nothing() as base:
            if base.execute("SELECT 1 FROM keys WHERE name = ?", (name,)).fetchone():
                raise UserError(f"'{name}' has a key: take another name, or delete that one first")
            base.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?)", row)
        return secret

    def change(self, name: str, state: State) -> None:
        """Open, degrade or refuse a key. Raises UserError where there is none of this name."""
        with self._all_or_nothing() as base:
            if not base.execute("UPDATE keys SET state = ? WHERE name = ?", (state, name)).rowcount:
                raise UserError(f"nobody has the name '{name}' in {self.path}")

    def delete(self, name: str) -> None:
        """Forget a key; its questions stay in the log. Raises UserError where there is none of this name."""
        with self._all_or_nothing() as base:
            if not base.execute("DELETE FROM keys WHERE name = ?", (name,)).rowcount:
                raise UserError(f"nobody has the name '{name}' in {self.path}")

    def everyone(self) -> list[tuple[Key, Used]]:
        """All keys by name, with what they used today."""
        with _told(self.path):
            rows = self._base.execute("SELECT name, state, a_minute, a_day FROM keys ORDER BY name").fetchall()
            return [(_key(row), self.used(row[0])) for row in rows]

    def find(self, secret: str) -> Key | None:
        """The key that was given."""
        with _told(self.path):
            found = self._base.execute("SELECT name, state, a_minute, a_day FROM keys WHERE hash = ?", (_hash(secret),))
            row = found.fetchone()
        return None if row is None else _key(row)

    def used(self, name: str) -> Used:
        """What a key used today; what it may still cost is counted."""
        row = (name, int(time.time()) // DAY)
        found = self._base.execute("SELECT questions, tokens FROM used WHERE name = ? AND day = ?", row).fetchone()
        return Used(*(found or (0, 0)))

    def note(self, key: Key, path: str, prompt: object, settings: object, most: int) -> int:
        """Write a question down before it is answered. Returns its number.

        Args:
            key: who asks.
            path: of the endpoint.
            prompt: what is asked, written as JSON; token ids of the texts first.
            settings: everything else that was asked for, written as JSON.
            most: tokens that it may read and write.

        Raises OverQuota where the key may not use so many today.
        """
        now = time.time()
        day = int(now) // DAY
        with self._all_or_nothing() as base:
            tokens = self.used(key.name).tokens
            if tokens + most > key.a_day:
                raise OverQuota(key, most - max(0, key.a_day - tokens), (day + 1) * DAY - int(now))
            base.execute(
                "INSERT INTO used VALUES (?, ?, 1, ?) ON CONFLICT DO UPDATE SET "
                "questions = questions + 1, tokens = tokens + excluded.tokens",
                (key.name, day, most),
            )
            row = (now, key.name, path, json.dumps(prompt), json.dumps(settings), most)
            done = base.execute(
                "INSERT INTO questions (time, name, path, prompt, settings, reserved) VALUES (?, ?, ?, ?, ?, ?)", row
            )
        return int(done.lastrowid or 0)

    def settle(self, number: int, status: int, read: int, written: int, seconds: float) -> None:
        """How a question ended: its HTTP status, the tokens that it cost, and how long it took."""
        with self._all_or_nothing() as base:
            found = base.execute("SELECT time, name, reserved FROM questions WHERE number = ?", (number,)).fetchone()
            asked, name, reserved = found
            base.execute(
                "UPDATE used SET tokens = tokens + ? WHERE name = ? AND day = ?",
                (read + written - reserved, name, int(asked) // DAY),
            )
            row = (status, written, seconds, number)
            base.execute("UPDATE questions SET status = ?, written = ?, seconds = ? WHERE number = ?", row)

    def log(self, since: float = 0.0) -> Iterable[Query]:
        """The questions of all keys in order, one line for each prompt, as the detectors read them."""
        with _told(self.path):
            rows = self._base.execute(
                "SELECT time, name, prompt FROM questions WHERE time >= ? ORDER BY time", (since,)
            )
            for asked, name, prompt in rows:
                for ids in json.loads(prompt):
                    yield Query(asked, name, np.array(ids, np.int32))


def _key(row: tuple[str, str, int, int]) -> Key:
    name, state, a_minute, a_day = row
    return Key(name, State(state), a_minute, a_day)


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="replace")).digest()


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Trouble with the file as one line."""
    try:
        yield
    except sqlite3.Error as error:
        raise Fault(f"{path}: {error}: is it a file of 'epigone serve', and is there room on the disk?") from error
    except OSError as error:
        raise Fault(f"{path} cannot be used: {error.strerror or error}") from error
