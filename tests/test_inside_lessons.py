"""The shipped experiment inside the teacher, shrunk; and lessons that cannot look inside, before anything is grown."""

import dataclasses
from pathlib import Path

import pytest
from tiny import Silent, few_verses

from epigone.cli import main
from epigone.data.tokenizers import BPE
from epigone.errors import UserError
from epigone.grow import grow
from epigone.lessons.inner import Match
from epigone.lessons.match_kinds import Relations, States
from epigone.lessons.objective import Objective
from epigone.models.ngram import NGram
from epigone.plan import plan
from epigone.store import Store
from epigone.teachers.kept import HiddenStates
from epigone.verbs.descriptions import lesson_in_words
from epigone.verbs.run import load_config

CONFIG = Path(__file__).parent.parent / "configs" / "inside.py"
WAYS = ["scores", "mse", "mse-light", "cosine", "relations", "contrast"]


def shrunk(node):
    """The same lesson for a tiny model, on short rows."""
    model = dataclasses.replace(node.model, model_size=16, heads=2)
    training = dataclasses.replace(node.lesson.training, batch_size=2, sequence_length=16, compare_every=None)
    lesson = dataclasses.replace(node.lesson, training=training)
    few = dataclasses.replace(node.tokenizer.text, split="test")
    tokenizer = dataclasses.replace(node.tokenizer, algorithm=BPE(vocab_size=300), text=few)
    text = tuple(dataclasses.replace(source, tokens=400) for source in node.lesson.text)
    lesson = dataclasses.replace(lesson, text=text)
    return dataclasses.replace(node, model=model, tokenizer=tokenizer, lesson=lesson)


@pytest.fixture(scope="module", autouse=True)
def few():
    with few_verses():
        yield


@pytest.fixture(scope="module")
def lineage():
    whole = load_config(CONFIG)(seeds=1, steps=2, scale=0.005)
    return dataclasses.replace(whole, nodes=tuple(map(shrunk, whole.nodes)), evaluation=None)


@pytest.fixture(scope="module")
def records(lineage, tmp_path_factory):
    run = tmp_path_factory.mktemp("inside") / "run"
    planned = {row.key: row for row in plan(lineage, Store(run, lineage))}
    grow(lineage, run, view=Silent())
    store = Store(run, lineage)
    return {node.name: store.record(node) | {"planned": planned[node.key]} for node in lineage.nodes}


def test_every_way_is_grown_begins_alike_and_shows_what_it_learned(lineage, records):
    ways = [node for node in lineage.nodes if node.generation == 1]
    assert [node.name for node in ways] == WAYS
    assert len({(n.model, n.seed, n.lesson.text, n.lesson.training, n.lesson.teacher) for n in ways}) == 1
    names = {
        "mse": "hidden_mse",
        "mse-light": "hidden_mse",
        "cosine": "hidden_cosine",
        "relations": "relations",
        "contrast": "contrast",
    }
    for way in WAYS:
        inner = {name for name in records[way]["curve"][-1] if name.startswith("inner_")}
        assert inner == ({f"inner_{names[way]}"} if way in names else set())
    assert {record["parameters"] for name, record in records.items() if name in WAYS} == {
        records["scores"]["parameters"]
    }


def test_what_was_planned_is_what_was_spent(records):
    for record in records.values():
        assert record["flops"] == record["planned"].flops
    spent = {name: record["flops"] for name, record in records.items()}
    assert spent["scores"] < spent["cosine"] == spent["mse"]
    assert records["mse"]["planned"].memory > records["scores"]["planned"].memory


def test_a_model_card_says_it(lineage):
    def line(objective):
        lesson = dataclasses.replace(lineage["mse@1"].lesson, objective=objective)
        return next(line.value for line in lesson_in_words(lesson, 0) if line.what == "Objective")

    assert line(lineage["mse@1"].lesson.objective).endswith(" + 1 x hidden mse (layers: evenly)")
    relations = Objective(hard_weight=1.0, inner=(Match(Relations(), layers=((1, 2),), weight=0.5),))
    assert line(relations) == "cross-entropy with the text + 0.5 x relations (layers: 1 from 2)"


def changed(lineage, *more, **lesson):
    """Teacher and one student, whose lesson is another, and other nodes."""
    student = lineage["mse@1"]
    student = dataclasses.replace(student, lesson=dataclasses.replace(student.lesson, **lesson))
    return dataclasses.replace(lineage, nodes=(lineage["teacher@0"], *more, student))


def refused(lineage, tmp_path, message):
    with pytest.raises(UserError, match=message):
        grow(lineage, tmp_path / "run", view=Silent())
    assert not list((tmp_path / "run").glob("nodes/*"))


def test_layers_that_cannot_be_seen_are_refused_before_anything_is_grown(lineage, tmp_path):
    unseen = "inner looks into the layers of a teacher, and here is none that shows them"
    refused(changed(lineage, scores=HiddenStates()), tmp_path, unseen)
    teacher = lineage["teacher@0"]
    other = dataclasses.replace(teacher, name="other")
    refused(changed(lineage, other, teacher=("teacher@0", "other@0")), tmp_path, unseen)
    counting = dataclasses.replace(
        teacher, model=NGram(), lesson=dataclasses.replace(teacher.lesson, objective=None, training=None)
    )
    refused(dataclasses.replace(lineage, nodes=(counting, lineage["mse@1"])), tmp_path, unseen)
    deep = Objective(inner=(Match(States(), layers=((1, 5),)),))
    refused(changed(lineage, objective=deep), tmp_path, "one of the teacher, 1 to 4")


def test_fields_are_reached_from_the_command_line(capsys):
    setting = "mse.lesson.objective.inner.0.weight=-2"
    assert main(["run", str(CONFIG), "--dry-run", "--seeds", "1", "--set", setting]) == 2
    assert "inner: weight=-2.0 must not be negative" in capsys.readouterr().err
