"""What a report says of students outside a box: how much text each way of learning is worth, and what is drawn."""

import json
import math

import pytest
from report.synthetic_run import lineage_entry, record, write_run

from epigone.report import box, write_report
from epigone.report.formats import real
from epigone.report.records import load_run
from epigone.report.summaries import Spread

TOKENS = {"text": (10_000, 40_000, 160_000), "scores": (10_000, 40_000)}
NATS = {("text", 10_000): 5.0, ("text", 40_000): 4.0, ("text", 160_000): 3.5,
        ("scores", 10_000): 4.5, ("scores", 40_000): 3.0}  # fmt: skip


def entries(nats):
    for way, sizes in TOKENS.items():
        for tokens in sizes:
            for seed in (0, 1):
                made = lineage_entry(f"{way}-{tokens}", 1, seed, "decoder", [], way=way, asked=str(tokens))
                value = math.exp(nats[way, tokens] + (0.1 if seed else -0.1))
                yield made, record(made, metrics={"perplexity": value})


def grown(folder, nats=NATS):
    made = list(entries(nats))
    return write_run(folder / "run", [one for one, _ in made], [told for _, told in made])


@pytest.fixture
def run(tmp_path):
    return grown(tmp_path)


def test_a_way_is_worth_the_text_that_teaches_as_much(run):
    found = box.asked(load_run(run))
    text = [one for one in found if one.way == "text"]
    assert [(one.way, one.tokens) for one in found] == [(way, n) for way, sizes in TOKENS.items() for n in sizes]
    few, many = (box.worth(one, text) for one in found if one.way == "scores")
    assert few == (pytest.approx(20_000), "")  # half of the way from 5 to 4 nats, over the logarithm of 10 k to 40 k
    assert many == (160_000, ">")
    assert [box.worth(one, text) for one in text] == [(pytest.approx(n), "") for n in TOKENS["text"]]
    assert box.worth(found[0]._replace(nats=Spread(6.0, 6.0, 6.0, 1)), text) == (10_000, "<")
    assert box.worth(found[0], text[:1]) is None


def test_where_more_text_did_not_teach_more_nothing_is_told_in_text(tmp_path):
    run = load_run(grown(tmp_path, NATS | {("text", 40_000): 5.5}))
    every = box.asked(run)
    assert box.worth(every[-1], [one for one in every if one.way == "text"]) is None
    assert [cells[-1] for _, cells in box.rows(run)] == [""] * 5


def test_the_page_shows_what_was_measured(run):
    page = write_report(run).read_text()
    assert 'id="box"' in page
    assert (run / "plots" / "box.png").stat().st_size > 10_000
    cells = {f"{name} {cells[0]}": cells[1:] for name, cells in box.rows(load_run(run))}
    assert cells["scores 10 k"][-2:] == ["20 k", "2"]
    assert cells["scores 40 k"][-2:] == [">160 k", ">4"]
    assert cells["text 40 k"][0] == "54.9 (49.4–60.3)"


def test_a_run_without_a_box_has_no_such_section(tmp_path):
    made = lineage_entry("alone", 0, 0, "decoder", [])
    page = write_report(write_run(tmp_path / "run", [made], [record(made)])).read_text()
    assert 'id="box"' not in page


WATCH = {
    "rate": 0.01, "window": 50, "price": 2.0, "limit": 20,
    "detectors": {"volume": {"false": 0.012, "false_low": 0.008, "false_high": 0.02}},
    "honest": {"users": 90, "queries": 5_000, "flagged": {"volume": 0.1, "any of them": 0.2},
               "refused": {"volume": 0.05, "any of them": 0.11}, "delayed": 0.034, "wait": 12.0},
    "days": 7.0,
    "extractors": {"plain": {"wanted": 4_000, "asked": 8_000, "days": 4.0, "caught": {"volume": [0.85, 0.8, 0.9]},
                             "got": {"volume": [50, 100, 50], "any of them": [2_000, 1_000, 1_000]}},
                   "slow": {"wanted": 4_000, "asked": 4_000, "days": 40.0, "caught": {"volume": None},
                            "got": {"volume": [4_000] * 3, "any of them": [4_000] * 3}}},
    "boxes": {"best5": {"shown": 0.7, "error": 0.0, "text_nats": 3.2, "distinct_2": 0.5},
              "no scores": {"shown": 0.0, "text_nats": 3.2, "distinct_2": 0.5}},
}  # fmt: skip


def watched(run, mark="now"):
    lineage = json.loads((run / "lineage.json").read_text())
    (run / "lineage.json").write_text(json.dumps(lineage | {"watch": "now"}))
    (run / "watch.json").write_text(json.dumps(WATCH | {"measured_as": mark}))
    for path in run.glob("nodes/*/record.json"):
        told = json.loads(path.read_text())
        path.write_text(
            json.dumps(told | {"data": [{"name": "answers", "documents": 100, "tokens": 2_000, "parents": ["t@0"]}]})
        )
    return run


def test_what_is_caught_is_told_with_its_price(run):
    loaded = load_run(watched(run))
    names, rows = box.detectors(loaded)
    assert names == ["plain, of 4 k", "slow, of 4 k"]
    assert dict(rows) == {
        "volume": ["1.2% (0.8%–2.0%)", "10%", "5%", "50 (50–100); 85%", "4 k"],
        "any of them": ["", "20%", "11%", "1 k (1 k–2 k)", "4 k"],
    }
    # 1,000 queries of 20 tokens: half of the way, over the logarithm, from 10 k to 40 k tokens.
    copies = dict(box.copies(loaded))
    assert box.learned_from(loaded) == ["text", "scores"]
    assert copies["plain"] == ["1 k", "24 h 00 min", "0.08", real(math.exp(4.5)), real(math.exp(3.75))]
    assert copies["slow"][:3] == ["4 k", "960 h 00 min", "0.16"]
    assert copies["slow"][4] == "≤" + box.asked(loaded)[-1].perplexity.mean.__format__(".1f")
    assert dict(box.boxes(loaded))["no scores"] == ["0%", "", "3.20", "0.500"]
    page = write_report(run).read_text()
    assert 'id="watch"' in page
    assert "90 honest users" in page


def test_what_was_watched_of_another_lineage_is_not_shown(run):
    loaded = load_run(watched(run, mark="before"))
    assert box.detectors(loaded) == ([], [])
    assert 'id="watch"' not in write_report(run).read_text()
