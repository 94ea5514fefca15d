"""`epigone label`: teachers asked once for a lineage, before it is grown or while it is; what a lesson may keep."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from epigone.cli import main

KEEPING = """
    keeps = lambda name, scores: change(
        student, name=name, lesson=change(student.lesson, objective=Objective(), scores=scores)
    )
    of_trigram = change(alone, teacher="trigram@0", scores=TopK(6), objective=Objective())
    counted = Node("counted", 1, MODEL, WORDS, of_trigram)
    kept = {{"best": TopK(6), "held": TopP(0.9, rest="left_out"), "drawn": RandomDraws(8)}}
    kept["states"] = HiddenStates("float32")
    nodes = [trigram, teacher, *fan_out(teacher, [keeps(*pair) for pair in kept.items()]), counted]
"""
CONFIG = tiny.CONFIG.replace("    nodes = [trigram, *copies, teacher, *fan_out(teacher, [student]), reader]", KEEPING)
CONFIG = CONFIG.replace(
    "from epigone.models.ngram",
    "from epigone.teachers.kept import HiddenStates, RandomDraws, TopK, TopP\nfrom epigone.models.ngram",
)


def label(folder, *more):
    return main(["label", str(folder / "tiny.py"), "--run", str(folder / "runs" / "tiny"), *more])


def run(folder, *more):
    return main(["run", str(folder / "tiny.py"), "--run", str(folder / "runs" / "tiny"), *more])


def record(folder, key):
    (path,) = (folder / "runs" / "tiny" / "nodes").glob(f"{key}-*/record.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Teachers grown; then two processes that label at once."""
    folder = tmp_path_factory.mktemp("label")
    tiny.write_config(folder, CONFIG)
    assert run(folder, "--node", "teacher@0") == 0
    assert run(folder, "--node", "trigram@0") == 0
    command = [
        sys.executable,
        "-m",
        "epigone",
        "label",
        str(folder / "tiny.py"),
        "--run",
        str(folder / "runs" / "tiny"),
    ]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    return folder, told


def test_two_programs_share_the_work_and_nothing_is_scored_again(folder, capsys):
    _, told = folder
    for key in ("best@1", "held@1", "drawn@1", "states@1", "counted@1"):
        lines = [line.split() for text in told for line in text.splitlines() if line.startswith(f"{key}:")]
        assert len(lines) == 2
        tokens, scored = {line[1] for line in lines}, [int(line[3].replace(",", "")) for line in lines]
        assert len(tokens) == 1
        # Documents that repeat are scored once, and a program may find that the other one has done it all.
        assert 0 < sum(scored) <= int(tokens.pop().replace(",", ""))
    assert label(folder[0], "--node", "best@1") == 0
    assert " 0 scored now" in capsys.readouterr().out


def test_what_was_labelled_is_learned_without_asking(folder):
    folder, _ = folder
    assert run(folder) == 0
    for key in ("best@1", "held@1", "drawn@1", "states@1", "counted@1"):
        scores = record(folder, key)["scores"]
        assert scores["asked"] == 0
        assert scores["bytes"] > 0
        assert scores["tokens"] > 1000
    # Hidden states are all scores: the same student as with the teacher beside it.
    beside = ["--set", "states.lesson.scores=None"]
    assert main(["run", str(folder / "tiny.py"), "--run", str(folder / "runs" / "beside"), *beside]) == 0
    (path,) = (folder / "runs" / "beside" / "nodes").glob("states@1-*/record.json")
    assert json.loads(path.read_text())["metrics"]["perplexity"] == pytest.approx(
        record(folder, "states@1")["metrics"]["perplexity"], rel=1e-3
    )


def test_a_run_labels_what_is_left(folder, tmp_path):
    tiny.write_config(tmp_path, CONFIG)
    assert run(tmp_path, "--set", "best.lesson.scores.k=3") == 0
    assert record(tmp_path, "best@1")["scores"]["asked"] > 0
    assert record(tmp_path, "best@1")["flops"] > record(tmp_path, "states@1")["flops"] * 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "not done"),
        (("--node", "teacher@0"), "keeps scores"),
        (("--node", "best"), "no node 'best'"),
        (("--set", "drawn.lesson.objective.divergence=epigone.lessons.divergences:jsd"), "forward_kl"),
        (("--set", "best.lesson.scores.k=0"), "at least 1"),
        (("--set", "best.lesson.scores.rest=none"), "bucket, zero, left_out"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    tiny.write_config(tmp_path, CONFIG)
    verb = run if "forward_kl" in message else label
    assert verb(tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_damaged_scores_are_one_line(folder, capsys):
    folder, _ = folder
    path = next(Path(folder / "runs" / "data" / "scores").glob("*/*.array_record"))
    whole = path.read_bytes()
    path.write_bytes(whole[:70_000])
    try:
        assert label(folder) == 1
        assert "damaged" in capsys.readouterr().err
    finally:
        path.write_bytes(whole)
