"""Weights between files and their places on the mesh: read block by block, written tensor by tensor.

Every device gets its part of each parameter once, empty, and a jitted update that takes it over (it is donated) fills
it: so the host holds a few blocks at a time. A process reads what its own devices need.
"""

import contextlib
import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from epigone.errors import Fault, UserError
from epigone.interchange.families import Family
from epigone.interchange.huggingface import find_family, tensor_plan, write_config
from epigone.interchange.safetensors_files import DTYPES, INDEX, SINGLE
from epigone.interchange.tensors import Box, Slot, Tensor, file_box, from_file, to_file
from epigone.interchange.weight_files import WeightFiles, plan_of
from epigone.models.config import DecoderConfig
from epigone.models.decoder import abstract
from epigone.models.sharding import Sharding

BLOCK = 2 << 20
"""Bytes that are read at a time: small beside a shard, large beside the cost of an update."""

_NO_MESH = Mesh(np.empty((), object), ())
"""Each part is filled by its device alone, whatever mesh is set."""


def load_weights(files: WeightFiles, config: DecoderConfig, sharding: Sharding = Sharding()) -> nnx.State:
    """The parameters of a decoder, in its `weights_dtype`, cut over the mesh that is set, or on the default device.

    Args:
        files: from `open_weights`.
        config: from `read_config`; its vocab_multiple may differ, and padded rows are 0.
        sharding: the mesh axes of each logical axis.

    Raises:
        UserError: the parameters cannot be cut so.
    """
    targets = abstract(config, sharding)
    empty = jax.jit(lambda: jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype, out_sharding=t.sharding), targets))()
    places = {_name(path): _Place(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(empty)}
    del empty
    plan = {tensor.name: tensor for tensor in plan_of(files, config)}
    with jax.set_mesh(_NO_MESH):
        for name in files.tensors:
            for slot in plan[name].slots if name in plan else ():
                places[slot.name].fill(files, plan[name], slot)
    return jax.tree_util.tree_map_with_path(lambda path, _: places[_name(path)].whole(), targets)


def _name(path: tuple) -> str:
    return next(key.key for key in reversed(path) if hasattr(key, "key"))


class _Place:
    """One parameter while it is filled: the parts on this process's devices, which the updates take over."""

    def __init__(self, empty: jax.Array) -> None:
        self._shape, self._sharding = empty.shape, empty.sharding
        shards = empty.addressable_shards
        self._boxes = {shard.device: _plain(shard.index, empty.shape) for shard in shards}
        self._parts = {shard.device: _alone(shard) for shard in shards}

    def fill(self, files: WeightFiles, tensor: Tensor, slot: Slot) -> None:
        """Put what a slot of a tensor holds into every part that has some of it."""
        alike: dict[tuple[tuple[int, int], ...], list[jax.Device]] = defaultdict(list)
        for device, box in self._boxes.items():
            alike[tuple((part.start, part.stop) for part in box)].append(device)
        for edges, devices in alike.items():
            for block in _blocks(tensor, slot, edges, files.tensors[tensor.name][1].itemsize):
                array = from_file(tensor, slot, block, files.read(tensor.name, file_box(tensor, slot, block)))
                starts = (*slot.index, *(part.start for part in block))
                local = [start - first for start, (first, _) in zip(starts, edges, strict=True)]
                for device in devices:
                    filled = _update(self._parts[device], array[(None,) * len(slot.index)], local)
                    self._parts[device] = jax.block_until_ready(filled)

    def whole(self) -> jax.Array:
        """The parameter."""
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, list(self._parts.values()))


def _alone(shard: Any) -> jax.Array:
    """A shard as an array of its device, and of no mesh; nothing is copied."""
    alone = SingleDeviceSharding(shard.device)
    return jax.make_array_from_single_device_arrays(shard.data.shape, alone, [shard.data])


def _plain(cut: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(cut, shape, strict=True))


@partial(jax.jit, donate_argnums=0)
def _update(part: jax.Array, block: jax.Array, starts: list[int]) -> jax.Array:
    return jax.lax.dynamic_update_slice(part, block.astype(part.dtype), starts)


