"""A teacher that is asked once: the same scores in any batch, order and mesh; work that is shared and goes on."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epigone.arena.policies import Best, Noisy, Policy, Rounded, Tempered, shown_scores
from epigone.data.pipeline import Batches, pack
from epigone.errors import UserError
from epigone.lessons.divergences import forward_kl
from epigone.lessons.heads import Hidden
from epigone.lessons.objective import Objective
from epigone.models import decoder
from epigone.models.config import DecoderConfig
from epigone.sampling.watermark import GreenList
from epigone.teachers.cached import CachedTeacher
from epigone.teachers.in_memory import DecoderTeacher
from epigone.teachers.kept import HiddenStates, RandomDraws, Shown, TopK, TopP
from epigone.teachers.score_files import Claims, ScoreFiles, segments
from epigone.training import labelling, loop
from epigone.training.config import Hardware, Training
from epigone.training.labelling import label

V, T = 40, 16
MODEL = DecoderConfig(vocab_size=V, layers=1, model_size=16, heads=2, max_length=T, vocab_multiple=8)
DOCUMENTS = [np.random.default_rng(n).integers(4, V, 3 + n % 23).astype(np.int32) for n in range(60)]
KEPT = [TopK(5), TopK(60, rest="zero"), TopP(0.6, most=20), RandomDraws(12), RandomDraws(12, power=0.5)]


@pytest.fixture(scope="module")
def params():
    weights = decoder.init(MODEL, 3)
    return jax.tree.map(lambda x: 4 * x, weights)  # far from uniform


def teacher(params):
    return DecoderTeacher(MODEL, params, "ids", "name")


def cached(scores, folder, params, temperature=1.0):
    more = teacher(params).head_alone() if isinstance(scores, HiddenStates) else {}
    return CachedTeacher(scores, folder, vocab_size=V, temperature=temperature, tokenizer_identity="ids", **more)


def asked(scores, folder, params, rows, batch_size=4, temperature=1.0, **given):
    found = cached(scores, folder, params, temperature)
    done = label(found, lambda: teacher(params), rows, batch_size, **given)
    return found, done


def contents(folder):
    """What is stored of each segment."""
    files = ScoreFiles(folder)
    all_keys = [key.tobytes() for key in files._keys]
    return dict(zip(all_keys, files.read(all_keys), strict=True))


@pytest.mark.parametrize("scores", KEPT)
def test_scores_are_those_of_the_teacher_beside_the_student(tmp_path, params, scores):
    rows = pack(DOCUMENTS, T)
    found, done = asked(scores, tmp_path, params, [rows], temperature=1.5)
    assert done.tokens == rows.targets
    batch = Batches([rows], None, 8, seed=1).batch(3)
    fetched = found.fetch(batch)
    given = found.scores({}, batch, fetched)
    states = teacher(params).scores(params, batch)
    logits = (states.hidden_BTD @ states.weight_VD.T)[..., :V]
    logits = jnp.where(jnp.isin(jnp.arange(V), jnp.array(MODEL.specials.never)), -1e9, logits)
    log_p = np.asarray(jax.nn.log_softmax(logits / 1.5))
    there = (given.log_probs_BTM > -1e9) & (batch.segments_BT > 0)[..., None]
    wanted = np.take_along_axis(log_p, given.ids_BTM, -1)
    if scores.rest == "sampled":
        counted = np.exp(given.log_probs_BTM) * 12
        if scores.power == 1.0:
            np.testing.assert_allclose(counted[there], np.rint(counted[there]), atol=1e-3)
        entropy = -(np.exp(log_p) * np.where(log_p > -1e8, log_p, 0)).sum(-1)
        np.testing.assert_allclose(given.rest_BT[batch.segments_BT > 0], entropy[batch.segments_BT > 0], atol=0.003)
    else:
        if scores.entries(V) <= 17:
            assert np.abs(given.log_probs_BTM - np.maximum(wanted, -4095 / 256))[there].max() < 0.003
        assert np.abs(np.exp(given.log_probs_BTM) - np.exp(wanted))[there].max() < 0.02
    assert there.any()


BOXES = {
    "best": Policy(scores=(Best(5),)),
    "best and own": Policy(scores=(Best(3, own=True), Rounded(1))),
    "twenty": Policy(scores=(Best(20, own=True),)),
    "noisy": Policy(scores=(Best(4, own=True), Noisy(7, 0.5, width=3))),
    "marked": Policy((GreenList(9, width=2), Tempered(1.5)), (Best(6, own=True),)),
}


@pytest.mark.parametrize(("box", "best"), [*product(BOXES, [4]), ("twenty", 20)])
def test_a_student_outside_learns_from_what_the_box_shows(tmp_path, params, box, best):
    """What is kept of packed rows is what the box says of each document alone when it is asked for its scores."""
    whole = [document for document in DOCUMENTS if len(document) < T]
    policy, shown = BOXES[box], Shown(BOXES[box], best=best)
    found, _ = asked(shown, tmp_path, params, [pack(whole, T)])
    batch = Batches([pack(whole, T)], None, 8, seed=1).batch(0)
    given = found.scores({}, batch, found.fetch(batch))
    seen = shown_scores(MODEL, params, policy, whole, best)
    told = {document.tobytes(): one for document, one in zip(whole, seen, strict=True)}
    for segment in segments(batch.tokens_BT, batch.segments_BT):
        place = (segment.row, slice(segment.first, segment.first + segment.length))
        targets = batch.targets_BT[place]
        seen = told[targets[:-1].tobytes()]
        for n, (ids, values, rest) in enumerate(
            zip(given.ids_BTM[place], given.log_probs_BTM[place], given.rest_BT[place], strict=True)
        ):
            kept = {int(i): float(v) for i, v in zip(ids, values, strict=True) if v > -1e9}
            wanted = {int(i): float(v) for i, v in zip(seen.ids[n], seen.log_probs[n], strict=True) if i >= 0}
            if not np.isnan(seen.own[n]):
                wanted[int(targets[n])] = float(seen.own[n])
            assert kept.keys() == wanted.keys()
            for token, value in wanted.items():
                assert kept[token] == pytest.approx(min(0.0, max(value, -4095 / 256)), abs=0.003)
            left = max(1 - sum(np.exp(list(wanted.values()))), 1e-7)
            assert rest == pytest.approx(max(np.log(left), -4095 / 256), abs=0.01)


@pytest.mark.parametrize("temperature", [2.0, 10.0])
def test_a_temperature_that_is_known_is_undone(tmp_path, params, temperature):
    """Where all is shown it is the model's own distribution again; where five are, they are as far apart as there."""
    whole = [document for document in DOCUMENTS if len(document) < T]
    rows, flatter = pack(whole, T), Tempered(temperature)
    every, _ = asked(Shown(Policy((flatter,)), V, times=temperature), tmp_path / "a", params, [rows])
    five, _ = asked(Shown(Policy((flatter,), (Best(5),)), 5, times=temperature), tmp_path / "b", params, [rows])
    plain, _ = asked(Shown(Policy(), V), tmp_path / "c", params, [rows])
    batch = Batches([rows], None, 8, seed=1).batch(0)
    real = batch.segments_BT > 0
    all_, few, own = (one.scores({}, batch, one.fetch(batch)) for one in (every, five, plain))
    shown = V - len(MODEL.specials.never)
    np.testing.assert_array_equal(all_.ids_BTM[real][:, :5], own.ids_BTM[real][:, :5])
    np.testing.assert_allclose(
        all_.log_probs_BTM[real][:, :shown], own.log_probs_BTM[real][:, :shown], atol=0.002 * temperature
    )
    gaps = few.log_probs_BTM[real][:, :5] - own.log_probs_BTM[real][:, :5]
    near = (own.log_probs_BTM[real][:, :5] > -15).all(axis=1)  # a record ends at 16 nats
    assert near.mean() > 0.9
    assert np.ptp(gaps[near], axis=1).max() < 0.01
    held = np.exp(few.log_probs_BTM[real]).sum(axis=1) + np.exp(few.rest_BT[real])
    np.testing.assert_allclose(held, 1, atol=0.01)


