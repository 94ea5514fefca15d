"""The shipped experiment on kept scores, shrunk: what each student keeps, and the order that even a little shows."""

import dataclasses
from pathlib import Path

import pytest
from tiny import Silent

from epigone.data.tokenizers import Words
from epigone.grow import grow
from epigone.store import Store
from epigone.verbs.run import load_config

CONFIG = Path(__file__).parent.parent / "configs" / "cached_scores.py"


def common_words(tokenizer):
    return dataclasses.replace(tokenizer, algorithm=Words(lowercase=True, max_size=2_000))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Records by name, one seed, little text of the 2,000 commonest words, and few steps."""
    lineage = load_config(CONFIG)(seeds=1, tokens=8_000, scale=0.05)
    few = dataclasses.replace(lineage.evaluation.text, tokens=3_000)
    evaluation = dataclasses.replace(lineage.evaluation, text=few, write_tokens=0, contexts=50, prompts=())
    nodes = tuple(dataclasses.replace(node, tokenizer=common_words(node.tokenizer)) for node in lineage.nodes)
    lineage = dataclasses.replace(lineage, nodes=nodes, evaluation=evaluation)
    run = tmp_path_factory.mktemp("cached-scores") / "run"
    grow(lineage, run, view=Silent())
    store = Store(run, lineage)
    return {node.name: store.record(node) for node in lineage.nodes}


def test_few_scores_are_kept_in_few_bytes(records):
    size = {name: records[name]["scores"]["bytes"] / records[name]["scores"]["tokens"] for name in ("drawn", "best")}
    # 11 bits an id, 12 a log-probability, 1 a draw; the least size of a shard is a third more of so little text.
    assert 12 * 23 / 8 <= size["best"] < 12 * 23 / 8 + 16
    assert size["drawn"] < (16 * 12 + 12) / 8 + 16
    assert "scores" not in records["full"]


def test_the_best_alone_are_behind_all_scores_and_draws(records):
    found = {name: record["metrics"]["nats_per_token"] for name, record in records.items()}
    assert max(found["full"], found["drawn"]) < found["best"]
