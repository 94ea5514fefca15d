"""A run that learns from its own texts: which steps do, what is kept, and that nothing disturbs it."""

import os
import signal
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from training_toy import MODEL, TRAINING, Counting, losses, own_texts, run, weights

from epigone.errors import Stopped, UserError
from epigone.lessons.divergences import forward_kl, jsd, reverse_kl
from epigone.lessons.objective import Objective
from epigone.lessons.policy_gradient import sampled_reverse_kl
from epigone.models import decoder
from epigone.models.ngram import NGram, NGramModel
from epigone.models.sharding import make_mesh
from epigone.sampling import own_rows
from epigone.teachers.cached import CachedTeacher
from epigone.teachers.in_memory import DecoderTeacher, NGramTeacher
from epigone.teachers.kept import TopK
from epigone.training.config import Hardware
from epigone.training.on_policy import OnPolicy
from epigone.training.own_texts import OwnTexts

BIG = replace(MODEL, model_size=24)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed"), **own_texts())


def texts(seed=0, **changes):
    """The own texts of a toy run, and what it writes at a step from one set of weights."""
    given = own_texts(**changes)
    own = OwnTexts(given["on_policy"], MODEL, TRAINING, given["objective"], given["teacher"], seed, make_mesh())
    return own, lambda step: write(own, step, decoder.init(MODEL, 0), given["teacher"].params)


def write(own, step, params, teacher_params):
    with jax.set_mesh(make_mesh()):
        placed = jax.tree.map(np.asarray, (params, teacher_params))
        return own.batch(step, Counting().batch(step), *placed)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------ which steps, and what is kept
def test_without_a_share_nothing_changes_to_the_bit(tmp_path):
    given = own_texts(share=0.0)
    plain = run(tmp_path / "plain", **{k: v for k, v in given.items() if k != "on_policy"})
    none = run(tmp_path / "none", **given)
    assert losses(none) == losses(plain)
    assert none.flops == plain.flops
    for name, wanted in weights(plain).items():
        np.testing.assert_array_equal(weights(none)[name], wanted)
    assert losses(run(tmp_path / "some", **own_texts(share=0.2))) != losses(plain)


def test_the_share_of_own_steps_follows_from_seed_and_step_alone():
    own, _ = texts(share=0.3)
    other, always = texts(seed=1, share=0.3)[0], texts(share=1.0)[0]
    kinds = [own.is_own(step) for step in range(1, 1001)]
    assert sum(kinds) == pytest.approx(300, abs=4 * np.sqrt(1000 * 0.3 * 0.7))
    assert [own.is_own(step) for step in reversed(range(1, 1001))] == kinds[::-1]
    assert [other.is_own(step) for step in range(1, 1001)] != kinds
    assert all(always.is_own(step) for step in range(1, 100))


def test_other_steps_get_the_text_untouched():
    own, batch = texts(share=0.5)
    for step in range(1, 20):
        assert own.is_own(step) != same(batch(step), Counting().batch(step))


