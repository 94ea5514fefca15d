"""A run that trains adapters alone: against plain optax, on meshes, resumed, on its own texts."""

import os
import signal
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_toy import MODEL, TRAINING, Counting, losses, own_texts, run, weights

from epigone.errors import Stopped
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.models import adapters, decoder
from epigone.models.adapters import LowRank
from epigone.models.quantization import Quantization
from epigone.models.sharding import make_mesh
from epigone.teachers.in_memory import DecoderTeacher
from epigone.training.config import Hardware
from epigone.training.optimizer import Optimizer, transformation
from epigone.training.own_texts import OwnTexts
from epigone.training.sealed import read_manifest
from epigone.training.sharding import to_mesh
from epigone.training.step import programs
from epigone.training.student import Student

HOW = LowRank(rank=2, alpha=4.0)
SHORT = replace(TRAINING, steps=6, compare_every=None)


def start():
    return decoder.init(MODEL, 3)


def adapted(directory, **given):
    return run(directory, adapters=HOW, **{"initial_params": start, "training": SHORT} | given)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return adapted(tmp_path_factory.mktemp("plain"), training=replace(SHORT, log_every=1, compare_every=1))


def test_equals_plain_optax_on_merged_weights(plain):
    """The reference makes W + (alpha / rank) A B at every step and differentiates through it."""
    base, trained = start(), adapters.init(HOW, MODEL, 0)
    update = transformation(SHORT.optimizer, SHORT.steps)

    def mean_loss(trained, batch):
        params = adapters.merge(HOW, MODEL, base, trained)
        logits = decoder.apply(MODEL, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
        loss_BT = TEXT_ALONE.loss(logits, None, batch.targets_BT)
        return jnp.sum(loss_BT * batch.weights_BT) / jnp.sum(batch.weights_BT)

    @jax.jit
    def advance(trained, state, batch):
        loss, gradients = jax.value_and_grad(mean_loss)(trained, batch)
        updates, state = update.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    state, found = update.init(trained), []
    batches = [Counting().batch(step) for step in range(SHORT.steps)]
    for batch in batches:
        trained, state, loss = advance(trained, state, batch)
        found.append(float(loss))
    np.testing.assert_allclose(losses(plain), found, rtol=1e-5)
    np.testing.assert_allclose([point["student_cross_entropy"] for point in plain.curve], found, rtol=1e-5)
    for name, wanted in trained.items():
        np.testing.assert_allclose(plain.adapters[name], wanted, atol=2e-5, err_msg=name)


def test_all_but_the_targets_stays_as_it_is_to_the_bit_and_nothing_of_the_start_is_taken_away(tmp_path):
    base = start()
    before = jax.tree.map(np.array, base)
    done = adapted(tmp_path, initial_params=lambda: base)
    same = {
        name: np.array_equal(leaf, dict(jax.tree_util.tree_leaves_with_path(before))[path])
        for path, leaf in jax.tree_util.tree_leaves_with_path(done.params)
        for name in [path[-2].key]
    }
    assert {name for name, kept in same.items() if not kept} == {
        *("query_LDNH", "key_LDKH", "value_LDKH", "mix_LNHD", "gate_LDF", "up_LDF", "down_LFD")
    }
    jax.tree.map(np.testing.assert_array_equal, base, before)


def test_only_what_is_trained_has_a_state(plain):
    count = adapters.parameter_count(HOW, MODEL)
    assert plain.trained == count < decoder.parameter_count(MODEL)
    assert 2 * 4 * count <= plain.optimizer_bytes <= 2 * 4 * count + 64
    assert plain.flops == adapters.flops_per_token(HOW, MODEL, 16) * SHORT.steps * 8 * 16


def test_no_gradient_of_the_frozen_head_is_made():
    """With a vocabulary far larger than all else, it would be the largest array of a step."""
    model, training = replace(MODEL, vocab_size=20_000, model_size=64, layers=1), replace(SHORT, batch_size=1)
    head = 4 * model.sizes.V * model.sizes.D
    assert _temporaries(Student(model, HOW), training) < head < _temporaries(Student(model), training)


def _temporaries(student, training):
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        program = programs(student, training, TEXT_ALONE, None, mesh)
        weights = lambda: decoder.init(student.config, 0)  # noqa: E731
        state, frozen = program.begin(student.begin(0, weights)), student.frozen(weights)
        batch, _ = to_mesh((Counting(1, 16).batch(0), {}), 1, mesh)
        return program.step.lower(state, frozen, {}, batch, {}).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("hardware", [Hardware(data=2, fsdp=2, tensor=2), Hardware(fsdp=2, microbatches=4)], ids=str)
def test_hardware_changes_nothing(hardware, plain, tmp_path):
    other = adapted(tmp_path, hardware=hardware, training=replace(SHORT, log_every=1))
    np.testing.assert_allclose(losses(other), losses(plain), rtol=1e-5)
    for name, wanted in weights(plain).items():
        np.testing.assert_allclose(weights(other)[name], wanted, atol=2e-5, err_msg=name)


def on_own_texts():
    training = replace(SHORT, ema_decay=0.5)
    return {"training": training} | own_texts(prompt_tokens=1)


def test_stopped_on_its_own_texts_it_goes_on_to_the_bit_from_a_checkpoint_without_the_frozen_weights(tmp_path):
    whole = adapted(tmp_path / "whole", **on_own_texts())

    def stop(report):
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        adapted(tmp_path / "cut", on_step=stop, **on_own_texts())
    (manifest,) = (tmp_path / "cut").glob("checkpoints/*/manifest.json")
    kept = read_manifest(manifest.parent)["arrays"]
    assert not [name for name in kept if "layers" in name or "embedding" in name]
    assert {name.split(".")[1] for name in kept if name.startswith("ema")} == set(whole.adapters)
    resumed = adapted(tmp_path / "cut", **on_own_texts())
    assert losses(resumed) == losses(whole)
    for name, wanted in weights(whole).items():
        np.testing.assert_array_equal(weights(resumed)[name], wanted, err_msg=name)


def test_own_texts_are_written_with_merged_weights(tmp_path, monkeypatch):
    """The result of two steps is the merged weights with which a third one writes."""
    writers = []
    batch = OwnTexts.batch

    def seen(self, step, given, params, teacher_params):
        writers.append(None if params is None else jax.tree.map(np.array, params))
        return batch(self, step, given, params, teacher_params)

    monkeypatch.setattr(OwnTexts, "batch", seen)
    training = replace(SHORT, optimizer=replace(SHORT.optimizer, schedule=_flat))
    given = own_texts(share=1.0, replay=0, reuse=1) | {"training": training}
    adapted(tmp_path / "long", **given)
    third = writers[2]
    short = adapted(tmp_path / "short", **given | {"training": replace(training, steps=2)})
    near = partial(np.testing.assert_allclose, rtol=0, atol=1e-7)  # merged in two programs
    jax.tree.map(near, third, jax.tree.map(np.array, short.params))
    with pytest.raises(AssertionError):
        jax.tree.map(near, writers[1], jax.tree.map(np.array, short.params))


def _flat(optimizer, progress):
    return progress * 0.0 + 1.0


def test_adapters_beside_short_weights_learn_as_beside_long_ones(tmp_path):
    """Weights of bfloat16 stay so; the adapters, and what they learn, are float32."""
    model = replace(MODEL, weights_dtype="bfloat16")
    short = run(tmp_path / "short", model=model, adapters=HOW, training=SHORT, initial_params=lambda: _cast("bfloat16"))
    long = adapted(tmp_path / "long", initial_params=lambda: _cast("bfloat16", "float32"))
    np.testing.assert_allclose(losses(short), losses(long), rtol=1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(short.params)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(short.adapters)} == {jnp.dtype("float32")}


def _cast(*kinds):
    params = start()
    for kind in kinds:
        params = jax.tree.map(lambda leaf, kind=kind: leaf.astype(kind), params)
    return params


# ------------------------------------------------------------------ products in shorter types
FOUR = replace(MODEL, quantization=Quantization("int4"))


@pytest.fixture(scope="module")
def aware(tmp_path_factory):
    training = replace(SHORT, log_every=1)
    return run(tmp_path_factory.mktemp("aware"), model=FOUR, training=training, initial_params=start)


def test_a_quantised_student_is_trained_as_it_is_multiplied_and_its_weights_are_not(aware, tmp_path):
    """The loss of a step is that of rounded weights; what is kept of them is float32, off the grid."""
    batch = Counting().batch(0)
    grid = decoder.multiplied(FOUR, start())
    logits = decoder.apply(MODEL, grid, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    loss_BT = TEXT_ALONE.loss(logits, None, batch.targets_BT)
    assert losses(aware)[0] == pytest.approx(np.average(loss_BT, weights=batch.weights_BT), rel=1e-5)
    plain = run(tmp_path, training=replace(SHORT, log_every=1), initial_params=start)
    assert losses(aware)[0] != pytest.approx(losses(plain)[0], rel=1e-4)
    kept, rounded = weights(aware), jax.tree.leaves(decoder.multiplied(FOUR, aware.params))
    assert any(not np.array_equal(a, b) for a, b in zip(kept.values(), rounded, strict=True))
    assert {leaf.dtype for leaf in kept.values()} == {np.dtype("float32")}
    # A grid of four bits would have 15 numbers an output; after six steps there are as many as inputs.
    assert all(len(set(row)) == 16 for row in weights(aware)["['layers']['up_LDF'].value"][0].T)


def test_the_slope_goes_straight_through_the_rounding(tmp_path):
    """The first step of plain descent is the gradient at the rounded weights, taken from those that are not."""
    training = replace(SHORT, steps=1, optimizer=Optimizer(_descent, learning_rate=0.5, warmup_steps=0, clip_norm=None))
    done = run(tmp_path, model=FOUR, training=training, initial_params=start)
    batch, grid = Counting().batch(0), decoder.multiplied(FOUR, start())

    def mean_loss(params):
        logits = decoder.apply(MODEL, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
        loss_BT = TEXT_ALONE.loss(logits, None, batch.targets_BT)
        return jnp.sum(loss_BT * batch.weights_BT) / jnp.sum(batch.weights_BT)

    slope = jax.jit(jax.grad(mean_loss))(grid)
    wanted = jax.tree.map(lambda weight, gradient: weight - 0.5 * gradient, start(), slope)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), done.params, wanted)


def _descent(optimizer, rate):
    return optax.sgd(rate)


@pytest.mark.parametrize("hardware", [Hardware(data=2, fsdp=2, tensor=2)], ids=["2x2x2"])
def test_hardware_changes_nothing_of_a_quantised_student(hardware, aware, tmp_path):
    training = replace(SHORT, log_every=1)
    other = run(tmp_path, model=FOUR, training=training, initial_params=start, hardware=hardware)
    np.testing.assert_allclose(losses(other), losses(aware), rtol=1e-5)


def test_the_teacher_of_a_quantised_student_is_not_quantised(tmp_path):
    """The first loss is KL(teacher as it is, student rounded)."""
    teacher = DecoderTeacher(MODEL, jax.tree.map(lambda w: 3 * w, decoder.init(MODEL, 5)), "id")
    training = replace(SHORT, steps=1)
    given = {"teacher": teacher, "objective": Objective(), "initial_params": start, "training": training}
    batch = Counting().batch(0)
    rows = (batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    pairs = ((MODEL, teacher.params), (FOUR, start()))
    of_teacher, of_student = (jax.nn.log_softmax(decoder.apply(*pair, *rows)) for pair in pairs)
    kl_BT = jnp.sum(jnp.exp(of_teacher) * (of_teacher - of_student), -1)
    wanted = np.average(kl_BT, weights=batch.weights_BT)
    assert losses(run(tmp_path, model=FOUR, **given)) == [pytest.approx(wanted, rel=1e-5)]
