"""Weights from files straight into their places on the mesh, block by block.

Every device gets its part of each parameter once, empty, and a jitted update that takes it over (it is donated) fills
it: so the host holds one block at a time, beside what the operating system keeps of the shard that is open. A process
reads what its own devices need.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from epigone.models.config import DecoderConfig, layer_weights, outer_weights
from epigone.models.decoder import abstract
from epigone.models.huggingface_tensors import Box, Slot, Tensor, file_box, from_file
from epigone.models.sharding import Sharding, check
from epigone.models.weight_files import WeightFiles, plan_of

BLOCK = 4 << 20
"""Bytes that are read at a time: small beside a shard, large beside the cost of an update."""

_NO_MESH = Mesh(np.empty((), object), ())
"""Each part is filled by its device alone, whatever mesh is set."""

Device = jax.Device | None


def load_weights(files: WeightFiles, config: DecoderConfig, sharding: Sharding = Sharding()) -> nnx.State:
    """The parameters of a decoder, in its `weights_dtype`, cut over the mesh that is set, or on the default device.

    Args:
        files: from `open_weights`.
        config: from `read_config`; its vocab_multiple may differ, and padded rows are 0.
        sharding: the mesh axes of each logical axis.

    Raises:
        UserError: the parameters cannot be cut so.
    """
    check(sharding, {name: weight.shape for name, weight in (outer_weights(config) | layer_weights(config)).items()})
    targets = abstract(config, sharding)
    places = {_name(path): _Place(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(targets)}
    plan = {tensor.name: tensor for tensor in plan_of(files, config)}
    with jax.set_mesh(_NO_MESH):
        for name in files.tensors:
            for slot in plan[name].slots if name in plan else ():
                places[slot.name].fill(files, plan[name], slot)
    return jax.tree_util.tree_map_with_path(lambda path, _: places[_name(path)].whole(), targets)


def _name(path: tuple) -> str:
    return next(key.key for key in reversed(path) if hasattr(key, "key"))


class _Place:
    """One parameter while it is filled: the parts on this process's devices."""

    def __init__(self, target: jax.ShapeDtypeStruct) -> None:
        self._shape, self._sharding = target.shape, target.sharding
        whole: Box = tuple(slice(0, size) for size in target.shape)
        boxes: dict[Device, Box] = {None: whole}
        if self._sharding is not None:
            cuts = self._sharding.addressable_devices_indices_map(target.shape).items()
            boxes = {device: _plain(cut, target.shape) for device, cut in cuts}
        self._boxes = boxes
        self._parts = {device: _empty(device, box, target.dtype) for device, box in boxes.items()}

    def fill(self, files: WeightFiles, tensor: Tensor, slot: Slot) -> None:
        """Put what a slot of a tensor holds into every part that has some of it."""
        alike: dict[tuple[tuple[int, int], ...], list[Device]] = defaultdict(list)
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
        if self._sharding is None:
            return self._parts[None]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, list(self._parts.values()))


def _plain(cut: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(cut, shape, strict=True))


def _empty(device: Device, box: Box, dtype: np.dtype) -> jax.Array:
    return jnp.zeros([part.stop - part.start for part in box], dtype, device=device)


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
