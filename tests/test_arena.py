"""The shipped experiment on prompt boxes, shrunk: every student learns by its way, and the box is watched."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import Silent, few_verses, shrunk

from epigone.arena.policies import POLICIES
from epigone.data.corpora import Noised
from epigone.errors import UserError
from epigone.grow import grow
from epigone.lineage import Lesson, Lineage
from epigone.models.ngram import NGram
from epigone.report import box, write_report
from epigone.report.records import load_run
from epigone.store import Store
from epigone.teachers.kept import Shown
from epigone.verbs.run import load_config

CONFIG = Path(__file__).parent.parent / "configs" / "arena.py"
WANTED = {"teacher", "text", "text-quarter", "text-fourfold", "noisy-and-text", "flat-undone", "marked", "noised20",
          "cleaned-up20", "noisy-text20"}  # fmt: skip


@pytest.fixture(scope="module")
def whole():
    return load_config(CONFIG)()


def shortened(lineage):
    """The same with models that write no more than a row holds."""
    short = [replace(node, model=replace(node.model, max_length=24)) for node in lineage.nodes]
    return replace(lineage, nodes=tuple(short))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = load_config(CONFIG)(seeds=1, tokens=800, scale=0.01)
    few = replace(made, nodes=tuple(node for node in made.nodes if node.name in WANTED))
    lineage = shortened(shrunk(few, write_tokens=0, compare={}))
    extractors = {name: replace(lineage.watch.extractors[name], queries=60) for name in ("plain", "hard prompts")}
    watch = replace(lineage.watch, users=24, days=3.0, rate=0.4, runs=1, extractors=extractors)
    lineage = replace(lineage, watch=replace(watch, boxes={"best5": POLICIES["best5"]}))
    folder = tmp_path_factory.mktemp("arena") / "run"
    with few_verses():
        grow(lineage, folder, view=Silent())
        assert grow(lineage, folder, view=Silent()) == []
    return Store(folder, lineage)


def test_students_learn_by_their_way_from_equally_many_tokens(whole):
    students = [node for node in whole.nodes if "way" in node.labels and node.seed == 0]
    asked = {int(node.labels["asked"]) for node in students}
    assert asked == {20_000, 80_000, 320_000}
    for node in students:
        (text,) = node.lesson.text
        assert text.tokens == int(node.labels["asked"])
        assert (node.lesson.scores is None) == (node.lesson.objective.hard_weight == 1) == (not node.lesson.teachers)
        if isinstance(node.lesson.scores, Shown):
            assert node.lesson.scores.policy.marks == text.marks
    # Those who only see less, see less of the same answers.
    plain = {node.lesson.text for node in students if not node.lesson.text[0].marks and node.labels["asked"] == "80000"}
    assert len(plain) == 1
    noisy = [node for node in whole.nodes if node.name.startswith("noised")]
    assert [node.lesson.text[0].corpus.share for node in noisy] == [0.1, 0.2, 0.4]


def test_texts_that_rows_would_cut_are_refused_since_a_box_reads_them_whole(whole, tmp_path):
    few = replace(whole, nodes=tuple(node for node in whole.nodes if node.key in ("teacher@0", "best5@1")), watch=None)
    lineage = shrunk(few, compare={})
    with few_verses(), pytest.raises(UserError, match="'best5@1' learns what a prompt box shows of whole texts"):
        grow(lineage, tmp_path / "run", view=Silent())
    assert not (tmp_path / "run" / "nodes").exists()
    warm = replace(lineage["best5@1"].lesson.objective, temperature=2.0)
    node = shortened(lineage)["best5@1"]
    hot = replace(node, lesson=replace(node.lesson, objective=warm))
    with few_verses(), pytest.raises(UserError, match="a prompt box shows scores of temperature 1"):
        grow(replace(shortened(lineage), nodes=(shortened(lineage)["teacher@0"], hot)), tmp_path / "hot", view=Silent())


def test_a_watch_that_cannot_be_is_refused_before_anything_is_grown(run, tmp_path):
    counts = replace(run.lineage["teacher@0"], model=NGram(), lesson=Lesson((run.lineage.watch.text,)))
    lineage = Lineage("counts", (counts,), None, watch=run.lineage.watch)
    with few_verses(), pytest.raises(UserError, match="'teacher@0' counts, and boxes are of a decoder"):
        grow(lineage, tmp_path / "run", view=Silent())
    with pytest.raises(UserError, match="no node 'pupil@0'"):
        replace(lineage, watch=replace(run.lineage.watch, teacher="pupil@0"))


def test_records_say_what_was_shown(run):
    records = {node.name: run.record(node) for node in run.lineage.nodes}
    assert set(records) == WANTED
    for name, record in records.items():
        assert record["metrics"]["perplexity"] > 1
        assert ("scores" in record) == (name in ("noisy-and-text", "flat-undone", "marked"))
    assert records["marked"]["data"][0]["marks"] == ["GreenList"]
    assert records["flat-undone"]["data"][0]["marks"] == ["Tempered"]
    assert records["noisy-text20"]["data"][0]["noise"] == {"share": 0.2, "seed": 0}
    assert isinstance(run.lineage["noised20@0"].lesson.text[0].corpus, Noised)


def test_the_box_is_watched_once_and_all_is_in_the_report(run):
    before = (run.run / "watch.json").stat().st_mtime_ns
    found = run.watch_record()
    assert set(found["extractors"]) == {"plain", "hard prompts"}
    assert found["boxes"]["best5"]["shown"] > 0
    grow(run.lineage, run.run, view=Silent())
    assert (run.run / "watch.json").stat().st_mtime_ns == before
    other = replace(run.lineage, watch=replace(run.lineage.watch, seed=1))
    assert Store(run.run, other).watch_record() is None
    page = write_report(run.run).read_text()
    assert 'id="box"' in page
    assert 'id="watch"' in page
    loaded = load_run(run.run)
    assert {way for way, _ in box.rows(loaded)} == {"text", "noisy-and-text", "flat-undone", "marked"}
    assert [name for name, _ in box.copies(loaded)] == ["plain", "hard prompts"]
