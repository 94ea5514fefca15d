"""Training that looks inside the teacher: against one step written out, on every mesh, after a stop, and refused."""

import os
import signal
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from training_toy import MODEL, TRAINING, Counting, losses, measures, run, weights

from epigone.errors import UserError
from epigone.lessons import inner
from epigone.lessons.divergences import cross_entropy, forward_kl
from epigone.lessons.hidden import hidden_cosine, hidden_mse, info_nce, relation_kl
from epigone.lessons.inner import Match, evenly, last
from epigone.lessons.match_kinds import Contrast, Relations, States
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.lessons.schedules import Linear
from epigone.models import decoder
from epigone.models.adapters import LowRank
from epigone.models.config import DecoderConfig
from epigone.models.inside import Asked
from epigone.models.layers import save_nothing
from epigone.models.sharding import make_mesh
from epigone.teachers.ensemble import Ensemble, EnsembleTeacher
from epigone.teachers.in_memory import DecoderStates, DecoderTeacher, NGramTeacher
from epigone.training.config import Hardware
from epigone.training.loop import Stopped
from epigone.training.optimizer import decayed, layer_matrices, transformation
from epigone.training.step import programs
from epigone.training.student import Student
from epigone.training.within import Within

BIG = replace(MODEL, layers=3, model_size=24, heads=4, kv_heads=2)
MATCHES = (
    Match(States(hidden_mse), layers=((1, 2), (2, 1)), weight=0.5),
    Match(States(hidden_cosine)),
    Match(Relations(heads=4), layers=((2, 2),), weight=2.0),
    Match(Contrast(size=8, temperature=0.5, negatives=5), layers=evenly, weight=Linear(0.1, 0.3, 4)),
)
OBJECTIVE = Objective(forward_kl, hard_weight=0.25, inner=MATCHES)
SHARES = (0.5, 1.0, 2.0, 0.1)
"""Weights at the first step."""

SHORT = replace(TRAINING, steps=4, log_every=1, compare_every=None)


@cache
def teacher(config=BIG):
    return DecoderTeacher(config, jax.tree.map(lambda w: 2 * w, decoder.init(config, 5)), "id")


def taught(directory, objective=OBJECTIVE, training=SHORT, **given):
    return run(directory, objective=objective, training=training, **({"teacher": teacher()} | given))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return taught(tmp_path_factory.mktemp("plain"))


def reference():
    """The first step written out, without mesh, fused loss or scan places: new weights, the loss, and each match."""
    within = Within(MATCHES, Student(MODEL), DecoderStates(BIG), None)
    learned = {"params": decoder.init(MODEL, 0), "projections": within.initial(0)}
    update = transformation(SHORT.optimizer, SHORT.steps)

    def look(config, params, inputs):
        asked = tuple(range(1, config.layers + 1))
        model = nnx.merge(decoder.structure(config), params)
        hidden, inside = model.look_inside(*inputs, Asked(asked, asked))
        return model.logits(hidden), inside

    def matched(w, s, t, segments):
        yield [hidden_mse(s.states[a], t.states[b], w[f"inner0_{a}_{b}_student_DE"]) for a, b in ((1, 2), (2, 1))]
        yield [hidden_cosine(s.states[2], t.states[3], w["inner1_2_3_student_DE"])]
        yield [sum(relation_kl((s.heads[2][i],) * 2, (t.heads[2][i],) * 2, segments, 4) for i in range(3))]
        both = [[w[f"inner3_{a}_{b}_{who}_DC"] for who in ("student", "teacher")] for a, b in ((1, 2), (2, 3))]
        pairs = ((s.states[1], t.states[2]), (s.states[2], t.states[3]))
        yield [info_nce(*pair, *ws, segments, 0.5, 5) for pair, ws in zip(pairs, both, strict=True)]

    def loss(learned, batch):
        inputs = (batch.tokens_BT, batch.positions_BT, batch.segments_BT)
        mine, s = look(MODEL, learned["params"], inputs)
        theirs, t = look(BIG, teacher().params, inputs)
        each = [sum(x) / len(x) for x in matched(learned["projections"], s, t, batch.segments_BT)]
        loss_BT = replace(OBJECTIVE, inner=()).loss(mine, theirs, batch.targets_BT)
        loss_BT += sum(share * x for share, x in zip(SHARES, each, strict=True))
        means = [jnp.sum(x * batch.weights_BT) / jnp.sum(batch.weights_BT) for x in (loss_BT, *each)]
        return means[0], means

    def advance(learned, batch):
        gradients, means = jax.grad(loss, has_aux=True)(learned, batch)
        return optax.apply_updates(learned, update.update(gradients, update.init(learned), learned)[0]), means

    return jax.jit(advance)(learned, Counting().batch(0))


