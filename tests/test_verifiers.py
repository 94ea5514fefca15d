"""Verification between generations: a classifier of real text, rules, and how selective a card says they are."""

import contextlib
import dataclasses

import numpy as np
import pytest
import tiny
from tiny import Silent

from epigone import regimes
from epigone.data.corpora import TextFiles
from epigone.data.tokenizers import Bytes, Words
from epigone.evaluate import diversity
from epigone.families import chain
from epigone.grow import grow, pending
from epigone.lessons.objective import TEXT_ALONE
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer, Written
from epigone.materials import Materials
from epigone.models.config import DecoderConfig
from epigone.models.ngram import NGram
from epigone.store import Store
from epigone.training.config import Training
from epigone.training.optimizer import Optimizer
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
    assert verification(tally, real, None, lambda document: False)["label_error_threshold"] == 0.0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verified")
    tiny.write_corpus(folder, 4_000)
    # The corpus has one name wherever it lies, so that the same is drawn in every run of the tests.
    with contextlib.chdir(folder):
        corpus = TextFiles("corpus.txt")
        words, few = TrainedTokenizer(Words(), Text(corpus)), Text(corpus, tokens=800)
        root = Node("root", 0, NGram(order=2), words, Lesson((few,)))
        ways = {
            "plain": {},
            "classifier": {"keep": 0.5, "verifier": RealOrWritten(Text(corpus, skip=8_000, tokens=8_000))},
            "rule": {"rule": ends_as_a_sentence},
        }
        nodes = [root]
        for name, how in ways.items():
            nodes += chain(root, 1, regimes.replace, name=name, writing=Written(by="", tokens=0, **how))
        evaluation = Evaluation(Text(corpus, "test"), Text(corpus), write_tokens=500, contexts=20)
        store = Store(folder / "run", Lineage("verified", tuple(nodes), evaluation))
        grow(store.lineage, store.run, view=Silent())
        yield store, Materials(store)


@pytest.fixture
def records(run):
    return {node.key: run[0].record(node) for node in run[0].lineage.nodes}


def test_what_is_verified_is_nearer_to_real_text(run):
    """Share of the pairs of words that real text has too, of what each reads."""
    store, materials = run
    nodes = {name: store.lineage[f"{name}@1"] for name in ("plain", "classifier", "rule")}
    index = materials.index((store.lineage.evaluation.real,), nodes["plain"].tokenizer)
    seen = {name: diversity.seen(materials.documents(node.lesson.text[0], node.tokenizer), index, 2)
            for name, node in nodes.items()}  # fmt: skip
    assert seen["classifier"] > seen["plain"] + 0.01
    assert seen["rule"] > seen["plain"]


def test_a_record_says_who_chose_and_how_selectively(records):
    classifier, rule = (records[f"{name}@1"]["data"][0]["chosen"] for name in ("classifier", "rule"))
    assert classifier["verifier"]["type"] == "epigone.verifiers:RealOrWritten"
    assert classifier["kept_of_real"] > classifier["kept_of_written"] == 0.5
    assert classifier["label_error_threshold"] > 0.5
    assert rule["rule"] == "epigone.verifiers:ends_as_a_sentence"
    assert rule["kept_of_real"] == 1.0
    assert rule["kept_of_written"] == pytest.approx(1 - rule["ruled_out"])
    assert not records["plain@1"]["data"][0].get("chosen")


def test_it_is_the_same_when_it_is_grown_again(tmp_path):
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


def test_a_judge_of_other_origin_reads_what_everybody_writes(tmp_path):
    corpus = TextFiles(str(tiny.write_corpus(tmp_path, 1_000)))
    words, own = TrainedTokenizer(Words(lowercase=True), Text(corpus)), TrainedTokenizer(Bytes(), Text(corpus))
    root = Node("root", 0, NGram(order=3), words, Lesson((Text(corpus, tokens=2_000),)))
    noise = Node("noise", 0, NGram(order=1), words, Lesson((Text(corpus, tokens=200),)))
    judge = Node("judge", 0, NGram(order=5), own, Lesson((Text(corpus),)))
    evaluation = Evaluation(Text(corpus, "test"), Text(corpus), write_tokens=500, contexts=20, judge="judge@0")
    lineage = Lineage("judged", (judge, root, noise), evaluation)
    grow(lineage, tmp_path / "run", view=Silent())
    store = Store(tmp_path / "run", lineage)
    bits = {node.name: store.record(node)["metrics"].get("judge_bits_per_byte") for node in lineage.nodes}
    assert bits["judge"] is None
    assert 0 < bits["root"] < bits["noise"] - 0.5
    late = dataclasses.replace(lineage, nodes=(root, noise, judge))
    assert [node.key for node in pending(Store(tmp_path / "late", late))] == ["root@0", "noise@0", "judge@0"]
    grow(late, tmp_path / "late", view=Silent())
    assert "judge_bits_per_byte" not in Store(tmp_path / "late", late).record(root)["metrics"]
    grow(late, tmp_path / "late", view=Silent())
    assert Store(tmp_path / "late", late).record(root)["metrics"]["judge_bits_per_byte"] == bits["root"]


def test_a_judge_that_is_a_decoder_looks_at_what_texts_mean_too(tmp_path):
    corpus = TextFiles(str(tiny.write_corpus(tmp_path, 1_000)))
    words = TrainedTokenizer(Words(lowercase=True), Text(corpus))
    training = Training(steps=20, batch_size=8, sequence_length=32, optimizer=Optimizer(learning_rate=1e-2))
    lesson = Lesson((Text(corpus),), objective=TEXT_ALONE, training=training)
    judge = Node("judge", 0, DecoderConfig(layers=1, model_size=32, heads=2, max_length=64), words, lesson)
    root = Node("root", 0, NGram(order=3), words, Lesson((Text(corpus, tokens=4_000),)))
    noise = Node("noise", 0, NGram(order=1), words, Lesson((Text(corpus, tokens=200),)))
    evaluation = Evaluation(Text(corpus, "test"), Text(corpus), write_tokens=1_000, contexts=20, judge="judge@0")
    lineage = Lineage("judged", (judge, root, noise), evaluation)
    grow(lineage, tmp_path / "run", view=Silent())
    told = {node.name: Store(tmp_path / "run", lineage).record(node)["metrics"] for node in lineage.nodes}
    assert told["root"]["judge_mauve"] > told["noise"]["judge_mauve"]
    assert 1 < told["root"]["judge_vendi"] < 100
    assert "judge_mauve" not in told["judge"]
