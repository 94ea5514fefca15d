"""Arrays in a bucket, through tensorstore: each one a Zarr array, each shard of it written by a process that holds it.

    PLACE/<name>/zarr.json     shape, type, chunks
    PLACE/<name>/c/...         a shard, or a part of it, in each object, with a CRC-32C that is compared when it is read

Processes share nothing but the bucket: each writes the objects of its own shards, and reads those that its devices
need, on whatever mesh. So a checkpoint is whole when all processes say that they are done.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from epigone.errors import Fault
from epigone.storage.places import context, key_value_spec
from epigone.storage.reasons import explained
from epigone.training.sealed import Damaged

CHUNK_BYTES = 2**28
"""Largest object: a store takes less than 5 GiB in one request, and what fails is sent again as a whole."""

READ_BYTES = 2**32
"""Bytes of arrays that are read at once."""


def start_writing(place: Path, arrays: dict[str, Any], kept: bool = False) -> Callable[[], None]:
    """Copy this process's shards off the devices, start to write them, and return a function that waits for the end.

    Arrays that are `kept` as they are until then need no copy.
    """
    for array in arrays.values():
        for _, data in _own(array):
            if isinstance(data, jax.Array):
                data.copy_to_host_async()
    futures = [future for name, array in arrays.items() for future in _write(place / name, array, kept)]

    def finish() -> None:
        for future in futures:
            future.result()

    return finish


def read(place: Path, targets: dict[str, Any]) -> dict[str, Any]:
    """The arrays by name, on the shardings of `targets`, or on this process's first device where they have none.

    Raises: Damaged where one is damaged; Fault where the store fails.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    found = {}
    for names in _together(targets):
        stores = {name: _open(place / name) for name in names if 0 not in targets[name].shape}
        shardings = {name: getattr(targets[name], "sharding", None) or here for name in names}
        with _telling(place):
            reads = {name: _reads(store.result(), shardings[name], targets[name]) for name, store in stores.items()}
            for name in names:
                found[name] = _assembled(targets[name], shardings[name], reads.pop(name, {}))
    return found


def _open(place: Path) -> Any:
    import tensorstore as ts

    spec = {"driver": "zarr3", "kvstore": key_value_spec(place), "fill_missing_data_reads": False}
    return ts.open(spec, open=True, read=True, context=context())


def _reads(store: Any, sharding: jax.sharding.Sharding, target: Any) -> dict[str, Any]:
    """Futures of the parts that the devices of this process hold, by index."""
    indices = sharding.addressable_devices_indices_map(target.shape).values()
    return {key: store[index].read() for key, index in {str(index): index for index in indices}.items()}


def _assembled(target: Any, sharding: jax.sharding.Sharding, parts: dict[str, Any]) -> jax.Array:
    dtype = np.dtype(target.dtype)

    def part(index: Any) -> np.ndarray:
        return parts[str(index)].result() if parts else np.zeros(sharding.shard_shape(target.shape), dtype)

    return jax.make_array_from_callback(target.shape, sharding, part)


@contextlib.contextmanager
def _telling(place: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # all that tensorstore raises
        if re.match("DATA_LOSS|NOT_FOUND|FAILED_PRECONDITION|INVALID_ARGUMENT", str(error)):
            raise Damaged(str(error).splitlines()[0][:200]) from error
        raise Fault(explained(error, place) or f"cannot read {place}: {str(error).splitlines()[0][:200]}") from error


def _write(place: Path, array: Any, kept: bool) -> list[Any]:
    """Futures of all that this process writes of an array."""
    import tensorstore as ts

    if 0 in array.shape:
        return []
    spec = _spec(place, array)
    # Every process knows the metadata without asking; the first one writes them.
    first = jax.process_index() == 0
    futures: list[Any] = [ts.open(spec, create=True, open=True, context=context())] if first else []
    store = ts.open(spec, open=True, assume_metadata=True, context=context()).result()
    # On a CPU a NumPy view of an array is the array itself, which the next step overwrites: make real copies.
    copied = np.array if not kept and jax.default_backend() == "cpu" else np.asarray
    for index, data in _own(array):
        write = store[index].write(copied(data), can_reference_source_data_indefinitely=True)
        futures.append(write.commit)
    return futures


def _own(array: Any) -> list[tuple[Any, Any]]:
    """Indices and data of the shards that this process writes: of replicas the first one."""
    if not isinstance(array, jax.Array) or (array.is_fully_addressable and jax.process_count() > 1):
        return [((...,), array)] if jax.process_index() == 0 else []
    return [(shard.index, shard.data) for shard in array.addressable_shards if shard.replica_id == 0]


def _spec(place: Path, array: Any) -> dict[str, Any]:
    sharding = getattr(array, "sharding", None)
    shard = sharding.shard_shape(array.shape) if sharding is not None else array.shape
    chunks = chunk_shape(shard, np.dtype(array.dtype).itemsize)
    metadata = {
        "shape": list(array.shape),
        "data_type": np.dtype(array.dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    # A part that is all zeros is written like any other: what is missing is then damage.
    how = {"driver": "zarr3", "store_data_equal_to_fill_value": True}
    return {**how, "kvstore": key_value_spec(place), "metadata": metadata}


def chunk_shape(shard: tuple[int, ...], itemsize: int, most: int = CHUNK_BYTES) -> tuple[int, ...]:
    """The shape of the objects of a shard: even parts of it, of at most so many bytes."""
    shape = list(shard)
    for axis, size in enumerate(shard):
        rest = itemsize * math.prod(shape) // max(1, size)
        fits = (part for part in range(size, 0, -1) if size % part == 0 and part * rest <= most)
        shape[axis] = next(fits, 1)
        if shape[axis] > 1:
            break
    return tuple(shape)


def _together(targets: dict[str, Any]) -> Iterator[list[str]]:
    """Names of arrays in groups that are read at once."""
    group: list[str] = []
    size = 0
    for name, target in targets.items():
        group, size = [*group, name], size + math.prod(target.shape) * np.dtype(target.dtype).itemsize
        if size >= READ_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
