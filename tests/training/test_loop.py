"""The trainer against plain optax, across meshes and micro-batches, and against its own first value."""

import os
import signal
import threading
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled_names import compiled_names
from flax import nnx
from training_toy import MODEL, TRAINING, Counting, losses, measures, own_texts, run, weights

from epigone.errors import Fault, UserError
from epigone.lessons.divergences import cross_entropy, forward_kl, jsd
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.models import decoder
from epigone.models.adapters import LowRank
from epigone.models.rules import Sharding
from epigone.models.sharding import AXES, make_mesh
from epigone.teachers.in_memory import DecoderTeacher
from epigone.training import step as compiled
from epigone.training.checkpoint import Checkpointer
from epigone.training.config import Hardware, Training
from epigone.training.loop import Stopped
from epigone.training.metrics import StepReport
from epigone.training.optimizer import Optimizer, adafactor, muon, transformation
from epigone.training.sharding import to_mesh
from epigone.training.stopping import StopRequest
from epigone.training.student import Student

FIRST_LOSS = 4.122797
"""Mean of the first two steps of the toy run."""

BIG_TEACHER = replace(MODEL, model_size=24)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"))


@cache
def reference(training=TRAINING, objective=TEXT_ALONE):
    """The same run, written out: no mesh, no micro-batches, no donation. Parameters and loss after each step."""
    scores = taught(0).params if objective.needs_teacher else None
    params, update = decoder.init(MODEL, 0), transformation(training.optimizer, training.steps)

    def mean_loss(params, batch):
        inputs = (batch.tokens_BT, batch.positions_BT, batch.segments_BT)
        teacher_logits = None if scores is None else decoder.apply(BIG_TEACHER, scores, *inputs)
        loss_BT = objective.loss(decoder.apply(MODEL, params, *inputs), teacher_logits, batch.targets_BT)
        return jnp.sum(loss_BT * batch.weights_BT) / jnp.sum(batch.weights_BT)

    @jax.jit
    def advance(params, state, batch):
        loss, gradients = jax.value_and_grad(mean_loss)(params, batch)
        updates, state = update.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, history = update.init(params), []
    for step in range(training.steps):
        params, state, loss = advance(params, state, Counting().batch(step))
        history.append((params, float(loss)))
    return history


def taught(seed):
    return DecoderTeacher(BIG_TEACHER, decoder.init(BIG_TEACHER, seed), "id")


def test_first_loss_is_the_known_one(plain):
    assert losses(plain)[0] == pytest.approx(FIRST_LOSS, abs=2e-5), (
        f"The toy run's first point was {FIRST_LOSS} and is now {losses(plain)[0]:.6f}. If the initial weights, the "
        "model's arithmetic, the order of data or the loss were changed on purpose, put the new value here and say so "
        "in CHANGELOG.md: every run's numbers change with it. If not, something broke."
    )


def test_equals_plain_optax(plain):
    history = reference()
    means = [np.average([history[i][1] for i in (k, k + 1)], weights=tokens(k)) for k in range(0, 12, 2)]
    np.testing.assert_allclose(losses(plain), means, rtol=1e-5)
    for mine, wanted in zip(jax.tree.leaves(plain.params), jax.tree.leaves(history[-1][0]), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=2e-5)


def tokens(first):
    return [Counting().batch(step).weights_BT.sum() for step in (first, first + 1)]


def test_says_what_it_did(plain):
    assert [point["step"] for point in plain.curve] == [2, 4, 6, 8, 10, 12]
    assert plain.tokens == plain.curve[-1]["tokens"] == sum(Counting().batch(s).weights_BT.sum() for s in range(12))
    assert plain.flops == decoder.flops_per_token(MODEL, 16, training=True) * 12 * 8 * 16
    assert plain.curve[0]["learning_rate"] == pytest.approx(0.01 * (1 + 2) / 3 / 2)
    assert plain.seconds == pytest.approx(plain.curve[-1]["seconds"], abs=1e-3)
    assert plain.seconds > 0


def test_a_learnable_text_is_learned(tmp_path):
    training = replace(TRAINING, steps=60, log_every=10)
    curve = losses(run(tmp_path, training=training))
    assert curve[-1] < 0.5 * curve[0]