def test_scores_do_not_depend_on_batch_order_or_mesh(tmp_path, params):
    for scores in (TopK(5), RandomDraws(12), Shown(BOXES["noisy"], best=4)):
        name = type(scores).__name__
        asked(scores, tmp_path / name / "a", params, [pack(DOCUMENTS, T)])
        other = [pack(DOCUMENTS[::-1][:30], T), pack(DOCUMENTS[:30], T)]
        mesh = Hardware(data=2, fsdp=2, tensor=2)
        asked(scores, tmp_path / name / "b", params, other, batch_size=8, hardware=mesh)
        first, second = contents(tmp_path / name / "a"), contents(tmp_path / name / "b")
        whole = {key for key in first if key in second}
        assert len(whole) > 40  # pieces of long documents may be cut elsewhere; whole documents are the same
        same = sum(first[key] == second[key] for key in whole)
        assert same > 0.9 * len(whole)  # a sum in another order may round to another step


def test_a_second_call_asks_nothing_and_an_interrupted_one_goes_on(tmp_path, params, monkeypatch):
    monkeypatch.setattr(labelling, "PIECE_TOKENS", 8 * T)
    rows = [pack(DOCUMENTS, T)]
    seen = []

    def stop(report):
        seen.append(report)
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asked(TopK(5), tmp_path, params, rows, on_step=stop)
    stored = len(ScoreFiles(tmp_path))
    assert stored > 0
    assert not list((tmp_path / "claims").iterdir())
    done = asked(TopK(5), tmp_path, params, rows)[1]
    assert 0 < done.tokens < rows[0].targets
    assert len(ScoreFiles(tmp_path)) > stored

    def never():
        raise AssertionError("the teacher was asked again")

    again = label(cached(TopK(5), tmp_path, params), never, rows, 4, on_step=seen.append)
    assert again.tokens == 0
    assert seen[-1].step == seen[-1].steps


