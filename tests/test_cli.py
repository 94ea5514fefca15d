"""The verbs as a person gives them: what they print, how they end, and that nothing is harmed when they end badly."""

import csv
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from epigone.cli import _stopped_by_signal, main
from epigone.errors import Stopped


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A folder in which the tiny lineage has been grown once; tests that change something take a copy."""
    folder = tmp_path_factory.mktemp("grown")
    config = tiny.write_config(folder)
    assert main(["run", str(config), "--run", str(folder / "runs" / "tiny")]) == 0
    return folder


@pytest.fixture
def folder(grown, tmp_path):
    """A copy of the grown folder, whose config reads the first folder's corpus."""
    return Path(shutil.copytree(grown, tmp_path / "copy"))


def run(folder: Path, *arguments: str) -> int:
    return main(["run", str(folder / "tiny.py"), "--run", str(folder / "runs" / "tiny"), *arguments])


def one_line(capsys) -> str:
    """The last call's error: one line, and no traceback."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("epigone: ")]
    assert len(lines) == 1, text
    return lines[0]


def records(folder: Path) -> dict[str, dict]:
    found = [json.loads(path.read_text()) for path in (folder / "runs" / "tiny" / "nodes").glob("*/record.json")]
    return {record["key"]: record for record in found}


def fingerprints(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file of the run with its time and content."""
    files = [path for path in (folder / "runs").rglob("*") if path.is_file() and path.name != "lock"]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_run_leaves_records_and_a_report(grown):
    found = records(grown)
    assert sorted(found) == sorted(tiny.NODES)
    for record in found.values():
        assert record["metrics"]["perplexity"] > 1
        assert record["samples"]
        assert record["predictions"][0]["context"] == "the cat"
        assert record["parameters"] > 0
        assert record["tokens"] > 0
        assert ("compilation" in record) == ("curve" in record)
        assert record.get("attention", "xla (platform cpu)") == "xla (platform cpu)"
        assert ("attention" in record) == ("curve" in record)
        assert record.get("compilation", {"seconds": 0})["seconds"] < record["seconds"]
    assert found["student@1"]["agreement"]["teacher@0"]["forward_kl"] >= 0
    assert found["reader@1"]["data"][0]["parents"][0]["key"] == "teacher@0"
    run_directory = grown / "runs" / "tiny"
    assert {"report.html", "results.json", "results.csv", "plots"} <= {path.name for path in run_directory.iterdir()}
    with (run_directory / "results.csv").open() as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    for key, record in found.items():
        for name in ("parameters", "tokens", "seconds"):
            assert float(rows[key][name]) == pytest.approx(record[name])
        assert rows[key]["flops"] == ("" if "flops" not in record else str(record["flops"]))


def test_a_second_run_does_nothing_but_say_so(folder, capsys):
    before = fingerprints(folder)
    assert run(folder) == 0
    assert "all 6 nodes are done, nothing to grow" in capsys.readouterr().out
    assert fingerprints(folder) == before


