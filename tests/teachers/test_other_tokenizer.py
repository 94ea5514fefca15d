"""A teacher of other tokens beside a student: its rows, what is aligned, and whole trainings."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import tiny
from compiled_names import compiled_names
from training_toy import losses, measures, run, weights

from epigone.data.pipeline import Batches, Rows, pack
from epigone.data.tokenizers import BPE, Bytes, Words
from epigone.errors import UserError
from epigone.lessons.aligned import UNREAD
from epigone.lessons.alignment import common_tokens, likelihood_matching, uld
from epigone.lessons.divergences import forward_kl, reverse_kl
from epigone.lessons.objective import Objective
from epigone.models import decoder
from epigone.models.config import DecoderConfig
from epigone.models.ngram import NGram, NGramModel
from epigone.teachers.in_memory import DecoderTeacher, NGramTeacher
from epigone.teachers.other_tokenizer import OtherTokenizerTeacher, fitted
from epigone.training import step as steps
from epigone.training.config import Hardware, Training
from epigone.training.on_policy import OnPolicy
from epigone.training.optimizer import Optimizer

TEXTS = [*tiny.sentences(60), "Grüße, 世界!", "naïve 🎓"]
WORDS, BYTES = Words(lowercase=False).build(TEXTS), Bytes().build()
OURS, THEIRS = BPE(300).build(TEXTS), BPE(330).build(TEXTS)
T = 48
TRAINING = Training(2, 4, T, optimizer=Optimizer(learning_rate=0.01, warmup_steps=0, epsilon=1e-4), log_every=1)


def config(tokenizer, **changes):
    return DecoderConfig(
        **{"vocab_size": tokenizer.size, "layers": 1, "model_size": 8, "heads": 2, "max_length": 128} | changes
    )


def known(tokenizer, seed=5):
    return DecoderTeacher(
        config(tokenizer), jax.tree.map(lambda x: 3 * x, decoder.init(config(tokenizer), seed)), "id", "name"
    )


def documents(tokenizer, texts=TEXTS):
    return tokenizer.encode_batch(texts)


def rows_of(tokenizer, length=T):
    return pack(documents(tokenizer), length)


def beside(ours, theirs, room=1.0, teacher=None):
    return fitted(teacher or known(theirs), theirs, ours, [rows_of(ours)], room)


def student(directory, teacher, divergence, ours=OURS, batches=None, **given):
    objective = divergence if isinstance(divergence, Objective) else Objective(divergence)
    batches = batches or Batches([rows_of(ours)], None, 4, seed=3)
    given = {"training": TRAINING} | given
    return run(directory, model=config(ours), objective=objective, teacher=teacher, batches=batches, **given)


@pytest.mark.parametrize("theirs", [THEIRS, BYTES, WORDS], ids=["bpe", "bytes", "words"])
def test_the_teacher_reads_the_students_text_in_rows_of_one_shape(theirs):
    teacher, told = beside(OURS, theirs)
    batches = Batches([rows_of(OURS)], None, 4, seed=0)
    shapes = set()
    for step in range(3):
        batch = batches.batch(step)
        fetched = teacher.fetch(batch)
        shapes.add(str(jax.tree.map(np.shape, fetched)))
        rows = fetched["rows"]
        for b in range(4):
            for number in range(1, rows.segments_BT[b].max() + 1):
                mine, other = batch.segments_BT[b] == number, rows.segments_BT[b] == number
                said = theirs.decode(rows.targets_BT[b][other])
                text = OURS.decode(batch.targets_BT[b][mine])
                assert said == (text if theirs is not WORDS else WORDS.decode(WORDS.encode(text)))
        match = fetched["match_BT"]
        for b, t in zip(*np.nonzero(match >= 0), strict=True):
            before = [
                tokenizer.decode(part.tokens_BT[b][: at + 1][part.segments_BT[b][: at + 1] == part.segments_BT[b][at]])
                for tokenizer, part, at in ((OURS, batch, t), (theirs, rows, match[b, t]))
            ]
            assert "".join(before[0].split()) == "".join(before[1].split())
    assert len(shapes) == 1
    assert told["unread"] == 0.0
    assert told["aligned_positions"] > 0.3
    assert told["length"] % 16 == 0


def test_what_does_not_fit_is_left_out_and_counted():
    whole = OtherTokenizerTeacher(known(BYTES), BYTES, OURS, 192)
    short = OtherTokenizerTeacher(known(BYTES), BYTES, OURS, 40)
    batch = Batches([rows_of(OURS)], None, 4, seed=0).batch(0)
    full, cut = whole.fetch(batch), short.fetch(batch)
    unread = cut["match_BT"] == UNREAD
    assert 0 < unread.sum() < batch.weights_BT.sum()
    assert not ((full["match_BT"] == UNREAD) & (batch.segments_BT > 0)).any()
    same = ~unread & (full["match_BT"] < 40) & (cut["match_BT"] >= 0)
    np.testing.assert_array_equal(cut["match_BT"][same], full["match_BT"][same])
    assert same.sum() > 10
    assert (cut["chunk_BT"][unread] == -1).all()


def test_of_one_tokenizer_common_tokens_is_the_divergence(tmp_path):
    wanted = student(tmp_path / "wanted", known(OURS), Objective(reverse_kl, hard_weight=0.1))
    aligned = Objective(partial(common_tokens, divergence=reverse_kl), hard_weight=0.1)
    found = student(tmp_path / "found", beside(OURS, OURS)[0], aligned)
    np.testing.assert_allclose(losses(found), losses(wanted), rtol=1e-5)
    other = weights(wanted)
    for name, array in weights(found).items():
        np.testing.assert_allclose(array, other[name], atol=2e-5)


def test_a_teacher_that_is_the_student_has_nothing_to_teach_by_chunks(tmp_path):
    params = decoder.init(config(OURS), 9)
    teacher = beside(OURS, OURS, teacher=DecoderTeacher(config(OURS), params, "id"))[0]
    still = student(
        tmp_path, teacher, likelihood_matching, initial_params=lambda: params, training=replace(TRAINING, steps=1)
    )
    assert still.curve[-1]["loss"] == pytest.approx(0.0, abs=1e-6)
    assert still.curve[-1]["gradient_norm"] == pytest.approx(0.0, abs=1e-5)
    assert still.curve[-1]["aligned_chunks"] == 1.0


@pytest.mark.parametrize(
    ("divergence", "hardware"),
    [(likelihood_matching, Hardware(data=2, tensor=2)), (uld, Hardware(microbatches=2))],
    ids=["mesh", "micro-batches"],
)
def test_neither_mesh_nor_micro_batches_change_anything(tmp_path, divergence, hardware):
    teacher = beside(OURS, BYTES)[0]
    wanted = student(tmp_path / "wanted", teacher, divergence)
    found = student(tmp_path / "found", teacher, divergence, hardware=hardware)
    for mine, theirs in zip(measures(found), measures(wanted), strict=True):
        for name, value in mine.items():
            assert value == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    assert wanted.curve[-1]["aligned_positions"] > 0.3


def placed(texts, rows, length):
    """Texts in rows, one after the other, each row with padding behind."""
    planes = np.zeros((len(rows), 3, length), np.int32)
    for row, numbers in enumerate(rows):
        at = 0
        for segment, number in enumerate(numbers, 1):
            text = texts[number]
            place = slice(at, at + len(text) + 1)
            planes[row, :, place] = np.append(1, text), np.append(text, 2), np.full(len(text) + 1, segment)
            at = place.stop
    return Rows(planes, int((planes[:, 2] > 0).sum()))


def test_neither_padding_nor_packing_changes_the_loss(tmp_path):
    """Each text in a row of its own, or several in one."""
    texts, sums = documents(OURS, TEXTS[:4]), []
    for rows, length in (([[0], [1], [2], [3]], T), ([[3, 0, 2], [1]], 2 * T)):
        rows = placed(texts, rows, length)
        teacher = fitted(known(THEIRS), THEIRS, OURS, [rows])[0]
        training = replace(TRAINING, steps=1, batch_size=len(rows), sequence_length=length)
        batches = Batches([rows], None, len(rows), seed=0)
        sums.append(student(tmp_path / str(length), teacher, likelihood_matching, batches=batches, training=training))
    assert sums[0].tokens == sums[1].tokens
    assert losses(sums[0]) == pytest.approx(losses(sums[1]), rel=1e-5)
    assert sums[0].curve[0]["gradient_norm"] == pytest.approx(sums[1].curve[0]["gradient_norm"], rel=1e-4)


def test_own_texts_are_read_too_and_nothing_is_compiled_again(tmp_path):
    teacher, _ = beside(OURS, BYTES, room=2.0)
    steps._programs.clear()
    own = OnPolicy(share=0.5, prompt_tokens=2, max_new=12)
    with compiled_names() as names:
        trained = student(
            tmp_path, teacher, likelihood_matching, training=replace(TRAINING, steps=5), on_policy=own, seed=1
        )
    (programs,) = steps._programs.values()
    assert [names.count(part.__name__) for part in (programs.step, programs.compare)] == [1, 1]
    assert np.isfinite(losses(trained)).all()
    assert all(point["aligned_positions"] > 0 for point in trained.curve)


def test_what_was_drawn_is_aligned_whatever_it_is():
    """Own texts may hold specials in their midst, and bytes that are no text."""
    draw = np.random.default_rng(0)
    for ours in (OURS, BYTES, WORDS):
        teacher = OtherTokenizerTeacher(known(THEIRS), THEIRS, ours, 64)
        for _ in range(40):
            targets = draw.integers(2, ours.size, draw.integers(1, 20)).astype(np.int32)
            laid = teacher.laid(draw.choice([1, 7]), targets)
            assert len(laid.match_T) == len(laid.chunk_T) == len(laid.read_T) == len(targets)
            assert len(laid.tokens_U) == len(laid.targets_U) == len(laid.chunk_U)
            assert laid.match_T.max(initial=-1) < max(1, len(laid.tokens_U))
            assert set(laid.chunk_T[laid.chunk_T >= 0]) == set(laid.chunk_U[laid.chunk_U >= 0])


def test_a_model_that_counts_teaches_other_tokens(tmp_path):
    counts = NGramModel.fit(NGram(), documents(WORDS), WORDS.size)
    teacher, told = beside(OURS, WORDS, teacher=NGramTeacher(counts, "id"))
    assert (told["unread"], told["length"]) == (0.0, 48)
    for divergence in (common_tokens,):
        trained = student(tmp_path / divergence.__name__, teacher, divergence, training=replace(TRAINING, steps=1))
        assert np.isfinite(losses(trained)).all()
        assert trained.curve[-1]["loss"] > 0


def test_a_teacher_that_does_not_fit_the_objective_is_refused(tmp_path):
    with pytest.raises(UserError, match="gives scores of tokens of its own"):
        student(tmp_path, beside(OURS, BYTES)[0], forward_kl)
    with pytest.raises(UserError, match="objective takes scores of tokens of its own"):
        student(tmp_path, known(OURS), uld)
    with pytest.raises(UserError, match="is no decoder of the student's tokens"):
        student(tmp_path, beside(OURS, BYTES)[0], uld, on_policy=OnPolicy(teacher_share=0.2))