def test_a_step_equals_the_same_written_out_and_the_curve_has_every_match(plain):
    names = inner.names_of(MATCHES)
    assert names == ("inner_hidden_mse", "inner_hidden_cosine", "inner_relations", "inner_contrast")
    assert inner.names_of((MATCHES[0], MATCHES[0])) == ("inner_hidden_mse_0", "inner_hidden_mse_1")
    learned, means = reference()
    first = plain.curve[0]
    assert [first[name] for name in ("loss", *names)] == pytest.approx([float(x) for x in means], rel=1e-5)
    with jax.set_mesh(mesh := make_mesh()):
        program = programs(Student(MODEL), SHORT, OBJECTIVE, teacher(), mesh)
        state = program.begin(decoder.init(MODEL, 0), program.within.initial(0))
        state, _ = program.step(state, {}, teacher().place(), jax.tree.map(lambda x: x[None], Counting().batch(0)), {})
    for part, wanted in learned.items():
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), state[part], wanted)
    assert losses(plain)[-1] < losses(plain)[0]


def test_hardware_changes_nothing(plain, tmp_path):
    other = taught(tmp_path, hardware=Hardware(data=2, fsdp=2, tensor=2, microbatches=2))
    for mine, wanted in zip(measures(other), measures(plain), strict=True):
        assert mine == pytest.approx(wanted, rel=1e-5)
    for name, wanted in weights(plain).items():
        np.testing.assert_allclose(weights(other)[name], wanted, atol=1e-4, err_msg=name)


def test_bfloat16_and_remat_are_near(plain, tmp_path):
    low = replace(MODEL, dtype="bfloat16", remat=save_nothing)
    lower = taught(tmp_path, model=low, teacher=teacher(replace(BIG, dtype="bfloat16")))
    np.testing.assert_allclose(losses(lower), losses(plain), rtol=0.03)


def test_adapters_look_inside_too(plain, tmp_path):
    """They begin as nothing beside the weights, so the first step is that of all weights."""
    (point,) = taught(tmp_path, training=replace(SHORT, steps=1), adapters=LowRank(rank=2)).curve
    for name in ("loss", *inner.names_of(MATCHES)):
        assert point[name] == pytest.approx(plain.curve[0][name], rel=1e-5)


def test_a_run_that_goes_on_is_the_same_to_the_bit(plain, tmp_path):
    def stop(report):
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        taught(tmp_path, on_step=stop)
    resumed = taught(tmp_path)
    assert measures(resumed) == measures(plain)
    for name, wanted in weights(plain).items():
        np.testing.assert_array_equal(weights(resumed)[name], wanted)


def test_projections_are_no_part_of_the_student(plain):
    assert jax.tree.structure(plain.params) == jax.tree.structure(decoder.init(MODEL, 0))
    with jax.set_mesh(mesh := make_mesh()):
        program = programs(Student(MODEL), replace(SHORT, ema_decay=0.5), OBJECTIVE, teacher(), mesh)
        state = jax.eval_shape(program.begin, decoder.abstract(MODEL), program.within.abstract())
    assert jax.tree.structure(state["ema"]) == jax.tree.structure(plain.params)
    assert {name: x.shape for name, x in state["projections"].items()} == {
        "inner0_1_2_student_DE": (16, 24),
        "inner0_2_1_student_DE": (16, 24),
        "inner1_2_3_student_DE": (16, 24),
        "inner3_1_2_student_DC": (16, 8),
        "inner3_1_2_teacher_DC": (24, 8),
        "inner3_2_3_student_DC": (16, 8),
        "inner3_2_3_teacher_DC": (24, 8),
    }
    assert all(decayed(state["projections"]).values())
    assert not any(layer_matrices(state["projections"]).values())


def test_projections_are_cut_and_begin_alike_on_every_mesh():
    within = Within(MATCHES[1:3], Student(MODEL), DecoderStates(BIG), None)
    (name, one), *_ = alone = list(within.initial(3).items())
    assert len(alone) == 1
    with jax.set_mesh(make_mesh(1, 4, 2)):
        cut, place = within.initial(3)[name], within.abstract()[name]
    assert cut.sharding == place.sharding
    assert cut.addressable_shards[0].data.shape == (4, 24)
    np.testing.assert_allclose(cut, one, rtol=1e-6)
    assert np.abs(one - within.initial(4)[name]).min() > 0
    assert np.std(one) == pytest.approx(0.25, rel=0.1)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    """Square projections begin as the identity, so loss and gradient are 0 from the first step, also in bfloat16."""
    model = replace(MODEL, dtype="bfloat16")
    matches = (
        Match(States(hidden_mse), layers=evenly),
        Match(States(hidden_cosine)),
        Match(Relations(), layers=evenly),
    )
    with jax.set_mesh(mesh := make_mesh()):
        program = programs(Student(model), SHORT, Objective(inner=matches), teacher(model), mesh)
        state = program.begin(teacher(model).params, program.within.initial(0))
        batch = jax.tree.map(lambda x: x[None], Counting().batch(0))
        _, metrics = program.step(state, {}, teacher(model).place(), batch, {})
    for name in ("loss", "gradient_norm", "inner_hidden_mse", "inner_hidden_cosine", "inner_relations"):
        assert float(metrics[name][0]) == 0.0


