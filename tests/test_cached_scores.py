"""The shipped experiment on kept scores, shrunk: what each student keeps, and the order that even a little shows."""

import dataclasses
from pathlib import Path

import pytest
from tiny import Silent, few_verses

from epigone.grow import grow
from epigone.store import Store
from epigone.verbs.run import load_config

CONFIG = Path(__file__).parent.parent / "configs" / "cached_scores.py"


def smaller(node):
    """The same lesson in narrow rows for a narrow model."""
    training = dataclasses.replace(node.lesson.training, batch_size=4, sequence_length=64, compare_every=None)
    lesson = dataclasses.replace(node.lesson, training=training)
    return dataclasses.replace(node, model=dataclasses.replace(node.model, model_size=32), lesson=lesson)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Records by name, one seed, little text and few short rows."""
    lineage = load_config(CONFIG)(seeds=1, tokens=8_000, scale=0.2)
    few = dataclasses.replace(lineage.evaluation.text, tokens=3_000)
    evaluation = dataclasses.replace(lineage.evaluation, text=few, write_tokens=0, contexts=50, prompts=())
    lineage = dataclasses.replace(lineage, nodes=tuple(map(smaller, lineage.nodes)), evaluation=evaluation)
    run = tmp_path_factory.mktemp("cached-scores") / "run"
    with few_verses():
        grow(lineage, run, view=Silent())
    store = Store(run, lineage)
    return {node.name: store.record(node) for node in lineage.nodes}


def test_few_scores_are_kept_in_few_bytes(records):
    size = {name: records[name]["scores"]["bytes"] / records[name]["scores"]["tokens"] for name in ("drawn", "best")}
    # 10 bits an id, 12 a log-probability, 1 a draw; the least size of a shard is half as much of so little text.
    assert 12 * 22 / 8 <= size["best"] < 12 * 22 / 8 + 20
    assert size["drawn"] < (24 * 11 + 12) / 8 + 20
    assert "scores" not in records["full"]


def test_the_best_alone_are_behind_all_scores_and_draws(records):
    found = {name: record["metrics"]["nats_per_token"] for name, record in records.items()}
    assert max(found["full"], found["drawn"]) < found["best"]
