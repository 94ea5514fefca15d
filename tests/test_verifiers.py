"""Verification between generations: a classifier of real text, rules, and how selective a card says they are."""

import numpy as np
import pytest
import tiny
from tiny import Silent

from epigone import regimes
from epigone.data.corpora import TextFiles
from epigone.data.tokenizers import Words
from epigone.families import chain
from epigone.grow import grow
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer, Written
from epigone.models.ngram import NGram
from epigone.store import Store
from epigone.verifiers import RealOrWritten, does_not_stutter, ends_as_a_sentence, verification
from epigone.writing import Tally


def texts(count, words, seed):
    rng = np.random.default_rng(seed)
    return [rng.choice(words, 8).astype(np.int32) for _ in range(count)]


def test_a_classifier_tells_real_text_from_the_writers():
    real, written = texts(300, np.arange(4, 30), 0), texts(300, np.arange(10, 40), 1)
    score = RealOrWritten(Text("c")).fitted(real, written)
    fresh = [score(texts(200, np.arange(*ends), 2)) for ends in ((4, 30), (10, 40))]
    assert np.mean(fresh[0] > 0) > 0.9
    assert np.mean(fresh[1] < 0) > 0.9


def test_of_text_that_is_alike_it_knows_nothing():
    """The control: where writer and real text are one, what it has learned does not hold for others."""
    score = RealOrWritten(Text("c")).fitted(texts(300, np.arange(4, 60), 0), texts(300, np.arange(4, 60), 1))
    assert abs(np.mean(score(texts(2000, np.arange(4, 60), 2)) > 0) - 0.5) < 0.1


@pytest.mark.parametrize(("text", "ends", "smooth"), [("a b.", 1, 1), ("a a ", 0, 0), ("Is it? ", 1, 1), ("", 0, 1)])
def test_rules(text, ends, smooth):
    assert (ends_as_a_sentence(text), does_not_stutter(text)) == (bool(ends), bool(smooth))


def test_a_card_has_both_shares_and_the_threshold_of_theory():
    tally = Tally(drawn=100, documents=100, kept=25, lowest=3.0, blocks=2)
    real = [np.full(n, 5, np.int32) for n in (1, 2, 3, 4)]
    told = verification(tally, real, lambda documents: np.array([len(d) - 1.0 for d in documents]), None)
    assert told == {"kept_of_written": 0.25, "kept_of_real": 0.5, "label_error_threshold": pytest.approx(2 / 3)}
    ruled = verification(tally, real, None, lambda document: len(document) > 1)
    assert ruled["kept_of_real"] == 0.75
    assert "label_error_threshold" not in verification(tally, real, None, lambda document: False)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verified")
    corpus = TextFiles(str(tiny.write_corpus(folder, 2_000)))
    words, few = TrainedTokenizer(Words(), Text(corpus)), Text(corpus, tokens=1_500)
    root = Node("root", 0, NGram(order=2), words, Lesson((few,)))
    real = Text(corpus, skip=4_000, tokens=4_000)
    ways = {
        "plain": {},
        "classifier": {"keep": 0.5, "verifier": RealOrWritten(real)},
        "rule": {"rule": ends_as_a_sentence},
    }
    nodes = [root]
    for name, how in ways.items():
        nodes += chain(root, 2, regimes.replace, name=name, writing=Written(by="", tokens=0, **how))
    evaluation = Evaluation(Text(corpus, "test"), Text(corpus), write_tokens=500, contexts=20)
    lineage = Lineage("verified", tuple(nodes), evaluation)
    grow(lineage, folder / "run", view=Silent())
    return {node.key: Store(folder / "run", lineage).record(node) for node in lineage.nodes}


def test_what_is_verified_stays_nearer_to_real_text(records):
    seen = {name: records[f"{name}@2"]["metrics"]["seen_2"] for name in ("plain", "classifier", "rule")}
    assert seen["classifier"] > seen["plain"] + 0.03
    assert seen["rule"] > seen["plain"]


def test_a_record_says_who_chose_and_how_selectively(records):
    classifier, rule = (records[f"{name}@2"]["data"][0]["chosen"] for name in ("classifier", "rule"))
    assert classifier["verifier"]["type"] == "epigone.verifiers:RealOrWritten"
    assert classifier["kept_of_real"] > classifier["kept_of_written"] == 0.5
    assert classifier["label_error_threshold"] > 0.5
    assert rule["rule"] == "epigone.verifiers:ends_as_a_sentence"
    assert rule["kept_of_real"] == 1.0
    assert rule["kept_of_written"] == pytest.approx(1 - rule["ruled_out"])
    assert not records["plain@2"]["data"][0].get("chosen")


def test_it_is_the_same_when_it_is_grown_again(records, tmp_path):
    corpus = TextFiles(str(tiny.write_corpus(tmp_path, 400)))
    words, few = TrainedTokenizer(Words(), Text(corpus)), Text(corpus, tokens=1_000)
    root = Node("root", 0, NGram(order=2), words, Lesson((few,)))
    how = Written(by="", tokens=0, keep=0.5, verifier=RealOrWritten(Text(corpus, tokens=1_000)))
    copies = chain(root, 1, regimes.replace, name="copy", writing=how)
    lineage = Lineage("again", (root, *copies), Evaluation(few, few, write_tokens=0, contexts=5))
    stores = [Store(tmp_path / name, lineage) for name in ("one", "other")]
    for store in stores:
        grow(lineage, store.run, view=Silent())
    metrics = [store.record(copies[0])["metrics"] for store in stores]
    assert metrics[0] == metrics[1]
