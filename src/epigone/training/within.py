"""Inside a step: student and teacher read a batch, and what is asked for inside them is held together."""

import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from epigone.lessons.chunks import Mesh
from epigone.lessons.heads import Hidden
from epigone.lessons.inner import Match, inner_losses, layers_of, projections_of
from epigone.models.inside import Asked
from epigone.models.sharding import Sharding, named, out, suffix
from epigone.teachers import Batch
from epigone.teachers.in_memory import DecoderStates
from epigone.training.student import Student

Projections = dict[str, jax.Array]
"""What is learned beside the student, by the names of `epigone.lessons.inner.projections_of`."""


@dataclass(frozen=True)
class Within:
    """What is held together.

    Attributes:
        matches: of the objective.
        student: how its states are made.
        teacher: how its teacher's are.
        mesh: the axes over which the batch is cut.
    """

    matches: tuple[Match, ...]
    student: Student
    teacher: DecoderStates
    mesh: Mesh

    def __call__(
        self, projections: Projections, trained: Any, frozen: Any, teacher_params: Any, batch: Batch
    ) -> tuple[Hidden, Hidden, tuple[jax.Array, ...]]:
        """Hidden states of both, and the loss [B, T] of each match; the teacher's are constants."""
        sizes = self.student.config.sizes, self.teacher.config.sizes
        asked = [
            Asked(*parts) for parts in zip(*(layers_of(self.matches, *sizes, of) for of in (False, True)), strict=True)
        ]
        given, theirs = self.teacher.look_inside(teacher_params, batch, asked[1])
        hidden, ours = self.student.look_inside(trained, frozen, batch, asked[0])
        pairs = tuple(match.pairs(*sizes) for match in self.matches)
        both = ours, jax.lax.stop_gradient(theirs)
        losses = inner_losses(self.matches, pairs, projections, *both, batch.segments_BT, mesh=self.mesh)
        return hidden, given, losses

    def initial(self, seed: int) -> Projections:
        """Projections for a seed, the same on every mesh, cut over the mesh that is set.

        Square ones begin as the identity, others normal with variance 1 / inputs.
        """
        return _initial(tuple(self._shapes().items()), jax.random.key(seed))

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Their shapes and places."""
        return {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=named(Sharding().weight(suffix(name))))
            for name, shape in self._shapes().items()
        }

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return projections_of(self.matches, self.student.config.sizes, self.teacher.config.sizes)


@partial(jax.jit, static_argnums=0)
def _initial(shapes: tuple[tuple[str, tuple[int, int]], ...], key: jax.Array) -> Projections:
    """The key is folded with each name, so that a new one does not change the others."""

    def one(name: str, shape: tuple[int, int]) -> jax.Array:
        cut, own = out(Sharding().weight(suffix(name))), jax.random.fold_in(key, zlib.crc32(name.encode()))
        if shape[0] == shape[1] and name.endswith("_DE"):
            return jnp.eye(*shape) if cut is None else jax.reshard(jnp.eye(*shape), cut)
        return shape[0] ** -0.5 * jax.random.normal(own, shape, jnp.float32, out_sharding=cut)

    return {name: one(name, shape) for name, shape in shapes}
