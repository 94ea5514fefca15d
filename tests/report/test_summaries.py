import json

import numpy as np
import pytest
from report.synthetic_run import key, quickstart, record, write_run
from scipy import stats

from epigone.report.records import load_run
from epigone.report.sections import measured, outcome, verdict
from epigone.report.summaries import comparisons, generation_series, paired_interval, spread, tried


def _compared(tmp_path, students, controls):
    """The comparison of given perplexities, one pair a seed; None leaves a node without the metric."""
    entries = [entry for entry in quickstart(1, len(students)) if entry["name"] in ("teacher", "student", "control")]
    given = {"student": students, "control": controls}
    records = []
    for entry in entries:
        value = given.get(entry["name"], [50.0])[entry["seed"]]
        records.append(record(entry, metrics={} if value is None else {"perplexity": value}))
    return comparisons(load_run(write_run(tmp_path, entries, records)))


def test_interval_agrees_with_scipys_paired_test():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(60, 3, 7), rng.normal(62, 3, 7)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert paired_interval(ours - theirs) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_interval_covers_the_truth_95_times_in_100():
    rng = np.random.default_rng(1)
    draws = rng.normal(0.7, 2.0, (2000, 4))
    covered = sum(low <= 0.7 <= high for low, high in map(paired_interval, draws))
    assert abs(covered - 1900) < 4 * np.sqrt(2000 * 0.95 * 0.05)
    # Negative control: the normal quantile instead of Student's is too sure of four seeds.
    half = 1.96 * draws.std(axis=1, ddof=1) / 2
    assert np.sum(abs(draws.mean(axis=1) - 0.7) <= half) < 1900 - 4 * np.sqrt(2000 * 0.95 * 0.05)


def test_one_seed_has_no_interval(tmp_path):
    assert paired_interval([1.0]) is None
    (one,) = _compared(tmp_path, [60.0], [70.0])
    assert (one.difference, one.low, one.verdict) == (-10.0, None, "one seed")


@pytest.mark.parametrize(
    ("students", "controls", "expected_verdict"),
    [
        ([60.0, 61.0, 62.0], [70.0, 71.5, 71.0], "better"),
        ([70.0, 71.5, 71.0], [60.0, 61.0, 62.0], "worse"),
        ([60.0, 72.0, 66.0], [66.0, 65.0, 67.0], "tie"),
    ],
)
def test_verdict(tmp_path, students, controls, expected_verdict):
    (one,) = _compared(tmp_path, students, controls)
    expected = stats.ttest_rel(students, controls).confidence_interval(0.95)
    assert (one.low, one.high) == pytest.approx((expected.low, expected.high))
    assert one.verdict == expected_verdict
    assert [teacher.key for teacher in one.teachers] == ["teacher@0"]


def test_the_gap_to_the_teacher_is_closed_in_nats(tmp_path):
    (one,) = _compared(tmp_path, [60.0, 55.0], [70.0, 80.0])  # the teacher's perplexity is 50
    expected = [np.log(70 / 60) / np.log(70 / 50), np.log(80 / 55) / np.log(80 / 50)]
    assert (one.gap_closed.low, one.gap_closed.high) == pytest.approx((min(expected), max(expected)))
    assert one.gap_closed.mean == pytest.approx(np.mean(expected))
    assert f"; {np.mean(expected):.0%} ({min(expected):.0%} to {max(expected):.0%}) of the gap" in verdict(one)


def test_a_student_that_is_worse_closes_nothing(tmp_path):
    (one,) = _compared(tmp_path, [80.0], [70.0])
    assert one.gap_closed.mean == pytest.approx(np.log(70 / 80) / np.log(70 / 50))
    assert f"no part of the gap to the teacher is closed: it is {-one.gap_closed.mean:.0%} wider" in verdict(one)


def test_there_is_no_gap_to_a_teacher_that_is_worse(tmp_path):
    (one,) = _compared(tmp_path, [60.0], [45.0])
    assert one.gap_closed is None
    assert "gap" not in verdict(one)


def test_pairs_need_both_sides_and_finite_values(tmp_path):
    (one,) = _compared(tmp_path, [60.0, None, float("inf"), 61.0], [70.0, 70.0, 70.0, 72.0])
    assert one.pairs == ((0, 60.0, 70.0), (3, 61.0, 72.0))


def test_a_series_begins_at_the_ancestor_of_its_seed(tmp_path):
    entries = quickstart(3, 2)
    series = {one.name: one for one in generation_series(load_run(write_run(tmp_path, entries, [])))}
    assert set(series) == {"trigram-replace", "trigram-accumulate", "trigram-fresh", "self-replace", "self-accumulate"}
    chain = series["trigram-accumulate"].chains[1]
    assert [node.key for node in chain] == [key("trigram", 0, 1), *(key("trigram-accumulate", g, 1) for g in (1, 2, 3))]
    assert [node.key for node in series["self-replace"].nodes(0)] == ["teacher@0"]


