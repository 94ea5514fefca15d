"""The shipped experiment on a teacher of other tokens, shrunk; and what does not fit is refused before anything."""

import dataclasses
from pathlib import Path

import pytest
import tiny
from tiny import Silent

from epigone.cli import main
from epigone.data.corpora import TextFiles
from epigone.data.tokenizers import BPE
from epigone.errors import UserError
from epigone.grow import grow
from epigone.lessons.alignment import likelihood_matching
from epigone.lessons.objective import Objective
from epigone.lineage import Evaluation, Text, TrainedTokenizer
from epigone.store import Store
from epigone.teachers.ensemble import Ensemble
from epigone.teachers.kept import TopK
from epigone.verbs.run import load_config

CONFIG = Path(__file__).parent.parent / "configs" / "other_tokenizer.py"


def shrunk(node, corpus):
    """The same lesson for a tiny model, on short rows of a small text."""
    text = Text(corpus)
    size = {2048: 330, 512: 300}[node.tokenizer.algorithm.vocab_size]
    model = dataclasses.replace(node.model, layers=1, model_size=8, heads=2)
    training = dataclasses.replace(node.lesson.training, batch_size=2, sequence_length=32)
    lesson = dataclasses.replace(node.lesson, training=training, text=(dataclasses.replace(text, tokens=400),))
    return dataclasses.replace(node, model=model, lesson=lesson, tokenizer=TrainedTokenizer(BPE(size), text))


@pytest.fixture(scope="module")
def lineage(tmp_path_factory):
    whole = load_config(CONFIG)(seeds=1, steps=2, teacher_steps=2)
    corpus = TextFiles(str(tiny.write_corpus(tmp_path_factory.mktemp("corpus"), 200)))
    evaluation = Evaluation(Text(corpus, "test", tokens=100), Text(corpus), write_tokens=0, contexts=5)
    return dataclasses.replace(whole, nodes=tuple(shrunk(node, corpus) for node in whole.nodes), evaluation=evaluation)


def changed(lineage, **lesson):
    """The lineage of the teacher and of one student with another lesson."""
    node = lineage["chunks@1"]
    node = dataclasses.replace(node, lesson=dataclasses.replace(node.lesson, **lesson))
    return dataclasses.replace(lineage, nodes=(lineage["teacher@0"], node), evaluation=None)


def test_every_way_is_grown_and_says_what_was_aligned(lineage, tmp_path):
    run = tmp_path / "run"
    grow(lineage, run, view=Silent())
    store = Store(run, lineage)
    records = {node.name: store.record(node) for node in lineage.nodes}
    for name in ("uld", "chunks", "common-tokens", "chunks-own", "common-own"):
        told = records[name]["alignment"]
        assert told["length"] % 16 == 0
        assert 0.1 < told["aligned_positions"] < 1
        assert told["tokens_per_token"] < 1
        assert told["unread"] == 0
        assert records[name]["curve"][-1]["aligned_chunks"] > 0.1
        assert records[name]["metrics"]["bits_per_byte"] > 1
        assert not records[name].get("agreement")
        assert records[name]["flops"] > records["control"]["flops"]


@pytest.mark.parametrize(
    ("lesson", "message"),
    [
        (
            {"objective": Objective()},
            r"'chunks@1' and its teacher 'teacher@0' read different tokenizers, 'bpe-300' of 300 tokens and 'bpe-330' "
            r"of 330: .*\(likelihood_matching, common_tokens or uld of epigone.lessons.alignment\)",
        ),
        ({"scores": TopK(4), "objective": Objective(likelihood_matching)}, "leave out scores, ensemble"),
        ({"start_from": "teacher@0"}, "which reads another tokenizer"),
    ],
    ids=["divergence", "scores", "start"],
)
def test_what_does_not_fit_is_refused_before_anything_is_grown(lineage, tmp_path, lesson, message):
    with pytest.raises(UserError, match=message):
        grow(changed(lineage, **lesson), tmp_path / "run", view=Silent())
    assert not list((tmp_path / "run").glob("nodes/*"))


def test_several_teachers_are_refused(lineage, tmp_path):
    second = dataclasses.replace(lineage["teacher@0"], name="second")
    node = lineage["chunks@1"]
    lesson = dataclasses.replace(node.lesson, teacher=("teacher@0", "second@0"), ensemble=Ensemble())
    nodes = (lineage["teacher@0"], second, dataclasses.replace(node, lesson=lesson))
    with pytest.raises(UserError, match="likelihood_matching takes one teacher beside the student"):
        grow(dataclasses.replace(lineage, nodes=nodes, evaluation=None), tmp_path / "run", view=Silent())


def test_it_is_planned(capsys):
    assert main(["run", str(CONFIG), "--dry-run", "--seeds", "1"]) == 0
    assert "7 nodes, 0 done" in capsys.readouterr().out
