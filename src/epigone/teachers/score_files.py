"""Scores on disk: ArrayRecord shards of segments, found by the content of a segment.

A segment's key is a hash of its tokens: so what was kept is found again in another order, in other batches, on another
mesh. A record is the key, a CRC-32 of the rest, and the rest (`score_records`); the last record of a shard holds the
keys of all others. A shard appears whole or not at all. Several processes on several hosts share the work by claims,
which are files: nothing else is between them. A claim that was not renewed for a while is void.
"""

import contextlib
import hashlib
import os
import socket
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from epigone.errors import Fault
from epigone.storage.folders import cache, fetched_file
from epigone.storage.places import Entry, entries, on_store, put_file

KEY_BYTES = 16
STALE_SECONDS = 120.0
"""Seconds after which a claim that nobody renewed is void."""

_OPTIONS = "group_size:16,uncompressed"


class Segment(NamedTuple):
    """Where a segment is in a batch or a packing: row, first position, length; and its key."""

    row: int
    first: int
    length: int
    key: bytes


def segments(tokens_BT: np.ndarray, segments_BT: np.ndarray) -> list[Segment]:
    """All segments of rows, in order; padding (segment 0) is none."""
    found = []
    for row, numbers_T in enumerate(segments_BT):
        borders = np.flatnonzero(np.diff(numbers_T, prepend=0, append=0))
        for first, end in pairwise(borders):
            if numbers_T[first]:
                content = tokens_BT[row, first:end].astype("<i4").tobytes()
                key = hashlib.blake2b(content, digest_size=KEY_BYTES).digest()
                found.append(Segment(row, int(first), int(end - first), key))
    return found


