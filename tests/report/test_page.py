import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from report.synthetic_run import HOSTILE, quickstart, record, write_run

from epigone.errors import UserError
from epigone.report import write_report
from epigone.report.records import load_run

PROBE = """<script>
  const box = document.querySelector('svg.lineage a[data-box="student@1"]');
  box.dispatchEvent(new MouseEvent("click", { cancelable: true }));
  const heads = [...document.querySelectorAll("#nodes th[scope=col]")];
  heads.find((head) => head.textContent === "perplexity").click();
  document.title = [document.querySelectorAll("#details tbody tr").length, document.querySelector("#nodes tbody tr").id,
    document.documentElement.scrollWidth <= window.innerWidth ? "fits" : "too wide"].join(" ");
</script>"""
VOID = {"meta", "link", "br", "img", "input", "hr"}
CHROMIUM = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)


class Page(HTMLParser):
    """Tags in balance, ids, text, scripts and everything that a browser would load or follow."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.tags, self.text, self.loads, self.links = [], [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(tag, dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self._attributes(tag, dict(attrs))

    def _attributes(self, tag, attrs):
        self.ids += [attrs["id"]] if "id" in attrs else []
        for name, value in attrs.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in ("src", "srcset", "data", "poster") or (name.endswith("href") and tag != "a"):
                self.loads.append(value)
            elif name.endswith("href"):
                self.links.append(value)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def html(full_run):
    return (full_run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_tags_are_balanced_and_ids_unique(page):
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))


def test_page_needs_no_other_file(full_run, html, page):
    assert all(value.startswith(("data:", "#")) for value in page.loads), page.loads
    assert not re.search(r"url\((?!['\"]?#)", html)
    assert not re.search(r"@import|fetch\(|XMLHttpRequest|import\(", html)
    assert page.tags.count("script") == 2  # one of them is data
    beside = {link for link in page.links if not link.startswith("#")}
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert {"results.json", "results.csv", "plots/"} < beside
    assert all((full_run / unquote(link)).exists() for link in beside)


def test_every_node_is_in_the_table_and_in_the_drawing(full_run, html, page):
    keys = [node.key for node in load_run(full_run).nodes]
    assert {f"node-{key}" for key in keys} <= set(page.ids)
    drawn = [key for found in re.findall(r'data-keys="([^"]*)"', html) for key in found.split()]
    assert sorted(drawn) == sorted(keys)


def test_lessons_are_drawn_once_for_all_seeds(full_run, html):
    nodes = load_run(full_run).nodes
    group = {node.key: node.group for node in nodes}
    expected = {(group[parent.key], node.group, parent.role) for node in nodes for parent in node.parents}
    found = re.findall(r'data-role="([^"]*)"\s+data-from="([^"]*)"\s+data-to="([^"]*)"', html)
    assert sorted((source, target, role) for role, source, target in found) == sorted(expected)


def test_two_lessons_from_one_parent_are_two_lines(tmp_path):
    entries = [entry for entry in quickstart(1, 1) if entry["name"] in ("teacher", "student")]
    roles = ["teacher", "text", "start"]
    entries[1]["parents"] = [{"key": "teacher@0", "role": role} for role in roles]
    html = write_report(write_run(tmp_path, entries, [])).read_text()
    lines = dict(re.findall(r'data-role="(\w+)" data-from="teacher@0" data-to="student@1"\s+d="([^"]+)"', html))
    assert sorted(lines) == sorted(roles)
    assert len(set(lines.values())) == 3


def test_boxes_do_not_overlap(html):
    svg = html[html.index('<svg class="lineage"') :]
    boxes = re.findall(
        r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg[: svg.index("</svg>")]
    )
    places = [tuple(map(float, box)) for box in boxes]
    assert len(places) == 31 + 10
    for i, (x, y, wide, high) in enumerate(places):
        assert all(abs(x - a) >= wide or abs(y - b) >= high for a, b, _, _ in places[:i])


def test_texts_are_escaped(html, page):
    assert HOSTILE not in html
    assert "<script>alert" not in html
    assert "<b>mountain" not in html
    assert any(HOSTILE in text for text in page.text)


def test_names_are_escaped_everywhere(tmp_path):
    entry = quickstart(1, 1)[0]
    bad = '"><script>alert(1)</script>'
    entry |= {"key": bad, "name": bad, "labels": {"family": bad, "regime": bad, "role": "student"}}
    other = entry | {"key": "c", "labels": entry["labels"] | {"role": "control"}, "name": "c", "identity": "0" * 16}
    later = entry | {"key": bad + "1", "generation": 1, "parents": [{"key": bad, "role": bad}], "identity": "1" * 16}
    made = record(entry, data=[{"name": bad, bad: bad}], device=bad, curve=[{"tokens": 1, "loss": 2.0}])
    run = write_run(tmp_path, [entry, other, later], [], description=bad)
    for name, one in (("a", made), ("b", record(other)), ("c", record(later, curve=made["curve"]))):
        (run / "nodes" / name).mkdir(parents=True)
        (run / "nodes" / name / "record.json").write_text(json.dumps(one))
    html = write_report(run).read_text()
    assert "<script>alert" not in html
    assert Page(html).tags.count("script") == 2


def test_sections_have_one_sentence_of_reading_help(html):
    sections = re.findall(r'<section id="([\w-]+)">\s*<h2>[^<]+</h2>\s*<p>[^<]{40,}', html)
    assert sections == ["lineage", "perplexity", "student-control", "diversity", "samples", "predictions", "imitation",
                        "curves", "nodes", "cards"]  # fmt: skip


def test_plots_are_png_files(full_run):
    names = {path.name for path in (full_run / "plots").iterdir()}
    assert names == {"perplexity.png", "student-control.png", "diversity-0.png", "diversity-1.png", "imitation.png",
                     "curves.png"}  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (full_run / "plots").iterdir())


def test_figures_follow_the_theme(html):
    charts = re.findall(r'<svg class="chart".*?</svg>', html, flags=re.S)
    assert len(charts) == 6
    assert all(not re.search(r"#[0-9a-f]{6}\b", re.sub(r'(href="|url\()#[^")]*', "", chart)) for chart in charts)


def test_samples_show_first_middle_and_last_generation_of_one_seed(full_run, page):
    text = "".join(page.text)
    node = next(node for node in load_run(full_run).nodes if node.key == "trigram-replace@10")
    assert " ".join(node.get("samples")[0].split())[:60] in text
    assert not any("generation 7" in part for part in page.text)


def test_next_words_of_teacher_student_and_control_stand_side_by_side(html):
    section = html[html.index('<section id="predictions">') : html.index('<section id="imitation">')]
    assert re.findall(r"<h4>([^<]*)</h4>", section) == ["teacher@0", "student@1", "control@1"] * 3
    assert section.count("<li") == 3 * 3 * 8


def test_next_words_without_a_comparison_are_those_of_the_ends_of_each_series(tmp_path):
    entries = [entry for entry in quickstart(3, 1) if entry["name"].startswith("self") or entry["name"] == "teacher"]
    html = write_report(write_run(tmp_path, entries, [record(entry) for entry in entries])).read_text()
    assert re.findall(r"<h4>([^<]*)</h4>", html)[:3] == ["teacher@0", "self-replace@3", "self-accumulate@3"]
    assert "Dark knowledge" not in html


def test_what_compiling_took_is_the_sum_of_all_nodes(tmp_path, html):
    assert "<b>compiling</b>" in html
    took = [{"seconds": 3.0, "programs": 5, "from_cache": 2}, {"seconds": 1.5, "programs": 1, "from_cache": 1}]
    entries = quickstart()[-2:]
    made = [record(entry, compilation=one) for entry, one in zip(entries, took, strict=True)]
    text = write_report(write_run(tmp_path, entries, made)).read_text()
    assert "<b>compiling</b> 4.5 s, 3 programs, and 3 from the cache" in text


def test_one_node_alone(tmp_path):
    entry = quickstart(1, 1)[0] | {"labels": {}, "name": "only", "key": "only@0"}
    html = write_report(write_run(tmp_path, [entry], [record(entry)])).read_text()
    assert Page(html).open == []
    assert 'id="student-control"' not in html
    assert "only@0" in html


def test_pending_nodes_are_shown_as_pending(tmp_path):
    entries = quickstart(2, 1)
    html = write_report(write_run(tmp_path, entries, [])).read_text()
    assert Page(html).open == []
    assert "0 of " in html
    assert html.count("<small>pending</small>") == len(entries)
    assert list((tmp_path / "plots").iterdir()) == []


def test_a_series_of_which_only_the_ancestor_is_grown_has_no_curve(tmp_path):
    entries = quickstart(2, 1)
    grown = [entry for entry in entries if entry["name"] in ("trigram", "trigram-replace")]
    html = write_report(write_run(tmp_path, entries, [record(entry) for entry in grown])).read_text()
    chart = re.search(r'<svg class="chart".*?</svg>', html, flags=re.S)[0]
    assert ">replace<" in chart
    assert ">accumulate<" not in chart


def test_a_record_with_the_least_fields(tmp_path):
    entry = quickstart(1, 1)[0]
    html = write_report(
        write_run(tmp_path, [entry], [{"key": entry["key"], "identity": entry["identity"]}])
    ).read_text()
    assert "1 of 1" in html


def test_writing_again_replaces_and_leaves_nothing_behind(tmp_path):
    entry = quickstart(1, 1)[0]
    run = write_run(tmp_path, [entry], [record(entry)])
    first, second = write_report(run).read_text(), write_report(run).read_text()
    assert first == second
    assert {path.name for path in run.iterdir()} == {
        "lineage.json", "nodes", "plots", "report.html", "results.json", "results.csv"}  # fmt: skip


def some(generations, seeds, *names):
    """The entries of a quickstart that have these names: every family more is another large figure."""
    return [entry for entry in quickstart(generations, seeds) if entry["name"] in names]


def test_several_runs_stand_on_one_page(tmp_path):
    names = ("trigram", "trigram-replace", "teacher", "student", "control")
    runs = {"one": some(2, 2, *names), "other": some(3, 2, *names)}
    for name, entries in runs.items():
        write_run(tmp_path / name, entries, [record(entry) for entry in entries])
    page = write_report(tmp_path / "one", [tmp_path / "other"], tmp_path / "both")
    html = page.read_text()
    assert page == tmp_path / "both" / "report.html"
    found = Page(html)
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert {"node-one/student@1.s1", "node-other/trigram-replace@3"} <= set(found.ids)
    beside = [unquote(link) for link in found.links if link.endswith("record.json")]
    assert len(beside) == sum(map(len, runs.values()))
    assert all((tmp_path / "both" / link).resolve().is_file() for link in beside)
    alone = write_report(tmp_path / "one").read_text()
    assert html.count('class="verdict') == 2 * alone.count('class="verdict') == 2
    rows = [row for row in html.split("<tr>") if 'scope="row">one/student@1<' in row]
    assert rows
    assert re.search(r"0\.[567]\d* ?\(", rows[0])  # agreement with the teacher


def test_claims_stand_beside_what_was_measured_also_of_several_runs(tmp_path):
    claim = {"says": "<b>copies</b> fade", "source": "somebody & sons", "factor": 1.0, "metric": "perplexity"}
    for name in ("one", "other"):
        entries = some(2, 2, "trigram", "trigram-replace")
        made = [record(entry) for entry in entries]
        for one in made:  # what nothing is claimed of is not drawn
            one["metrics"] = {"perplexity": one["metrics"]["perplexity"]}
        run = write_run(tmp_path / name, entries, made)
        described = json.loads((run / "lineage.json").read_text())
        told = [claim | {"order": ["trigram@0", "trigram-replace@2"]}, claim | {"order": ["trigram@0", "nobody@1"]}]
        (run / "lineage.json").write_text(json.dumps(described | {"claims": told}))
    html = write_report(tmp_path / "one").read_text()
    assert Page(html).open == []
    assert html.count("&lt;b&gt;copies&lt;/b&gt; fade") == 1
    assert "somebody &amp; sons" in html
    results = json.loads((tmp_path / "one" / "results.json").read_text())["claims"]
    assert [one["verdict"] for one in results] == ["holds"]
    both = write_report(tmp_path / "one", [tmp_path / "other"], tmp_path / "both").read_text()
    assert both.count("&lt;b&gt;copies&lt;/b&gt; fade") == 2


def test_several_runs_need_a_folder_and_names_of_their_own(tmp_path):
    run = write_run(tmp_path / "a" / "run", quickstart(1, 1), [])
    same = write_run(tmp_path / "b" / "run", quickstart(1, 1), [])
    with pytest.raises(UserError, match="a report of 2 runs belongs to none of them: name a folder with --to"):
        write_report(run, [same])
    with pytest.raises(UserError, match="two runs are called 'run'"):
        write_report(run, [same], tmp_path / "c")


if CHROMIUM:  # Elsewhere the page is checked as text alone.

    def test_a_browser_sorts_the_table_and_opens_a_box(full_run, html, tmp_path):
        copy = tmp_path / "probe.html"
        copy.write_text(html.replace("</body>", PROBE + "</body>"))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                 f"--user-data-dir={tmp_path}", "--window-size=1200,900"]  # fmt: skip
        command = [CHROMIUM, *flags, "--dump-dom", copy.as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        best = min(load_run(full_run).nodes, key=lambda node: node.metric("perplexity"))
        assert re.search(r"<title>([^<]*)</title>", dom)[1] == f"3 node-{best.key} fits"