def test_a_dry_run_tells_schedulers_the_graph_as_json(grown, tmp_path, capsys):
    tiny.write_config(tmp_path)
    assert run(tmp_path, "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    nodes = {node["key"]: node for node in told["nodes"]}
    assert sorted(nodes) == sorted(tiny.NODES)
    assert nodes["student@1"]["parents"] == ["teacher@0"]
    assert not any(node["done"] for node in nodes.values())
    assert nodes["teacher@0"]["parameters"] > 0
    assert not (tmp_path / "runs" / "tiny" / "nodes").exists()
    assert run(grown, "--dry-run", "--json") == 0
    assert all(node["done"] for node in json.loads(capsys.readouterr().out)["nodes"])


def test_json_alone_is_refused(grown, capsys):
    assert run(grown, "--json") == 2
    assert "epigone run CONFIG --dry-run --json" in one_line(capsys)


def test_a_dry_run_plans_and_grows_nothing(tmp_path, capsys):
    tiny.write_config(tmp_path)
    assert run(tmp_path, "--dry-run") == 0
    shown = capsys.readouterr().out
    for key in tiny.NODES:
        assert key in shown
    assert re.search(r"6 nodes, 0 done; to do: [\d.]+ [kMG]FLOPs|6 nodes, 0 done; to do: [\d.]+ [kMG] FLOPs", shown)
    assert not (tmp_path / "runs" / "tiny" / "nodes").exists()


def test_a_plan_touches_no_device(tmp_path, monkeypatch):
    """It is made before processes join, and where jobs are submitted from: JAX would end at a platform of this name."""
    tiny.write_config(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "nonesuch")
    process = start(tmp_path, "--dry-run")
    shown, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert "6 nodes, 0 done" in shown


def test_a_changed_field_grows_only_what_descends_from_it(folder):
    before = records(folder)
    assert run(folder, "--set", "teacher.lesson.training.steps=9") == 0
    after = {path.parent.name.rsplit("-", 1)[0] for path in (folder / "runs/tiny/nodes").glob("*/record.json")}
    identities = {path.parent.name for path in (folder / "runs/tiny/nodes").glob("*/record.json")}
    assert after == set(tiny.NODES)
    assert len(identities) == len(before) + 3  # the teacher, its student and its reader


def test_a_changed_evaluation_measures_again_and_trains_nothing(folder):
    before = {key: record["metrics"]["perplexity"] for key, record in records(folder).items()}
    weights = {path: content for path, content in fingerprints(folder).items() if "model" in path.parts}
    assert run(folder, "--set", "evaluation.contexts=20", "--set", "evaluation.prompts=the dog") == 0
    after = records(folder)
    assert {key: record["metrics"]["perplexity"] for key, record in after.items()} == before
    assert {record["predictions"][0]["context"] for record in after.values()} == {"the dog"}
    assert {path: content for path, content in fingerprints(folder).items() if "model" in path.parts} == weights


def test_one_node_at_a_time(tmp_path, capsys):
    tiny.write_config(tmp_path)
    assert run(tmp_path, "--node", "student@1") == 2
    assert "needs 'teacher@0' (teacher), which is not done" in one_line(capsys)
    assert run(tmp_path, "--node", "teacher@0") == 0
    assert run(tmp_path, "--node", "student@1") == 0
    assert sorted(records(tmp_path)) == ["student@1", "teacher@0"]


def test_samples_and_their_scores(grown, capsys):
    directory = str(grown / "runs" / "tiny")
    for node in ("teacher@0", "trigram@0"):
        assert main(["sample", node, "--run", directory, "--n", "3", "--prompt", "the cat", "--scores"]) == 0
        first = capsys.readouterr().out
        assert len(first.splitlines()) == 3
        assert all("the cat" in line for line in first.splitlines())
        main(["sample", node, "--run", directory, "--n", "3", "--prompt", "the cat", "--scores"])
        assert capsys.readouterr().out == first
        assert main(["sample", node, "--run", directory, "--n", "3", "--seed", "1"]) == 0
        assert capsys.readouterr().out != first


def test_help_names_every_verb_and_every_field(grown, capsys):
    assert main(["--help"]) == 0
    assert {"run", "sample", "report"} <= set(capsys.readouterr().out.split())
    assert main(["run", str(grown / "tiny.py"), "--help"]) == 0
    shown = capsys.readouterr().out
    for field in ("--steps", "--hardware.data", "lesson.training.batch_size", "model.layers", "write_tokens"):
        assert field in shown
    assert "training steps of every transformer" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "no verb 'rnu'; did you mean 'run'"),
        (["run"], "say which config"),
        (["run", "nothing.py"], "no config 'nothing.py'"),
        (["run", "CONFIG", "--stpes", "3"], "--steps"),
        (["run", "CONFIG", "--steps", "many"], "'many'"),
        (["run", "CONFIG", "--set", "teacher.lesson.training.stepz=3"], "did you mean 'steps'"),
        (["run", "CONFIG", "--node", "teecher@0"], "did you mean 'teacher@0'"),
        (["run", "CONFIG", "--hardware.data", "64", "--set", "teacher.lesson.training.steps=3"], "64"),
        (["run", "CONFIG", "--set", "teacher.model.heads=3"], "heads 3"),
        (["run", "CONFIG", "--set", "student.lesson.teacher=techer@0"], "did you mean 'teacher@0'"),
        (["run", "CONFIG", "--set", "teacher.lesson.teacher=student@1"], "cycle"),
        (["run", "CONFIG", "--set", "teacher.lesson.objective.hard_weight=2"], "hard_weight=2"),
        (["run", "CONFIG", "--set", "trigram.lesson.text.0.tokens=9999999"], "9999999"),
        (["sample", "teacher@0", "--run", "nowhere"], "no run in nowhere"),
        (["sample", "teacher@0", "--run", "runs/tiny", "--seed", "-1"], "seed=-1"),
        (["sample", "teacher@0", "--run", "runs/tiny", "--n", "0"], "n=0"),
        (["run", "CONFIG", "--set", "teacher.model.vocab_size=10"], "vocab_size 10 is less"),
        (["run", "CONFIG", "--set", "evaluation.text.split=tset"], "no split 'tset'"),
        (["run", "CONFIG", "--set", "evaluation.contexts=0"], "contexts=0"),
        (["run", "CONFIG", "--set", "student.lesson.start_from=trigram@0"], "no weights to start from"),
        (["run", "CONFIG", "--set", "trigram.lesson.teacher=teacher@0"], "counts words"),
        (["run", "CONFIG", "--set", "student.lesson.objective=None"], "needs an objective"),
        (["run", "CONFIG", "--dry-run", "--set", "teacher.lesson.training=None"], "needs an objective and a training"),
        (["run", "CONFIG", "--set", "trigram.name=../../escape"], "use letters, digits"),
        (["report", "nowhere"], "'nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    before = fingerprints(folder)
    assert main([str(folder / "tiny.py") if a == "CONFIG" else a for a in arguments]) == 2
    assert message in one_line(capsys)
    after = fingerprints(folder)
    before.pop(folder / "runs" / "tiny" / "lineage.json")  # describes the config that was last asked for
    assert {path: content for path, content in after.items() if path in before} == before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def lineage(:", "line 1"),
        ("x = 1", "no function 'lineage'"),
        ("def lineage():\n    return 3", "returned int, not a Lineage"),
        ("def lineage():\n    return 1 / 0", "line 2: ZeroDivisionError"),
        ("import nothing_of_that_name", "nothing_of_that_name"),
    ],
)
def test_a_bad_config_names_its_line(source, message, tmp_path, capsys):
    config = tmp_path / "bad.py"
    config.write_text(source)
    assert main(["run", str(config)]) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "corpus.txt"),
        ("", "empty"),
        ("\n\n \n", "empty"),
        ("one two three.", "no document for split"),
        ("\n\n".join(f"word{i}" for i in range(60)), "one sequence needs 512"),
    ],
)
def test_a_missing_empty_or_short_text_is_told(content, message, tmp_path, capsys):
    config = tiny.write_config(tmp_path)
    corpus = tmp_path / "corpus.txt"
    corpus.unlink() if content is None else corpus.write_text(content)
    given = ["--set", "teacher.lesson.training.sequence_length=512", "--node", "teacher@0"]
    assert main(["run", str(config), "--run", str(tmp_path / "run"), *given]) == 2
    assert message in one_line(capsys)


