"""The step of a training before there is a device for it: its arguments as shapes, and the step lowered from them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from epigone.lessons.objective import Objective
from epigone.models import decoder
from epigone.models.sharding import mesh_in_use, named
from epigone.teachers import Batch, Teacher
from epigone.training.config import Hardware, Training
from epigone.training.sharding import batch_spec, check_divisible
from epigone.training.step import programs
from epigone.training.student import Student


def abstract_state(begin: Callable[..., Any], learned: tuple[Any, Any], offload: bool = False) -> Any:
    """Shapes and shardings of the state on the mesh that is set, without making it.

    `offload`: the optimizer's moments are in the memory of the host.
    """

    def on_mesh(leaf: Any) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if leaf.sharding else jax.sharding.PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named(spec))

    def on_host(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return leaf.update(sharding=leaf.sharding.with_memory_kind("pinned_host")) if leaf.ndim else leaf

    state = jax.tree.map(on_mesh, jax.eval_shape(begin, *learned))
    return state | {"optimizer": jax.tree.map(on_host, state["optimizer"])} if offload else state


def abstract_batch(training: Training, microbatches: int) -> Batch:
    """A batch [microbatches, B, T] on the mesh that is set, as `to_mesh` makes them."""
    shape = (microbatches, training.batch_size // microbatches, training.sequence_length)
    floats = {"weights_BT": jnp.float32}

    def part(name: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, floats.get(name, jnp.int32), sharding=named(batch_spec(3)))

    return Batch(**{name: part(name) for name in Batch._fields})


def traced_step(
    student: Student, training: Training, objective: Objective, teacher: Teacher | None, hardware: Hardware
) -> Any:
    """The step of training, traced on the mesh that is set: teacher, student forward and backward, loss, optimizer.

    Args:
        student: with its config and rules.
        training: batch, length and optimizer.
        objective: what is learned.
        teacher: a `DecoderTeacher`, of which no weights are read; None where text alone is learned.
        hardware: micro-batches; its mesh is the one that is set, which may be of devices that are not here
            (`jax.experimental.topologies`) or of none (`jax.sharding.AbstractMesh` with an abstract device).

    Returns: a `jax.stages.Traced`: `.lower()` for the devices of the mesh, `.lower(lowering_platforms=("tpu",))` for a
    platform alone.

    Raises: UserError for what does not divide.
    """
    mesh: Any = mesh_in_use()
    check_divisible(training.batch_size, hardware.microbatches, mesh, student.sharding, hardware.teacher)
    program = programs(student, training, objective, teacher, mesh, hardware.offload_optimizer)
    learned = (student.abstract(), program.within.abstract() if program.within else {})
    frozen = decoder.abstract(student.config, student.sharding) if student.adapters else {}
    scores: Any = teacher.scores if teacher else None
    theirs = decoder.abstract(scores.config, scores.sharding) if teacher else {}
    state, batch = (
        abstract_state(program.begin, learned, hardware.offload_optimizer),
        abstract_batch(training, hardware.microbatches),
    )
    step: Any = program.step
    return step.trace(state, frozen, theirs, batch, {})