@pytest.mark.parametrize(
    "hardware",
    [
        Hardware(microbatches=4),
        Hardware(data=2, fsdp=2, tensor=2),
        Hardware(fsdp=2, microbatches=2),
    ],
    ids=["4 micro-batches", "2x2x2", "1x2x1, 2 micro-batches"],
)
def test_hardware_changes_nothing(hardware, plain, tmp_path):
    """Rows hold different numbers of tokens, so an average of averages over the parts would show."""
    other = run(tmp_path, hardware=hardware)
    np.testing.assert_allclose(losses(other), losses(plain), rtol=1e-5)
    for name, wanted in weights(plain).items():
        np.testing.assert_allclose(weights(other)[name], wanted, atol=2e-4, err_msg=name)


EVERYWHERE = AXES
COPIES = Sharding(B=EVERYWHERE, N=(), K=(), F=(), V=(), D=())
PIECES = Sharding(B=EVERYWHERE, N=(), K=(), F=(), V=(), D=EVERYWHERE)
OVER_ALL = Sharding(D=("data", "fsdp"))


@pytest.mark.parametrize(
    ("kind", "rules"),
    [("scores", COPIES), ("scores", PIECES), ("own texts", COPIES), ("adapters", PIECES)],
    ids=["data-parallel", "cut", "own texts", "adapters"],
)
def test_student_and_teacher_have_rules_of_their_own(kind, rules, tmp_path):
    """A teacher that is cut over everything, beside a student that is whole, or cut another way, on each device."""
    given = {"objective": Objective(forward_kl), "teacher": taught(5)}
    if kind == "adapters":
        given["adapters"] = LowRank(rank=2)
    given |= own_texts() if kind == "own texts" else {}
    training = replace(TRAINING, steps=4)
    hardware = Hardware(data=2, fsdp=2, tensor=2, student=rules, teacher=OVER_ALL)
    cut_teacher = DecoderTeacher(given["teacher"].scores.config, given["teacher"].params, "id", sharding=OVER_ALL)
    one = run(tmp_path / "one", training=training, **given)
    other = run(tmp_path / "cut", training=training, **given | {"hardware": hardware, "teacher": cut_teacher})
    np.testing.assert_allclose(losses(other), losses(one), rtol=1e-5)
    for name, wanted in weights(one).items():
        np.testing.assert_allclose(weights(other)[name], wanted, atol=2e-4, err_msg=name)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        theirs = nnx.to_pure_dict(cut_teacher.place())["layers"]["up_LDF"]
    assert theirs.addressable_shards[0].data.size == theirs.size // 8
    ours = nnx.to_pure_dict(other.params)["layers"]["up_LDF"]
    assert ours.addressable_shards[0].data.size == ours.size // (1 if rules is COPIES else 8)


def test_a_teacher_whose_experts_are_apart_beside_a_student_that_is_whole(tmp_path):
    config = replace(BIG_TEACHER, experts=4, experts_per_token=2)
    params = decoder.init(config, 5)
    given = {"objective": Objective(forward_kl), "training": replace(TRAINING, steps=4)}
    one = run(tmp_path / "one", teacher=DecoderTeacher(config, params, "id"), **given)
    hardware = Hardware(fsdp=2, tensor=1, expert=4, student=COPIES)
    apart = run(tmp_path / "apart", teacher=DecoderTeacher(config, params, "id"), hardware=hardware, **given)
    np.testing.assert_allclose(losses(apart), losses(one), rtol=1e-5)
    for name, wanted in weights(one).items():
        np.testing.assert_allclose(weights(apart)[name], wanted, atol=2e-4, err_msg=name)


def test_a_batch_that_the_students_rules_cannot_cut_is_refused(tmp_path):
    hardware = Hardware(data=2, tensor=4, microbatches=2, student=COPIES)
    with pytest.raises(UserError, match=r"2 micro-batches over 8 devices \(data x fsdp x tensor x expert\)"):
        run(tmp_path, hardware=hardware)


def test_an_average_of_averages_would_show():
    batch = Counting().batch(0)
    loss_BT = np.random.default_rng(0).normal(size=batch.weights_BT.shape)
    whole = np.sum(loss_BT * batch.weights_BT) / batch.weights_BT.sum()
    parts = [np.average(loss_BT[i : i + 2], weights=batch.weights_BT[i : i + 2]) for i in range(0, 8, 2)]
    assert abs(np.mean(parts) - whole) > 1e-3


