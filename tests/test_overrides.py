"""Every field of every node, from the command line."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from epigone import regimes
from epigone.errors import UserError
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer
from epigone.overrides import documented_fields, override


@dataclass(frozen=True)
class Model:
    """A model.

    Attributes:
        layers: number of layers.
        width: features,
            if any.
        regime: a function.
        tied: whether.
    """

    layers: int = 2
    width: float | None = None
    regime: Callable = regimes.replace
    tied: bool = True


def lineage() -> Lineage:
    text = Text("corpus", tokens=10)
    nodes = [
        Node(name, 0, Model(), TrainedTokenizer("words", text), Lesson((text,)), seed=seed)
        for name in ("teacher", "self-a", "self-b")
        for seed in (0, 1)
    ]
    return Lineage("test", tuple(nodes), Evaluation(text, text))


def changed(*assignments: str) -> dict[str, Node]:
    return override(lineage(), assignments).by_key


def test_a_name_takes_all_seeds_a_key_one_and_a_pattern_several():
    assert {k for k, n in changed("teacher.model.layers=5").items() if n.model.layers == 5} == {
        "teacher@0",
        "teacher@0.s1",
    }
    assert {k for k, n in changed("teacher@0.s1.model.layers=5").items() if n.model.layers == 5} == {"teacher@0.s1"}
    assert {k for k, n in changed("teacher@0.model.layers=5").items() if n.model.layers == 5} == {"teacher@0"}
    assert len([n for n in changed("self-*.model.layers=5").values() if n.model.layers == 5]) == 4


def test_values_are_read_as_the_field_is_typed():
    node = changed("teacher.model.width=3", "teacher.model.tied=false", "teacher.lesson.text.0.tokens=None")[
        "teacher@0"
    ]
    assert node.model.width == 3.0
    assert isinstance(node.model.width, float)
    assert node.model.tied is False
    assert node.lesson.text[0].tokens is None
    assert changed("teacher.model.width=None")["teacher@0"].model.width is None
    assert changed("teacher.model.regime=accumulate")["teacher@0"].model.regime is regimes.accumulate
    assert changed("teacher.model.regime=functools:reduce")["teacher@0"].model.regime is functools.reduce
    assert override(lineage(), ["evaluation.prompts=a b,c"]).evaluation.prompts == ("a b", "c")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("teacher.model.layrs=5", "Model has no field 'layrs'; did you mean 'layers'"),
        ("techer.model.layers=5", "no node 'techer' in lineage 'test'; did you mean 'teacher'"),
        ("teacher.model.layers=five", "'five' is not of type int; it is 2 now"),
        ("teacher.model.tied=maybe", "'maybe' is not of type bool"),
        ("teacher.model.regime=acumulate", "no function 'acumulate'; did you mean 'accumulate'"),
        ("teacher.model.regime=nowhere.at.all:f", "no module 'nowhere.at.all'"),
        ("teacher.lesson.text.7.tokens=5", "'7' is no entry of a list of 1"),
        ("teacher.model.layers.deep=5", "no field 'deep'"),
        ("teacher.model.layers", "write NODE.FIELD=VALUE"),
        ("layers=5", "write NODE.FIELD=VALUE"),
    ],
)
def test_mistakes_get_one_clear_line(assignment, message):
    with pytest.raises(UserError) as caught:
        changed(assignment)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_documents_every_field_with_its_present_value():
    fields = {path: (value, text) for path, value, text in documented_fields(Model())}
    assert fields["layers"] == (2, "number of layers.")
    assert fields["width"] == (None, "features, if any.")
    assert set(fields) == {"layers", "width", "regime", "tied"}
    assert "lesson.text.0.tokens" in dict((path, value) for path, value, _ in documented_fields(lineage().nodes[0]))