def _blocks(tensor: Tensor, slot: Slot, edges: tuple[tuple[int, int], ...], itemsize: int) -> Iterator[Box]:
    """The boxes of a slot, in its own coordinates, to be read one by one for a part with these edges."""
    depth = len(slot.index)
    if not all(first <= i < last for i, (first, last) in zip(slot.index, edges, strict=False)):
        return
    box = [slice(first, min(last, size)) for (first, last), size in zip(edges[depth:], slot.shape, strict=True)]
    axis = slot.inputs if tensor.turned else 0
    row = itemsize * math.prod(part.stop - part.start for i, part in enumerate(box) if i != axis)
    step = max(1, BLOCK // row) if row > 0 else 1
    for start in range(box[axis].start, box[axis].stop, step):
        yield (*box[:axis], slice(start, min(start + step, box[axis].stop)), *box[axis + 1 :])


def save_weights(
    folder: Path, config: DecoderConfig, params: nnx.State, family: Family | None = None, shard_bytes: int = 5 * 10**9
) -> tuple[str, ...]:
    """Write config.json and the safetensors that transformers reads, whole or not at all; the names of the files.

    Tensor by tensor, in the type `config.weights_dtype`, without padded rows. Where several processes hold the
    parameters, all must call this, and the first one writes.

    Args:
        folder: made if absent; it may hold other files, and no weights.
        config: of the parameters.
        params: from `load_weights`, `decoder.init` or a training.
        family: a row of the table; by default the first one that represents the config.
        shard_bytes: largest size of a file, unless one tensor alone is larger.

    Raises:
        UserError: no family represents the config, or the folder holds weights.
        Fault: they cannot be written (a full disk).
    """
    values = write_config(config, family)
    if any(folder.glob("*.safetensors*")):
        raise UserError(f"'{folder}' holds weights already: name another folder")
    dtype = np.dtype(config.weights_dtype)
    shards = _shards(tensor_plan(config, find_family(values)), dtype.itemsize, shard_bytes)
    arrays = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    beside = {"config.json": values} | ({INDEX: _index(shards, dtype.itemsize)} if len(shards) > 1 else {})
    with _whole(folder) as place:
        for name, tensors in shards.items():
            gathered = (_gathered(tensor, arrays).astype(dtype, copy=False) for tensor in tensors)
            _write_shard(place(name), dtype, tensors, gathered)
        for name, value in beside.items():
            place(name).write_text(json.dumps(value, indent=2) + "\n")
    return (*shards, *beside)


def _shards(plan: Sequence[Tensor], itemsize: int, limit: int) -> dict[str, list[Tensor]]:
    """Tensors of each file, in order: a file is closed before it would grow beyond the limit."""
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in plan:
        more = itemsize * math.prod(tensor.shape)
        if groups[-1] and size + more > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += more
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _index(shards: Mapping[str, list[Tensor]], itemsize: int) -> dict[str, Any]:
    where = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
    total = itemsize * sum(math.prod(tensor.shape) for tensors in shards.values() for tensor in tensors)
    return {"metadata": {"total_size": total}, "weight_map": where}


def _gathered(tensor: Tensor, arrays: Mapping[str, jax.Array]) -> np.ndarray:
    """A tensor of the file, from all devices of all processes."""
    parts = []
    for slot in tensor.slots:
        part = np.asarray(_taken(arrays[slot.name], slot.index))
        parts.append(part[tuple(slice(0, size) for size in slot.shape)])
    return to_file(tensor, parts)


def _taken(array: jax.Array, index: tuple[int, ...]) -> jax.Array:
    """What lies at an index of the first axes, whole on every device."""
    places = array.sharding
    if not isinstance(places, NamedSharding) or not isinstance(places.mesh, Mesh):
        return array[index]
    with jax.set_mesh(places.mesh):
        if any(places.spec[: len(index)]):  # experts that are apart
            return array.at[index].get(out_sharding=PartitionSpec())
        return jax.reshard(array[index], PartitionSpec())


def _write_shard(path: Path, dtype: np.dtype, tensors: Sequence[Tensor], arrays: Iterable[np.ndarray]) -> None:
    """The safetensors format: length of the header, header, and the tensors one after another."""
    kind = next(name for name, known in DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + dtype.itemsize * math.prod(tensor.shape)
        header[tensor.name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            file.write(array.reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Where to write each file; all appear in the folder when the body has ended, or none."""
    if jax.process_index() > 0:
        yield lambda name: Path(os.devnull)
        return
    hidden = folder / f".weights.{os.getpid()}.tmp"
    try:
        hidden.mkdir(parents=True)
        yield lambda name: hidden / name
        for path in hidden.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for path in sorted(hidden.iterdir(), reverse=True):  # config.json, without which no folder is a model, is last
            path.replace(folder / path.name)
    except OSError as error:
        raise Fault(
            f"could not write the weights in '{folder}' ({error.strerror or error}): make room there"
        ) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
