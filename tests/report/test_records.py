import json
import math

import pytest
from report.synthetic_run import quickstart, record, write_run

from epigone.errors import Fault, UserError
from epigone.report.records import finite, load_run, number


def test_nodes_without_a_record_are_pending(tmp_path):
    entries = quickstart(2, 1)
    run = load_run(write_run(tmp_path, entries, [record(entry) for entry in entries[:2]]))
    assert [node.key for node in run.nodes] == [entry["key"] for entry in entries]
    assert [node.key for node in run.grown] == [entry["key"] for entry in entries[:2]]
    assert run.nodes[-1].metric("perplexity") is None


def test_records_of_another_identity_are_ignored(tmp_path):
    entry, other = quickstart(1, 1)[:2]
    stale = record(entry, identity="f" * 16, metrics={"perplexity": 1.0})
    run = load_run(write_run(tmp_path, [entry, other], [stale, record(other)]))
    assert [node.key for node in run.grown] == [other["key"]]


def test_a_current_record_wins_over_a_stale_one_of_the_same_key(tmp_path):
    entry = quickstart(1, 1)[0]
    records = [record(entry, identity=identity, metrics={"perplexity": value})
               for identity, value in (("0" * 16, 1.0), (entry["identity"], 2.0), ("f" * 16, 3.0))]  # fmt: skip
    run = load_run(write_run(tmp_path, [entry], records))
    assert run.nodes[0].metric("perplexity") == 2.0


def test_labels_default_to_kind_and_name(tmp_path):
    entry = quickstart(1, 1)[0] | {"labels": {}}
    (node,) = load_run(write_run(tmp_path, [entry], [])).nodes
    assert (node.family, node.regime, node.role) == ("ngram", "trigram", "")


@pytest.mark.parametrize(
    ("value", "expected"), [(3, 3.0), ("inf", math.inf), ("-inf", -math.inf), (None, None), ("x", None), (True, None)]
)
def test_number(value, expected):
    assert number(value) == expected


def test_number_reads_infinity_literals_and_nan():
    assert number(json.loads("Infinity")) == math.inf
    assert math.isnan(number("nan"))
    assert finite("nan") is None
    assert finite(math.inf) is None


def test_a_directory_without_a_lineage_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match=r"no lineage.json in .*give the directory of a run"):
        load_run(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"nodes": [{"key": "a@0"}]}', '{"name": "x"}', '{"nodes": [3]}'])
def test_a_damaged_lineage_is_a_fault(tmp_path, text):
    (tmp_path / "lineage.json").write_text(text)
    with pytest.raises(Fault, match=r"lineage.json"):
        load_run(tmp_path)


def test_a_damaged_record_is_a_fault_that_names_the_file(tmp_path):
    entry = quickstart(1, 1)[0]
    run = write_run(tmp_path, [entry], [record(entry)])
    (path,) = run.glob("nodes/*/record.json")
    path.write_text(path.read_text()[:100])
    with pytest.raises(Fault, match=r"record.json"):
        load_run(run)
