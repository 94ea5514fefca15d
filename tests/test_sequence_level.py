"""The shipped experiment on texts that a teacher wrote, shrunk: every student reads what it says it reads."""

import dataclasses
from pathlib import Path

import pytest
from tiny import Silent, few_verses

from epigone.data.tokenizers import Words
from epigone.grow import grow
from epigone.lineage import Written
from epigone.plan import plan
from epigone.store import Store
from epigone.verbs.run import load_config

CONFIG = Path(__file__).parent.parent / "configs" / "sequence_level.py"


def shrunk(node):
    """The same lesson for a tiny model of the commonest words, on short rows."""
    tokenizer = dataclasses.replace(node.tokenizer, algorithm=Words(lowercase=True, max_size=200))
    if node.name == "judge":
        return dataclasses.replace(node, tokenizer=tokenizer)
    model = dataclasses.replace(node.model, layers=1, model_size=8, heads=2, max_length=16)
    training = dataclasses.replace(node.lesson.training, batch_size=2, sequence_length=16)
    return dataclasses.replace(
        node, model=model, tokenizer=tokenizer, lesson=dataclasses.replace(node.lesson, training=training)
    )


@pytest.fixture(scope="module", autouse=True)
def few():
    with few_verses():
        yield


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    whole = load_config(CONFIG)(seeds=1, real=400, tokens=200, steps=2, scale=0.01)
    few = dataclasses.replace(whole.evaluation.text, tokens=300)
    evaluation = dataclasses.replace(whole.evaluation, text=few, write_tokens=0, contexts=10)
    lineage = dataclasses.replace(whole, nodes=tuple(map(shrunk, whole.nodes)), evaluation=evaluation)
    store = Store(tmp_path_factory.mktemp("sequence-level") / "run", lineage)
    planned = {row.key: row for row in plan(lineage, store)}
    grow(lineage, store.run, view=Silent())
    return lineage, {node.name: store.record(node) for node in lineage.nodes}, planned


def test_every_student_reads_what_it_says(grown):
    lineage, records, _ = grown
    cards = {name: record["data"][0] for name, record in records.items()}
    assert {name for name, card in cards.items() if "parents" not in card} == {
        "teacher", "judge", "few", "as-much", "few-scores"
    }  # fmt: skip
    chosen = {name: card["chosen"] for name, card in cards.items() if "chosen" in card}
    assert set(chosen) == {"best-of-4", "filtered", "prompted"}
    assert (chosen["best-of-4"]["best_of"], chosen["best-of-4"]["judge"]["key"]) == (4, "teacher@0")
    assert (chosen["filtered"]["kept"], chosen["filtered"]["judge"]["key"]) == (0.25, "judge@0")
    assert cards["prompted"]["prompts"]["prompt_tokens"] == 4
    assert all(records[node.name]["metrics"]["perplexity"] > 1 for node in lineage.nodes)


def test_students_differ_in_text_and_teacher_alone(grown):
    students = [node for node in grown[0].nodes if node.generation == 1]
    assert len(students) == 8
    assert len({(node.model, node.seed, node.lesson.training) for node in students}) == 1
    sizes = {node.lesson.text[0].tokens for node in students if isinstance(node.lesson.text[0], Written)}
    assert sizes == {200}


def test_choosing_costs_what_was_planned_or_a_block_more(grown):
    _, records, planned = grown
    for name in ("sampled", "best-of-4", "filtered", "prompted"):
        assert records[name]["flops"] >= 0.9 * planned[f"{name}@1"].flops
    assert planned["best-of-4@1"].flops > planned["sampled@1"].flops > planned["few@1"].flops