def test_a_batch_serves_as_many_steps_as_asked_and_comes_from_the_last_that_are_kept():
    own, batch = texts(share=1.0, replay=3, reuse=4)
    seen = [batch(step) for step in range(1, 81)]
    first = {x[0].tobytes() + x[1].tobytes(): step for step, x in reversed(list(enumerate(seen)))}
    assert sorted(first.values()) == list(range(0, 80, 4))
    ages = [(step - first[x[0].tobytes() + x[1].tobytes()]) // 4 for step, x in enumerate(seen) if step % 4]
    assert set(ages) == {0, 1, 2}
    assert own.flops(80) == 20 * own.flops(1)


def test_rows_have_the_beginnings_of_their_own_batch_and_weights_where_the_student_wrote():
    _, batch = texts(share=1.0, importance=False, replay=0, reuse=1)
    text, mine = Counting().batch(3), batch(3)
    assert all(x.shape == y.shape and x.dtype == y.dtype for x, y in zip(mine, text, strict=True))
    np.testing.assert_array_equal(mine.tokens_BT[:, :3], text.tokens_BT[:, :3])
    assert (mine.weights_BT[:, :2] == 0).all()
    assert (mine.weights_BT[:, 2:8] == 1).all()
    assert set(np.unique(mine.weights_BT)) == {0, 1}
    again = (mine.positions_BT == 0) & (mine.segments_BT > 1)
    rows = np.nonzero(again)[0]
    np.testing.assert_array_equal(mine.tokens_BT[again], text.tokens_BT[rows, 0])


def test_the_weights_of_the_step_write():
    own, _ = texts(share=1.0, replay=0, reuse=1)
    teacher = own_texts()["teacher"].params
    drawn = [write(own, 1, decoder.init(MODEL, seed), teacher) for seed in (0, 0, 1)]
    assert same(drawn[0], drawn[1])
    assert not same(drawn[0], drawn[2])


# ------------------------------------------------------------------ learning
@pytest.fixture(scope="module")
def counts_upwards(tmp_path_factory):
    """A teacher that has learned to count."""
    trained = run(tmp_path_factory.mktemp("teacher"), training=replace(TRAINING, steps=60))
    return DecoderTeacher(MODEL, trained.params, "id")


def mean_kl(params, teacher):
    """Reverse KL on what these weights write now."""
    how, forward = OnPolicy(prompt_tokens=2, max_new=6), jax.jit(decoder.apply, static_argnums=0)
    own = OwnTexts(how, MODEL, TRAINING, Objective(reverse_kl), teacher, 0, make_mesh())
    student, known = (jax.tree.map(np.asarray, x) for x in (params, teacher.params))
    batch = write(own, 1000, student, None)
    logits = [forward(MODEL, p, batch.tokens_BT, batch.positions_BT, batch.segments_BT) for p in (student, known)]
    return float(np.sum(reverse_kl(*logits) * batch.weights_BT) / batch.weights_BT.sum())


@pytest.mark.parametrize(
    ("objective", "steps"),
    [(Objective(reverse_kl), 60), (Objective(partial(jsd, beta=0.5)), 60), (Objective(sampled_reverse_kl), 300)],
    ids=["reverse_kl", "jsd", "policy gradient"],
)
def test_the_student_comes_near_its_teacher_where_it_writes_itself(objective, steps, counts_upwards, tmp_path):
    given = {"objective": objective, "teacher": counts_upwards, "on_policy": OnPolicy(prompt_tokens=2, max_new=6)}
    trained = run(tmp_path, training=replace(TRAINING, steps=steps), **given)
    before, after = (mean_kl(params, counts_upwards) for params in (decoder.init(MODEL, 0), trained.params))
    assert after < 0.6 * before, f"{before:.3f} -> {after:.3f}"


def test_a_model_that_counts_scores_own_texts(tmp_path):
    documents = [np.arange(first, first + 9, dtype=np.int32) % 60 + 4 for first in range(60)]
    teacher = NGramTeacher(NGramModel.fit(NGram(), documents, MODEL.vocab_size), "id")
    how = OnPolicy(prompt_tokens=2, max_new=6)
    training = replace(TRAINING, steps=60)
    curve = losses(run(tmp_path, training=training, objective=Objective(forward_kl), teacher=teacher, on_policy=how))
    assert np.mean(curve[-3:]) < 0.8 * np.mean(curve[:3])


def test_the_record_counts_the_passes_that_write(tmp_path):
    """Half of the own steps write; each writes with student and teacher, a pass a column."""
    given = own_texts(share=1.0)
    trained = run(tmp_path, **given)
    forward = [decoder.flops_per_token(model, 16, training=False) for model in (MODEL, BIG)]
    training = decoder.flops_per_token(MODEL, 16, training=True) + forward[1]
    assert trained.flops == 8 * 16 * (12 * training + 6 * sum(forward))


# ------------------------------------------------------------------ nothing disturbs it
@pytest.mark.parametrize(
    "hardware",
    [Hardware(microbatches=4), Hardware(data=4, fsdp=2), Hardware(data=2, fsdp=2, tensor=2)],
    ids=["4 micro-batches", "4x2x1", "2x2x2"],
)
def test_hardware_changes_nothing(hardware, undisturbed, tmp_path):
    other = run(tmp_path, hardware=hardware, **own_texts())
    np.testing.assert_allclose(losses(other), losses(undisturbed), rtol=1e-4)
    for name, wanted in weights(undisturbed).items():
        np.testing.assert_allclose(weights(other)[name], wanted, atol=3e-4, err_msg=name)


def test_one_program_writes_at_all_steps(tmp_path, monkeypatch):
    given, traced, source = own_texts(max_new=7), [], own_rows._source
    monkeypatch.setattr(own_rows, "_source", lambda rows: traced.append(rows) or source(rows))
    for seed in (0, 1):
        run(tmp_path / str(seed), seed=seed, **given)
    assert len(traced) == 1


@pytest.mark.parametrize("step", [1, 4, 6, 9])
def test_stopped_anywhere_it_goes_on_to_the_bit_with_its_replay(step, undisturbed, tmp_path):
    def signal_at(report):
        if report.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        run(tmp_path, on_step=signal_at, **own_texts())
    resumed = run(tmp_path, **own_texts())
    assert losses(resumed) == losses(undisturbed)
    for name, wanted in weights(undisturbed).items():
        np.testing.assert_array_equal(weights(resumed)[name], wanted, err_msg=name)


def test_a_replay_that_is_lost_would_show(tmp_path, monkeypatch):
    """Steps 2 to 4 and 6 to 8 take what was kept. A place that was never filled has no token that counts."""

    def signal_at(report):
        if report.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    given = own_texts(share=1.0, replay=4, reuse=4)
    with pytest.raises(Stopped, match="stopped at step 6"):
        run(tmp_path, on_step=signal_at, **given)
    forgetful = property(lambda self: self._kept, lambda self, new: vars(self).setdefault("_kept", new))
    monkeypatch.setattr(OwnTexts, "kept", forgetful, raising=False)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, **given)


