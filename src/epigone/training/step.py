"""The compiled programs of a training run: one for all nodes of the same shape in a process.

Seeds, identities, weights and the teacher's weights are arguments, never constants of the program.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from epigone.identity import fingerprint
from epigone.lessons.aligned import Aligned, aligned_loss, aligned_sums
from epigone.lessons.chunks import Mesh
from epigone.lessons.comparison import Sums, as_pairs, compare
from epigone.lessons.fused import fused_loss
from epigone.lessons.inner import names_of
from epigone.lessons.objective import Objective
from epigone.lessons.policy_gradient import reads_later
from epigone.lessons.rewards import rewarded_loss
from epigone.lessons.schedules import at_step
from epigone.lessons.sparse import Sparse
from epigone.teachers import Batch, Signal, Teacher
from epigone.teachers.in_memory import DecoderStates
from epigone.teachers.mean_teacher import AverageStates, weights_of
from epigone.training.config import Training
from epigone.training.optimizer import learning_rate, transformation
from epigone.training.sharding import BATCH_AXES
from epigone.training.student import Student
from epigone.training.within import Projections, Within

State = dict[str, Any]
"""step (int32), params (all that is trained of the student), optimizer; projections where some are learned beside it;
ema where the params are averaged."""

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device

MANY = (0, None, None, 0, 0)
"""Of the arguments of a step, the axis along which students lie that are trained together."""

_programs: dict[Any, "Programs"] = {}


@dataclass(frozen=True)
class Programs:
    """What is compiled for one shape of training.

    Attributes:
        begin: (what is trained, projections) -> the state before the first step, with copies of both.
        step: (state, frozen, teacher's parameters, batch, fetched) -> (state, metrics); the old state is donated.
            `frozen` are weights of the student that are not trained, {} where all are.
        compare: (what is trained, frozen, teacher's parameters, batch, fetched) -> pairs of
            `epigone.lessons.comparison`, of the whole batch. A program of its own, so that whether it runs changes no
            bit of a step.
        within: what inside the teacher is learned too; None for nothing.
    """

    begin: Callable[..., State]
    step: Callable[[State, Any, Any, Batch, Any], tuple[State, dict[str, tuple[jax.Array, jax.Array]]]]
    compare: Callable[[Any, Any, Any, Batch, Any], Sums]
    within: Within | None


def programs(
    student: Student,
    training: Training,
    objective: Objective,
    teacher: Teacher | None,
    mesh: jax.sharding.Mesh | None,
    offload: bool = False,
    together: bool = False,
) -> Programs:
    """The programs for this student, lesson and mesh; the same objects for equal configs.

    Args:
        student: the shape of what is trained.
        training: steps and optimizer.
        objective: what is learned.
        teacher: whose scores are.
        mesh: where arrays lie; None for one device that is not named.
        offload: the optimizer's moments are in the memory of the host.
        together: of many students at once, along a first axis of everything but the teacher's parameters.
    """
    scores, theirs = (teacher.scores, teacher.head) if teacher else (None, None)
    key = (fingerprint((student, training, objective, scores, theirs)), mesh, offload, together)
    if key not in _programs:
        heads = (student.head, *(theirs if isinstance(theirs, tuple) else (theirs,)))
        cut = Mesh() if mesh is None else Mesh(BATCH_AXES, "tensor" if mesh.shape["tensor"] > 1 else None)
        whole: Any = partial(rewarded_loss if reads_later(objective.divergence) else fused_loss, objective.loss)
        if teacher and teacher.signal is Signal.OTHER_TOKENS:
            whole = partial(aligned_loss, objective)
        fused = partial(whole, heads=heads, mesh=cut)
        within = None
        if objective.inner and isinstance(scores, DecoderStates):  # `check_inside` lets no other in
            within = Within(objective.inner, student, scores, cut)
        begin: Any = partial(_begin, training, offload)
        step: Any = partial(_step, training, objective, student, scores, within, fused, offload)
        alone = heads[:1] if whole.func is aligned_loss else heads
        beside: Any = partial(_compare, student, scores, partial(compare, heads=alone, mesh=cut))
        if together:
            begin, step, beside = (jax.vmap(one, MANY[:n]) for one, n in ((begin, 1), (step, 5), (beside, 5)))
        _programs[key] = Programs(jax.jit(begin), jax.jit(step, donate_argnums=0), jax.jit(beside), within)
    return _programs[key]


def _begin(training: Training, offload: bool, params: Any, projections: Projections | None = None) -> State:
    state = {"params": jax.tree.map(jnp.copy, params)}
    if projections:
        state["projections"] = jax.tree.map(jnp.copy, projections)
    optimizer = transformation(training.optimizer, training.steps).init(_learned(state))
    state |= {"step": jnp.zeros((), jnp.int32), "optimizer": _moved(optimizer, HOST) if offload else optimizer}
    return state if training.ema_decay is None else state | {"ema": jax.tree.map(jnp.copy, params)}


def _step(
    training: Training,
    objective: Objective,
    student: Student,
    scores: Callable[..., Any] | None,
    within: Within | None,
    fused: Callable[..., tuple[jax.Array, jax.Array]],
    offload: bool,
    state: State,
    frozen: Any,
    teacher_params: Any,
    batch: Batch,
    fetched: Any,
) -> tuple[State, dict[str, tuple[jax.Array, jax.Array]]]:
    """One update from a batch [microbatches, B, T]."""
    # The sum of weights over all micro-batches, devices and hosts: every token counts the same, wherever it lies.
    tokens = jnp.sum(batch.weights_BT)
    knobs = objective.knobs(state["step"])
    teacher_params = weights_of(scores, state, teacher_params)

    def loss(learned: Any, part: tuple[Batch, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        batch, fetched = part
        params, projections = _parted(state, learned)
        inner: dict[str, jax.Array] = {}
        if within is None:
            given = _given(scores, student, frozen, teacher_params, batch, fetched)
            ours = student(params, frozen, batch)
        else:
            ours, given, losses = within(projections, params, frozen, teacher_params, batch)
            given = given if objective.needs_scores else None
            each = zip(names_of(objective.inner), losses, strict=True)
            inner = {name: jnp.sum(loss_BT * batch.weights_BT) for name, loss_BT in each}
        texts = {"segments_BT": batch.segments_BT} if reads_later(objective.divergence) else {}
        total = fused(ours, given, batch.targets_BT, batch.weights_BT, knobs=knobs, **texts)[0]
        for match, value in zip(objective.inner, inner.values(), strict=True):
            total += at_step(match.weight, state["step"]) * value
        return total / tokens, inner

    zeros = jnp.zeros(()), {name: jnp.zeros(()) for name in names_of(objective.inner)}
    differentiated = jax.value_and_grad(loss, has_aux=True)
    (mean_loss, inner), gradients = _accumulated(differentiated, _learned(state), (batch, fetched), zeros)
    if offload:
        state = state | {"optimizer": _moved(state["optimizer"], DEVICE)}
    updates, optimizer_state = _update(training, gradients, state)
    optimizer_state = _moved(optimizer_state, HOST) if offload else optimizer_state
    params, projections = _parted(state, optax.apply_updates(_learned(state), updates))
    new = {"step": state["step"] + 1, "params": params, "optimizer": optimizer_state}
    if projections:
        new["projections"] = projections
    if training.ema_decay is not None:
        new["ema"] = optax.incremental_update(params, state["ema"], 1.0 - training.ema_decay)
    one = jnp.ones(())
    metrics = {
        "loss": (mean_loss * tokens, tokens),
        **{name: (value, tokens) for name, value in inner.items()},
        "gradient_norm": (optax.global_norm(gradients), one),
        "learning_rate": (learning_rate(training.optimizer, training.steps)(state["step"]), one),
    }
    return new, metrics


def _given(
    scores: Callable[..., Any] | None, student: Student, frozen: Any, teacher_params: Any, batch: Batch, fetched: Any
) -> Any:
    """What the teacher says of a batch. The average of the student reads it as the student does."""
    if isinstance(scores, AverageStates):
        return student(teacher_params, frozen, batch)
    return scores(teacher_params, batch, fetched) if scores else None


def _compare(
    student: Student,
    scores: Callable[..., Any] | None,
    compare: Callable[..., Sums],
    params: Any,
    frozen: Any,
    teacher_params: Any,
    batch: Batch,
    fetched: Any,
) -> Sums:
    """The student beside its teacher and the text, on a batch [microbatches, B, T], one micro-batch at a time."""

    def sums(part: tuple[Batch, Any]) -> Sums:
        batch, fetched = part
        given = _given(scores, student, frozen, teacher_params, batch, fetched)
        more = aligned_sums(given, batch.weights_BT) if isinstance(given, Aligned) else {}
        # A few scores are no distribution, and one over other tokens is none over the student's.
        given = None if isinstance(given, Sparse | Aligned) else given
        return compare(student(params, frozen, batch), given, batch.targets_BT, batch.weights_BT) | more

    def add(so_far: Sums, part: tuple[Batch, Any]) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, so_far, sums(part)), None

    first = jax.tree.map(lambda x: x[0], (batch, fetched))
    if batch.weights_BT.shape[0] == 1:
        return as_pairs(sums(first))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sums, first))
    return as_pairs(jax.lax.scan(add, zeros, (batch, fetched))[0])


def _accumulated(value_and_grad: Callable[..., Any], params: Any, parts: Any, zeros: Any) -> tuple[Any, Any]:
    """Sum of the values, which begin at `zeros`, and of the gradient over the micro-batches, one at a time."""
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        return value_and_grad(params, jax.tree.map(lambda x: x[0], parts))

    def add(sums: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, value_and_grad(params, part)), None

    return jax.lax.scan(add, (zeros, jax.tree.map(jnp.zeros_like, params)), parts)[0]


def _moved(optimizer: Any, where: Any) -> Any:
    """The moments of an optimizer's state in another memory; its counters stay."""
    return jax.tree.map(lambda x: jax.device_put(x, where) if x.ndim else x, optimizer)


def _learned(state: State) -> Any:
    """All that the optimizer moves: the student, and what is learned beside it."""
    return {name: state[name] for name in ("params", "projections")} if "projections" in state else state["params"]


def _parted(state: State, learned: Any) -> tuple[Any, Projections]:
    """And back."""
    return (learned["params"], learned["projections"]) if "projections" in state else (learned, {})


def _update(training: Training, gradients: Any, state: State) -> tuple[Any, Any]:
    """The optimizer's step. Optax knows no explicit shardings: inside it, the compiler places what lies between."""
    update = transformation(training.optimizer, training.steps).update
    params, optimizer_state = _learned(state), state["optimizer"]
    if jax.sharding.get_abstract_mesh().empty:
        return update(gradients, optimizer_state, params)
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (params, optimizer_state))
    return jax.sharding.auto_axes(update, out_sharding=shardings)(gradients, optimizer_state, params)
