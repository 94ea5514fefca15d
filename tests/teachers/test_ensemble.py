"""Several teachers beside one student: what they give together, by source of text, and what does not fit."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from epigone.cli import main
from epigone.data.pipeline import Batches, pack
from epigone.errors import UserError
from epigone.lessons.ensemble import by_confidence, mean_of_logits, mean_of_probabilities
from epigone.lessons.objective import Objective
from epigone.models import decoder
from epigone.models.config import DecoderConfig
from epigone.models.ngram import NGram, NGramModel
from epigone.teachers.ensemble import Ensemble, EnsembleTeacher, routes_of
from epigone.teachers.in_memory import DecoderTeacher, NGramTeacher
from epigone.training import loop
from epigone.training.config import Hardware, Training

V, T = 40, 16
SMALL = DecoderConfig(vocab_size=V, layers=1, model_size=16, heads=2, max_length=T, vocab_multiple=8)
LARGE = dataclasses.replace(SMALL, model_size=24, logit_softcap=5.0)
TEXTS = [
    [np.random.default_rng([source, n]).integers(4, V, 3 + n % 23).astype(np.int32) for n in range(60)]
    for source in range(2)
]


def members():
    counted = NGramModel.fit(NGram(), TEXTS[0], V)
    decoders = [DecoderTeacher(config, decoder.init(config, 3), "ids") for config in (SMALL, LARGE)]
    return [*decoders, NGramTeacher(counted, "ids")]


def train(folder, teacher, rows, hardware=Hardware()):
    training = Training(steps=3, batch_size=8, sequence_length=T)
    batches = Batches(rows, None, 8, seed=5)
    how = {"seed": 1, "identity": "x", "directory": folder, "hardware": hardware}
    return jax.device_get(
        loop.train(SMALL, training, Objective(temperature=1.5), batches, teacher=teacher, **how).params
    )


def close(first, second):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), first, second)


@pytest.mark.parametrize("combine", [mean_of_probabilities, mean_of_logits])
def test_a_teacher_beside_its_double_teaches_as_one(tmp_path, combine):
    rows, one = [pack(TEXTS[0], T)], members()[1]
    twice = EnsembleTeacher([one, members()[1]], Ensemble((1.0, 3.0), combine, by_confidence))
    close(train(tmp_path / "one", one, rows), train(tmp_path / "two", twice, rows))


def test_decoders_and_a_count_based_model_teach_together_on_a_mesh(tmp_path):
    rows, how = [pack(TEXTS[0], T)], Ensemble((1.0, 2.0, 1.0))
    found = train(tmp_path / "one", EnsembleTeacher(members(), how), rows)
    close(found, train(tmp_path / "many", EnsembleTeacher(members(), how), rows, Hardware(data=2, fsdp=2, tensor=2)))
    alone = train(tmp_path / "alone", members()[0], rows)
    with pytest.raises(AssertionError):  # the negative control: the others do count
        close(found, alone)


def test_each_source_of_text_is_scored_by_its_own_teacher_in_any_batch():
    rows = [pack(text, T) for text in TEXTS]
    teacher = EnsembleTeacher(members(), Ensemble(), routes_of(rows, [2, 0]))
    batches = Batches(rows, None, 8, seed=3)
    for step in range(4):
        batch = batches.batch(step)
        weights = teacher.fetch(batch)["weights_BTM"]
        for row in range(8):
            own = [(batch.tokens_BT[row] == source.planes_R3T[:, 0]).all(1).any() for source in rows]
            wanted = 2 if own[0] else 0
            there = batch.segments_BT[row] > 0
            assert (weights[row, there].argmax(-1) == wanted).all()
            assert (weights[row, there].max(-1) == 1).all()


@pytest.mark.parametrize(
    ("ensemble", "teachers", "sources"),
    [
        (Ensemble(), ("a@0",), 1),
        (Ensemble(), ("a@0", "a@0"), 1),
        (Ensemble((1.0,)), ("a@0", "b@0"), 1),
        (Ensemble((1.0, 0.0)), ("a@0", "b@0"), 1),
        (Ensemble(route=("a@0",)), ("a@0", "b@0"), 2),
        (Ensemble(route=("a@0", "c@0")), ("a@0", "b@0"), 2),
    ],
)
def test_what_does_not_fit_is_refused(ensemble, teachers, sources):
    with pytest.raises(UserError):
        ensemble.check(teachers, sources)


CONFIG = tiny.CONFIG.replace(
    "nodes = [trigram, *copies, teacher, *fan_out(teacher, [student]), reader]",
    """other = change(teacher, name="other", seed=1)
    both = change(student, name="both", lesson=change(student.lesson, ensemble=Ensemble((1.0, 2.0))))
    nodes = [trigram, teacher, other, *fan_out([teacher, other], [both]), *fan_out([trigram, teacher], [student])]""",
).replace("from epigone.models.ngram", "from epigone.teachers.ensemble import Ensemble\nfrom epigone.models.ngram")


def test_a_lineage_with_several_teachers_grows_and_says_so(tmp_path, capsys):
    config, run = tiny.write_config(tmp_path, CONFIG), tmp_path / "runs" / "tiny"
    assert main(["run", str(config), "--run", str(run)]) == 0
    assert main(["export", "both@1", "--run", str(run), "--to", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "teacher@0 and other@0.s1" in card
    assert main(["run", str(config), "--run", str(run), "--set", "both.lesson.ensemble.weights=1.0,2.0,3.0"]) == 2
    assert "3" in capsys.readouterr().err
