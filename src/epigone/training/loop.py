"""The trainer. One function, read from top to bottom."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from epigone.data.pipeline import Batches
from epigone.errors import Stopped
from epigone.lessons import inner
from epigone.lessons.objective import Objective
from epigone.models.adapters import LowRank
from epigone.models.config import DecoderConfig
from epigone.models.sharding import make_mesh
from epigone.teachers import Teacher, check_compatible, check_inside
from epigone.teachers.in_memory import config_inside
from epigone.teachers.mean_teacher import MeanTeacher, check_mean_teacher, weights_of
from epigone.training.ahead import abstract_state
from epigone.training.checkpoint import Checkpointer
from epigone.training.config import Hardware, Training
from epigone.training.events import Events
from epigone.training.metrics import Clock, Progress, StepReport, demand_finite
from epigone.training.on_policy import TEXT_ONLY, OnPolicy
from epigone.training.own_texts import OwnTexts
from epigone.training.sharding import check_divisible, to_mesh
from epigone.training.step import programs
from epigone.training.stopping import StopRequest
from epigone.training.student import Student, first_weights
from epigone.training.utilisation import Speed, peak_flops

__all__ = ["Hardware", "StepReport", "Stopped", "Trained", "Training", "train"]


@dataclass(frozen=True)
class Trained:
    """What a training run gives.

    Attributes:
        params: the weights on the mesh: the averaged ones where the training has an ema_decay; with adapters merged.
        adapters: these adapters by themselves, averaged or not; None where all weights were trained.
        trained: numbers that were trained.
        optimizer_bytes: of the optimizer's state, over all devices.
        tokens: targets trained on, each by its weight.
        flops: floating-point operations of student and teacher, of own texts and padding too, of recomputation not.
        curve: points with step, tokens, seconds, the mean loss, gradient_norm and learning_rate since the last one, and
            tokens_per_second, flops_per_second and mfu (`epigone.training.utilisation`). Then what
            `epigone.lessons.comparison` says of the last step's batch under the weights before it, which are those
            that the loss is of, too.
        seconds: training time, that before a restart included.
    """

    params: Any
    adapters: Any
    trained: int
    optimizer_bytes: int
    tokens: int
    flops: int
    curve: list[dict[str, float]]
    seconds: float


def train(
    model: DecoderConfig,
    training: Training,
    objective: Objective,
    batches: Batches,
    *,
    seed: int,
    identity: str,
    directory: Path,
    teacher: Teacher | None = None,
    on_policy: OnPolicy = TEXT_ONLY,
    initial_params: Callable[[], Any] | None = None,
    adapters: LowRank | None = None,
    hardware: Hardware = Hardware(),
    on_step: Callable[[StepReport], None] | None = None,
    key: str | None = None,
) -> Trained:
    """Train a decoder, from a checkpoint in `directory` if there is one: the result is the same to the bit.

    Args:
        model: the student, its vocab_size filled in.
        training: steps, batch and optimizer.
        objective: what the student's logits are held against.
        batches: the data; batch `n` depends on nothing but `n`.
        seed: of the initial weights.
        identity: of the node; a checkpoint of another one is refused.
        directory: for checkpoints and TensorBoard events.
        teacher: gives scores, where the objective needs them.
        on_policy: which steps learn from the student's own texts, and how these are written.
        initial_params: gives weights to start from instead of random ones; asked only where no checkpoint is found, or
            where there are adapters.
        adapters: low-rank adapters which alone are trained, beside these weights; None trains all weights.
        hardware: mesh, micro-batches, how often to write a checkpoint.
        on_step: called with each finished step, while the next one runs.
        key: the node's name for messages; its identity if absent.

    Raises:
        UserError: the parts do not fit each other, the mesh or the checkpoint. Nothing has run.
        Fault: the loss or its gradient is not a number, or a checkpoint cannot be written.
        Stopped: SIGTERM or SIGINT came, and a checkpoint has been written.
    """
    # ------------------------------------------------------------------ does it all fit?
    mesh = make_mesh(*hardware.sizes)
    check_divisible(training.batch_size, hardware.microbatches, mesh, hardware.student, hardware.teacher)
    check_compatible(objective, teacher, vocab_size=model.vocab_size)
    if isinstance(teacher, MeanTeacher):
        check_mean_teacher(objective, training.ema_decay, on_policy.share)
    seen = config_inside(teacher)
    check_inside(objective, model.sizes, seen.sizes if seen else None)
    own = OwnTexts(on_policy, model, training, objective, teacher, seed, mesh)
    several, first = jax.process_count() > 1, jax.process_index() == 0
    key = key or identity
    student = Student(model, adapters, hardware.student)
    per_token = student.flops_per_token(training.sequence_length)
    per_token += teacher.flops_per_token(training.sequence_length) if teacher else 0
    if objective.inner and seen:
        per_token += inner.flops_per_token(objective.inner, model.sizes, seen.sizes, training.sequence_length)
    step_flops = per_token * training.batch_size * training.sequence_length

    with jax.set_mesh(mesh), StopRequest(several) as stop:
        # -------------------------------------------------------------- the state: a checkpoint's, or a new one
        offload = hardware.offload_optimizer
        program = programs(student, training, objective, teacher, mesh, offload)
        begin, run_step = program.begin, program.step
        within = program.within
        checkpoints = Checkpointer(directory / "checkpoints", identity)
        weights = partial(first_weights, model, hardware.student, seed, initial_params)
        learned = (student.abstract(), within.abstract() if within else {})
        restored = checkpoints.restore(abstract_state(begin, learned, offload) | {"own": own.kept})
        if restored is not None:
            state, about = restored
            own.kept = state.pop("own")
            progress = Progress(**about)
        else:
            params = student.begin(seed, weights)
            state, progress = begin(params, within.initial(seed) if within else {}), Progress()
            del params
        frozen, start = student.frozen(weights), int(state["step"])
        teacher_params = teacher.place() if teacher else {}

        # -------------------------------------------------------------- the steps
        clock, events = Clock(progress), Events(directory / "events", active=first)
        between = Speed(step_flops, peak_flops(mesh))
        stream = batches.iterate(start) if start < training.steps else iter(())
        saved_at, running = time.monotonic(), None

        def finished(step: int, metrics: Any) -> None:
            """Read the metrics of a step, which waits for it: called when the next one has been started."""
            pairs = {name: (float(total), float(count)) for name, (total, count) in jax.device_get(metrics).items()}
            loss = pairs["loss"][0] / pairs["loss"][1]
            demand_finite(key, step, loss, pairs["gradient_norm"][0], training.optimizer.learning_rate)
            progress.add(pairs)
            speed = clock.tick()
            if training.is_point(step):
                events.write(progress.close(step, **between.at_point(step, progress.tokens)))
            if on_step is not None:
                on_step(StepReport(step, training.steps, loss, round(progress.tokens), speed, progress.seconds))

        try:
            for step in range(start + 1, training.steps + 1):
                writer = student.whole(state["params"], frozen) if own.is_own(step) else None
                batch = own.batch(step, next(stream), writer, teacher_params)
                del writer
                fetched = teacher.fetch(batch) if teacher else {}
                batch, fetched = to_mesh((batch, fetched), hardware.microbatches, mesh)
                # Before the step, which takes the state away. Read with the step's metrics, so nothing waits for it.
                given = (frozen, teacher_params, batch, fetched)
                theirs = weights_of(teacher.scores, state, teacher_params) if teacher else {}
                compared = (state["params"], frozen, theirs, batch, fetched)
                beside = program.compare(*compared) if training.compares(step) else {}
                state, metrics = run_step(state, *given)
                if running is not None:
                    finished(*running)
                running = (step, metrics | beside)

                stopping = stop.at(step)
                if stopping or (step < training.steps and _due(step, saved_at, training, hardware, several)):
                    # Its own metrics first: a state that is not finite never becomes a checkpoint.
                    finished(*running)
                    running = None
                    checkpoints.save(step, state | {"own": own.kept}, asdict(progress))
                    events.bring()
                    saved_at = time.monotonic()
                    if stopping:
                        checkpoints.wait()
                        where = f"node '{key}' stopped at step {step} of {training.steps}"
                        raise Stopped(f"{where}; the same command goes on from here")
            if running is not None:
                finished(*running)
        finally:
            try:
                events.close()
            finally:
                checkpoints.close()

    # ------------------------------------------------------------------ what came of it
    trained = state["params"] if training.ema_decay is None else state["ema"]
    with jax.set_mesh(mesh):
        params = student.whole(trained, frozen)
    return Trained(
        params=params,
        adapters=None if adapters is None else trained,
        trained=student.parameter_count(),
        optimizer_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state["optimizer"])),
        tokens=round(progress.tokens),
        flops=step_flops * training.steps + own.flops(training.steps),
        curve=progress.curve,
        seconds=progress.seconds,
    )


def _due(step: int, saved_at: float, training: Training, hardware: Hardware, several: bool) -> bool:
    """Whether it is time for a checkpoint. Clocks of several processes differ: the first one's counts, now and then."""
    every, seconds = hardware.checkpoint_every_steps, hardware.checkpoint_every_seconds
    if every is not None and step % every == 0:
        return True
    if seconds is None:
        return False
    due = time.monotonic() - saved_at >= seconds
    if not several:
        return due
    return step % training.log_every == 0 and bool(multihost_utils.broadcast_one_to_all(np.int32(due)))