def test_a_damaged_model_is_told_and_nothing_else_is_touched(folder, capsys):
    """The teacher's weights are cut short; its student must be grown again and cannot."""
    nodes = folder / "runs" / "tiny" / "nodes"
    for path in nodes.glob("student@1-*/record.json"):
        path.unlink()
    largest = max(
        next(nodes.glob("teacher@0-*/model")).rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
    )
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    before = fingerprints(folder)
    assert run(folder) == 1
    assert "teacher@0" in one_line(capsys)
    before.pop(folder / "runs" / "tiny" / "lineage.json", None)
    assert {path: content for path, content in fingerprints(folder).items() if path in before} == before


def test_a_damaged_or_foreign_record_is_told(folder, capsys):
    record = next((folder / "runs/tiny/nodes").glob("teacher@0-*/record.json"))
    record.write_text(record.read_text().replace('"identity"', '"other"', 1))
    assert run(folder) == 1
    assert "not of this lineage" in one_line(capsys)
    record.write_text("{")
    assert run(folder) == 1
    assert "is damaged" in one_line(capsys)


def test_a_full_disk_is_one_line_and_the_run_goes_on_afterwards(tmp_path, capsys, monkeypatch):
    tiny.write_config(tmp_path)
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 4:
            raise OSError(28, "No space left on device", "record.json")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert run(tmp_path) == 1
    assert "the disk is full" in one_line(capsys)
    monkeypatch.setattr(os, "fsync", real)
    assert run(tmp_path) == 0
    assert sorted(records(tmp_path)) == sorted(tiny.NODES)


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "epigone", "run", str(folder / "tiny.py"), "--run", str(folder / "runs" / "tiny")]
    return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, pattern: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not list(path.glob(pattern)):
        assert time.monotonic() < deadline, f"{pattern} did not appear in {path}"
        time.sleep(0.05)


