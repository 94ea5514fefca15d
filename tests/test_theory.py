"""Theory beside what lineages of words really do, in every regime; where theory says nothing, and of what.

That the formulas are right, and wrong ones are seen, is shown in `tests/evaluate/test_collapse_theory.py`.
"""

import contextlib
import dataclasses
from functools import partial

import numpy as np
import pytest
from tiny import Silent, write_corpus

from epigone import regimes
from epigone.data.corpora import TextFiles
from epigone.data.tokenizers import Words
from epigone.errors import UserError
from epigone.evaluate import collapse_theory
from epigone.evaluate.collapse_theory import Block
from epigone.families import chain
from epigone.grow import grow
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer, Written
from epigone.models.ngram import NGram
from epigone.models.smoothing import mle, witten_bell
from epigone.store import Store

REGIMES = {
    "replace": regimes.replace,
    "grown": regimes.replace_grown,
    "accumulate": regimes.accumulate,
    "subsample": regimes.accumulate_subsample,
    "window": partial(regimes.sliding_window, last=2),
    "fixed": partial(regimes.fixed_share, share=0.4),
    "fresh": partial(regimes.fresh_share, share=0.4),
}
SEEDS, GENERATIONS, TOKENS = 8, 3, 200


def words(corpus, **model):
    tokenizer = TrainedTokenizer(Words(), Text(corpus))
    return Node(
        "word", 0, NGram(order=1, **({"smoothing": mle} | model)), tokenizer, Lesson((Text(corpus, tokens=TOKENS),))
    )


def grown(nodes, corpus, run):
    """Records by the key of the node."""
    evaluation = Evaluation(Text(corpus, "test", tokens=100), Text(corpus), write_tokens=0, contexts=5)
    lineage = Lineage("theory", tuple(nodes), evaluation)
    grow(lineage, run, view=Silent())
    return {node.key: Store(run, lineage).record(node) for node in lineage.nodes}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus whose name is the same wherever it lies, so that the same is drawn in every run of the tests."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 2_000)
    with contextlib.chdir(folder):
        yield TextFiles("corpus.txt")


@pytest.fixture(scope="module")
def records(corpus, tmp_path_factory):
    root, nodes = words(corpus), []
    for seed in range(SEEDS):
        own = dataclasses.replace(root.lesson.text[0], skip=300 * seed)
        first = dataclasses.replace(root, seed=seed, lesson=Lesson((own,)))
        nodes += [first, *(n for name, regime in REGIMES.items() for n in chain(first, GENERATIONS, regime, name=name))]
    return grown(nodes, corpus, tmp_path_factory.mktemp("theory") / "run")


def pairs(records, name, metric="learned_heterozygosity"):
    """What happened and what was expected [seed] at the last generation."""
    found = [r for r in records.values() if (r["name"], r["generation"]) == (name, GENERATIONS)]
    return np.array([r["metrics"][metric] for r in found]), np.array([r["theory"][metric] for r in found])


def off(found, expected):
    """Mean difference in standard errors."""
    gap = found - expected
    return abs(gap.mean()) / (gap.std(ddof=1) / np.sqrt(len(gap)))


@pytest.mark.parametrize("name", REGIMES)
def test_every_regime_keeps_the_variety_that_theory_says(records, name):
    assert off(*pairs(records, name)) < 4


def test_words_that_are_left_follow_the_survival_of_a_branching_process(records):
    assert off(*pairs(records, "replace", "words_left")) < 4
    with pytest.raises(KeyError):
        pairs(records, "accumulate", "words_left")


def test_the_first_generation_is_where_theory_begins(records):
    for record in (record for record in records.values() if record["generation"] == 0):
        metrics, expected = record["metrics"], record["theory"]
        assert expected["learned_heterozygosity"] == pytest.approx(metrics["learned_heterozygosity"])
        assert expected["words_left"] == metrics["words_left"] <= metrics["learned_words"]


def test_a_text_that_is_drawn_of_is_written_once(records):
    """Subsampled texts are parts of whole ones: constant in size, each whole written as often as it has a writer."""
    last = [r for r in records.values() if (r["name"], r["generation"]) == ("subsample", GENERATIONS)]
    for record in last:
        assert [card["subsample"] for card in record["data"]] == [50] * 4
        assert 4 * 50 <= record["tokens"] < 2 * TOKENS


@pytest.mark.parametrize(
    ("model", "writing"),
    [({"smoothing": witten_bell}, {}), ({}, {"temperature": 0.5}), ({}, {"top_k": 3}), ({}, {"keep": 0.5})],
)
def test_there_is_no_theory_of_what_is_smoothed_or_chosen(corpus, tmp_path, model, writing):
    copies = chain(words(corpus, **model), 1, regimes.replace, name="c", writing=Written(by="", tokens=0, **writing))
    record = grown([words(corpus, **model), *copies], corpus, tmp_path / "run")[copies[0].key]
    assert record["theory"] == {}
    assert record["metrics"]["words_left"] > 0


def test_a_smoothed_model_that_writes_by_counts_has_a_theory_and_adds_no_word(corpus, tmp_path):
    root = words(corpus, smoothing=witten_bell, writing=mle)
    copies = chain(root, 2, regimes.replace, name="c")
    record = grown([root, *copies], corpus, tmp_path / "run")[copies[1].key]
    assert record["metrics"]["learned_words"] == record["metrics"]["words_left"]
    assert {"words_left", "learned_heterozygosity"} == set(record["theory"])
    assert record["metrics"]["impossible"] == 0


def test_a_control_has_no_first_generation_to_lose_from(corpus, tmp_path):
    root = words(corpus)
    controls = chain(root, 1, regimes.real_only, name="real")
    record = grown([root, *controls], corpus, tmp_path / "run")[controls[0].key]
    assert record["theory"] == {}
    assert "words_left" not in record["metrics"]
    assert record["metrics"]["learned_words"] > 3


def test_texts_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="comes later"):
        collapse_theory.heterozygosity_of([Block(9), Block(9, writer=1)], [[0], [1]], [[0.5]])
    with pytest.raises(UserError, match="real texts come first"):
        collapse_theory.heterozygosity_of([Block(9), Block(9, writer=0), Block(9)], [[0]], np.eye(2))
    with pytest.raises(UserError, match="for 1 real texts"):
        collapse_theory.heterozygosity_of([Block(9)], [[0]], np.eye(2))


def test_closed_forms_are_cases_of_it():
    n, h0, generations = 50, 0.7, 6
    texts = [Block(n)] + [Block(n, writer=g) for g in range(generations)]
    t = np.arange(generations + 1)
    replaced = collapse_theory.heterozygosity_of(texts, [[g] for g in t], [[1 - h0]])
    np.testing.assert_allclose(replaced, collapse_theory.heterozygosity_replace(h0, n, t))
    kept = collapse_theory.heterozygosity_of(texts, [list(range(g + 1)) for g in t], [[1 - h0]])
    np.testing.assert_allclose(kept, collapse_theory.heterozygosity_accumulate(h0, n, t, held=1))
