"""A teacher that reads other tokens: it is given the student's text, encoded anew, in rows of its own.

For each segment of a batch the bytes of the student's tokens are encoded with the teacher's tokenizer on the host, and
laid beside the student's by where tokens begin and end (`data/byte_alignment.py`). Shapes are fixed, so that one
program serves all batches: a teacher's row has `length` positions and holds the segments of one row of the student's,
one after the other; what does not fit is not read, has no part in the loss, and is counted. In the step the teacher
reads its own rows; no array but these ids goes from the host to the device.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from epigone.data.byte_alignment import align
from epigone.data.packing import Rows
from epigone.data.pipeline import Batch, as_batch
from epigone.data.token_bytes import TokenBytes, common_ids
from epigone.data.tokenizers import Tokenizer
from epigone.lessons.aligned import UNREAD, Aligned
from epigone.lessons.heads import Head
from epigone.teachers import Signal, Teacher
from epigone.teachers.score_files import segments

REMEMBERED = 2**15
"""Segments whose alignment is kept: texts come back in every epoch."""

MEASURED = 2**12
"""Rows from which it is found how long the teacher's rows are, and how much is aligned; at most these many."""

MULTIPLE = 16
"""A teacher's rows are as long as the longest that was seen, up to a multiple of this."""

ROOM = 1.25
"""Own texts may take so much more than the longest row of text."""


class Laid(NamedTuple):
    """One segment beside the teacher's tokens of the same text; as `Aligned`, from the segment's own beginning."""

    tokens_U: np.ndarray
    targets_U: np.ndarray
    match_T: np.ndarray
    chunk_T: np.ndarray
    chunk_U: np.ndarray
    read_T: np.ndarray
    """For each of the student's targets how many of the teacher's must be read until all of it is said."""


@dataclass(frozen=True)
class AlignedScores:
    """What the teacher gives for its own rows."""

    scores: Callable[..., Any]

    def __call__(self, params: Any, batch: Batch, fetched: dict[str, Any]) -> Aligned:
        given = self.scores(params["teacher"], fetched["rows"], fetched["teacher"])
        rest = (fetched["match_BT"], fetched["chunk_BT"], fetched["chunk_BU"], params["ids_V"])
        return Aligned(given, fetched["rows"].targets_BT, *rest)


class OtherTokenizerTeacher:
    """A teacher beside the student whose tokens are others.

    Attributes:
        length: positions of its rows (U).
    """

    signal = Signal.OTHER_TOKENS
    vocab_size = tokens = None

    def __init__(self, teacher: Teacher, theirs: Tokenizer, ours: Tokenizer, length: int) -> None:
        """Args: a decoder or a model that counts, both tokenizers, and `length`. Raises UserError for one of a kind
        whose tokens have no known bytes."""
        self.teacher, self.length = teacher, length
        self.tokenizer_identity, self.tokenizer_name = theirs.vocabulary, theirs.name
        self.scores = AlignedScores(teacher.scores)
        self.head: Head | None = teacher.head if isinstance(teacher.head, Head) else None
        self._theirs, self._ours = TokenBytes(theirs), TokenBytes(ours)
        config = getattr(teacher.scores, "config", None)
        self._longest = sys.maxsize if config is None else config.max_length
        self._laid: dict[bytes, Laid] = {}

    def place(self) -> Any:
        """Parameters of the teacher, and the common ids, on the mesh that is set."""
        ids_V = jnp.asarray(common_ids(self._ours, self._theirs))
        if not jax.sharding.get_abstract_mesh().empty:
            ids_V = jax.device_put(ids_V, P())
        return {"teacher": self.teacher.place(), "ids_V": ids_V}

    def fetch(self, batch: Batch) -> dict[str, Any]:
        """The teacher's rows [B, U], what it fetches for them itself, and how they lie beside the student's [B, T]."""
        found = self.beside(batch)
        return found | {"teacher": self.teacher.fetch(found["rows"])}

    def beside(self, batch: Batch) -> dict[str, Any]:
        """The teacher's rows, and how they lie beside the student's."""
        tokens_BT, targets_BT, numbers_BT = (
            np.asarray(x) for x in (batch.tokens_BT, batch.targets_BT, batch.segments_BT)
        )
        B, T = tokens_BT.shape
        pad = self._theirs.tokenizer.specials.pad
        planes_B3U = np.zeros((B, 3, self.length), np.int32)
        planes_B3U[:, :2] = pad
        match_BT, chunk_BT = (np.full((B, T), -1, np.int32) for _ in range(2))
        chunk_BU = np.full((B, self.length), -1, np.int32)
        used_B, number_B = np.zeros(B, int), np.zeros(B, int)
        for row, first, size, _ in segments(tokens_BT, numbers_BT):
            laid = self.laid(tokens_BT[row, first], targets_BT[row, first : first + size])
            at = used_B[row]
            room = min(len(laid.tokens_U), self.length - at, self._longest)
            number_B[row] += 1
            mine = slice(at, at + room)
            planes_B3U[row, :, mine] = laid.tokens_U[:room], laid.targets_U[:room], np.full(room, number_B[row])
            place = slice(first, first + size)
            unread = laid.read_T > room
            match = np.where((laid.match_T >= 0) & (laid.match_T < room), laid.match_T + at, -1)
            match_BT[row, place] = np.where(unread, UNREAD, match)
            cut = np.unique(laid.chunk_T[unread])
            chunk_BT[row, place] = _from(first, np.where(np.isin(laid.chunk_T, cut), -1, laid.chunk_T))
            chunk_BU[row, mine] = _from(first, np.where(np.isin(laid.chunk_U, cut), -1, laid.chunk_U)[:room])
            used_B[row] += room
        return {"rows": as_batch(planes_B3U), "match_BT": match_BT, "chunk_BT": chunk_BT, "chunk_BU": chunk_BU}

    def laid(self, first: int, targets_T: np.ndarray) -> Laid:
        """One segment, from its first input token and its targets."""
        key = np.append(first, targets_T).astype("<i4").tobytes()
        if key not in self._laid:
            if len(self._laid) >= REMEMBERED:
                self._laid.clear()
            self._laid[key] = _lay(self._ours, self._theirs, int(first), targets_T)
        return self._laid[key]

    def flops_per_token(self, length: int) -> int:
        """Those of its own rows, for each token of a student's row of this length."""
        return self.teacher.flops_per_token(self.length) * self.length // length


