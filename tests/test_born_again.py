"""The shipped experiment on models of one size, shrunk: a chain, a student of them all, and one that teaches itself."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import Silent, few_verses

from epigone.data.tokenizers import Words
from epigone.errors import UserError
from epigone.families import born_again
from epigone.grow import grow
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.lineage import Lesson
from epigone.materials import Materials
from epigone.models.ngram import NGram
from epigone.plan import plan
from epigone.store import Store
from epigone.verbs.descriptions import lesson_in_words
from epigone.verbs.model_card import _sentence
from epigone.verbs.run import load_config

CONFIG = Path(__file__).parent.parent / "configs" / "born_again.py"


def shrunk(node):
    """The same lesson for a tiny model of the commonest words, on short rows."""
    tokenizer = dataclasses.replace(node.tokenizer, algorithm=Words(lowercase=True, max_size=100))
    model = dataclasses.replace(node.model, layers=1, model_size=8, heads=2, max_length=16)
    training = dataclasses.replace(node.lesson.training, batch_size=2, sequence_length=16)
    lesson = dataclasses.replace(node.lesson, training=training)
    return dataclasses.replace(node, model=model, tokenizer=tokenizer, lesson=lesson)


@pytest.fixture(scope="module", autouse=True)
def few():
    with few_verses():
        yield


@pytest.fixture(scope="module")
def lineage():
    whole = load_config(CONFIG)(seeds=1, generations=2, tokens=400, steps=3)
    few = dataclasses.replace(whole.evaluation.text, tokens=300)
    evaluation = dataclasses.replace(whole.evaluation, text=few, write_tokens=0, contexts=10)
    return dataclasses.replace(whole, nodes=tuple(map(shrunk, whole.nodes)), evaluation=evaluation)


@pytest.fixture(scope="module")
def grown(lineage, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("born-again") / "run", lineage)
    planned = {row.key: row for row in plan(lineage, store)}
    grow(lineage, store.run, view=Silent())
    return store, {node.key: store.record(node) for node in lineage.nodes}, planned


def test_each_generation_has_the_one_before_as_its_teacher(lineage):
    assert lineage["born-again@1"].lesson.teachers == ("teacher@0",)
    assert lineage["born-again@2"].lesson.teachers == ("born-again@1",)
    assert lineage["student-of-all@3"].lesson.teachers == ("teacher@0", "born-again@1", "born-again@2")
    assert len({node.model for node in lineage.nodes}) == 1
    assert all(node.lesson.start_from is None for node in lineage.nodes)


def test_generations_start_afresh(lineage, grown):
    """A generation does not begin with its teacher's own initial weights: the first losses on the text differ."""
    records = grown[1]
    keys = ["teacher@0", "born-again@1", "born-again@2", "student-of-all@3"]
    assert [lineage[key].lesson.initialisation for key in keys] == [0, 1, 2, 3]
    assert len({records[key]["curve"][0]["student_cross_entropy"] for key in keys}) == 4


def test_a_born_again_student_and_its_control_differ_in_the_teacher_alone(lineage):
    student, control = lineage["born-again@1"], lineage["control@1"]
    alike = dataclasses.replace(student.lesson, teacher=None, objective=TEXT_ALONE)
    assert dataclasses.replace(student, name="control", lesson=alike, labels=control.labels) == control


def test_what_was_planned_is_what_was_spent(lineage, grown):
    _, records, planned = grown
    for node in lineage.nodes:
        assert records[node.key]["flops"] == planned[node.key].flops
    assert planned["mean-teacher@1"].flops == planned["born-again@1"].flops > planned["average@1"].flops
    assert planned["average@1"].memory == planned["control@1"].memory + 4 * planned["control@1"].parameters


def test_all_are_measured_and_the_average_is_not_the_last_weights(lineage, grown):
    store, records, _ = grown
    assert all(record["metrics"]["perplexity"] > 1 for record in records.values())
    one, other = (jax.tree.leaves(Materials(store).model(lineage[key]).params) for key in ("average@1", "control@1"))
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_card_says_who_taught(lineage, grown):
    node = lineage["mean-teacher@1"]
    assert "and from the running average of its own weights" in _sentence(node, grown[1][node.key])
    words = {line.what: line.value for line in lesson_in_words(node.lesson, 0)}
    assert "forward KL to the running average of its own weights" in words["Objective"]


def test_a_chain_needs_a_teacher_that_was_trained(lineage):
    teacher = lineage["teacher@0"]
    counting = dataclasses.replace(teacher, model=NGram(), lesson=Lesson(teacher.lesson.text))
    with pytest.raises(UserError, match="'teacher@0' was not trained here"):
        born_again(counting, 2, Objective(hard_weight=0.5))