def test_two_runs_at_once_the_second_leaves_and_a_killed_one_goes_on(grown, tmp_path, capsys):
    """Ended twice, once by SIGKILL and once by SIGTERM, the lineage ends as if nothing had happened."""
    shutil.copy(grown / "tiny.py", tmp_path)
    nodes = tmp_path / "runs" / "tiny"
    long = ["--set", "teacher.lesson.training.steps=2000"]
    first = start(tmp_path, *long)
    wait_for(nodes, "nodes/teacher@0-*/training")
    assert run(tmp_path, *long) == 2
    assert f"is being grown by process {first.pid}" in one_line(capsys)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    third = start(tmp_path, *long)
    wait_for(nodes, f"nodes/teacher@0-*/training/events/*.{third.pid}")  # a point of its curve is there
    third.send_signal(signal.SIGTERM)
    assert third.wait(timeout=60) == 128 + signal.SIGTERM, third.stderr.read()
    assert "goes on from here" in third.stderr.read()
    assert run(tmp_path, *long) == 0
    whole = tmp_path / "whole"
    assert main(["run", str(tmp_path / "tiny.py"), "--run", str(whole / "runs" / "tiny"), *long]) == 0
    expected, found = records(whole), records(tmp_path)
    assert sorted(found) == sorted(tiny.NODES)
    for key in tiny.NODES:
        assert found[key]["metrics"] == expected[key]["metrics"]
        assert found[key]["samples"] == expected[key]["samples"]
    curves = [[point["loss"] for point in kind["teacher@0"]["curve"]] for kind in (found, expected)]
    assert len(curves[0]) == 200
    assert curves[0] == curves[1]


def test_a_signal_in_a_callback_of_the_garbage_collector_is_not_lost():
    def callback(phase, info):
        if phase == "start":
            gc.callbacks.remove(callback)
            os.kill(os.getpid(), signal.SIGTERM)

    def collect_and_wait():
        gc.callbacks.append(callback)
        gc.collect()
        time.sleep(5)

    before = sys.unraisablehook
    with pytest.raises(Stopped), _stopped_by_signal():
        collect_and_wait()
    assert sys.unraisablehook is before
