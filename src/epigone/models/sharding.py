"""Where every array lives: one mesh, and one rule per axis letter.

Epigone runs on a mesh with four explicit axes, made in one line and set with `jax.set_mesh`:

    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)): ...

The rules are a `Sharding` (`models/rules.py`). By default the batch is cut over `data`, `fsdp` and `expert`; heads,
feed-forward and vocabulary over `tensor`; the experts of a mixture over `expert`; the other axis of each weight over
`fsdp`, and it is gathered just before use. Models on one mesh may have rules of their own. With no mesh set the same
code runs on the default device: every placement below is then the identity.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from epigone.errors import UserError
from epigone.models.rules import Sharding

AXES = ("data", "fsdp", "tensor", "expert")

NEAR = ("data", "fsdp", "expert", "tensor")
"""The same, from those whose devices may be far from each other to those that are neighbours."""


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, expert: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of `data * fsdp * tensor * expert` devices with explicit axes; the first ones unless `devices` names them.

    Raises UserError when there are fewer devices than the mesh needs.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = (data, fsdp, tensor, expert)
    needed = math.prod(sizes)
    if min(sizes) < 1 or needed > len(devices):
        raise UserError(
            f"a mesh of {in_words(sizes)} needs {needed} devices, and there are {len(devices)}: choose sizes of at "
            f"least 1 whose product is at most {len(devices)}"
        )
    # A mesh need not be a product of whole dimensions of a TPU's torus: these may be split.
    near = [sizes[AXES.index(axis)] for axis in NEAR]
    grid = create_device_mesh(near, devices[:needed], allow_split_physical_axes=True)
    return Mesh(in_order(grid), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def in_order(grid: np.ndarray) -> np.ndarray:
    """A grid whose dimensions are those of NEAR, as one of AXES."""
    return np.transpose(grid, [NEAR.index(axis) for axis in AXES])


def in_words(sizes: Sequence[int]) -> str:
    """Sizes of the mesh with their axes, as `data 1 x fsdp 8 x tensor 2`; without experts where they are not cut."""
    pairs = zip(AXES, sizes, strict=True)
    return " x ".join(f"{axis} {size}" for axis, size in pairs if axis != "expert" or size != 1)


def check(sharding: Sharding, shapes: Mapping[str, Sequence[int]], mesh: Mesh | None = None) -> None:
    """Refuse weights that cannot be cut as declared. `shapes` maps names with an axis suffix to sizes.

    Raises UserError for two logical axes on one mesh axis, for a mesh axis that does not exist, and for
    a size that does not divide, with the numbers.
    """
    sizes = dict((mesh or jax.sharding.get_abstract_mesh()).shape)
    for name, shape in shapes.items():
        letters = suffix(name)
        for letter, size, axes in zip(letters, shape, sharding.weight(letters), strict=True):
            _check_axis(name, letter, size, (axes,) if isinstance(axes, str) else axes or (), sizes)


def check_batch(sharding: Sharding, batch_size: int, mesh: Mesh | None = None) -> None:
    """Refuse a batch that the mesh cannot cut into equal parts."""
    check(sharding, {"batch_B": (batch_size,)}, mesh)


def _check_axis(name: str, letter: str, size: int, axes: tuple[str, ...], sizes: Mapping[str, int]) -> None:
    if not sizes:
        return
    unknown = [axis for axis in axes if axis not in sizes]
    if unknown:
        raise UserError(f"{name}: mesh axis '{unknown[0]}' does not exist; the mesh has {', '.join(sizes)}")
    parts = math.prod(sizes[axis] for axis in axes)
    if size % parts:
        raise UserError(
            f"{name}: axis {letter} has size {size}, which {' x '.join(axes)} = {parts} does not divide: "
            f"change the model's size or the mesh"
        )


def suffix(name: str) -> str:
    """The axis letters of a name: `query_LDNH` -> `LDNH`."""
    return name.rsplit("_", 1)[-1]


def in_mesh() -> bool:
    """Whether a mesh is set."""
    return not jax.sharding.get_abstract_mesh().empty


def placed(x: jax.Array, spec: P) -> jax.Array:
    """`x`, moved to `spec` on the current mesh; unchanged when none is set."""
    return jax.reshard(x, spec) if in_mesh() else x


def spread(arrays: Any, shardings: Any) -> Any:
    """A tree of arrays that every process has whole, cut over the devices of all processes as `shardings` says."""

    def place(array: jax.Array, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(array, sharding)
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, arrays, shardings)


def out(spec: P) -> P | None:
    """`spec` as an `out_sharding=` argument: None when no mesh is set."""
    return spec if in_mesh() else None


def named(spec: P) -> NamedSharding | None:
    """`spec` on the current mesh, for restore targets and for what is compiled ahead; None when no mesh is set."""
    return NamedSharding(mesh_in_use(), spec) if in_mesh() else None


def mesh_in_use() -> Mesh | AbstractMesh:
    """The mesh that is set: with its devices, where it has some. Not to be called in what is traced."""
    return jax.sharding.get_abstract_mesh() if jax.sharding.get_mesh().empty else jax.sharding.get_mesh()


def batch_parts(sharding: Sharding) -> int:
    """Into how many parts the current mesh cuts a batch."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(sizes.get(axis, 1) for axis in sharding.B)
