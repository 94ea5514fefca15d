"""What a report says of populations: which factors they differ in, what is held, and figures of it."""

import json

import pytest
from report.synthetic_run import quickstart, record, write_run

from epigone.report import populations as p
from epigone.report import write_report
from epigone.report.records import Population, load_run

USUAL = {"teachers": 1, "dose": 0.5, "models": 8}


def population(seed=0, value=1.0, **factors):
    made = USUAL | factors
    key = "-".join(f"{name}{v:g}" for name, v in made.items()) + (f".s{seed}" if seed else "")
    return Population(key, seed, ("a@0", "b@0"), made, {"effective_models": value, "error_kappa": 0.1 * value})


GRID = [population(s, k - d + s, teachers=k, dose=d) for s in (0, 1) for k in (1, 2, 4) for d in (0.5, 1.0)]
MORE = [population(models=2, value=9.0), population(models=16, value=10.0)]


def test_factors_are_those_that_vary_and_the_most_frequent_value_is_held():
    assert p.factors(GRID) == ["teachers", "dose"]
    assert p.factors(GRID + MORE) == ["teachers", "dose", "models"]
    assert p.usual(GRID + MORE) == {"teachers": 1, "dose": 0.5, "models": 8}


def test_one_factor_is_looked_at_with_the_others_held():
    along = p.along(GRID + MORE, "teachers", "effective_models")
    assert {k: (v.mean, v.low, v.high, v.count) for k, v in along.items()} == {
        1: (1.0, 0.5, 1.5, 2), 2: (2.0, 1.5, 2.5, 2), 4: (4.0, 3.5, 4.5, 2)
    }  # fmt: skip
    assert [v.mean for v in p.along(GRID + MORE, "models", "effective_models").values()] == [9.0, 1.0, 10.0]


def test_cells_are_means_and_what_is_not_there_is_none():
    found = p.cells(GRID + MORE, "teachers", "dose", "effective_models")
    assert (found.rows, found.columns) == ([1, 2, 4], [0.5, 1.0])
    assert found.means == [[1.0, 0.5], [2.0, 1.5], [4.0, 3.5]]
    lone = p.cells([*GRID, population(dose=0.0)], "teachers", "dose", "effective_models")
    assert lone.means[0][0] == 1.0
    assert lone.means[1][0] is None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    entries = quickstart(generations=1, seeds=1)[:2]
    made = write_run(tmp_path_factory.mktemp("populations") / "run", entries, [record(entry) for entry in entries])
    lineage = json.loads((made / "lineage.json").read_text())
    described = [{"key": x.key, "seed": x.seed, "members": x.members, "factors": x.factors} for x in GRID + MORE]
    lineage["populations"] = [entry | {"measured_as": "now"} for entry in described]
    (made / "lineage.json").write_text(json.dumps(lineage))
    (made / "populations").mkdir()
    for one in GRID + MORE[:1]:
        kept = {"metrics": one.metrics, "measured_as": "now"}
        (made / "populations" / f"{one.key}.json").write_text(json.dumps(kept))
    stale = {"metrics": {"effective_models": 99.0}, "measured_as": "before"}
    (made / "populations" / f"{MORE[1].key}.json").write_text(json.dumps(stale))
    write_report(made)
    return made


def test_a_page_has_the_map_and_every_factor(run):
    html = (run / "report.html").read_text()
    section = html[html.index('<section id="populations">') :].partition("</section>")[0]
    assert "teachers 1, dose 0.5, models 8" in section
    assert section.count('<svg class="chart"') == 2
    assert (run / "plots" / "populations.png").stat().st_size > 10_000
    assert (run / "plots" / "factors.png").stat().st_size > 10_000


def test_results_have_every_population_and_no_stale_measure(run):
    kept = {one["key"]: one for one in json.loads((run / "results.json").read_text())["populations"]}
    assert len(kept) == len(GRID + MORE)
    assert kept[GRID[0].key]["metrics"] == GRID[0].metrics
    assert kept[MORE[1].key]["metrics"] == {}
    assert load_run(run).populations[0].metric("nothing") is None


def test_a_lineage_without_populations_has_no_such_section(tmp_path):
    entries = quickstart(generations=1, seeds=1)[:2]
    made = write_run(tmp_path / "run", entries, [record(entry) for entry in entries])
    assert 'id="populations"' not in write_report(made).read_text()
