"""Which nodes are trained together, and that a run with groups ends as one without."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny

from epigone.cli import main
from epigone.groups import groups
from epigone.grow import grow
from epigone.store import Store
from epigone.training.config import Hardware
from epigone.verbs.run import load_config

CONFIG = '''
"""Two generations of small transformers and their students, four seeds each."""

from dataclasses import replace as change

from epigone import regimes
from epigone.data.corpora import TextFiles
from epigone.data.tokenizers import Words
from epigone.families import chain, fan_out
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer
from epigone.models.config import DecoderConfig
from epigone.models.ngram import NGram
from epigone.training.loop import Training
from epigone.training.optimizer import Optimizer

CORPUS = TextFiles("corpus.txt")
WORDS = TrainedTokenizer(Words(), Text(CORPUS))
SMALL = DecoderConfig(layers=1, model_size=16, heads=2, max_length=32)


def lineage(seeds: int = 4, steps: int = 8) -> Lineage:
    nodes = []
    training = Training(steps=steps, batch_size=4, sequence_length=16, optimizer=Optimizer(learning_rate=1e-2))
    counting = Lesson((Text(CORPUS, tokens=600),), validation=Text(CORPUS, "validation"))
    nodes.append(Node("trigram", 0, NGram(), WORDS, counting))
    for seed in range(seeds):
        text = Text(CORPUS, skip=200 * seed, tokens=800)
        first = Node("first", 0, SMALL, WORDS, Lesson((text,), objective=TEXT_ALONE, training=training), seed=seed)
        nodes += [first, *chain(first, 1, regimes.replace, name="copy")]
        soft = Lesson((text,), teacher="trigram@0", objective=Objective(), training=training)
        nodes.append(Node("student", 1, SMALL, WORDS, soft, seed=seed))
    evaluation = Evaluation(Text(CORPUS, "test"), Text(CORPUS), write_tokens=100, contexts=10)
    return Lineage("abreast", tuple(nodes), evaluation)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_corpus(tmp_path)
    (tmp_path / "abreast.py").write_text(CONFIG)
    return tmp_path


def records(run):
    found = [json.loads(path.read_text()) for path in run.glob("nodes/*/record.json")]
    return {record["key"]: record for record in found}


def keys(parts):
    return [[node.key for node in part] for part in parts]


def test_nodes_of_one_shape_that_do_not_wait_for_each_other_are_together(folder):
    lineage = load_config(folder / "abreast.py")()
    store = Store(folder / "run", lineage)
    firsts, copies, students = (
        [f"{name}{s}" for s in ("", ".s1", ".s2", ".s3")] for name in ("first@0", "copy@1", "student@1")
    )
    every = lineage.order
    assert keys(groups(every, store, 8)) == [["trigram@0"], firsts, copies, students]
    assert keys(groups(every, store, 3)) == [
        ["trigram@0"], firsts[:3], firsts[3:], copies[:3], copies[3:], students[:3], students[3:]
    ]  # fmt: skip
    assert keys(groups(every, store, 1)) == [[node.key] for node in every]
    # Which are together does not depend on what is left to do.
    assert keys(groups([lineage["copy@1.s1"]], store, 3)) == [copies[:3]]


def test_a_run_with_groups_is_a_run_without_up_to_rounding(folder):
    lineage = load_config(folder / "abreast.py")()
    grow(lineage, folder / "together", hardware=Hardware(together=8), view=tiny.Silent())
    grow(lineage, folder / "alone", view=tiny.Silent())
    found, wanted = records(folder / "together"), records(folder / "alone")
    assert found.keys() == wanted.keys() == {node.key for node in lineage.nodes}
    for key, record in found.items():
        other = wanted[key]
        assert record.get("together") == (None if key == "trigram@0" else 4)
        assert record["identity"] == other["identity"]
        assert record["tokens"] == pytest.approx(other["tokens"], rel=0.1 if key.startswith("copy") else 0)
        if not key.startswith("copy"):  # whose text is another where a draw falls on the other side of a rounding
            assert record["metrics"]["perplexity"] == pytest.approx(other["metrics"]["perplexity"], rel=1e-4)
            assert [p["loss"] for p in record.get("curve", [])] == pytest.approx(
                [p["loss"] for p in other.get("curve", [])], rel=1e-4
            )


def test_a_group_begins_with_its_parents_weights_where_it_is_to(folder):
    grow(load_config(folder / "abreast.py")(seeds=2, steps=60), folder / "fresh", view=tiny.Silent())
    source = (folder / "abreast.py").read_text().replace("regimes.replace, name", "regimes.replace, warm=True, name")
    (folder / "abreast.py").write_text(source)
    lineage = load_config(folder / "abreast.py")(seeds=2, steps=60)
    for run, most in (("together", 8), ("alone", 1)):
        grow(lineage, folder / run, hardware=Hardware(together=most), view=tiny.Silent())
    found, wanted, fresh = (records(folder / run) for run in ("together", "alone", "fresh"))
    for key in ("copy@1", "copy@1.s1"):
        assert found[key]["together"] == 2
        assert [parent["role"] for parent in found[key]["parents"]].count("start") == 1
        ours, theirs, other = (record[key]["curve"][0]["loss"] for record in (found, wanted, fresh))
        assert ours == pytest.approx(theirs, rel=0.02)
        assert ours < other - 0.3


RUN = ["run", "abreast.py", "--hardware.together", "4", "--run"]


def test_a_group_of_which_some_are_done_ends_the_same_after_sigkill(folder):
    assert main([*RUN, "whole"]) == 0
    process = subprocess.Popen([sys.executable, "-m", "epigone", *RUN, "killed"], cwd=folder)
    deadline = time.monotonic() + 240
    while len(records(folder / "killed")) < 3:  # the trigram and a part of the first group
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = records(folder / "killed")
    assert len(done) < 13
    assert main([*RUN, "killed"]) == 0
    found, wanted = records(folder / "killed"), records(folder / "whole")
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert found[key]["metrics"] == wanted[key]["metrics"], key
        assert found[key]["samples"] == wanted[key]["samples"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hardware.together", "0"], "together=0 must be at least 1"),
        (["--hardware.together", "2", "--hardware.microbatches", "2"], "small models on one device"),
        (["--hardware.together", "2", "--jobs", "2"], "give either"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, capsys, arguments, said):
    assert main(["run", "abreast.py", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
