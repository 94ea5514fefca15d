"""Several small models of one shape in one program: `jax.vmap` over their weights, seeds and data.

A step of a model of a few thousand weights is not arithmetic, it is the start of a hundred small operations. Done for
many models at once, these cost as much as for one. The results are those of `epigone.training.loop.train` up to the
rounding of sums. There are no checkpoints: what is worth one is worth a run of its own.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from epigone.data.pipeline import Batches, ahead
from epigone.errors import Stopped, UserError
from epigone.lessons.objective import Objective
from epigone.models import decoder
from epigone.models.config import DecoderConfig
from epigone.teachers import Teacher, check_compatible
from epigone.training.config import Training
from epigone.training.loop import Trained
from epigone.training.metrics import Clock, Progress, StepReport, demand_finite
from epigone.training.step import programs
from epigone.training.stopping import StopRequest
from epigone.training.student import Student


@dataclass(frozen=True)
class Member:
    """One of the models.

    Attributes:
        key: its name, for messages.
        seed: of the initial weights.
        batches: its data, of the same sizes as the others'.
        initial_params: gives weights to start from instead of random ones.
    """

    key: str
    seed: int
    batches: Batches
    initial_params: Callable[[], Any] | None = None


def train_together(
    model: DecoderConfig,
    training: Training,
    objective: Objective,
    members: Sequence[Member],
    *,
    teacher: Teacher | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> list[Trained]:
    """Train all members on one device, as `train` would train each: one result a member, in their order.

    Args:
        model: the shape of all, its vocab_size filled in.
        training: steps, batch and optimizer.
        objective: of all.
        members: at least one.
        teacher: of all; its weights are there once.
        on_step: called with each finished step: the mean of the losses, the tokens of all.

    Raises:
        UserError: the parts do not fit each other. Nothing has run.
        Fault: a loss or its gradient is not a number; the line names the member.
        Stopped: SIGTERM or SIGINT came; what was trained so far is lost.
    """
    check_compatible(objective, teacher, vocab_size=model.vocab_size)
    if objective.inner:
        raise UserError("models that are trained together learn scores and text, and nothing of a teacher's layers")
    student = Student(model)
    program = programs(student, training, objective, teacher, None, together=True)
    begun = [one.initial_params() if one.initial_params else decoder.init(model, one.seed) for one in members]
    state = program.begin(_stacked(begun))
    del begun
    teacher_params = teacher.place() if teacher else {}

    sum_up = Progress()
    clock, each = Clock(sum_up), [Progress() for _ in members]
    stream = ahead(lambda step: [one.batches.batch(step) for one in members], training.batch_size)
    began, running = time.monotonic(), None

    def finished(step: int, metrics: Any) -> None:
        """Read the metrics of a step, each a pair of arrays [members]: called when the next one has been started."""
        found = {name: np.broadcast_arrays(*map(np.asarray, pair)) for name, pair in jax.device_get(metrics).items()}
        losses = found["loss"][0] / found["loss"][1]
        for number, one in enumerate(members):
            norm, rate = found["gradient_norm"][0][number], training.optimizer.learning_rate
            demand_finite(one.key, step, losses[number], norm, rate)
            pairs = {name: (float(total[number]), float(count[number])) for name, (total, count) in found.items()}
            each[number].add(pairs)
            sum_up.tokens += pairs["loss"][1]
        speed = clock.tick()
        if training.is_point(step):
            for progress in each:
                progress.seconds = sum_up.seconds / len(members)
                progress.close(step)
        if on_step is not None:
            on_step(StepReport(step, training.steps, losses.mean(), round(sum_up.tokens), speed, sum_up.seconds))

    with StopRequest() as stop:
        for step in range(1, training.steps + 1):
            batches = next(stream)
            fetched = _stacked([_in_parts(teacher.fetch(one)) if teacher else {} for one in batches])
            batch = _stacked([_in_parts(one) for one in batches])
            # Before the step, which takes the state away.
            compared: Any = (state["params"], {}, teacher_params, batch, fetched)
            beside = program.compare(*compared) if training.compares(step) else {}
            state, metrics = program.step(state, {}, teacher_params, batch, fetched)
            if running is not None:
                finished(*running)
            running = (step, metrics | beside)
            if stop.at(step):
                raise Stopped(f"stopped at step {step} of {training.steps} of {len(members)} models that begin anew")
        if running is not None:
            finished(*running)

    params = state["params"] if training.ema_decay is None else state["ema"]
    per_token = student.flops_per_token(training.sequence_length)
    per_token += teacher.flops_per_token(training.sequence_length) if teacher else 0
    optimizer = sum(leaf.nbytes for leaf in jax.tree.leaves(state["optimizer"])) // len(members)
    return [
        Trained(
            params=jax.tree.map(lambda x, number=number: x[number], params),
            adapters=None,
            trained=student.parameter_count(),
            optimizer_bytes=optimizer,
            tokens=round(progress.tokens),
            flops=per_token * training.batch_size * training.sequence_length * training.steps,
            curve=progress.curve,
            seconds=(time.monotonic() - began) / len(members),
        )
        for number, progress in enumerate(each)
    ]


def _stacked(trees: Sequence[Any]) -> Any:
    """Trees of one structure as one, with the members along the first axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves) if _is_numpy(leaves) else jnp.stack(leaves), *trees)


def _is_numpy(leaves: Sequence[Any]) -> bool:
    return all(isinstance(leaf, np.ndarray) for leaf in leaves)


def _in_parts(tree: Any) -> Any:
    """[B, ...] as the one micro-batch [1, B, ...] that a step reads."""
    return jax.tree.map(lambda x: x[None], tree)
