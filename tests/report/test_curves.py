"""Figures of training: whose lines are drawn, and from which points."""

import math

from report.synthetic_run import quickstart, record, write_run

from epigone.report.curves import IMITATION, curve, imitation_figure
from epigone.report.records import load_run


def loaded(folder, seeds=2, **changes):
    entries = [e for e in quickstart(1, seeds) if e["name"] in ("teacher", "student", "control")]
    return load_run(write_run(folder, entries, [record(entry, **changes) for entry in entries]))


def test_a_curve_has_the_points_that_have_the_measure(tmp_path):
    points = [
        {"tokens": 10, "loss": 3.0},
        {"tokens": 20, "loss": 2.0, "forward_kl": 1.5},
        {"tokens": 30, "loss": math.inf, "forward_kl": "nan"},
        {"tokens": 40, "loss": 1.0, "forward_kl": 0.0},
    ]
    node = loaded(tmp_path, curve=points).grown[0]
    assert curve(node, "loss") == [(10, 3.0), (20, 2.0), (40, 1.0)]
    assert curve(node, "forward_kl") == [(20, 1.5), (40, 0.0)]
    assert curve(node, "agreement_top1") == []


def test_a_long_curve_is_thinned_and_keeps_its_ends(tmp_path):
    node = loaded(tmp_path, curve=[{"tokens": i, "loss": float(i)} for i in range(1001)]).grown[0]
    thin = curve(node, "loss", most=11)
    assert thin == [(100 * i, 100.0 * i) for i in range(11)]


def test_a_student_has_a_row_and_each_seed_its_lines(tmp_path):
    figure = imitation_figure(loaded(tmp_path))
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == list(IMITATION)
    assert panels[0].get_ylabel() == "student@1"
    for axes, lines in zip(panels, IMITATION.values(), strict=True):
        assert len(axes.lines) == 2 * len(lines)
        assert [text.get_text() for text in axes.get_legend().texts] == [line.label for line in lines]
    (first, second) = (node for node in loaded(tmp_path).grown if node.name == "student")
    best = [line for line in panels[0].lines if line.get_color() == IMITATION["says what its teacher says"][1].colour]
    for line, node in zip(best, (first, second), strict=True):
        assert list(line.get_ydata()) == [value for _, value in curve(node, "agreement_top1")]


def test_without_a_teacher_there_is_no_such_figure(tmp_path):
    assert imitation_figure(loaded(tmp_path, curve=[{"tokens": 1, "loss": 2.0, "student_entropy": 1.0}])) is None
