"""Run a teacher once over packed rows, and keep on disk what a lesson wants of its scores."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from epigone.data.pipeline import Batch, Rows, as_batch
from epigone.lessons.chunks import Mesh, map_logits
from epigone.lessons.heads import Head
from epigone.models.sharding import make_mesh
from epigone.sampling.draw import token_keys
from epigone.teachers import Teacher
from epigone.teachers.cached import CachedTeacher
from epigone.teachers.kept import HiddenStates, Kept, Places, Shown
from epigone.teachers.score_files import Claims, Segment, segments
from epigone.training.config import Hardware
from epigone.training.metrics import StepReport
from epigone.training.sharding import BATCH_AXES, to_mesh

PIECE_TOKENS = 2**17
"""Positions of the rows that are claimed at once, and whose segments make a shard; a small shard has much padding."""

WAIT_SECONDS = 1.0
"""Between two looks at what others are at."""

_DONE, _MINE, _BUSY = range(3)


@dataclass(frozen=True)
class Labelled:
    """What was done.

    Attributes:
        tokens: positions that were scored now, by this run of the program.
        size: bytes on disk of what was kept of these rows, in proportion to their segments.
        seconds: that it took.
    """

    tokens: int
    size: int
    seconds: float


def label(
    cached: CachedTeacher,
    teacher: Callable[[], Teacher],
    rows: Sequence[Rows],
    batch_size: int,
    hardware: Hardware = Hardware(),
    on_step: Callable[[StepReport], None] | None = None,
) -> Labelled:
    """Score what is not on disk yet. Other programs, on any host, may do the same at the same time.

    Args:
        cached: says what is kept, and where.
        teacher: gives the teacher; asked only where something is missing.
        rows: packed text.
        batch_size: rows of a batch, a multiple of the devices that share it.
        hardware: the mesh on which the teacher runs.
        on_step: called after each batch.

    Raises: Fault where the disk is full or a shard is damaged.
    """
    mesh = make_mesh(*hardware.sizes)
    pieces = [piece for source in rows for piece in _pieces(source)]
    with jax.set_mesh(mesh):
        work = _Work(cached, teacher, batch_size, mesh, on_step, sum(-(-len(piece) // batch_size) for piece in pieces))
        while pieces:
            pieces = [piece for piece in pieces if not work.done(piece)]
            if pieces:  # others are at them
                time.sleep(WAIT_SECONDS)
                cached.files.refresh()
    cached.files.refresh()
    share = len(work.keys) / max(1, len(cached.files))
    return Labelled(work.tokens, round(cached.files.size * share), time.monotonic() - work.began)


def _pieces(rows: Rows) -> Iterator[np.ndarray]:
    size = max(1, PIECE_TOKENS // rows.length)
    for first in range(0, len(rows), size):
        yield rows.planes_R3T[first : first + size]


class _Work:
    """What has been done of the work so far."""

    def __init__(
        self,
        cached: CachedTeacher,
        teacher: Callable[[], Teacher],
        batch_size: int,
        mesh: jax.sharding.Mesh,
        on_step: Callable[[StepReport], None] | None,
        steps: int,
    ):
        self.cached, self.files, self.claims = cached, cached.files, Claims(cached.files.directory)
        self.make_teacher, self.params = teacher, None
        self.teacher: Teacher | None = None
        self.batch_size, self.mesh, self.on_step, self.steps = batch_size, mesh, on_step, steps
        self.began, self.step, self.tokens = time.monotonic(), 0, 0
        self.keys: set[bytes] = set()

    def done(self, planes_R3T: np.ndarray) -> bool:
        """Score a piece, unless it is on disk or another is at it; whether it is on disk now."""
        found = segments(planes_R3T[:, 0], planes_R3T[:, 2])
        name = _name(found)
        self.keys.update(segment.key for segment in found)
        state = _first_says(lambda: self._look(name, found))
        if state == _MINE:
            self._score_piece(name, planes_R3T, self._missing(found))
        elif state == _DONE:
            self._tell(-(-len(planes_R3T) // self.batch_size))
        return state != _BUSY

    def _look(self, name: str, found: Sequence[Segment]) -> int:
        """Claim a piece, unless it is on disk or another is at it."""
        if not self._missing(found):
            return _DONE
        if not self.claims.take(name):
            return _BUSY
        self.files.refresh()  # who had claimed it may have ended since
        if self._missing(found):
            return _MINE
        self.claims.give_up(name)
        return _DONE

    def _missing(self, found: Sequence[Segment]) -> set[bytes]:
        return {found[number].key for number in self.files.missing([segment.key for segment in found])}

    def _score_piece(self, name: str, planes_R3T: np.ndarray, missing: set[bytes]) -> None:
        """All processes of a program score; the first one writes."""
        try:
            content = self._scored(name, planes_R3T, missing)
            if jax.process_index() == 0:
                self.files.write(name, content)
            else:
                deque(content, maxlen=0)
        finally:
            self.claims.give_up(name)

    def _scored(self, name: str, planes_R3T: np.ndarray, missing: set[bytes]) -> Any:
        """(key, record) of every segment that is missing, once."""
        if self.teacher is None:
            self.teacher = self.make_teacher()
            self.params = self.teacher.place()
        for first in range(0, len(planes_R3T), self.batch_size):
            batch = as_batch(_filled(planes_R3T[first : first + self.batch_size], self.batch_size))
            found = segments(batch.tokens_BT, batch.segments_BT)
            kept = self._kept(batch, found)
            for segment in found:
                if segment.key in missing:
                    missing.remove(segment.key)
                    self.tokens += segment.length
                    yield segment.key, self.cached.record(_part(kept, segment))
            if jax.process_index() == 0:
                self.claims.renew(name)
            self._tell(1)

    def _kept(self, batch: Batch, found: list[Segment]) -> Any:
        """What the teacher gives for a batch, on the host."""
        assert self.teacher is not None
        hashes_BT2 = np.zeros((*batch.tokens_BT.shape, 2), np.uint32)
        for segment in found:
            place = slice(segment.first, segment.first + segment.length)
            hashes_BT2[segment.row, place] = np.frombuffer(segment.key[:8], "<u4")
        share = self.batch_size // jax.process_count()
        mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        own = Batch(*(part[mine] for part in batch))
        kept = self.cached.kept
        context_BTH = _before(own, kept.policy.width if isinstance(kept, Shown) else 0)
        arrays = to_mesh((own, self.teacher.fetch(own), hashes_BT2[mine], context_BTH), 1, self.mesh)
        cut = Mesh(BATCH_AXES, "tensor" if self.mesh.shape["tensor"] > 1 else None)
        head = self.teacher.head if isinstance(self.teacher.head, Head) else Head()
        head = replace(head, vocab_size=self.cached.vocab_size)
        how = (kept, self.cached.temperature, self.teacher.scores, head, cut)
        found = _score(how, self.params, *arrays)
        alone = jax.process_count() == 1
        return jax.device_get(found) if alone else multihost_utils.process_allgather(found, tiled=True)

    def _tell(self, steps: int) -> None:
        self.step += steps
        if self.on_step is not None and steps:
            seconds = time.monotonic() - self.began
            speed = self.tokens / seconds if seconds else 0.0
            self.on_step(StepReport(self.step, self.steps, None, self.tokens, speed, seconds))


@partial(jax.jit, static_argnums=0)
def _score(
    how: tuple[Any, ...], params: Any, batch: Batch, fetched: Any, hashes_BT2: jax.Array, context_BTH: jax.Array
) -> Any:
    """What is kept of a batch [1, B, T]: arrays [B, T, ...]."""
    kept, temperature, scores, head, cut = how
    batch, fetched, hashes_BT2, context_BTH = jax.tree.map(lambda x: x[0], (batch, fetched, hashes_BT2, context_BTH))
    given = scores(params, batch, fetched)
    if isinstance(kept, HiddenStates):
        return given.hidden_BTD.astype(kept.dtype)

    def keep(logits_CV: jax.Array, hashes_C2: jax.Array, positions_C: jax.Array, *more: jax.Array) -> Kept:
        # What is drawn for a token depends on its segment and its place in it alone.
        keys_C = token_keys(jax.random.key(0), hashes_C2[:, 0], hashes_C2[:, 1], positions_C)
        return kept.keep(logits_CV.astype(jnp.float32) / temperature, Places(keys_C, *more))

    return map_logits(keep, head, given, hashes_BT2, batch.positions_BT, batch.targets_BT, context_BTH, mesh=cut)


def _before(batch: Batch, width: int) -> np.ndarray:
    """The `width` tokens before each target [B, T, width], at least 1; before a segment has so many, its first one."""
    back = np.arange(max(1, width) - 1, -1, -1)
    places_BTH = np.arange(batch.tokens_BT.shape[1])[:, None] - np.minimum(back, batch.positions_BT[..., None])
    rows_B11 = np.arange(len(batch.tokens_BT))[:, None, None]
    return np.ascontiguousarray(batch.tokens_BT[rows_B11, places_BTH])


def _name(found: Sequence[Segment]) -> str:
    """The name of the shard of these segments: a hash of their keys."""
    return hashlib.blake2b(b"".join(segment.key for segment in found), digest_size=8).hexdigest()


def _filled(planes_R3T: np.ndarray, rows: int) -> np.ndarray:
    """With rows of padding at the end, so that all batches have one shape."""
    return np.pad(planes_R3T, ((0, rows - len(planes_R3T)), (0, 0), (0, 0)))


def _part(kept: Any, segment: Segment) -> Any:
    place = slice(segment.first, segment.first + segment.length)
    return jax.tree.map(lambda x: x[segment.row, place], kept)


def _first_says(what: Callable[[], int]) -> int:
    """What the first process of this program finds, for all of them."""
    if jax.process_count() == 1:
        return what()
    return int(multihost_utils.broadcast_one_to_all(np.int32(what() if jax.process_index() == 0 else 0)))
