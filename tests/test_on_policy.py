"""The shipped experiment on own texts, shrunk: every way is grown, counted and measured by its teacher."""

import dataclasses
from pathlib import Path

import pytest
from tiny import Silent, few_verses, shrunk

from epigone.cli import main
from epigone.errors import UserError
from epigone.grow import grow
from epigone.lessons.objective import Objective
from epigone.lineage import Lesson, Pretrained
from epigone.models.ngram import NGram
from epigone.plan import plan
from epigone.store import Store
from epigone.training.loop import Training
from epigone.training.on_policy import OnPolicy
from epigone.verbs.run import load_config

CONFIG = Path(__file__).parent.parent / "configs" / "on_policy.py"
OWN = {"jsd-half-own", "reverse-own", "reverse-replay", "reverse-mixed", "policy-gradient", "whole-texts"}


@pytest.fixture(scope="module", autouse=True)
def few():
    with few_verses():
        yield


@pytest.fixture(scope="module")
def lineage():
    return shrunk(load_config(CONFIG)(seeds=1, steps=4, scale=0.01))


@pytest.fixture(scope="module")
def records(lineage, tmp_path_factory):
    run = tmp_path_factory.mktemp("on_policy") / "run"
    planned = {row.key: row for row in plan(lineage, Store(run, lineage))}
    grow(lineage, run, view=Silent())
    store = Store(run, lineage)
    return {node.name: store.record(node) | {"planned": planned[node.key]} for node in lineage.nodes}


def test_every_way_is_grown_and_its_text_is_judged_by_the_teacher(lineage, records):
    assert {node.name for node in lineage.nodes if node.lesson.on_policy} == OWN
    for record in records.values():
        assert record["metrics"]["real_perplexity"] > 1
        assert len(record["curve"]) >= 1
    assert all(lineage.ancestor(node.key).name == "teacher" for node in lineage.nodes)


def test_all_ways_begin_alike_and_differ_in_what_they_are_taught_alone(lineage):
    ways = [node for node in lineage.nodes if node.generation == 2]
    assert len(ways) == 9
    assert len({(n.model, n.seed, n.lesson.text, n.lesson.training, n.lesson.start_from) for n in ways}) == 1
    assert len({(n.lesson.objective, n.lesson.on_policy) for n in ways}) == 9


def test_what_was_planned_is_what_was_spent(records):
    for name in OWN - {"jsd-half-own", "reverse-replay"}:
        assert records[name]["flops"] == records[name]["planned"].flops
    reading, writing = records["reverse-text"]["flops"], records["reverse-own"]["flops"]
    assert reading < records["reverse-replay"]["flops"] < writing < records["reverse-mixed"]["flops"]


def test_own_texts_are_part_of_the_identity(lineage):
    one = lineage["reverse-own@2"]
    other = dataclasses.replace(
        one, lesson=dataclasses.replace(one.lesson, on_policy=OnPolicy(prompt_tokens=0, max_new=126))
    )
    nodes = [other if node is one else node for node in lineage.nodes]
    changed = dataclasses.replace(lineage, nodes=tuple(nodes))
    assert changed.identities["reverse-own@2"] != lineage.identities["reverse-own@2"]
    assert changed.identities["reverse-text@2"] == lineage.identities["reverse-text@2"]


def test_a_lesson_without_a_teacher_or_with_weights_has_no_own_texts():
    with pytest.raises(UserError, match="on_policy, own texts, and no teacher"):
        Lesson(objective=Objective(), training=Training(), on_policy=OnPolicy())
    with pytest.raises(UserError, match="has its weights"):
        Lesson(source=Pretrained("somewhere", "0"), on_policy=OnPolicy())


def test_a_teacher_that_counts_and_should_write_is_refused_before_anything_is_grown(lineage, tmp_path):
    teacher = lineage["teacher@0"]
    counting = dataclasses.replace(
        teacher, model=NGram(), lesson=dataclasses.replace(teacher.lesson, objective=None, training=None)
    )
    nodes = (counting, lineage["begin@1"], lineage["reverse-mixed@2"])
    mixed = dataclasses.replace(lineage, nodes=nodes, evaluation=None)
    with pytest.raises(UserError, match=r"teacher_share=0\.2 draws tokens from the teacher"):
        grow(mixed, tmp_path / "run", view=Silent())
    assert not list((tmp_path / "run").glob("nodes/*"))


def test_fields_are_reached_from_the_command_line(capsys):
    setting = "reverse-own.lesson.on_policy.share=2"
    assert main(["run", str(CONFIG), "--dry-run", "--seeds", "1", "--set", setting]) == 2
    assert "on_policy: share=2.0 is outside [0, 1]" in capsys.readouterr().err