def test_one_waits_for_what_another_is_at_and_takes_over_what_it_left(tmp_path, params, monkeypatch):
    monkeypatch.setattr(labelling, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr("epigone.teachers.score_files.STALE_SECONDS", 0.5)
    rows = [pack(DOCUMENTS, T)]
    asked(TopK(5), tmp_path / "whole", params, rows)
    name = next((tmp_path / "whole").glob("*.array_record")).stem
    claim = tmp_path / "left" / "claims" / name
    claim.parent.mkdir(parents=True)
    claim.write_text("another host that died")
    done = asked(TopK(5), tmp_path / "left", params, rows)[1]
    assert done.seconds >= 0.4
    assert contents(tmp_path / "left") == contents(tmp_path / "whole")


def test_what_another_ends_while_it_is_claimed_is_not_scored_again(tmp_path, params, monkeypatch):
    rows, take = [pack(DOCUMENTS, T)], Claims.take

    def late(self, name):
        monkeypatch.setattr(Claims, "take", take)
        assert asked(TopK(5), tmp_path, params, rows)[1].tokens == rows[0].targets
        return take(self, name)

    monkeypatch.setattr(Claims, "take", late)
    assert asked(TopK(5), tmp_path, params, rows)[1].tokens == 0
    assert Claims.take is take
    assert not list((tmp_path / "claims").iterdir())


def test_a_text_that_was_not_scored_is_refused(tmp_path, params):
    found = asked(TopK(5), tmp_path, params, [pack(DOCUMENTS[:20], T)])[0]
    with pytest.raises(UserError, match="epigone label"):
        found.fetch(Batches([pack(DOCUMENTS, T)], None, 32, seed=1).batch(0))


def train(folder, given, rows, objective, hardware=Hardware()):
    training = Training(steps=4, batch_size=8, sequence_length=T)
    batches = Batches([rows], None, 8, seed=5)
    trained = loop.train(
        MODEL, training, objective, batches, seed=1, identity="x", directory=folder, teacher=given, hardware=hardware
    )
    return trained.params


def test_hidden_states_that_were_kept_teach_as_the_teacher_itself(tmp_path, params):
    rows, objective = pack(DOCUMENTS, T), Objective(forward_kl)
    found = asked(HiddenStates("float32"), tmp_path / "scores", params, [rows])[0]
    given = found.scores(found.place(), None, found.fetch(Batches([rows], None, 8, seed=5).batch(0)))
    assert isinstance(given, Hidden)
    mine, whole = (train(tmp_path / n, t, rows, objective) for n, t in (("a", found), ("b", teacher(params))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), mine, whole)
    asked(HiddenStates(), tmp_path / "small", params, [rows])
    large, small = contents(tmp_path / "scores"), contents(tmp_path / "small")
    assert {key: len(record) for key, record in large.items()} == {key: 2 * len(r) for key, r in small.items()}


def test_kept_scores_train_the_same_on_a_mesh(tmp_path, params):
    rows, objective = pack(DOCUMENTS, T), Objective(forward_kl, hard_weight=0.3)
    for scores in (TopK(5), RandomDraws(12)):
        found = asked(scores, tmp_path / type(scores).__name__, params, [rows])[0]
        one = train(tmp_path / f"{scores}-1", found, rows, objective)
        many = train(tmp_path / f"{scores}-8", found, rows, objective, Hardware(data=2, fsdp=2, tensor=2))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), one, jax.device_get(many))
