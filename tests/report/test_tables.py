import csv
import json
import math

import pytest
from report.synthetic_run import quickstart, record, write_run

from epigone.report import write_report
from epigone.report.formats import count, duration, real
from epigone.report.records import load_run


def _strict(text):
    def refuse(literal):
        raise ValueError(f"{literal} is no JSON")

    return json.loads(text, parse_constant=refuse)


def _rows(run):
    with (run / "results.csv").open(newline="") as file:
        return {row["key"]: row for row in csv.DictReader(file)}


def test_csv_and_json_agree_with_the_records(full_run):
    table, results = _rows(full_run), _strict((full_run / "results.json").read_text())
    nodes = {row["key"]: row for row in results["nodes"]}
    grown = load_run(full_run).grown
    assert list(table) == list(nodes) == [node.key for node in grown]
    for node in grown:
        for name, value in node.get("metrics").items():
            assert nodes[node.key][name] == float(table[node.key][name]) == value
        assert float(table[node.key]["seconds"]) == node.get("seconds")
    assert nodes["student@1.s1"]["agreement.teacher@0.top1"] == pytest.approx(
        float(table["student@1.s1"]["agreement.teacher@0.top1"])
    )


def test_absent_metrics_stay_absent(full_run, tmp_path):
    table, results = _rows(full_run), json.loads((full_run / "results.json").read_text())
    assert table["trigram@0"]["flops"] == ""
    assert all("flops" not in row for row in results["nodes"] if row["kind"] == "ngram")
    entry = quickstart(1, 1)[0]
    run = write_run(tmp_path, [entry], [record(entry, metrics={})])
    write_report(run)
    assert "perplexity" not in _rows(run)["trigram@0"]


def test_infinite_and_undefined_values_are_words(tmp_path):
    entries = quickstart(2, 1)
    values = [math.inf, "inf", math.nan]
    records = [record(e, metrics={"perplexity": v}) for e, v in zip(entries, values, strict=False)]
    run = write_run(tmp_path, entries, records)
    page = write_report(run).read_text()
    results = _strict((run / "results.json").read_text())
    assert [row["perplexity"] for row in results["nodes"][:3]] == ["inf", "inf", "nan"]
    assert [row["perplexity"] for row in _rows(run).values()][:4] == ["inf", "inf", "nan", ""]
    assert "Not drawn: trigram · replace @0: inf; trigram · replace @1: inf; trigram · replace @2: nan" in page
    assert ">inf</td>" in page


def test_series_and_comparisons_are_in_the_json(full_run):
    results = json.loads((full_run / "results.json").read_text())
    (compared,) = results["comparisons"]
    assert compared["interval_95"][0] < compared["difference"] < compared["interval_95"][1]
    assert len(compared["pairs"]) == 3
    replace = next(one for one in results["series"] if one["name"] == "trigram-replace")
    assert [point["generation"] for point in replace["points"]["perplexity"]] == list(range(11))


def test_numbers_for_readers():
    assert [count(v) for v in (None, 0, 999, 1_234_567, 1.2e12)] == ["", "0", "999", "1.23 M", "1.2 T"]
    assert [real(v) for v in (None, 0.000664, 0.12345, 7.364, 61.23, 12_345.0, math.inf)] == [
        "", "0.00066", "0.123", "7.36", "61.2", "12\u202f345", "inf"]  # fmt: skip
    assert [duration(v) for v in (None, 1.25, 75.2, 7_260)] == ["", "1.2 s", "1 min 15 s", "2 h 01 min"]
