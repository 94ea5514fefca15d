"""What a training says of student, teacher and text beside its loss: right, free of side effects, the same anywhere."""

import os
import signal
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from lessons.test_comparison import ALL, OF_STUDENT, reference
from teachers.test_in_memory import Trigram
from training.test_events import records
from training_toy import MODEL, TRAINING, Counting, losses, measures, run, weights

from epigone.errors import UserError
from epigone.identity import fingerprint
from epigone.lessons.divergences import jsd
from epigone.lessons.objective import Objective
from epigone.models import decoder
from epigone.models.sharding import make_mesh
from epigone.teachers.in_memory import DecoderTeacher, NGramTeacher
from epigone.training.config import Hardware, Training
from epigone.training.loop import Stopped
from epigone.training.sharding import to_mesh
from epigone.training.step import programs
from epigone.training.student import Student

TEACHER = replace(MODEL, model_size=24)
TRUTH = Objective(hard_weight=0.3, temperature=2.0)


@cache
def teacher():
    return DecoderTeacher(TEACHER, decoder.init(TEACHER, 5), "id")


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    return run(tmp_path_factory.mktemp("taught"), objective=TRUTH, teacher=teacher())


def logits(config, params, batch):
    return np.asarray(decoder.apply(config, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT))


def test_a_point_is_about_the_batch_of_its_step_and_the_weights_before_it(tmp_path):
    training = replace(TRAINING, steps=2, log_every=1)
    points = run(tmp_path, objective=TRUTH, teacher=teacher(), training=training).curve
    batch = Counting().batch(0)
    both = logits(MODEL, decoder.init(MODEL, 0), batch), logits(TEACHER, teacher().params, batch)
    expected = reference(*both, batch.targets_BT, batch.weights_BT)
    assert set(expected) == ALL
    for name, value in expected.items():
        assert points[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        assert 0 < points[0][name] < 9


def test_the_divergence_of_a_point_is_the_loss_of_its_step(tmp_path):
    """At temperature 1, step for step, while the weights change."""
    training = replace(TRAINING, log_every=1)
    points = run(tmp_path, objective=Objective(), teacher=teacher(), training=training).curve
    assert len(points) == 12
    np.testing.assert_allclose([p["forward_kl"] for p in points], [p["loss"] for p in points], rtol=1e-4)
    assert points[-1]["loss"] < 0.9 * points[0]["loss"]


def test_no_bit_of_the_result_depends_on_it(taught, tmp_path):
    training = replace(TRAINING, compare_every=None)
    without = run(tmp_path, objective=TRUTH, teacher=teacher(), training=training)
    assert losses(without) == losses(taught)
    for name, kept in weights(without).items():
        np.testing.assert_array_equal(kept, weights(taught)[name])
    assert all(set(point) >= ALL for point in taught.curve)
    assert not any(ALL & set(point) for point in without.curve)


def test_it_is_no_part_of_an_identity():
    assert fingerprint(replace(TRAINING, compare_every=None)) == fingerprint(TRAINING)
    assert fingerprint(replace(TRAINING, log_every=3)) != fingerprint(TRAINING)


def test_only_some_points_have_it_and_the_last_one_always():
    training = Training(steps=35, log_every=10, compare_every=2)
    assert [step for step in range(1, 36) if training.is_point(step)] == [10, 20, 30, 35]
    assert [step for step in range(1, 36) if training.compares(step)] == [20, 35]
    assert not any(replace(training, compare_every=None).compares(step) for step in range(1, 36))
    with pytest.raises(UserError, match="compare_every=0 must be at least 1"):
        Training(compare_every=0)


def test_points_without_it_lack_it(taught, tmp_path):
    sparse = run(tmp_path, objective=TRUTH, teacher=teacher(), training=replace(TRAINING, compare_every=3))
    assert [point["step"] for point in sparse.curve if "forward_kl" in point] == [6, 12]
    kept = {point["step"]: point for point in measures(taught)}
    assert all(point == kept[point["step"]] for point in measures(sparse) if "forward_kl" in point)


def test_without_a_teacher_there_is_only_the_student(tmp_path):
    for point in run(tmp_path).curve:
        assert set(point) & ALL == OF_STUDENT


@pytest.mark.parametrize(
    "hardware",
    [Hardware(microbatches=4), Hardware(data=2, fsdp=2, tensor=2), Hardware(data=2, fsdp=2, tensor=2, microbatches=2)],
    ids=["4 micro-batches", "2x2x2", "2x2x2, 2 micro-batches"],
)
def test_hardware_changes_no_point(hardware, taught, tmp_path):
    """Rows hold different numbers of tokens; the weights of later steps differ by rounding."""
    other = run(tmp_path, objective=TRUTH, teacher=teacher(), hardware=hardware)
    for mine, wanted in zip(measures(other), measures(taught), strict=True):
        assert mine == pytest.approx(wanted, rel=1e-3, abs=2e-3)


def test_a_run_that_goes_on_has_the_same_curve(taught, tmp_path):
    def stop(report):
        if report.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    given = {"objective": TRUTH, "teacher": teacher()}
    with pytest.raises(Stopped):
        run(tmp_path, on_step=stop, **given)
    assert measures(run(tmp_path, **given)) == measures(taught)


def test_an_ngram_teacher(tmp_path):
    class Counted(Trigram):
        vocab_size = MODEL.vocab_size

    counted = NGramTeacher(Counted(), "id")
    training = replace(TRAINING, steps=1)
    (point,) = run(tmp_path, objective=Objective(jsd), teacher=counted, training=training).curve
    batch = Counting().batch(0)
    scores = np.maximum(counted.fetch(batch)["logits_BTV"], -1e9)
    expected = reference(logits(MODEL, decoder.init(MODEL, 0), batch), scores, batch.targets_BT, batch.weights_BT)
    assert {name: point[name] for name in ALL} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_events_hold_it(tmp_path):
    points = run(tmp_path, objective=TRUTH, teacher=teacher(), training=replace(TRAINING, steps=4)).curve
    (path,) = (tmp_path / "events").iterdir()
    read = {(v.tag, e.step): v.simple_value for e in records(path) for v in e.summary.value}
    for name in ALL | {"tokens_per_second", "flops_per_second"}:
        assert read[name, 4] == pytest.approx(points[-1][name], rel=1e-6)
    assert ("tokens_per_second", 2) not in read


def test_a_running_average_is_not_what_is_compared(tmp_path):
    """It is what becomes of the training; the loss is not of it, either."""
    training = replace(TRAINING, ema_decay=0.9, log_every=1)
    points = run(tmp_path, objective=Objective(), teacher=teacher(), training=training).curve
    np.testing.assert_allclose([p["forward_kl"] for p in points], [p["loss"] for p in points], rtol=1e-4)


def test_the_compiled_comparison_takes_nothing_away():
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        program = programs(Student(MODEL), TRAINING, TRUTH, teacher(), mesh)
        state = program.begin(decoder.init(MODEL, 0))
        given = ({}, teacher().place(), *to_mesh((Counting().batch(0), {}), 1, mesh))
        one, two = (jax.device_get(program.compare(state["params"], *given)) for _ in range(2))
        program.step(state, *given)
    assert one == two