def _from(first: int, chunk: np.ndarray) -> np.ndarray:
    """Chunks of a segment that begins at this column, counted in the row."""
    return np.where(chunk < 0, -1, chunk + first)


def _lay(ours: TokenBytes, theirs: TokenBytes, first: int, targets_T: np.ndarray) -> Laid:
    """A text that begins with bos, or goes on from another row: then its first token is read and not predicted."""
    own, other = ours.tokenizer.specials, theirs.tokenizer.specials
    begins = first == own.bos
    ends = bool(len(targets_T)) and int(targets_T[-1]) in (own.eos, *own.stops)
    said = targets_T[:-1] if ends else targets_T
    pieces = ours.pieces(said if begins else np.append(first, said), begins)
    text = b"".join(pieces)
    sizes = np.cumsum([0, *map(len, pieces)]) if begins else np.cumsum([len(piece) for piece in pieces])
    ids, spoken = theirs.encode(text, begins)
    borders = np.append(0, spoken) if begins else spoken
    read = np.append(other.bos, ids) if begins else ids
    if ends:  # the end is one thing more to say, at the same place on both sides
        sizes = np.append(sizes, sizes[-1] + 1)
        borders = np.append(borders, max(len(text), borders[-1] if len(borders) else 0) + 1)
        read = np.append(read, other.eos)
    if len(borders) < 2:
        nothing = np.full(len(targets_T), -1, np.int32)
        none = np.zeros(0, np.int32)
        return Laid(none, none, nothing, nothing, none, np.zeros_like(nothing))
    found = align(sizes, borders)
    needed = np.searchsorted(borders[1:], sizes[1:], side="left") + 1
    needed = np.minimum(needed, len(borders) - 1)
    tokens_U, targets_U = read[:-1].astype(np.int32), read[1:].astype(np.int32)
    return Laid(tokens_U, targets_U, found.match_N, found.chunk_N, found.chunk_M, needed)


def fitted(
    teacher: Teacher, theirs: Tokenizer, ours: Tokenizer, rows: Sequence[Rows], room: float = 1.0
) -> tuple[OtherTokenizerTeacher, dict[str, float]]:
    """The teacher with rows that hold those of a text, and what is said of the text.

    Args: the teacher, both tokenizers, packed text of the student, and a factor on the longest row.
    Returns: it, and `length`, its tokens for one of the student's, and of the student's tokens the shares that are at
    an aligned position, that are in an aligned chunk, and that the teacher does not read.
    """
    planes = [source.planes_R3T[:: max(1, len(source) // MEASURED)] for source in rows]
    found = OtherTokenizerTeacher(teacher, theirs, ours, 1)
    longest = 1
    for planes_R3T in planes:
        sizes_R = np.zeros(len(planes_R3T), int)
        for row, first, size, _ in segments(planes_R3T[:, 0], planes_R3T[:, 2]):
            laid = found.laid(planes_R3T[row, 0, first], planes_R3T[row, 1, first : first + size])
            sizes_R[row] += min(len(laid.tokens_U), found._longest)
        longest = max(longest, int(sizes_R.max()))
    found.length = -(-round(longest * room) // MULTIPLE) * MULTIPLE
    return found, _told(found, planes)


def _told(teacher: OtherTokenizerTeacher, planes: Sequence[np.ndarray]) -> dict[str, float]:
    sums = np.zeros(5)
    for planes_R3T in planes:
        batch = as_batch(np.asarray(planes_R3T))
        fetched = teacher.beside(batch)
        real = batch.segments_BT > 0
        shares = [fetched["match_BT"] >= 0, fetched["chunk_BT"] >= 0, fetched["match_BT"] == UNREAD]
        sums += [real.sum(), (fetched["rows"].segments_BT > 0).sum(), *((share & real).sum() for share in shares)]
    names = ("tokens_per_token", "aligned_positions", "aligned_chunks", "unread")
    return {"length": teacher.length} | dict(zip(names, (sums[1:] / max(1, sums[0])).tolist(), strict=True))
