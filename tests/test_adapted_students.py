"""The shipped experiment on adapted students, shrunk: what is trained, what is kept, and what is refused."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Silent

from epigone.cli import main
from epigone.errors import UserError
from epigone.grow import grow
from epigone.interchange.streaming import load_weights
from epigone.interchange.weight_files import open_weights
from epigone.lessons.objective import Objective
from epigone.lineage import Lesson, Pretrained
from epigone.materials import Materials
from epigone.models import adapters, decoder
from epigone.models.adapters import LowRank
from epigone.models.inherit import Inherit
from epigone.models.quantization import Quantization
from epigone.models.selection import most_active
from epigone.opened import open_node
from epigone.plan import plan
from epigone.sampling.decode import DecoderLanguageModel
from epigone.store import Store
from epigone.training.checkpoint import load_params
from epigone.training.loop import Training
from epigone.verbs.descriptions import lesson_in_words, quantization_in_words
from epigone.verbs.export import export
from epigone.verbs.run import load_config

CONFIG = Path(__file__).parent.parent / "configs" / "adapted_students.py"


def changed(node, **fields):
    return dataclasses.replace(node, lesson=dataclasses.replace(node.lesson, **fields))


def shrunk(node):
    """The same lesson for a tiny model, on short rows."""
    model = dataclasses.replace(node.model, layers=1, model_size=16, heads=2)
    training = dataclasses.replace(node.lesson.training, batch_size=2, sequence_length=16)
    how = node.lesson.adapters
    how = how and dataclasses.replace(how, rank=min(how.rank, 16))
    return dataclasses.replace(changed(node, training=training, adapters=how), model=model)


LEFT_OUT = {"lora-64", "lora-8-attention", "int4-both-aware", "int4-both-rounded"}
"""Nodes of which others of the same kind are grown."""


@pytest.fixture(scope="module")
def lineage():
    whole = load_config(CONFIG)(seeds=1, steps=3, scale=0.01)
    whole = dataclasses.replace(whole, nodes=tuple(node for node in whole.nodes if node.name not in LEFT_OUT))
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
        share = record["trained_parameters"] / whole["trained_parameters"]
        assert share < (0.1 if node.lesson.adapters.rank < 16 else 1), name
        assert record["optimizer_bytes"] == pytest.approx(share * whole["optimizer_bytes"], rel=0.01), name
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


def test_all_students_begin_alike_and_differ_in_what_is_trained_and_how_it_is_multiplied():
    students = [node for node in load_config(CONFIG)(seeds=1).nodes if node.generation == 2]
    whole = {dataclasses.replace(n.model, quantization=None) for n in students}
    assert len(whole) == len({(n.seed, n.lesson.text, n.lesson.start_from, n.lesson.teacher) for n in students}) == 1
    assert len({(n.lesson.adapters, n.model.quantization) for n in students}) == len(students) == 8
    assert all(n.lesson.training == students[0].lesson.training for n in students if not n.lesson.adapters)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_control_has_the_weights_of_the_student_that_it_rounds(name, lineage, grown):
    """And it is measured rounded, as the one is that was trained so."""
    store, records = grown
    materials = Materials(store)
    plain = materials.model(lineage["all-weights@2"])
    control, aware = (materials.model(lineage[key]) for key in (f"{name}-rounded@3", f"{name}-aware@2"))
    jax.tree.map(np.testing.assert_array_equal, plain.params, control.params)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: not np.array_equal(a, b), control.params, aware.params)))
    document = [np.arange(4, 12, dtype=np.int32)]
    grid = DecoderLanguageModel(control.config.on_grid, decoder.multiplied(control.config, control.params))
    (mine,), (rounded,), (whole,) = (model.log_probs(document) for model in (control, grid, plain))
    np.testing.assert_allclose(mine, rounded, atol=1e-5)
    assert np.abs(mine - whole).max() > 1e-4
    assert records[f"{name}-rounded"]["metrics"]["perplexity"] != records["all-weights"]["metrics"]["perplexity"]


def test_an_export_has_the_weights_that_are_multiplied(lineage, grown, tmp_path):
    store, _ = grown
    opened = open_node("int4-aware@2", store.run)
    export(opened, tmp_path / "out")
    model = opened.model
    read = load_weights(open_weights(tmp_path / "out"), model.config)
    rows = (np.arange(4, 12, dtype=np.int32)[None], np.arange(8, dtype=np.int32)[None], np.ones((1, 8), np.int32))
    plain = dataclasses.replace(model.config, quantization=None)
    logits = [decoder.apply(*pair, *rows) for pair in ((plain, read), (model.config, model.params))]
    np.testing.assert_allclose(*logits, atol=1e-5)
    assert not np.allclose(decoder.apply(plain, model.params, *rows), logits[1], atol=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "matrices of the layers lie on a grid of int4, with a scale of every output" in card


def test_what_an_export_does_not_say_is_on_its_card():
    words = quantization_in_words(Quantization("int8", "int8", 32))
    assert words == (
        "matrices of the layers lie on a grid of int8, with a scale of blocks of 32 inputs; inputs of products were "
        "rounded to int8, token by token, which these files do not say"
    )


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


def test_quantization_that_cannot_be_is_refused_before_anything_is_grown(lineage, tmp_path, monkeypatch):
    node, adapted = lineage["int4-aware@2"], lineage["lora-8@2"]
    other = dataclasses.replace(node.model, quantization=Quantization("int4", block=7))
    cases = [
        (dataclasses.replace(node, model=other), "'int4-aware@2': quantization: block=7 does not divide the 16 inputs"),
        (dataclasses.replace(adapted, model=node.model), "adapters and quantization, and what is merged would be"),
        (node, r"'int4-aware@2': quantization needs qwix: pip install 'epigone\[quantization\]'"),
    ]
    for one, line in cases:
        if one is node:
            monkeypatch.setitem(sys.modules, "qwix", None)
        few = dataclasses.replace(lineage, nodes=(*lineage.nodes[:2], one), evaluation=None)
        with pytest.raises(UserError, match=line):
            grow(few, tmp_path / "run", view=Silent())
    assert not list((tmp_path / "run").glob("nodes/*"))


def test_adapters_need_weights_beside_which_they_lie():
    with pytest.raises(UserError, match="a lesson has adapters, and no weights that they lie beside: name the node"):
        Lesson(objective=Objective(), training=Training(), adapters=LowRank())
    with pytest.raises(UserError, match="has its weights"):
        Lesson(source=Pretrained("somewhere", "0"), adapters=LowRank())


def test_fields_are_reached_from_the_command_line(capsys):
    for setting, line in (
        ("lora-2.lesson.adapters.rank=0", "adapters: rank=0 must be at least 1"),
        ("int4-aware.model.quantization.weights=int3", "weights='int3' is not one of int8, int4, fp8"),
    ):
        assert main(["run", str(CONFIG), "--dry-run", "--seeds", "1", "--set", setting]) == 2
        assert line in capsys.readouterr().err
