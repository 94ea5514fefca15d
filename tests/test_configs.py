"""Shipped experiments that have no test file of their own, shrunk: nodes differ as they say, and some are grown."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import Silent, few_populations, few_verses, shrunk

from epigone.grow import grow
from epigone.lineage import Lineage
from epigone.report import populations, write_report
from epigone.report.records import load_run
from epigone.report.summaries import generation_series
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


@pytest.mark.parametrize(
    ("name", "claims"),
    [
        ("generations/trigrams", 7),
        ("generations/transformers", 5),
        ("generations/beams", 2),
        ("generations/ladder", 3),
        ("born_again", 1),
        ("arena", 10),
    ],
)
def test_what_papers_claim_is_said_of_nodes_that_are_there(name, claims):
    lineage = load_config(CONFIGS / f"{name}.py")()
    groups = {f"{node.name}@{node.generation}" for node in lineage.nodes}
    assert len(lineage.claims) == claims
    for claim in lineage.claims:
        assert set(claim.order) <= groups, claim


@pytest.mark.parametrize("name", GROWN)
def test_students_are_grown_and_held_against_their_teachers(name, tmp_path):
    whole = config(name)
    few = replace(whole, nodes=tuple(node for node in whole.nodes if node.name in GROWN[name]))
    lineage = shrunk(few, compare={}, write_tokens=0)
    with few_verses():
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


GENERATIONS = {
    "generations/transformers": ({"generations": 1, "tokens": 1_500}, {"reader", "accumulate", "sampled-0"}),
    "generations/ladder": ({"tokens": 2_000, "crumbs": 200}, {"teacher", "ladder", "text"}),
    "generations/beams": ({"generations": 1, "tokens": 300, "given": 3}, {"reader", "completed-0", "completed-3"}),
}
"""Configs of transformers that read each other, how small they are made, and the nodes that are grown."""


@pytest.mark.parametrize("name", GENERATIONS)
def test_transformers_read_what_transformers_wrote(name, tmp_path):
    knobs, wanted = GENERATIONS[name]
    whole = load_config(CONFIGS / f"{name}.py")(seeds=1, steps=2, **knobs)
    few = replace(whole, nodes=tuple(n for n in whole.nodes if n.name in wanted and n.generation < 2))
    lineage = shrunk(few)
    with few_verses(every=2):  # one of them begins behind 300,000 tokens
        grow(lineage, tmp_path / "run", view=Silent())
    records = [Store(tmp_path / "run", lineage).record(node) for node in lineage.nodes]
    assert {record["name"] for record in records} == wanted
    for record in records:
        assert record["metrics"]["perplexity"] > 1
        assert record["generation"] == 0 or record["metrics"]["words_left"] > 0
    assert len({node.labels["regime"] for node in whole.nodes if node.generation}) >= 4


COUNTED = {
    "generations/drift": {"seeds": 1, "generations": 1},
    "generations/trigrams": {"seeds": 1, "generations": 2, "tokens": 2_000},
    "sameness": {"seeds": 1, "teacher_tokens": 800, "tokens": 400},
}
"""Configs of models that count, which are grown but for most populations, and how small they are made."""

EVERY = {"generations/drift": 10, "generations/trigrams": 1, "sameness": 4}
"""Of them, one verse in so many is read: some begin far behind."""


@pytest.fixture(scope="module", params=COUNTED)
def counted(request, tmp_path_factory):
    """A config's name, its lineage and the directory of its run."""
    whole = load_config(CONFIGS / f"{request.param}.py")(**COUNTED[request.param])
    if whole.populations:
        kinds = ("t1-d0-m8-c3-r0", "t2-d0.5-m8-c3-r0", "t1-d0.5-m2-c3-r0", "t1-d0.5-m8-c3-r1")
        whole = few_populations(whole, kinds)
    lineage = shrunk(whole, write_tokens=min(600, whole.evaluation.write_tokens))
    run = tmp_path_factory.mktemp("counted") / "run"
    with few_verses(EVERY[request.param]):
        grow(lineage, run, view=Silent())
    return request.param, lineage, run


def test_models_that_count_are_grown_and_measured(counted):
    _, lineage, run = counted
    store = Store(run, lineage)
    for node in lineage.nodes:
        metrics = store.record(node)["metrics"]
        assert metrics["learned_words"] > 10
        assert ("distinct_2" in metrics) == bool(lineage.evaluation.write_tokens)
    page = write_report(run).read_text()
    assert ('id="populations"' in page) == bool(lineage.populations)


def test_regimes_have_a_curve_each_and_start_where_they_should(counted):
    name, _, run = counted
    if name == "sameness":
        return
    series = generation_series(load_run(run))
    assert len({(one.family, one.regime) for one in series}) == len(series) >= 7
    for one in series:
        assert one.generations[0] == 0 or one.regime == "real only"


def test_populations_are_measured(counted):
    _, lineage, run = counted
    for population in lineage.populations:
        metrics = Store(run, lineage).population_record(population)["metrics"]
        assert 1 <= metrics["effective_models"] <= len(population.members)


def test_populations_differ_in_one_factor_from_the_usual_one_or_in_teachers_and_dose():
    lineage = load_config(CONFIGS / "sameness.py")(seeds=1)
    usual = populations.usual(list(lineage.populations))
    for population in lineage.populations:
        other = {factor for factor, value in population.factors.items() if value != usual[factor]}
        assert len(other) < 2 or other == {"teachers", "dose"}
        assert len(population.members) == population.factors["models"]
        texts = [lineage[key].lesson.text for key in population.members]
        assert len(set(texts)) == len(texts)
