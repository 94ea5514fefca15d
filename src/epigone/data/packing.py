"""Documents packed into rows of a fixed length, in memory or mapped from a file."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from epigone.errors import Fault, UserError
from epigone.models.language_model import Specials

_TOKENS, _TARGETS, _SEGMENTS = 0, 1, 2
_CHUNK = 2**24
"""Events that `pack_to` holds in memory at once."""


class Rows:
    """Packed rows of T positions each.

    Attributes:
        planes_R3T: int32 tokens, targets and segments of each row; segment 0 is padding. Row first, so that one read
            of the mapped file brings a whole row.
        targets: number of targets, the padding left out.
    """

    def __init__(self, planes_R3T: np.ndarray, targets: int):
        self.planes_R3T = planes_R3T
        self.targets = targets

    def __len__(self) -> int:
        return len(self.planes_R3T)

    @property
    def length(self) -> int:
        """Positions of a row (T)."""
        return self.planes_R3T.shape[2]

    @property
    def fill(self) -> float:
        """Share of the positions that hold a target; the rest is padding."""
        return self.targets / (len(self) * self.length)

    def save(self, directory: Path) -> None:
        """Store the rows; the directory appears whole or not at all. Raises Fault if the disk is full."""
        _write(directory, [self], self.length)

    @classmethod
    def open(cls, directory: Path) -> "Rows":
        """Map stored rows into memory: only what is read is loaded. Raises Fault if they are missing or damaged."""
        try:
            header = json.loads((directory / "rows.json").read_text(encoding="utf-8"))
            shape, targets = (int(header["rows"]), 3, int(header["length"])), int(header["targets"])
            size = (directory / "rows.int32").stat().st_size
            if size != 4 * np.prod(shape):
                raise ValueError(f"{size} bytes instead of {4 * np.prod(shape)}")
            return cls(np.memmap(directory / "rows.int32", "<i4", "r", shape=shape), targets)
        except FileNotFoundError as error:
            raise Fault(f"no finished rows at {directory}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Fault(f"rows {directory} are damaged ({error}): delete the folder to pack them again") from error


def pack(documents: Sequence[np.ndarray], length: int, specials: Specials = Specials()) -> Rows:
    """Pack documents into rows of `length` positions (best fit, longest first).

    A document x_1..x_n is the inputs bos, x_1..x_n and the targets x_1..x_n, eos. One that is longer than a row is cut
    into pieces that go on where the last one stopped: no bos inside, and the target of a piece's last position is the
    document's next token. Every event occurs exactly once. The same documents give the same rows.

    Raises UserError if there is no document, or fewer targets than one row holds.
    """
    if length < 1:
        raise UserError(f"sequence length {length} < 1")
    total = sum(len(document) + 1 for document in documents)
    if not documents:
        raise UserError("there is no document to learn from")
    if total < length:
        raise UserError(f"the text has {total} tokens, one sequence needs {length}: give more text or shorten it")
    return _pack(documents, length, specials)


def pack_to(
    directory: Path,
    documents: Iterable[np.ndarray],
    length: int,
    chunk: int = _CHUNK,
    specials: Specials = Specials(),
) -> Rows:
    """`pack` for a text larger than memory: packs `chunk` events at a time into a file and maps it."""
    _write(directory, (pack(block, length, specials) for block in _chunks(documents, max(chunk, length))), length)
    return Rows.open(directory)


def _pack(documents: Sequence[np.ndarray], length: int, specials: Specials) -> Rows:
    sizes = np.array([len(document) + 1 for document in documents], np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    targets = np.full(int(sizes.sum()), specials.eos, np.int32)
    inner = np.ones(len(targets), bool)
    inner[starts + sizes - 1] = False
    targets[inner] = np.concatenate([np.asarray(document, np.int32) for document in documents])
    tokens = np.concatenate([[specials.bos], targets[:-1]]).astype(np.int32)
    tokens[starts] = specials.bos
    pieces = _pieces(sizes, length)
    rows, offsets, segments = _place(pieces, length)
    planes_R3T = np.zeros((int(rows.max()) + 1, 3, length), np.int32)
    planes_R3T[:, :2] = specials.pad
    # Pieces follow each other in the order of the events, so one running count gives each event its place.
    column_N = np.arange(len(targets)) - np.repeat(np.cumsum(pieces) - pieces - offsets, pieces)
    row_N = np.repeat(rows, pieces)
    planes_R3T[row_N, _TOKENS, column_N] = tokens
    planes_R3T[row_N, _TARGETS, column_N] = targets
    planes_R3T[row_N, _SEGMENTS, column_N] = np.repeat(segments, pieces)
    return Rows(planes_R3T, len(targets))


def _pieces(sizes: np.ndarray, length: int) -> np.ndarray:
    """Lengths of the pieces of all documents, in order: full ones, then what is left."""
    counts = -(-sizes // length)
    pieces = np.full(int(counts.sum()), length, np.int64)
    pieces[np.cumsum(counts) - 1] = sizes - (counts - 1) * length
    return pieces


def _place(pieces: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, offset and segment number of each piece: longest first, each into the fullest row that has room.

    Rows wait in one stack for each number of free positions; the bits of one integer say which stacks hold any, so the
    fullest fitting row is its lowest bit at or above the piece's length.
    """
    free: list[list[int]] = [[] for _ in range(length + 1)]
    occupied, opened = 0, 0
    placed = np.empty((3, len(pieces)), np.int64)
    used: list[int] = []
    sizes = pieces.tolist()
    for piece in np.argsort(-pieces, kind="stable").tolist():
        size = sizes[piece]
        fitting = occupied >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = free[room].pop()
            if not free[room]:
                occupied ^= 1 << room
        else:
            room, row = length, opened
            opened += 1
            used.append(0)
        used[row] += 1
        placed[:, piece] = row, length - room, used[row]
        if room > size:
            free[room - size].append(row)
            occupied |= 1 << (room - size)
    return placed[0], placed[1], placed[2]


def _chunks(documents: Iterable[np.ndarray], events: int) -> Iterator[list[np.ndarray]]:
    """Blocks of at least `events` events; what is left over joins the last block, since it may not fill a row."""
    waiting: list[np.ndarray] = []
    block: list[np.ndarray] = []
    count = 0
    for document in documents:
        block.append(document)
        count += len(document) + 1
        if count >= events:
            if waiting:
                yield waiting
            waiting, block, count = block, [], 0
    yield waiting + block


def _write(directory: Path, blocks: Iterable[Rows], length: int) -> None:
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    rows = targets = 0
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with (partial / "rows.int32").open("wb") as file:
            for block in blocks:
                file.write(np.ascontiguousarray(block.planes_R3T, "<i4").data)
                rows, targets = rows + len(block), targets + block.targets
        header = {"rows": rows, "length": length, "targets": targets}
        (partial / "rows.json").write_text(json.dumps(header), encoding="utf-8")
        if directory.exists():
            shutil.rmtree(directory)
        partial.replace(directory)
    except OSError as error:
        raise Fault(f"cannot write rows {directory}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
