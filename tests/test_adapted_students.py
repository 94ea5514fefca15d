"""The shipped experiment on adapted students, shrunk: what is trained, what is kept, and what is refused."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epigone.cli import main
from epigone.errors import UserError
from epigone.grow import grow
from epigone.lessons.objective import Objective
from epigone.lineage import Lesson, Node, Pretrained
from epigone.materials import Materials
from epigone.models import adapters
from epigone.models.adapters import LowRank
from epigone.models.inherit import Inherit
from epigone.models.selection import most_active
from epigone.plan import plan
from epigone.store import Store
from epigone.training.checkpoint import load_params
from epigone.training.loop import Training
from epigone.verbs.descriptions import lesson_in_words
from epigone.verbs.run import load_config

CONFIG = Path(__file__).parent.parent / "configs" / "adapted_students.py"


class Silent:
    """A view that shows nothing."""

    def start(self, node: Node) -> None: ...

    def stage(self, name: str, steps: int | None = None) -> None: ...

    def step(self, report: object) -> None: ...

    def finish(self, node: Node, record: dict) -> None: ...


def changed(node, **fields):
    return dataclasses.replace(node, lesson=dataclasses.replace(node.lesson, **fields))


def shrunk(node):
    """The same lesson for a tiny model, on short rows."""
    model = dataclasses.replace(node.model, layers=1, model_size=16, heads=2)
    training = dataclasses.replace(node.lesson.training, batch_size=2, sequence_length=16)
    return dataclasses.replace(changed(node, training=training), model=model)


@pytest.fixture(scope="module")
def lineage():
    whole = load_config(CONFIG)(seeds=1, steps=3, scale=0.01)
    evaluation = dataclasses.replace(whole.evaluation, contexts=10)
    text = dataclasses.replace(evaluation.text, tokens=300)
    evaluation = dataclasses.replace(evaluation, text=text)
    return dataclasses.replace(whole, nodes=tuple(map(shrunk, whole.nodes)), evaluation=evaluation)


@pytest.fixture(scope="module")
def grown(lineage, tmp_path_factory):
    run = tmp_path_factory.mktemp("adapted") / "run"
    planned = {row.key: row for row in plan(lineage, Store(run, lineage))}
    grow(lineage, run, view=Silent())
    store = Store(run, lineage)
    return store, {node.name: store.record(node) | {"planned": planned[node.key]} for node in lineage.nodes}


def with_adapters(lineage):
    return [node for node in lineage.nodes if node.lesson.adapters]


def test_adapters_train_few_numbers_and_keep_little_of_the_optimizer(lineage, grown):
    _, records = grown
    whole = records["all-weights"]
    assert whole["trained_parameters"] == whole["parameters"]
    for node in with_adapters(lineage):
        record, name = records[node.name], node.name
        assert record["parameters"] == whole["parameters"]
        assert record["trained_parameters"] < whole["trained_parameters"] / 10, name
        assert record["optimizer_bytes"] < whole["optimizer_bytes"] / 10, name
        assert record["flops"] == record["planned"].flops < whole["flops"]
        assert record["planned"].memory < whole["planned"].memory
        assert record["metrics"]["perplexity"] > 1


def test_a_node_that_is_done_is_its_start_with_its_adapters_merged(lineage, grown):
    """What lies beside it is enough to make it again."""
    store, _ = grown
    materials = Materials(store)
    start = materials.model(lineage["begin@1"])
    for node in with_adapters(lineage):
        how, done = node.lesson.adapters, materials.model(node)
        beside = load_params(store.directory(node) / "adapters", adapters.abstract(how, start.config))
        assert any(np.any(array) for name, array in beside.items() if "_lora_b_" in name)
        merged = adapters.merge(how, start.config, start.params, beside)
        jax.tree.map(np.testing.assert_array_equal, merged, done.params)


def test_all_students_begin_alike_and_differ_in_what_is_trained(lineage):
    students = [node for node in lineage.nodes if node.generation == 2]
    assert len({(n.model, n.seed, n.lesson.text, n.lesson.start_from, n.lesson.teacher) for n in students}) == 1
    assert len({n.lesson.adapters for n in students}) == 4


def test_a_start_of_bfloat16_stays_so_and_others_learn_from_what_was_merged(lineage, grown, tmp_path):
    """A child of the adapted node, and one that it teaches, need nothing new."""
    node, begin = lineage["lora-2@2"], lineage["begin@1"]
    short = dataclasses.replace(node, model=dataclasses.replace(node.model, weights_dtype="bfloat16"))
    child = changed(dataclasses.replace(lineage["all-weights@2"], name="child"), teacher=node.key, start_from=begin.key)
    few = dataclasses.replace(lineage, nodes=(lineage["teacher@0"], begin, short, child), evaluation=None)
    grow(few, tmp_path / "run", view=Silent())
    store = Store(tmp_path / "run", few)
    params = Materials(store).model(short).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert store.record(child)["parents"][0]["key"] == node.key
    whole = changed(short, adapters=None)
    with pytest.raises(UserError, match="weights_dtype 'bfloat16' rounds small steps away"):
        grow(dataclasses.replace(few, nodes=(*few.nodes[:2], whole)), tmp_path / "other", view=Silent())


def test_adapters_are_part_of_the_identity_and_of_the_card(lineage):
    node = lineage["lora-8@2"]
    other = changed(node, adapters=LowRank(rank=8, alpha=8.0))
    nodes = tuple(other if one is node else one for one in lineage.nodes)
    identities = dataclasses.replace(lineage, nodes=nodes).identities
    assert identities[node.key] != lineage.identities[node.key]
    assert identities["lora-2@2"] == lineage.identities["lora-2@2"]
    lines = {line.what: line.value for line in lesson_in_words(node.lesson, 0)}
    assert lines["Adapters"] == (
        "low-rank (LoRA), rank 8, alpha 16, on all matrices of the layers; merged into these weights"
    )


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"adapters": LowRank(rank=17)}, r"node 'lora-8@2': adapters: rank=17 is more than that of 'query', 16 x 16"),
        ({"inherit": Inherit(width=most_active)}, "units that are chosen on text, which a resumed run would choose"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_grown(fields, line, lineage, tmp_path):
    node = changed(lineage["lora-8@2"], **fields)
    few = dataclasses.replace(lineage, nodes=(*lineage.nodes[:2], node), evaluation=None)
    with pytest.raises(UserError, match=line):
        grow(few, tmp_path / "run", view=Silent())
    assert not list((tmp_path / "run").glob("nodes/*"))


def test_adapters_need_weights_beside_which_they_lie():
    with pytest.raises(UserError, match="a lesson has adapters, and no weights that they lie beside: name the node"):
        Lesson(objective=Objective(), training=Training(), adapters=LowRank())
    with pytest.raises(UserError, match="has its weights"):
        Lesson(source=Pretrained("somewhere", "0"), adapters=LowRank())


def test_fields_are_reached_from_the_command_line(capsys):
    setting = "lora-2.lesson.adapters.rank=0"
    assert main(["run", str(CONFIG), "--dry-run", "--seeds", "1", "--set", setting]) == 2
    assert "adapters: rank=0 must be at least 1" in capsys.readouterr().err
