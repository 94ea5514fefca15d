"""The quickstart's first experiment, grown as it is shipped: the order of the regimes, and that a copy decays."""

import dataclasses
import itertools
from pathlib import Path

import pytest
from tiny import Silent

from epigone.grow import grow
from epigone.store import Store
from epigone.verbs.run import load_config

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.py"


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    """Metrics by regime and generation, one seed."""
    whole = load_config(CONFIG)(seeds=1)
    trigrams = tuple(node for node in whole.nodes if node.name.startswith("trigram"))
    few = dataclasses.replace(whole.evaluation.text, tokens=15_000)
    measured = {"text": few, "write_tokens": 4_000, "contexts": 50, "compare": {}}
    evaluation = dataclasses.replace(whole.evaluation, **measured)
    lineage = dataclasses.replace(whole, nodes=trigrams, evaluation=evaluation)
    run = tmp_path_factory.mktemp("quickstart") / "run"
    grow(lineage, run, view=Silent())
    store = Store(run, lineage)
    return {(node.name, node.generation): store.record(node)["metrics"] for node in trigrams}


def test_accumulated_text_beats_a_fresh_share_and_that_beats_replacing(metrics):
    last = {name: metrics[f"trigram-{name}", 10]["perplexity"] for name in ("accumulate", "fresh", "replace")}
    assert metrics["trigram", 0]["perplexity"] < last["accumulate"] < last["fresh"] / 1.5 < last["replace"] / 3


def test_replaced_text_loses_coherence_at_every_generation(metrics):
    seen = [metrics["trigram", 0]["seen_2"], *(metrics["trigram-replace", g]["seen_2"] for g in range(1, 11))]
    assert all(later < earlier for earlier, later in itertools.pairwise(seen))


def test_seeds_read_different_text_and_a_student_the_text_of_its_control():
    lineage = load_config(CONFIG)()
    texts = {lineage[key].lesson.text for key in ("trigram@0", "trigram@0.s1", "trigram@0.s2")}
    assert len(texts) == 3
    for suffix in ("", ".s1", ".s2"):
        student, control = lineage[f"student@1{suffix}"], lineage[f"control@1{suffix}"]
        assert student.lesson.text == control.lesson.text
        assert student.lesson.training == control.lesson.training
        assert student.model == control.model
        assert control.lesson.teacher is None
        assert student.lesson.teacher == "teacher@0"
