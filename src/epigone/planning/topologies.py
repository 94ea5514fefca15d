"""Devices that are not here: a kind of chip, how many, and how they are connected."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import product
from math import prod
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, AxisType

from epigone.devices import CHIPS, Chip
from epigone.errors import UserError
from epigone.models.sharding import AXES, NEAR, in_order, make_mesh

KINDS = {chip.name: kind for kind, chip in CHIPS.items()}

FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
"""Shapes of the slices of v5e and v6e, by chips."""

CUBIC = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
"""And of v4 and v5p, by chips; their names count cores, two a chip."""

WHOLE_RING = {2: 16, 3: 4}
"""Chips along a dimension of a torus, by its dimensions, from which the last is connected to the first."""


@dataclass(frozen=True)
class Topology:
    """Chips and their connections.

    Attributes:
        name: as it was given.
        chip: each of them.
        kind: what JAX calls it.
        shape: chips along each dimension of the torus; or how many there are.
    """

    name: str
    chip: Chip
    kind: str
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        """How many."""
        return prod(self.shape)

    @property
    def platform(self) -> str:
        """`tpu` or `cuda`."""
        return "tpu" if self.chip.dimensions else "cuda"

    def mesh(self, sizes: Sequence[int]) -> AbstractMesh:
        """A mesh of such devices, of none at all: enough to trace."""
        from jax._src.mesh import AbstractDevice

        device = AbstractDevice(device_kind=self.kind, num_cores=None, platform=self.platform)
        return AbstractMesh(tuple(sizes), AXES, axis_types=(AxisType.Explicit,) * len(AXES), abstract_device=device)

    def bandwidth(self, sizes: Sequence[int], axes: Sequence[str]) -> float:
        """Bytes/s at which a device sends in an exchange along axes of a mesh.

        Torus: along the fewest dimensions, or parts of them, that make up the devices that take part; in both
        directions along a whole ring, in one along what is none. Nodes: as the link allows, and the network adapters
        of those devices in one node together.
        """
        group = prod(size for axis, size in zip(AXES, sizes, strict=True) if axis in axes)
        if not self.chip.dimensions:
            near = self._in_one_node(sizes, axes)
            return self.chip.link if near == group else min(self.chip.link, self.chip.network * near)
        return self.among(group)

    def among(self, group: int) -> float:
        """The same among so many chips of a torus."""
        return self.chip.link * self._links(group)

    def _links(self, group: int) -> int:
        """Over how many links at once so many chips exchange."""
        ring = WHOLE_RING[self.chip.dimensions]
        parts = [[n for n in range(1, size + 1) if size % n == 0] for size in self.shape]
        ways = []
        for taken in product(*parts):
            if prod(taken) == group:
                whole = [n for n, size in zip(taken, self.shape, strict=True) if n == size >= ring]
                links = len(whole) + sum(n > 1 for n in taken)
                ways.append((-sum(n > 1 for n in taken), links))
        return max(ways, default=(0, 1))[1]

    def _in_one_node(self, sizes: Sequence[int], axes: Sequence[str]) -> int:
        """Devices of one exchange that are in the same node, neighbours in the mesh's order being neighbours there."""
        near = [dict(zip(AXES, sizes, strict=True))[axis] for axis in NEAR]
        places = in_order(np.arange(prod(sizes)).reshape(near))
        group = places[tuple(slice(None) if axis in axes else 0 for axis in AXES)].ravel()
        return int(np.sum(group // self.chip.node == group[0] // self.chip.node))


def topology(name: str) -> Topology:
    """`v5e:16x16`, `v5p:4x4x8` (a shape in chips); `v5e-256`, `v5p-256` (as the provider names slices); `h100:64`.

    Raises: UserError for what is no topology, with those that are.
    """
    found = re.fullmatch(r"([a-z0-9\-]+?)(?::([\dx]+)|-(\d+))", name.lower())
    kind = KINDS.get(found.group(1)) if found else None
    if not found or kind is None:
        near = get_close_matches(name.partition(":")[0], KINDS, n=1)
        raise UserError(
            f"topology '{name}' is none" + (f"; did you mean {near[0]}?" if near else "") + " Give a chip and a shape, "
            f"as in v5e:16x16, v5p-256 or h100:64. Chips: {', '.join(KINDS)}"
        )
    chip = CHIPS[kind]
    if not chip.dimensions:
        count = found.group(2) or found.group(3)
        if not count.isdigit() or not int(count):
            raise UserError(f"topology '{name}': say how many, as in {chip.name}:64")
        return Topology(name, chip, kind, (int(count),))
    shape = tuple(int(n) for n in (found.group(2) or _slice(name, chip, int(found.group(3)))).split("x") if n)
    if len(shape) != chip.dimensions or not all(shape):
        like = "16x16" if chip.dimensions == 2 else "4x4x8"
        raise UserError(f"topology '{name}': a {chip.name} has {chip.dimensions} dimensions, as in {chip.name}:{like}")
    return Topology(name, chip, kind, shape)


def _slice(name: str, chip: Chip, count: int) -> str:
    """The usual shape of a slice of which the provider's name says how many cores it has."""
    shapes, cores = (FLAT, 1) if chip.dimensions == 2 else (CUBIC, 2)
    if count not in [cores * chips for chips in shapes]:
        names = ", ".join(f"{chip.name}-{cores * chips}" for chips in shapes)
        raise UserError(f"topology '{name}' is no slice that has one shape: give it, or take one of {names}")
    return shapes[count // cores]


def tpu_mesh(where: Topology, sizes: Sequence[int]) -> Any:
    """The same mesh of devices as libtpu describes them: enough to compile.

    Raises: UserError where libtpu is not installed, or knows no such slice.
    """
    if find_spec("libtpu") is None:
        raise UserError("the compiler for TPUs is not installed: pip install 'epigone[plan]', or plan by --no-compile")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    from jax.experimental import topologies

    shape = "x".join(map(str, where.shape))
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"{where.chip.name}:{shape}")
        return make_mesh(*sizes, devices=described.devices)
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"libtpu describes no topology '{where.name}': {said}") from None
