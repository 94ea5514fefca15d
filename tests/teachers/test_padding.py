"""Vocabularies that differ in padding alone: every value is that of the models without padding."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_toy import MODEL, TRAINING, Counting, measures, run, weights

from epigone.data.pipeline import Rows
from epigone.errors import UserError
from epigone.lessons.divergences import forward_kl, jsd, reverse_kl
from epigone.lessons.objective import Objective
from epigone.models import decoder
from epigone.models.inherit import Inherit, inherit
from epigone.teachers.cached import CachedTeacher
from epigone.teachers.ensemble import Ensemble, EnsembleTeacher
from epigone.teachers.in_memory import DecoderTeacher
from epigone.teachers.kept import HiddenStates, RandomDraws, TopK
from epigone.training.config import Hardware
from epigone.training.labelling import label
from epigone.training.on_policy import OnPolicy

TRUE = 64
"""Ids of the tokenizer; the text has all from 4 on."""
TINY = replace(MODEL, vocab_size=TRUE, layers=1, model_size=8, vocab_multiple=8, tied=False)
SHORT = replace(TRAINING, steps=2, batch_size=4, log_every=1)


def wider(config, vocab_size):
    return replace(config, vocab_size=vocab_size)


def padded(params, vocab_size):
    """The same weights, with rows at the end that would win everywhere if they were not masked."""

    def more(path, leaf):
        if not jax.tree_util.keystr(path).split("'")[-2].startswith(("embedding_V", "head_V")):
            return leaf
        rows = 3.0 * jnp.ones((-(-vocab_size // 8) * 8 - len(leaf), leaf.shape[1]))
        return jnp.concatenate([leaf, rows * jnp.sign(leaf[:1])])

    return jax.tree_util.tree_map_with_path(more, params)


START = decoder.init(TINY, 1)
KNOWN = jax.tree.map(lambda x: 4 * x, decoder.init(TINY, 2))


def teacher(vocab_size=TRUE, params=KNOWN):
    return DecoderTeacher(wider(TINY, vocab_size), padded(params, vocab_size), "ids", "name", tokens=TRUE)


def student(directory, vocab_size, **given):
    begin = padded(START, vocab_size)
    given = {"training": SHORT} | given
    return run(directory, model=wider(TINY, vocab_size), initial_params=lambda: begin, **given)


def same(found, wanted):
    for mine, theirs in zip(measures(found), measures(wanted), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert value == pytest.approx(theirs[name], abs=1e-6, rel=1e-6), name
    other = weights(wanted)
    for name, array in weights(found).items():
        at = np.s_[..., : other[name].shape[0], :] if "_V" in name else np.s_[...]
        np.testing.assert_allclose(array[at], other[name], atol=2e-6, err_msg=name)


PADDED = {"teacher": (TRUE, 72), "student": (72, TRUE)}
MESH = Hardware(data=2, tensor=2)


@pytest.mark.parametrize(("who", "hardware"), [("teacher", Hardware()), ("teacher", MESH), ("student", MESH)], ids=str)
def test_a_decoder_teaches_as_one_without_padding(tmp_path, who, hardware):
    ours, theirs = PADDED[who]
    objective = Objective(jsd, temperature=1.3, hard_weight=0.2)
    wanted = student(tmp_path / "wanted", TRUE, teacher=teacher(), objective=objective)
    found = student(tmp_path / "found", ours, teacher=teacher(theirs), objective=objective, hardware=hardware)
    same(found, wanted)


KEPT = [("teacher", TopK(5)), ("student", TopK(5)), ("teacher", RandomDraws(9)), ("student", HiddenStates("float32"))]


@pytest.mark.parametrize(("who", "kept"), KEPT, ids=str)
def test_scores_that_were_kept_are_those_without_padding(tmp_path, who, kept):
    batches = Counting(4, TINY.max_length)
    planes = [np.stack([b.tokens_BT, b.targets_BT, b.segments_BT], 1) for b in map(batches.batch, range(2))]
    rows = [Rows(np.concatenate(planes), 1)]

    def cached(name, ours, theirs):
        asked = teacher(theirs)
        head = asked.head_alone() if isinstance(kept, HiddenStates) else {}
        size = min(ours, theirs)
        found = CachedTeacher(kept, tmp_path / name, vocab_size=size, tokenizer_identity="ids", tokens=TRUE, **head)
        label(found, lambda: asked, rows, 4)
        return found

    objective = Objective(forward_kl, hard_weight=0.1)
    one, other = cached("one", TRUE, TRUE), cached("other", *PADDED[who])
    wanted = student(tmp_path / "wanted", TRUE, teacher=one, objective=objective, batches=batches)
    found = student(tmp_path / "found", PADDED[who][0], teacher=other, objective=objective, batches=batches)
    same(found, wanted)


def test_several_teachers_with_different_padding(tmp_path):
    second = jax.tree.map(lambda x: 3 * x, decoder.init(TINY, 3))
    several = lambda *sizes: EnsembleTeacher(  # noqa: E731
        [teacher(sizes[0]), teacher(sizes[1], second)], Ensemble(weights=(0.3, 0.7))
    )
    objective = Objective(forward_kl)
    wanted = student(tmp_path / "wanted", TRUE, teacher=several(TRUE, TRUE), objective=objective)
    found = student(tmp_path / "found", 72, teacher=several(80, TRUE), objective=objective, hardware=MESH)
    same(found, wanted)


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_own_texts_have_no_padding_and_are_those_without_it(tmp_path, who):
    ours, theirs = PADDED[who]
    own = OnPolicy(prompt_tokens=1, max_new=6, teacher_share=0.4, importance=True)
    given = {"objective": Objective(reverse_kl), "on_policy": own, "training": replace(SHORT, steps=1)}
    wanted = student(tmp_path / "wanted", TRUE, teacher=teacher(), **given)
    same(student(tmp_path / "found", ours, teacher=teacher(theirs), **given), wanted)


@pytest.mark.parametrize("rows", [56, 72])
def test_a_student_starts_from_a_teacher_with_other_padding(rows):
    big, small = wider(TINY, 72), wider(TINY, rows)
    if rows < TRUE:
        with pytest.raises(UserError, match="vocab_size is 72 in the teacher and 56"):
            inherit(big, padded(KNOWN, 72), small, decoder.init(small, 0), Inherit(), tokens=TRUE)
        return
    began = inherit(TINY, KNOWN, small, decoder.init(small, 0), Inherit(), tokens=TRUE)
    table = began["outer"]["embedding_VD"][...]
    np.testing.assert_array_equal(table[:TRUE], KNOWN["outer"]["embedding_VD"][...])
    assert table.shape == (72, 8)
    assert not np.any(table[TRUE:])
    back = inherit(small, began, TINY, decoder.init(TINY, 0), Inherit(), tokens=TRUE)
    jax.tree.map(np.testing.assert_array_equal, back, KNOWN)


def test_a_vocabulary_that_is_another_is_refused_with_both_sizes(tmp_path):
    for tokens in (None, 70):
        other = DecoderTeacher(wider(TINY, 72), padded(KNOWN, 72), "ids", "name", tokens=tokens)
        with pytest.raises(UserError, match="teacher vocabulary 72 != student vocabulary 64"):
            student(tmp_path, TRUE, teacher=other, objective=Objective())