@pytest.mark.parametrize("rule", [muon, adafactor], ids=["muon", "adafactor"])
def test_other_rules_run_on_a_mesh(rule, tmp_path):
    training = replace(TRAINING, optimizer=replace(TRAINING.optimizer, rule=rule), steps=4)
    one = run(tmp_path / "one", training=training)
    cut = run(tmp_path / "cut", training=training, hardware=Hardware(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(losses(cut), losses(one), rtol=1e-4)


@pytest.mark.parametrize(
    ("objective", "hardware"),
    [
        (Objective(forward_kl, temperature=2.0, hard_weight=0.3), Hardware()),
        (Objective(partial(jsd, beta=0.3), temperature_squared=False), Hardware(data=2, fsdp=2, tensor=2)),
    ],
    ids=["forward_kl on one device", "jsd on eight"],
)
def test_distillation_equals_plain_optax(objective, hardware, tmp_path):
    trained = run(tmp_path, objective=objective, teacher=taught(0), hardware=hardware)
    expected = reference(objective=objective)[-1][0]
    for mine, wanted in zip(jax.tree.leaves(trained.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=2e-4)
    forward = taught(0).flops_per_token(16)
    assert trained.flops == (decoder.flops_per_token(MODEL, 16, training=True) + forward) * 12 * 8 * 16


def test_running_average_in_closed_form(tmp_path):
    """ema_t = d^t p_0 + (1 - d) sum_i d^(t - i) p_i."""
    decay = 0.7
    trained = run(tmp_path, training=replace(TRAINING, ema_decay=decay))
    leaves = [jax.tree.leaves(decoder.init(MODEL, 0)), *(jax.tree.leaves(p) for p, _ in reference())]
    for i, mine in enumerate(jax.tree.leaves(trained.params)):
        weighted = [(1 - decay) * decay ** (12 - t) * np.asarray(leaves[t][i]) for t in range(1, 13)]
        np.testing.assert_allclose(mine, decay**12 * leaves[0][i] + sum(weighted), atol=2e-5)
        assert np.max(np.abs(np.asarray(mine) - leaves[-1][i])) > 1e-3


def test_given_weights_are_started_from_and_left_alone(plain, tmp_path):
    before = weights(plain)
    again = run(tmp_path, initial_params=lambda: plain.params)
    assert losses(again)[0] < losses(plain)[0] - 0.1
    for name, kept in weights(plain).items():
        np.testing.assert_array_equal(kept, before[name])


def test_one_compilation_for_all_nodes_of_a_shape(tmp_path):
    before = set(compiled._programs)
    with compiled_names() as names:
        for seed in (0, 1):
            objective = Objective(partial(jsd, beta=0.5), hard_weight=0.3)
            node = {"seed": seed, "identity": f"node{seed}", "teacher": taught(seed)}
            run(tmp_path / str(seed), objective=objective, **node)
    (new,) = set(compiled._programs) - before
    program = compiled._programs[new]
    assert [names.count(part.__name__) for part in (program.step, program.begin, program.compare)] == [1, 1, 1]


def test_reports_every_step_while_the_next_one_runs(tmp_path):
    seen: list[StepReport] = []
    run(tmp_path, on_step=seen.append)
    assert [report.step for report in seen] == list(range(1, 13))
    assert all(report.steps == 12 and report.tokens_per_second > 0 for report in seen)
    assert seen[-1].tokens == sum(Counting().batch(s).weights_BT.sum() for s in range(12))


def test_a_loss_that_is_no_number_is_a_fault_with_step_and_node(tmp_path):
    wild = replace(TRAINING, optimizer=Optimizer(learning_rate=1e30, warmup_steps=0, clip_norm=None))
    with pytest.raises(Fault, match=r"node 'toy@0': at step \d+ the loss is nan.*lower the learning rate \(1e\+30\)"):
        run(tmp_path, training=wild, hardware=Hardware(checkpoint_every_steps=1))
    with jax.set_mesh(make_mesh()):
        begin = compiled.programs(Student(MODEL), wild, TEXT_ALONE, None, make_mesh()).begin
        abstract = jax.tree.map(np.asarray, begin(decoder.init(MODEL, 0)))
    kept, _ = Checkpointer(tmp_path / "checkpoints", "0123456789abcdef").restore(abstract)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(kept))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_with_a_checkpoint_and_the_run_goes_on(number, plain, tmp_path):
    before = signal.getsignal(number)

    def signal_at_five(report):
        if report.step == 5:
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped, match=r"node 'toy@0' stopped at step \d+ of 12"):
        run(tmp_path, on_step=signal_at_five)
    assert signal.getsignal(number) == before
    seen = []
    resumed = run(tmp_path, on_step=lambda report: seen.append(report.step))
    assert seen[0] > 5
    assert measures(resumed) == measures(plain)
    for name, wanted in weights(plain).items():
        np.testing.assert_array_equal(weights(resumed)[name], wanted, err_msg=name)


@pytest.mark.parametrize("step", [11, 12])
def test_a_signal_in_the_last_step_is_not_lost(step, plain, tmp_path):
    """In step 12 of 12 there is still a checkpoint to write; after it, the signal goes on to who handled it before."""

    def signal_at(report):
        if report.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    def outside(*_):
        raise Stopped("stopped outside")

    before = signal.signal(signal.SIGTERM, outside)
    try:
        with pytest.raises(Stopped, match="step 12 of 12" if step == 11 else "outside"):
            run(tmp_path, on_step=signal_at)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert losses(run(tmp_path)) == losses(plain)


def test_the_second_signal_goes_where_it_went_before():
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append("hard"))
    try:
        with StopRequest() as stop:
            assert not stop.at(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.at(2)
            assert received == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == ["hard"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_signals_are_left_alone_outside_the_main_thread():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def enter():
        with StopRequest():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [before]


def test_a_checkpoint_of_another_node_is_refused(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, on_step=lambda report: report.step == 1 and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(UserError, match="belongs to node identity 0123456789abcdef, this node is ffff"):
        run(tmp_path, identity="ffff")


def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match="batch_size 8 does not divide into 3 micro-batches"):
        run(tmp_path, hardware=Hardware(microbatches=3))
    with pytest.raises(UserError, match="needs a teacher"):
        run(tmp_path, objective=Objective())
    with pytest.raises(UserError, match="needs 16 devices"):
        run(tmp_path, hardware=Hardware(data=16))
    with pytest.raises(UserError, match="steps=0 must be at least 1"):
        Training(steps=0)
    with pytest.raises(UserError, match=r"ema_decay=1\.5"):
        Training(ema_decay=1.5)
    with pytest.raises(UserError, match="hardware: fsdp=0"):
        Hardware(fsdp=0)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_is_cut_over_the_mesh_without_losing_a_row():
    mesh = make_mesh(2, 2, 2)
    batch = Counting().batch(0)
    with jax.set_mesh(mesh):
        cut = to_mesh(batch, 2, mesh)
    assert cut.tokens_BT.shape == (2, 4, 16)
    assert cut.tokens_BT.addressable_shards[0].data.shape == (2, 1, 16)
    np.testing.assert_array_equal(np.asarray(cut.tokens_BT).reshape(8, 16), batch.tokens_BT)


def test_cross_entropy_is_what_text_alone_trains_on():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 8)), jnp.float32)
    targets = jnp.array([[1, 2, 3]])
    np.testing.assert_array_equal(TEXT_ALONE.loss(logits, None, targets), cross_entropy(logits, targets))


def test_moments_in_the_hosts_memory_change_no_bit(tmp_path):
    """Nor does a checkpoint of them, from which the run goes on with moments on the devices; and back."""
    here = Hardware(data=2, fsdp=2, tensor=2)
    away = replace(here, offload_optimizer=True)
    plain = run(tmp_path / "plain", hardware=here)
    for first, then in ((away, here), (here, away)):
        place = tmp_path / f"from {first.offload_optimizer}"
        with pytest.raises(Stopped):
            run(place, hardware=first, on_step=lambda r: r.step == 5 and os.kill(os.getpid(), signal.SIGTERM))
        assert measures(run(place, hardware=then)) == measures(plain)
    state = beginning(away)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state["optimizer"]) if leaf.ndim}
    assert kinds == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state["params"])} == {"device"}


def beginning(hardware):
    mesh = make_mesh(hardware.data, hardware.fsdp, hardware.tensor)
    with jax.set_mesh(mesh):
        program = compiled.programs(Student(MODEL), TRAINING, TEXT_ALONE, None, mesh, hardware.offload_optimizer)
        return program.begin(decoder.init(MODEL, 0), {})
