"""The figures of training: the loss of every model, and how a student came to resemble its teacher."""

from collections.abc import Iterator
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from epigone.report.records import Node, Run, finite
from epigone.report.style import MUTED, colour, grid

MOST_PANELS = 24
MOST_STUDENTS = 6
"""Students that are drawn beside their teacher; the records have the others."""


class Line(NamedTuple):
    """One measure of a panel: its name in a record's curve, what the figure calls it, its colour and its stroke."""

    name: str
    label: str
    colour: str
    stroke: str = "-"


IMITATION = {
    "says what its teacher says": (
        Line("agreement_top5", "five best words", colour(5)),
        Line("agreement_top1", "best word", colour(0)),
    ),
    "distance to the teacher, nats": (
        Line("forward_kl", "KL(teacher, student)", colour(1)),
        Line("reverse_kl", "KL(student, teacher)", colour(4)),
    ),
    "surprise at the text, nats": (
        Line("student_cross_entropy", "student", colour(0)),
        Line("teacher_cross_entropy", "teacher", MUTED, "--"),
    ),
    "doubt (entropy), nats": (
        Line("student_entropy", "student", colour(0)),
        Line("teacher_entropy", "teacher", MUTED, "--"),
    ),
}
"""Title of each panel, and its lines."""


def curves_figure(run: Run) -> Figure | None:
    """Training loss against tokens: a panel a name (every lesson has its own loss), a line a node."""
    groups: dict[str, list[tuple[Node, list[tuple[float, float]]]]] = {}
    for node in run.grown:
        if points := curve(node, "loss"):
            groups.setdefault(node.name, []).append((node, points))
    if not groups:
        return None
    shown = dict(list(groups.items())[:MOST_PANELS])
    figure, panels = grid(len(shown), columns=4, height=2.2)
    for axes, (name, nodes) in zip(panels, shown.items(), strict=True):
        _training(axes, nodes)
        axes.set_title(name)
        axes.locator_params(nbins=5)
        axes.set_xlabel("million tokens")
    panels[0].set_ylabel("loss, nats")
    return figure


def _training(axes: Axes, nodes: list[tuple[Node, list[tuple[float, float]]]]) -> None:
    generations = sorted({node.generation for node, _ in nodes})
    named = set()
    for node, points in nodes:
        index = generations.index(node.generation)
        label = f"@{node.generation}" if node.generation not in named and len(generations) > 1 else None
        named.add(node.generation)
        millions, losses = [tokens / 1e6 for tokens, _ in points], [loss for _, loss in points]
        dot = "o" if len(points) == 1 else None
        axes.plot(millions, losses, color=colour(index), linewidth=1.2, alpha=0.85, label=label, marker=dot)
    if len(generations) > 1:
        axes.legend(loc="upper right", fontsize=8.5)


def imitation_figure(run: Run) -> Figure | None:
    """A row a student (a name at its generation), a panel a question, a line a seed; None where no teacher was read."""
    students: dict[str, list[Node]] = {}
    for node in run.grown:
        if curve(node, "forward_kl"):
            students.setdefault(node.group, []).append(node)
    if not students:
        return None
    shown = dict(list(students.items())[:MOST_STUDENTS])
    figure, panels = grid(len(IMITATION) * len(shown), columns=len(IMITATION), height=2.5)
    for row, (group, nodes) in enumerate(shown.items()):
        own = panels[row * len(IMITATION) : (row + 1) * len(IMITATION)]
        for axes, (title, lines) in zip(own, IMITATION.items(), strict=True):
            _imitation(axes, nodes, lines)
            axes.set_title(title, fontsize=9.5)
        own[0].set_ylabel(group)
        own[0].set_ylim(0, 1)
        own[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _imitation(axes: Axes, nodes: list[Node], lines: tuple[Line, ...]) -> None:
    for line in lines:
        for label, points in zip(_once(line.label), (curve(node, line.name) for node in nodes), strict=False):
            millions, values = [tokens / 1e6 for tokens, _ in points], [value for _, value in points]
            dot = "o" if len(points) == 1 else None
            (drawn,) = axes.plot(millions, values, line.stroke, color=line.colour, alpha=0.85, marker=dot, label=label)
            drawn.set_linewidth(1.4)
    axes.locator_params(nbins=5)
    axes.set_xlabel("million tokens")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", fontsize=8.5)


def _once(label: str) -> Iterator[str | None]:
    """A label for the first of many lines."""
    yield label
    while True:
        yield None


def curve(node: Node, name: str, most: int = 150) -> list[tuple[float, float]]:
    """(tokens, value) of one measure of a node's training curve, where it is there and finite, at about `most` points.

    Both ends are kept.
    """
    raw = [(finite(p.get("tokens")), finite(p.get(name))) for p in node.get("curve", [])]
    points = [(tokens, value) for tokens, value in raw if tokens is not None and value is not None]
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]
