"""Stepping through generations: what the page's script is given, and what it shows in a browser."""

import json
import re
import shutil
import subprocess

import pytest
from report.synthetic_run import HOSTILE, quickstart, record, write_run

from epigone.report import write_report
from epigone.report.explorer import exploration
from epigone.report.records import load_run
from epigone.report.summaries import generation_series

CHROMIUM = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
WORDS = [["the", 90], ["lord", 40], ["cedar", 2], ["myrrh", 1]]
LOST = {0: [], 1: ["myrrh", "cedar"], 2: ["myrrh"], 3: ["myrrh", "lord"]}
"""Lost at each generation; the cedar comes back."""


def entries():
    return [entry for entry in quickstart(3, 2) if entry["name"].startswith("trigram")]


def made(entry):
    more = {"watched": WORDS if entry["generation"] == 0 else [], "lost": LOST[entry["generation"]]}
    theory = {"perplexity": 100.0 + entry["generation"]} if "replace" in entry["name"] else {}
    return record(entry, theory=theory, **more)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = write_run(tmp_path_factory.mktemp("explorer") / "run", entries(), [made(entry) for entry in entries()])
    write_report(directory)
    return directory


@pytest.fixture(scope="module")
def data(run):
    loaded = load_run(run)
    return json.loads(exploration(loaded, generation_series(loaded)))


def test_a_word_is_lost_for_good_where_it_never_comes_back(data):
    one = data["series"][0]
    assert one["words"] == WORDS
    assert one["lost"] == {"0": [], "1": ["myrrh"], "2": ["myrrh"], "3": ["lord", "myrrh"]}


def test_every_series_has_its_points_texts_and_theory(data, run):
    series = {one["title"]: one for one in data["series"]}
    assert set(series) == {"trigram · replace", "trigram · accumulate", "trigram · fresh"}
    replaced = series["trigram · replace"]
    assert [g for g, *_ in replaced["points"]["perplexity"]] == replaced["generations"] == [0, 1, 2, 3]
    assert all(low <= mean <= high for _, mean, low, high in replaced["points"]["perplexity"])
    assert replaced["theory"]["perplexity"] == [[g, 100.0 + g] for g in (1, 2, 3)]
    assert series["trigram · accumulate"]["theory"] == {}
    assert HOSTILE[:20] in replaced["samples"]["3"][1]
    assert data["metrics"][0] == ["perplexity", "held-out perplexity"]


def test_what_is_not_finite_is_left_out(tmp_path):
    some = [entry for entry in entries() if entry["name"] in ("trigram", "trigram-replace") and not entry["seed"]]
    records = [made(entry) for entry in some]
    records[-1]["metrics"]["perplexity"] = "inf"
    loaded = load_run(write_run(tmp_path / "run", some, records))
    points = json.loads(exploration(loaded, generation_series(loaded)))["series"][0]["points"]["perplexity"]
    assert [g for g, *_ in points] == [0, 1, 2]


def test_a_run_without_generations_has_nothing_to_step_through(tmp_path):
    first = entries()[:1]
    directory = write_run(tmp_path / "run", first, [made(first[0])])
    assert exploration(load_run(directory), generation_series(load_run(directory))) == ""
    assert 'id="generations"' not in write_report(directory).read_text()


def test_nothing_in_a_text_ends_the_data(run):
    html = (run / "report.html").read_text()
    block = re.search(r'<script type="application/json" id="exploration">(.*?)</script>', html, flags=re.S)[1]
    assert "<" not in block
    assert json.loads(block)["series"]


PROBE = """<script>
  const change = (id, value, kind) => {
    const found = document.getElementById(id);
    found.value = value;
    found.dispatchEvent(new Event(kind));
  };
  const seen = [];
  const look = () => seen.push([document.getElementById("at").textContent,
    [...document.querySelectorAll("#cloud .lost")].map((word) => word.textContent).join("+"),
    document.querySelectorAll("#written p").length, document.querySelectorAll("#curve path").length].join(" "));
  look();
  change("pick-generation", 3, "input");
  look();
  change("pick-metric", "distinct_2", "change");
  look();
  change("pick-series", 1, "change");
  document.title = [...seen, document.getElementById("told").textContent.split(",")[0],
    document.documentElement.scrollWidth <= window.innerWidth ? "fits" : "too wide"].join(" | ");
</script>"""

if CHROMIUM:  # Elsewhere the data alone are checked.

    def test_a_browser_steps_through_generations(run, tmp_path):
        copy = tmp_path / "probe.html"
        copy.write_text((run / "report.html").read_text().replace("</body>", PROBE + "</body>"))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                 f"--user-data-dir={tmp_path}", "--window-size=1200,900"]  # fmt: skip
        command = [CHROMIUM, *flags, "--dump-dom", copy.as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        seen = re.search(r"<title>([^<]*)</title>", dom)[1].split(" | ")
        # Three lines, the band of the chosen one, and its theory, which no other measure has.
        assert seen == ["0  4 5", "3 lord+myrrh 4 5", "3 lord+myrrh 4 4", "trigram · accumulate", "fits"]