class ScoreFiles:
    """All shards of one folder. Raises Fault where one is damaged."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._shards: dict[str, Any] = {}
        self._keys = np.empty((0, 2), "<u8")
        self._places = np.empty((0, 2), np.int64)
        self._readers: list[Any] = []
        self.refresh()

    def __len__(self) -> int:
        """Segments of all shards."""
        return len(self._keys)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(size for size, _ in self._listed().values())

    def refresh(self) -> None:
        """See the shards that others have written since."""
        listed = {name: entry for name, entry in self._listed().items() if name not in self._shards}
        new = [(name, fetched_file(self.directory / name, mark)) for name, (_, mark) in sorted(listed.items())]
        keys, places = [self._keys], [self._places]
        for name, path in new:
            reader, found = _open(path)
            keys.append(found)
            places.append(np.stack([np.full(len(found), len(self._readers)), np.arange(len(found))], axis=1))
            self._shards[name] = path
            self._readers.append((path, reader))
        if new:
            all_keys, all_places = np.concatenate(keys), np.concatenate(places)
            order = np.argsort(all_keys[:, 0], kind="stable")
            self._keys, self._places = all_keys[order], all_places[order]

    def _listed(self) -> dict[str, Entry]:
        """The shards that are there."""
        if on_store(self.directory):
            found = entries(self.directory)
        else:
            paths = self.directory.glob("*.array_record")
            found = {path.name: Entry(path.stat().st_size, "") for path in paths}
        return {name: entry for name, entry in found.items() if name.endswith(".array_record")}

    def missing(self, wanted: Sequence[bytes]) -> list[int]:
        """Which of the keys are in no shard."""
        return [number for number, place in enumerate(self._find(wanted)) if place < 0]

    def read(self, wanted: Sequence[bytes]) -> list[bytes]:
        """What was written of segments, checked. Raises KeyError for a key that is in no shard."""
        found = self._find(wanted)
        if (found < 0).any():
            raise KeyError(wanted[int(np.argmin(found))])
        places, parts = self._places[found], [b""] * len(wanted)
        for shard in np.unique(places[:, 0]):
            mine = np.flatnonzero(places[:, 0] == shard)
            path, reader = self._readers[shard]
            try:
                records = reader.read(places[mine, 1].tolist())
            except (RuntimeError, ValueError, IndexError, OSError) as error:
                raise _damaged(path, str(error)) from error
            for number, record in zip(mine, records, strict=True):
                parts[number] = _checked(path, record, wanted[int(number)])
        return parts

    def write(self, name: str, content: Iterable[tuple[bytes, bytes]]) -> None:
        """Store (key, record) pairs as the shard of this name. Raises Fault if the disk is full."""
        from array_record.python import array_record_module

        target = self.directory / f"{name}.array_record"
        here = cache() if on_store(self.directory) else self.directory
        partial = here / f".{name}.{socket.gethostname()}-{os.getpid()}.partial"
        keys = []
        try:
            with _writing(here):
                writer = array_record_module.ArrayRecordWriter(str(partial), _OPTIONS)
            for key, record in content:
                keys.append(key)
                with _writing(here):
                    writer.write(key + zlib.crc32(record).to_bytes(4, "little") + record)
            with _writing(here):
                writer.write(b"".join(keys))
                writer.close()
                put_file(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        self.refresh()

    def _find(self, wanted: Sequence[bytes]) -> np.ndarray:
        """Places of keys in the sorted list of all; -1 where there is none."""
        keys = np.frombuffer(b"".join(wanted), "<u8").reshape(-1, 2)
        at = np.searchsorted(self._keys[:, 0], keys[:, 0])
        found = np.full(len(keys), -1, np.int64)
        for step in range(len(self._keys)):  # one round, unless the first halves of two keys are equal
            near = np.minimum(at + step, len(self._keys) - 1)
            same = (self._keys[near] == keys).all(axis=1) & (found < 0) & (at + step < len(self._keys))
            found[same] = near[same]
            again = (found < 0) & (self._keys[near, 0] == keys[:, 0]) & (at + step + 1 < len(self._keys))
            if not again.any():
                break
        return found


class Claims:
    """Who works at what, as files in a folder that all hosts see, or as claims in a bucket."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._mine = f"{socket.gethostname()}-{os.getpid()}"
        self._stored: dict[str, Any] = {}

    def take(self, name: str) -> bool:
        """Claim a piece of work; False if another's claim is fresh. Two may win at once: then it is done twice."""
        if on_store(self.directory):
            from epigone.storage.claims import Claim

            return bool(self._stored.setdefault(name, Claim(self._path(name))).take())
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x") as file:
                file.write(self._mine)
            return True
        except FileExistsError:
            pass
        try:
            fresh = time.time() - path.stat().st_mtime < STALE_SECONDS
            if fresh and path.read_text() != self._mine:
                return False
            path.write_text(self._mine)
        except FileNotFoundError:  # it was given up in this moment
            return self.take(name)
        return True

    def renew(self, name: str) -> None:
        """Say that the work goes on; claims in a bucket say so by themselves."""
        if not on_store(self.directory):
            self._path(name).touch()

    def give_up(self, name: str) -> None:
        """Done, or stopped."""
        if not on_store(self.directory):
            self._path(name).unlink(missing_ok=True)
        elif name in self._stored:
            self._stored.pop(name).give_up()

    def _path(self, name: str) -> Path:
        return self.directory / "claims" / name


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except (RuntimeError, ValueError, OSError) as error:
        raise Fault(f"{directory} cannot be written: {' '.join(str(error).split())[:200]}") from error


def _open(path: Path) -> tuple[Any, np.ndarray]:
    """A reader of a shard, and the keys in it [records, 2]."""
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        last = reader.num_records() - 1
        keys = np.frombuffer(reader.read([last])[0], "<u8").reshape(-1, 2)
    except (RuntimeError, ValueError, IndexError, TypeError, OSError) as error:  # -1 records, where it was cut
        raise _damaged(path, str(error)) from error
    if len(keys) != last:
        raise _damaged(path, f"{last} records and {len(keys)} keys")
    return reader, keys


def _checked(path: Path, record: bytes, key: bytes) -> bytes:
    body = record[KEY_BYTES + 4 :]
    if record[:KEY_BYTES] != key or zlib.crc32(body) != int.from_bytes(record[KEY_BYTES : KEY_BYTES + 4], "little"):
        raise _damaged(path, "a record is not what was written")
    return body


def _damaged(path: Path, why: str) -> Fault:
    return Fault(f"scores {path} are damaged ({' '.join(why.split())[:200]}): delete the file to make them again")
