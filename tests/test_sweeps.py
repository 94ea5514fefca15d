"""Sweeps of generations and populations: one that is killed goes on to the same end; chains of models of two kinds."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny

from epigone import regimes
from epigone.cli import main
from epigone.data.corpora import TextFiles
from epigone.data.tokenizers import Words
from epigone.families import chain
from epigone.grow import grow
from epigone.lessons.objective import TEXT_ALONE
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer
from epigone.models.config import DecoderConfig
from epigone.models.ngram import NGram
from epigone.store import Store
from epigone.training.config import Training

CONFIG = '''
"""A small sweep."""

from functools import partial

from epigone import regimes
from epigone.data.corpora import TextFiles
from epigone.data.tokenizers import Words
from epigone.families import chain
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Population, Text, TrainedTokenizer, Written
from epigone.models.ngram import NGram
from epigone.models.smoothing import mle
from epigone.verifiers import RealOrWritten

CORPUS = TextFiles("corpus.txt")
WORDS = TrainedTokenizer(Words(), Text(CORPUS))


def lineage() -> Lineage:
    nodes, populations = [], []
    chosen = Written(by="", tokens=0, keep=0.5, verifier=RealOrWritten(Text(CORPUS, tokens=2_000)))
    for seed in range(2):
        text = Text(CORPUS, skip=600 * seed, tokens=600)
        counting = Lesson((text,), validation=Text(CORPUS, "validation"))
        root = Node("root", 0, NGram(writing=mle), WORDS, counting, seed=seed)
        nodes.append(root)
        for name in ("replace", "accumulate_subsample", "fresh_share"):
            nodes += chain(root, 3, partial(getattr(regimes, name)), name=name)
        nodes += chain(root, 2, regimes.replace, name="chosen", writing=chosen)
        members = tuple(node.key for node in nodes if node.generation == 2 and node.seed == seed)
        populations.append(Population("second", members, {"seed": seed}, seed))
    evaluation = Evaluation(Text(CORPUS, "test"), Text(CORPUS), write_tokens=300, contexts=30)
    return Lineage("sweep", tuple(nodes), evaluation, populations=tuple(populations))
'''


def write(folder):
    tiny.write_corpus(folder, 2_000)
    (folder / "sweep.py").write_text(CONFIG)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path)


def start(folder, run, *more):
    command = [sys.executable, "-m", "epigone", "run", "sweep.py", "--run", f"runs/{run}", *more]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(folder, run):
    """Metrics, theory and texts of every node, and those of populations."""
    place = folder / "runs" / run
    records = [json.loads(path.read_text()) for path in sorted(place.glob("nodes/*/record.json"))]
    kept = ("identity", "metrics", "theory", "lost", "samples", "data", "tokens")
    nodes = {record["key"]: {name: record.get(name) for name in kept} for record in records}
    return nodes, {path.name: json.loads(path.read_text()) for path in sorted(place.glob("populations/*.json"))}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """What an undisturbed run of one process gives."""
    folder = write(tmp_path_factory.mktemp("undisturbed"))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert main(["run", "sweep.py", "--run", "runs/whole"]) == 0
    found = results(folder, "whole")
    assert len(found[0]) == 2 * 12
    assert len(found[1]) == 2
    return found


@pytest.mark.parametrize(
    ("more", "shares"),
    [((), (0.1, 0.4, 0.8)), (("--jobs", "2"), (0.5,))],
    ids=["one process", "two beside each other"],
)
def test_a_sweep_that_is_killed_again_and_again_ends_the_same(folder, wanted, more, shares, monkeypatch, capsys):
    chance, killed = random.Random(3), 0
    for share in shares:
        process = start(folder, "killed", *more)
        while process.poll() is None and len(results(folder, "killed")[0]) < share * len(wanted[0]):
            time.sleep(0.02)
        time.sleep(0.2 * chance.random())
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
    assert killed == len(shares)
    monkeypatch.chdir(folder)
    assert main(["run", "sweep.py", "--run", "runs/killed", *more]) == 0
    assert results(folder, "killed") == wanted
    assert "nothing to grow" not in capsys.readouterr().out


def test_a_transformer_reads_a_trigram_and_the_reverse(tmp_path):
    corpus = TextFiles(str(tiny.write_corpus(tmp_path)))
    words, text = TrainedTokenizer(Words(), Text(corpus)), Text(corpus, tokens=400)
    training = Training(steps=3, batch_size=2, sequence_length=16)
    trigram = Node("trigram", 0, NGram(), words, Lesson((text,)))
    small = DecoderConfig(layers=1, model_size=16, heads=2, max_length=16)
    decoder = Node("decoder", 0, small, words, Lesson((text,), objective=TEXT_ALONE, training=training))
    mixed = chain(trigram, 3, regimes.replace, name="mixed", successors=(decoder, trigram))
    warm = chain(decoder, 2, regimes.replace, name="warm", warm=True)
    evaluation = Evaluation(Text(corpus, "test"), Text(corpus), write_tokens=100, contexts=10)
    lineage = Lineage("mixed", (trigram, *mixed, decoder, *warm), evaluation)
    grow(lineage, tmp_path / "run", view=tiny.Silent())
    records = {node.key: Store(tmp_path / "run", lineage).record(node) for node in lineage.nodes}
    assert [records[f"mixed@{g}"]["kind"] for g in (1, 2, 3)] == ["decoder", "ngram", "decoder"]
    assert all(record["metrics"]["perplexity"] > 1 for record in records.values())
    starts = [parent["key"] for parent in records["warm@2"]["parents"] if parent["role"] == "start"]
    assert starts == ["warm@1"]