# ------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"share": 1.5}, r"share=1\.5 is outside \[0, 1\]"),
        ({"teacher_share": -0.1}, r"teacher_share=-0\.1 is outside"),
        ({"prompt_tokens": -1}, "prompt_tokens=-1 must be at least 0"),
        ({"max_new": 0}, "max_new=0 must be at least 1"),
        ({"temperature": 0.0}, r"temperature=0\.0 must be 1e-6 or more"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"replay": 4}, "replay=4 batches are kept and each serves reuse=1 steps: set both"),
        ({"reuse": 2}, "replay=0 batches are kept and each serves reuse=2 steps: set both"),
        ({"reuse": 0}, "reuse=0 must be at least 1"),
    ],
    ids=str,
)
def test_bad_values_are_refused_in_one_line(fields, line):
    with pytest.raises(UserError, match=line) as refused:
        OnPolicy(**fields)
    assert "\n" not in str(refused.value)


def drawn(**fields):
    return {"objective": Objective(sampled_reverse_kl), "on_policy": OnPolicy(**fields)}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"objective": Objective(hard_weight=1.0), "teacher": None}, "name a teacher that scores them"),
        ({"objective": Objective(hard_weight=0.2)}, r"hard_weight=0\.2 would teach the student's own tokens"),
        (own_texts(prompt_tokens=16), "prompt_tokens=16 leaves nothing to write in a row of 16"),
        (drawn(share=0.5), r"set on_policy with share=1, not 0\.5"),
        (drawn(top_p=0.9), "needs every token at its own probability"),
        (drawn(temperature=0.5), "set importance=True"),
        (drawn(teacher_share=0.5), "set importance=True"),
        (drawn() | {"objective": Objective(sampled_reverse_kl, temperature=2.0)}, "temperature=1 of the objective"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(changes, line, tmp_path):
    with pytest.raises(UserError, match=line) as refused:
        run(tmp_path, **(own_texts() | changes))
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_policy_gradient_without_own_texts_is_refused(tmp_path):
    given = {k: v for k, v in own_texts().items() if k != "on_policy"} | {"objective": Objective(sampled_reverse_kl)}
    with pytest.raises(UserError, match="set on_policy with share=1, not 0"):
        run(tmp_path, **given)


def test_a_teacher_that_cannot_write_or_read_is_refused(tmp_path):
    counts = NGramTeacher(NGramModel.fit(NGram(), [np.arange(4, 12)], MODEL.vocab_size), "id")
    with pytest.raises(UserError, match=r"teacher_share=0\.3 draws tokens from the teacher.*is no decoder"):
        run(tmp_path, **(own_texts() | {"teacher": counts}))

    teacher = CachedTeacher(TopK(4), tmp_path / "scores", vocab_size=MODEL.vocab_size)
    with pytest.raises(UserError, match="has scores of some texts only, and own texts are new"):
        run(tmp_path, **(own_texts(teacher_share=0.0) | {"teacher": teacher}))
