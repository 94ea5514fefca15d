"""The student's own batches in a training run: at which steps, written when, and kept for which later steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from epigone.lessons.objective import Objective
from epigone.models import decoder
from epigone.models.config import DecoderConfig
from epigone.sampling.own_rows import Given, Writing, write_rows
from epigone.teachers import Batch, Teacher, common_size
from epigone.teachers.cached import CachedTeacher
from epigone.teachers.ensemble import EnsembleTeacher
from epigone.teachers.in_memory import DecoderStates
from epigone.training.config import Training
from epigone.training.on_policy import OnPolicy, check_on_policy, check_run
from epigone.training.sharding import to_mesh

PURPOSE = 0x0E1F
"""Beside the seed: which steps are own is drawn by other numbers than anything else of the run."""


class OwnTexts:
    """The own batches of one training run.

    Attributes:
        kept: those that later steps may take again, whole on every device; part of a checkpoint.
    """

    def __init__(
        self,
        how: OnPolicy,
        model: DecoderConfig,
        training: Training,
        objective: Objective,
        teacher: Teacher | None,
        seed: int,
        mesh: Mesh,
    ) -> None:
        """Args: as `train` has them. Raises UserError for what does not fit; nothing is written yet."""
        scores: Any = getattr(teacher, "scores", None)
        decodes = isinstance(scores, DecoderStates)
        check_on_policy(how, objective, None if teacher is None else decodes)
        if how.share:
            check_run(how, training, _reads_all(teacher))
        self._how, self._seed, self._mesh, self._training, self._teacher = how, seed, mesh, training, teacher
        mixed = scores.config if decodes and how.teacher_share else None
        sizes = (how.prompt_tokens, how.max_new)
        tokens = common_size(teacher, model.vocab_size or 0)
        self._writing = Writing(model, mixed, how.teacher_share, *sizes, how.knobs, how.importance, tokens)
        self._turns = [0]
        self.kept = [_empty(training, mesh) for _ in range(how.replay)]

    def is_own(self, step: int) -> bool:
        """Whether this step learns from own texts. It follows from seed and step alone."""
        share = self._how.share
        return bool(share) if share in (0.0, 1.0) else bool(self._number(step, 0) < share)

    def batch(self, step: int, given: Batch, params: Any, teacher_params: Any) -> Batch:
        """The batch of a step: the given one, one that is written now, or one that is kept.

        Args: step, from 1; this process's part of its text; the weights of the student and of its teacher.
        Returns: this process's part.
        """
        if not self.is_own(step):
            return given
        turn = self._turn(step)
        written = turn // self._how.reuse + 1
        if turn % self._how.reuse:
            choice = int(self._number(step, 1) * min(written, self._how.replay))
            return self._part(self.kept[(written - 1 - choice) % self._how.replay], given)
        rows = Given(given.tokens_BT, given.targets_BT, given.segments_BT)
        fresh = Batch(*self._write(params, teacher_params, rows, step))
        if self.kept:
            self.kept[(written - 1) % self._how.replay] = fresh
        return self._part(fresh, given)

    def flops(self, steps: int) -> int:
        """Floating-point operations of writing in these steps: one forward pass a column of a row, of each model."""
        written = -(-(self._turn(steps) + self.is_own(steps)) // self._how.reuse)
        length = self._training.sequence_length
        each = decoder.flops_per_token(self._writing.student, length, training=False)
        each += self._teacher.flops_per_token(length) if self._teacher and self._writing.teacher else 0
        return written * self._training.batch_size * length * each

    def _write(self, params: Any, teacher_params: Any, rows: Given, step: int) -> tuple[jax.Array, ...]:
        whole = Given(*(x[0] for x in to_mesh(rows, 1, self._mesh)))
        return write_rows(self._writing, params, teacher_params, whole, np.uint32(self._seed), np.uint32(step))

    def _part(self, whole: Batch, given: Batch) -> Batch:
        """This process's rows, on the host."""
        rows = len(given.tokens_BT)
        first = jax.process_index() * rows
        return Batch(*(np.asarray(x)[first : first + rows] for x in whole))

    def _number(self, step: int, which: int) -> float:
        """Numbers from 0 to 1 of a step: of its kind, and of its choice among those that are kept."""
        return np.random.default_rng([self._seed, PURPOSE, step]).random(2)[which]

    def _turn(self, step: int) -> int:
        """Own steps before this one."""
        for s in range(len(self._turns), step):
            self._turns.append(self._turns[-1] + self.is_own(s))
        return self._turns[step - 1]


def _reads_all(teacher: Teacher | None) -> bool:
    """Whether it scores any text, also one that is new."""
    if isinstance(teacher, EnsembleTeacher):
        return teacher.routes is None and all(map(_reads_all, teacher.members))
    return not isinstance(teacher, CachedTeacher)


def _empty(training: Training, mesh: Mesh) -> Batch:
    """A place for a batch, on all devices."""
    shape, whole = (training.batch_size, training.sequence_length), NamedSharding(mesh, P())
    kinds = (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
    return Batch(*(jnp.zeros(shape, kind, device=whole) for kind in kinds))
