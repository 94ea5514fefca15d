"""From packed rows to batches: shuffled, mixed, split over processes, and the same for a step whoever asks."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from epigone.data.packing import Rows, pack, pack_to
from epigone.errors import UserError

if TYPE_CHECKING:
    import grain

__all__ = ["Batch", "Batches", "Rows", "as_batch", "pack", "pack_to"]

Made = TypeVar("Made")

_FOREVER = 2**62
_PREFETCHED = 8


Array = Any
"""An array [B, T]: of numpy on the host, of JAX inside a step."""


class Batch(NamedTuple):
    """One process's share of a global batch; B is that share.

    A row holds documents one after the other: segments 1, 2, ..., positions from 0 in each. Padding has segment 0,
    position 0, weight 0 and pad for token and target.
    """

    tokens_BT: Array
    targets_BT: Array
    weights_BT: Array
    positions_BT: Array
    segments_BT: Array


class Batches:
    """An endless series of batches; batch `step` is a pure function of the arguments and `step`.

    Args:
        rows: sources of one row length.
        weights: share of each source in the rows; it is kept to within one row at every step. None: all rows
            of all sources, each once an epoch.
        batch_size: rows of a global batch, over all processes.
        seed: orders the rows of each source anew in each of its epochs.
        process_index: which contiguous slice of each global batch is this process's.
        process_count: number of slices. It changes no global batch, so a run goes on from its step on another number.

    Raises UserError for sources that do not fit together, bad weights, or a batch that the processes cannot share.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        weights: Sequence[float] | None,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        _check(rows, weights, batch_size, process_index, process_count)
        self._rows = list(rows)
        self._starts = np.cumsum([0, *(len(source) for source in rows)])
        self._weights = None if weights is None else [float(weight) for weight in weights]
        self._seed = seed
        self.batch_size = batch_size
        self.process_index, self.process_count = process_index, process_count

    @property
    def length(self) -> int:
        """Positions of a row (T)."""
        return self._rows[0].length

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all sources."""
        return int(self._starts[-1])

    @property
    def tokens_per_epoch(self) -> int:
        """Targets of all sources, each counted once."""
        return sum(source.targets for source in self._rows)

    @property
    def tokens_per_step(self) -> float:
        """Targets of a global batch, on average over many steps."""
        fills = np.array([source.fill for source in self._rows])
        shares = np.diff(self._starts) if self._weights is None else np.array(self._weights)
        return float(self.batch_size * self.length * (fills @ shares) / shares.sum())

    @property
    def fill(self) -> float:
        """Share of the positions that hold a target."""
        return self.tokens_per_step / (self.batch_size * self.length)

    def batch(self, step: int) -> Batch:
        """This process's slice of global batch `step` (from 0)."""
        share = self.batch_size // self.process_count
        first = step * self.batch_size + self.process_index * share
        return self._gather(np.array([self._order[index] for index in range(first, first + share)]))

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches from `start_step` on, made in background threads while the caller computes."""
        return ahead(self.batch, self.batch_size, start_step)

    @functools.cached_property
    def _order(self) -> "grain.MapDataset[int]":
        """The endless series of global row numbers. Grain, which imports JAX, is imported on first use."""
        import grain

        if self._weights is None:
            return grain.MapDataset.source(_Epochs(0, self.rows_per_epoch, self._seed))
        sources: list[Any] = [
            grain.MapDataset.source(_Epochs(int(start), len(source), self._seed))
            for start, source in zip(self._starts[:-1], self._rows, strict=True)
        ]
        return grain.MapDataset.mix(sources, self._weights)

    def _gather(self, numbers: np.ndarray) -> Batch:
        planes_B3T = np.empty((len(numbers), 3, self.length), np.int32)
        owners = np.searchsorted(self._starts, numbers, side="right") - 1
        for owner in np.unique(owners):
            mine = owners == owner
            planes_B3T[mine] = self._rows[owner].planes_R3T[numbers[mine] - self._starts[owner]]
        return as_batch(planes_B3T)


def ahead(make: Callable[[int], Made], batch_size: int, start: int = 0) -> Iterator[Made]:
    """make(start), make(start + 1) and so on, of so many rows each, in background threads while the caller computes."""
    import grain

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=_PREFETCHED)
    return iter(grain.MapDataset.range(start, _FOREVER // batch_size).map(make).to_iter_dataset(options))


class _Epochs:
    """Row numbers `start` to `start + rows`, over and over, in a new order each time: a source for Grain.

    Grain's own shuffle takes up to 2 ms an element when a source has few rows (it walks through 2**16 numbers to find
    one in range), and repeats the order of another source's later epoch, since it adds epoch and seed.
    """

    def __init__(self, start: int, rows: int, seed: int):
        self._start, self._rows, self._seed = start, rows, seed
        self._permutation = functools.lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return _FOREVER

    def __getitem__(self, index: Any) -> int:
        epoch, place = divmod(int(index), self._rows)
        return self._start + int(self._permutation(epoch)[place])

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, self._start, epoch]).permutation(self._rows)


def as_batch(planes_B3T: np.ndarray) -> Batch:
    """Packed rows as a batch."""
    tokens_BT, targets_BT, segments_BT = (np.ascontiguousarray(planes_B3T[:, plane]) for plane in range(3))
    weights_BT = (segments_BT > 0).astype(np.float32)
    return Batch(tokens_BT, targets_BT, weights_BT, positions(segments_BT), segments_BT)


def positions(segments_BT: np.ndarray) -> np.ndarray:
    """Distance from the start of the segment, 0 in padding."""
    column_T = np.arange(segments_BT.shape[1], dtype=np.int32)
    begins_BT = np.ones(segments_BT.shape, bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts_BT = np.maximum.accumulate(np.where(begins_BT, column_T, 0), axis=1)
    return np.where(segments_BT > 0, column_T - starts_BT, 0).astype(np.int32)


def _check(
    rows: Sequence[Rows], weights: Sequence[float] | None, batch_size: int, process_index: int, process_count: int
) -> None:
    lengths = sorted({source.length for source in rows})
    if len(lengths) != 1:
        raise UserError(f"sources must have one row length, not {lengths or 'none at all'}")
    if weights is not None and (len(weights) != len(rows) or not all(0 < weight < np.inf for weight in weights)):
        raise UserError(f"weights {list(weights)} are not {len(rows)} positive numbers, one a source of text")
    if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
        raise UserError(f"a batch of {batch_size} rows cannot be shared by {process_count} processes evenly")