def test_inside_beside_the_text_alone(tmp_path):
    """At hard_weight=1 the teacher's scores do not count, and what is inside it is still looked at."""
    relations = Match(Relations(of=(("queries", "keys"), ("values", "values")), heads=2), weight=0.0)
    (beside,) = taught(tmp_path, replace(TEXT_ALONE, inner=(relations,)), replace(SHORT, steps=1)).curve
    batch = Counting().batch(0)
    logits = decoder.apply(MODEL, decoder.init(MODEL, 0), batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    nats_BT = cross_entropy(logits, batch.targets_BT)
    assert beside["loss"] == pytest.approx(np.average(nats_BT, weights=batch.weights_BT), rel=1e-5)
    assert beside["inner_relations"] > 0


def test_operations_are_counted(plain):
    per_token = decoder.flops_per_token(MODEL, 16, training=True) + teacher().flops_per_token(16)
    states, contrast = 6 * 16 * 24, 8 * (6 * 16 + 4 * 24 + 6 * 16)
    relations = 3 * 8.5 * 2 * 3 * 16 + 8.5 * 2 * (24 + 12 + 12)
    inside = 2 * states + states + relations + 2 * contrast
    assert plain.flops == (per_token + round(inside)) * 4 * 8 * 16


SIZES = [config.sizes for config in (MODEL, BIG)]


def test_layer_maps():
    small, large = (DecoderConfig(vocab_size=64, layers=n).sizes for n in (4, 12))
    assert Match(layers=evenly).pairs(small, large) == ((1, 3), (2, 6), (3, 9), (4, 12))
    assert Match(layers=evenly).pairs(large, small)[:3] == ((1, 1), (2, 1), (3, 1))
    assert Match(layers=last).pairs(small, large) == ((4, 12),)
    assert inner.layers_of(MATCHES, *SIZES, False) == ((1, 2), (1, 2, 3))
    assert inner.layers_of(MATCHES, *SIZES, True) == ((2,), (2,))


@pytest.mark.parametrize(
    ("match", "message"),
    [
        (lambda: Match(layers=((3, 1),)), r"layers \(3, 1\) is no pair of a layer of the student, 1 to 2"),
        (lambda: Match(layers=((1, 4),)), r"one of the teacher, 1 to 3"),
        (lambda: Match(layers=()), "layers is empty"),
        (lambda: Match(weight=-1.0), r"weight=-1.0 must not be negative"),
        (lambda: Match(Relations(heads=5)), "heads=5 does not divide the 16 features of all queries of the student"),
        (lambda: Match(Relations(heads=8)), "heads=8 does not divide the 12 features of all keys of the teacher"),
        (lambda: Match(Relations()), "2 heads of queries and the teacher 4: set heads to a divisor of 16 and 24"),
        (lambda: Match(Relations(of=(("queries", "states"),))), "must be pairs of queries, keys, values"),
        (lambda: Match(Relations(of=(("keys", "queries"),))), "name queries first"),
        (lambda: Match(Relations(heads=0)), "heads=0 must be at least 1"),
        (lambda: Match(Contrast(temperature=0)), "temperature=0 positive"),
        (lambda: Match(Contrast(negatives=0)), "negatives=0 must be at least 1"),
    ],
    ids=range(12),
)
def test_what_does_not_fit_is_refused(match, message, tmp_path):
    with pytest.raises(UserError, match=message):
        taught(tmp_path, Objective(inner=(match(),)))
    assert not list(tmp_path.iterdir())


def test_teachers_that_show_no_layers_are_refused(tmp_path):
    class Counted:
        vocab_size, order = MODEL.vocab_size, 2

    ensemble = EnsembleTeacher([teacher(), teacher()], Ensemble())
    for other in (NGramTeacher(Counted(), "id"), ensemble):
        with pytest.raises(UserError, match="here is none that shows them"):
            taught(tmp_path, teacher=other)
    with pytest.raises(UserError, match="needs a teacher"):
        taught(tmp_path, replace(TEXT_ALONE, inner=MATCHES), teacher=None)