def test_names_are_not_parsed(tmp_path):
    entries = quickstart(3, 1)
    text = {entry["name"]: f"x{i}" for i, entry in enumerate(entries)}
    for entry in entries:
        entry["key"] = f"{text[entry['name']]}@{entry['generation']}"
        for parent in entry["parents"]:
            name, generation = parent["key"].split("@")
            parent["key"] = f"{text[name]}@{generation}"
        entry["name"] = text[entry["name"]]
    series = generation_series(load_run(write_run(tmp_path, entries, [])))
    assert [one.regime for one in series] == ["replace", "accumulate", "fresh", "replace", "accumulate"]
    assert all(one.generations == [0, 1, 2, 3] for one in series)


def test_points_are_means_and_extremes_over_seeds(full_run):
    run = load_run(full_run)
    series = next(one for one in generation_series(run) if one.name == "trigram-fresh")
    values = [node.metric("perplexity") for node in run.nodes if node.name == "trigram-fresh" and node.generation == 4]
    point = series.points("perplexity")[4]
    assert (point.mean, point.low, point.high, point.count) == (
        pytest.approx(np.mean(values)), min(values), max(values), 3)  # fmt: skip
    assert series.points("no such metric") == {}


def test_spread_leaves_out_what_is_absent():
    assert spread([None, None]) is None
    assert spread([None, 2.0, 4.0]).count == 2


def held_against(tmp_path, order, factor=1.0, **perplexities):
    """A claim about the second generation of copies, and about the one teacher; a missing one is not measured."""
    seeds = len(next(iter(perplexities.values())))
    entries = [entry for entry in quickstart(2, seeds) if entry["generation"] == 2 or entry["name"] == "teacher"]
    given = {entry["key"]: perplexities.get(entry["name"].rpartition("-")[2]) for entry in entries}
    records = [
        record(entry, metrics={"perplexity": given[entry["key"]][entry["seed"]]})
        for entry in entries
        if given[entry["key"]] and given[entry["key"]][entry["seed"]] is not None
    ]
    run = write_run(tmp_path, entries, records)
    described = json.loads((run / "lineage.json").read_text())
    claim = {"says": "a < b", "source": "somebody", "order": order, "factor": factor, "metric": "perplexity"}
    (run / "lineage.json").write_text(json.dumps(described | {"claims": [claim]}))
    return tried(load_run(run))


FIRST, SECOND = "trigram-accumulate@2", "trigram-replace@2"


@pytest.mark.parametrize(
    ("ours", "theirs", "factor", "said"),
    [
        ([1, 2, 3], [2, 3, 4], 1.0, "holds: 3 of 3 seeds"),
        ([1, 2, 5], [2, 3, 4], 1.0, "holds on average: 2 of 3 seeds"),
        ([3, 3, 3], [2, 2, 4], 1.0, "does not hold at this scale: 1 of 3 seeds"),
        ([2, 2, 2], [2, 2, 2], 1.0, "does not hold at this scale: 0 of 3 seeds"),
        ([2, 2, 2], [2, 2, 2], 1.1, "holds: 3 of 3 seeds"),
        ([2.3, 2.1], [2, 2], 1.1, "does not hold at this scale: 1 of 2 seeds"),
        ([float("inf"), 1], [2, 2], 1.0, "does not hold at this scale: 1 of 2 seeds"),
        ([1], [2], 1.0, "holds: one seed"),
    ],
)
def test_a_claim_is_held_against_what_was_measured(ours, theirs, factor, said, tmp_path):
    (one,) = held_against(tmp_path, [FIRST, SECOND], factor, accumulate=ours, replace=theirs)
    assert outcome(one) == said


def test_one_teacher_stands_beside_every_seed_and_an_order_may_have_three_members(tmp_path):
    order = [FIRST, SECOND, "teacher@0"]
    (one,) = held_against(tmp_path, order, accumulate=[1, 2], replace=[2, 9], teacher=[5, None])
    assert outcome(one) == "does not hold at this scale: 1 of 2 seeds"
    assert measured(one) == "accumulate@2 1.50 (1.00–2.00), replace@2 5.50 (2.00–9.00), teacher@0 5.00"
    assert [found.mean for found in one.measured] == [1.5, 5.5, 5.0]
    assert held_against(tmp_path / "a", order[:2], accumulate=[1, 2], replace=[2, None]) == []
    assert held_against(tmp_path / "b", [FIRST, "nobody@3"], accumulate=[1, 2]) == []
