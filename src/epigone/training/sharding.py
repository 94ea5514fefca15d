"""From each process's part of a batch to arrays on the mesh, cut into micro-batches."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from epigone.errors import UserError
from epigone.models.rules import Sharding

BATCH_AXES = Sharding().B
"""Those of the batch between models: as it is read, and where losses are taken."""


def check_divisible(batch_size: int, microbatches: int, mesh: Mesh, *rules: Sharding) -> None:
    """Refuse a batch that devices, micro-batches or processes cannot share equally, by the rules of any model.

    Raises: UserError with the numbers.
    """
    for axes in dict.fromkeys([BATCH_AXES, *(rule.B for rule in rules)]):
        devices = math.prod(mesh.shape[axis] for axis in axes if axis in mesh.shape)
        if batch_size % (microbatches * devices):
            raise UserError(
                f"batch_size {batch_size} does not divide into {microbatches} micro-batches over {devices} devices "
                f"({' x '.join(axes)}): make it a multiple of {microbatches * devices}, or change --hardware"
            )
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if devices % jax.process_count():
        raise UserError(
            f"the batch is cut over {devices} devices ({' x '.join(BATCH_AXES)}), and {jax.process_count()} processes "
            "cannot share them equally: raise data, fsdp or expert"
        )


def batch_spec(ndim: int) -> P:
    """How an array [microbatches, B, ...] of a batch lies on the mesh."""
    return P(None, BATCH_AXES, *(None,) * (ndim - 2))


def to_mesh(local: Any, microbatches: int, mesh: Mesh) -> Any:
    """A tree of host arrays [b, ...], this process's part, as global arrays [microbatches, B / microbatches, ...].

    Which sequences share a micro-batch depends on the number of processes; sums over all micro-batches do not.
    """
    count = jax.process_count()
    parts = jax.tree.map(lambda x: np.asarray(x).reshape(microbatches, -1, *np.shape(x)[1:]), local)
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, batch_spec(x.ndim)), parts)
    if count == 1:
        return jax.device_put(parts, shardings)

    def share(part: np.ndarray, sharding: NamedSharding) -> jax.Array:
        shape = (microbatches, part.shape[1] * count, *part.shape[2:])
        return jax.make_array_from_process_local_data(sharding, part, shape)

    return jax.tree.map(share, parts, shardings)
