"""Shipped experiments that have no test file of their own, shrunk: nodes differ as they say, and some are grown."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import Silent, shrunk

from epigone.grow import grow
from epigone.lineage import Lineage
from epigone.store import Store
from epigone.verbs.run import load_config

CONFIGS = Path(__file__).parent.parent / "configs"
KNOBS = {"seeds": 1, "steps": 2, "tokens": 2_000, "scale": 0.005}
GROWN = {
    "objectives": {"teacher", "hard-fades-in"},
    "several_teachers": {"basic", "standard", "likely"},
}
"""Of each config the nodes that the tests grow: what nothing else grows from a config."""


def config(name: str) -> Lineage:
    return load_config(CONFIGS / f"{name}.py")(**KNOBS)


@pytest.mark.parametrize("name", GROWN)
def test_students_are_grown_and_held_against_their_teachers(name, tmp_path):
    whole = config(name)
    few = replace(whole, nodes=tuple(node for node in whole.nodes if node.name in GROWN[name]))
    lineage = shrunk(few, compare={}, write_tokens=0)
    grow(lineage, tmp_path / "run", view=Silent())
    store = Store(tmp_path / "run", lineage)
    assert {node.name for node in lineage.nodes} == GROWN[name]
    for node in lineage.nodes:
        record = store.record(node)
        assert record["metrics"]["perplexity"] > 1
        assert set(record["agreement"]) == set(node.lesson.teachers)


@pytest.mark.parametrize("name", GROWN)
def test_students_read_the_same_text_and_learn_different_lessons(name):
    lessons = [node.lesson for node in config(name).nodes if node.generation == 1]
    assert len({(lesson.text, lesson.weights, lesson.training) for lesson in lessons}) == 1
    taught = {str((lesson.teacher, lesson.ensemble, lesson.objective)) for lesson in lessons}
    assert len(taught) == len(lessons) > 8


def test_two_seeds_read_different_text():
    lineage = load_config(CONFIGS / "objectives.py")(seeds=2)
    assert lineage["jsd@1"].lesson.text != lineage["jsd@1.s1"].lesson.text
