"""Many models in one program are, each, what a run of its own makes."""

import os
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest
import training_toy as toy

from epigone.data.packing import pack
from epigone.data.pipeline import Batches
from epigone.errors import Fault, Stopped, UserError
from epigone.lessons.divergences import reverse_kl
from epigone.lessons.inner import Match
from epigone.lessons.match_kinds import States
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.models import decoder
from epigone.models.language_model import Specials
from epigone.models.ngram import NGram, NGramModel
from epigone.teachers.in_memory import DecoderTeacher, NGramTeacher
from epigone.training.together import Member, train_together

DOCUMENTS = [list(np.random.default_rng(n).integers(4, 64, 9)) for n in range(200)]
ROWS = pack([np.array(one) for one in DOCUMENTS], toy.TRAINING.sequence_length, Specials())


def batches(seed, batch_size=8):
    return Batches([ROWS], None, batch_size, seed)


def members(count, **more):
    return [Member(f"toy@{n}", n, batches(100 + n), **more) for n in range(count)]


def alone(member, directory, training, objective, **given):
    start = {"initial_params": member.initial_params, "batches": member.batches}
    return toy.run(directory / member.key, training=training, objective=objective, seed=member.seed, **start, **given)


def same(one, other):
    ours, theirs = toy.weights(one), toy.weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-4, err_msg=name)
    assert (one.tokens, one.flops, one.trained, one.optimizer_bytes) == (
        other.tokens,
        other.flops,
        other.trained,
        other.optimizer_bytes,
    )
    for mine, yours in zip(toy.measures(one), toy.measures(other), strict=True):
        assert mine.keys() == yours.keys()
        for name in mine:
            assert mine[name] == pytest.approx(yours[name], rel=1e-4, abs=1e-4), name


def teachers():
    big = replace(toy.MODEL, model_size=24)
    counts = NGramModel.fit(NGram(), [np.array(one) for one in DOCUMENTS], 64)
    return {
        "text alone": (TEXT_ALONE, None),
        "a decoder": (Objective(reverse_kl, hard_weight=0.3), DecoderTeacher(big, decoder.init(big, 5), "id")),
        "counts": (Objective(hard_weight=0.5), NGramTeacher(counts, "id")),
    }


@pytest.mark.parametrize("kind", ["text alone", "a decoder", "counts"])
def test_each_is_what_it_is_alone(kind, tmp_path):
    objective, teacher = teachers()[kind]
    given = members(3)
    found = train_together(toy.MODEL, toy.TRAINING, objective, given, teacher=teacher)
    for member, one in zip(given, found, strict=True):
        same(one, alone(member, tmp_path, toy.TRAINING, objective, teacher=teacher))
    first, second = (toy.losses(one) for one in found[:2])
    assert first != second


def test_averaged_weights_and_given_starts(tmp_path):
    training = replace(toy.TRAINING, ema_decay=0.8)
    starts = [decoder.init(toy.MODEL, 40 + n) for n in range(2)]
    given = [replace(m, initial_params=lambda n=n: starts[n]) for n, m in enumerate(members(2))]
    found = train_together(toy.MODEL, training, TEXT_ALONE, given)
    for member, one in zip(given, found, strict=True):
        same(one, alone(member, tmp_path, training, TEXT_ALONE))


def test_what_a_member_learns_does_not_hang_on_the_others():
    few = train_together(toy.MODEL, toy.TRAINING, TEXT_ALONE, members(2))
    many = train_together(toy.MODEL, toy.TRAINING, TEXT_ALONE, members(5))
    for one, other in zip(few, many[:2], strict=True):
        same(one, other)


def test_who_diverges_is_named():
    given = members(3)
    spoiled = jax.tree.map(lambda w: w * np.nan, decoder.init(toy.MODEL, 0))
    given[1] = replace(given[1], initial_params=lambda: spoiled)
    with pytest.raises(Fault, match=r"^node 'toy@1': at step 1 the loss is nan and .*: lower the learning rate"):
        train_together(toy.MODEL, toy.TRAINING, TEXT_ALONE, given)


def test_it_can_be_stopped():
    def stop(report):
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match=r"stopped at step \d+ of 12 of 2 models that begin anew"):
        train_together(toy.MODEL, toy.TRAINING, TEXT_ALONE, members(2), on_step=stop)


def test_layers_of_a_teacher_are_refused():
    big = replace(toy.MODEL, model_size=24)
    inner = Objective(reverse_kl, inner=(Match(States()),))
    with pytest.raises(UserError, match="nothing of a teacher's layers"):
        train_together(
            toy.MODEL, toy.TRAINING, inner, members(2), teacher=DecoderTeacher(big, decoder.init(big, 5), "id")
        )


def test_reports_count_all_members():
    seen = []
    found = train_together(toy.MODEL, toy.TRAINING, TEXT_ALONE, members(3), on_step=seen.append)
    assert [report.step for report in seen] == list(range(1, 13))
    assert seen[-1].tokens == sum(one.tokens for one in found)
    assert seen[-1].loss == pytest.approx(np.mean([one.curve[-1]["loss"] for one in found]), rel=0.2)
