"""A student that learns from its own average: beside the dense form, on a mesh, after a stop; and what is refused."""

import os
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_toy import MODEL, TRAINING, Counting, losses, measures, run, weights

from epigone.errors import Stopped, UserError
from epigone.lessons.divergences import jsd, reverse_kl
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.lessons.schedules import Linear
from epigone.lineage import Lesson, Pretrained
from epigone.models import decoder
from epigone.models.adapters import LowRank
from epigone.models.sharding import make_mesh
from epigone.teachers.mean_teacher import MeanTeacher, check_mean_teacher
from epigone.training.config import Hardware
from epigone.training.on_policy import OnPolicy
from epigone.training.optimizer import transformation
from epigone.training.sharding import to_mesh
from epigone.training.step import programs
from epigone.training.student import Student

AVERAGED = replace(TRAINING, ema_decay=0.8)
HALF = Objective(reverse_kl, hard_weight=0.5)


def given(training=AVERAGED, objective=HALF, **more):
    return {"training": training, "objective": objective, "teacher": MeanTeacher(MODEL, "id")} | more


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("mean-teacher"), **given())


@pytest.mark.parametrize("objective", [HALF, Objective(jsd, temperature=2.0, hard_weight=Linear(1.0, 0.2, 3))])
def test_steps_are_those_of_the_dense_loss_with_a_constant_average(objective):
    """Three steps by hand: logits of the average are data, and no gradient goes through them."""
    mesh, how = make_mesh(), transformation(AVERAGED.optimizer, AVERAGED.steps)
    params = average = decoder.init(MODEL, 0)
    optimizer, update, apply = how.init(params), jax.jit(how.update), jax.jit(optax.apply_updates)
    forward = jax.jit(decoder.apply, static_argnums=0)

    def dense(params, scores, batch, knobs):
        logits = decoder.apply(MODEL, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
        loss_BT = objective.loss(logits, scores, batch.targets_BT, knobs=knobs)
        return (loss_BT * batch.weights_BT).sum() / batch.weights_BT.sum()

    with jax.set_mesh(mesh):
        program = programs(Student(MODEL), AVERAGED, objective, MeanTeacher(MODEL, "id"), mesh)
        state, by_hand = program.begin(params), jax.jit(jax.value_and_grad(dense))
        for step in range(3):
            batch = Counting().batch(step)
            state, metrics = program.step(state, {}, {}, *to_mesh((batch, {}), 1, mesh))
            scores = forward(MODEL, average, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
            wanted, gradient = by_hand(params, scores, batch, objective.knobs(jnp.int32(step)))
            total, count = metrics["loss"]
            assert float(total / count) == pytest.approx(float(wanted), rel=1e-5)
            assert float(metrics["gradient_norm"][0]) == pytest.approx(float(optax.global_norm(gradient)), rel=1e-4)
            changes, optimizer = update(gradient, optimizer, params)
            params = apply(params, changes)
            average = jax.tree.map(lambda a, p: 0.8 * np.asarray(a) + 0.2 * np.asarray(p), average, params)
    for name, mine, other in zip("ab", (state["params"], state["ema"]), (params, average), strict=True):
        for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5, err_msg=name)


def test_the_average_agrees_at_first_and_then_lags(undisturbed, tmp_path):
    points = run(tmp_path, **given(training=replace(AVERAGED, log_every=1))).curve
    assert points[0]["forward_kl"] == pytest.approx(0.0, abs=1e-6)
    assert points[-1]["forward_kl"] > 1e-3
    assert points[-1]["teacher_cross_entropy"] != points[-1]["student_cross_entropy"]
    plain = run(tmp_path / "plain", training=AVERAGED)
    assert undisturbed.flops == pytest.approx(plain.flops * 4 / 3)
    assert losses(undisturbed) != losses(plain)


def test_adapters_have_an_average_too(tmp_path):
    frozen = decoder.init(MODEL, 1)
    more = {"adapters": LowRank(rank=2), "initial_params": lambda: frozen}
    points = run(tmp_path, **given(training=replace(AVERAGED, log_every=1, steps=6), **more)).curve
    assert points[0]["forward_kl"] == pytest.approx(0.0, abs=1e-6)
    assert points[-1]["forward_kl"] > 1e-5


@pytest.mark.parametrize(
    "hardware",
    [Hardware(microbatches=4), Hardware(data=2, fsdp=2, tensor=2, microbatches=2)],
    ids=["4 micro-batches", "2x2x2, 2 micro-batches"],
)
def test_hardware_changes_nothing(hardware, undisturbed, tmp_path):
    other = run(tmp_path, hardware=hardware, **given())
    for mine, wanted in zip(measures(other), measures(undisturbed), strict=True):
        assert mine == pytest.approx(wanted, rel=1e-3, abs=2e-3)


def test_a_run_that_was_stopped_goes_on_to_the_bit(undisturbed, tmp_path):
    def stop(report):
        if report.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        run(tmp_path, on_step=stop, **given())
    again = run(tmp_path, **given())
    assert measures(again) == measures(undisturbed)
    for name, wanted in weights(undisturbed).items():
        np.testing.assert_array_equal(weights(again)[name], wanted)


# ------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": TRAINING}, "ema_decay=None of the training leaves no average"),
        ({"training": replace(TRAINING, ema_decay=0.0)}, "ema_decay=0.0 of the training leaves no average"),
        ({"objective": Objective()}, "hard_weight=0 teaches nothing"),
        ({"objective": Objective(hard_weight=Linear(0.0, 0.0, 5))}, "hard_weight=0 teaches nothing"),
        ({"objective": TEXT_ALONE}, "hard_weight=1 learns from the text alone"),
        ({"on_policy": OnPolicy(share=0.5)}, "cannot correct the student's own texts"),
    ],
)
def test_what_makes_no_sense_is_refused_before_step_0(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path, **given(**changes))
    assert not list(tmp_path.iterdir())


def test_a_schedule_that_nobody_knows_is_taken():
    check_mean_teacher(Objective(hard_weight=jnp.cos), 0.9)


@pytest.mark.parametrize("other", ["teacher", "ensemble", "scores", "on_policy"])
def test_a_lesson_has_one_kind_of_teacher(other):
    with pytest.raises(UserError, match=f"mean_teacher, the student's own average, and {other}"):
        Lesson(objective=HALF, training=AVERAGED, mean_teacher=True, **{other: "a@0"})


def test_weights_from_files_learn_nothing():
    with pytest.raises(UserError, match="has its weights"):
        Lesson(source=Pretrained("somewhere", "0"), mean_teacher=True)
