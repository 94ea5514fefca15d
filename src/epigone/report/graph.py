"""The lineage as an SVG drawing: columns are generations, rows are names, seeds share a box.

An edge to the next column runs straight; one that skips columns runs along a track below the row of its child and
turns up into it, so that a model taught by all its ancestors shows one rail and not a fan of crossing lines.
"""

import math
from dataclasses import dataclass
from html import escape

from epigone.report.formats import real
from epigone.report.records import Node, Run
from epigone.report.summaries import spread

ROLES = {"teacher": "c2", "text": "c0", "start": "c4", "judge": "c3"}
# Below the child's row and around the middle of a box: two lessons from one parent lie side by side.
_TRACK = {"text": 7.0, "teacher": 11.0, "start": 15.0, "judge": 19.0}
_SHIFT = {"teacher": -5.0, "start": 5.0, "judge": 10.0}
_BOX_W, _BOX_H, _ROW, _TOP, _LEFT, _LETTER = 66.0, 34.0, 67.0, 34.0, 10.0, 6.6


@dataclass(frozen=True)
class Box:
    """All seeds of one name at one generation, with its place in the grid."""

    name: str
    generation: int
    nodes: tuple[Node, ...]
    column: int
    row: int

    @property
    def ident(self) -> str:
        return f"{self.name}@{self.generation}"


@dataclass(frozen=True)
class Layout:
    """Boxes by (name, generation), the rows on which a family begins, and the size in pixels."""

    boxes: dict[tuple[str, int], Box]
    headings: dict[int, str]
    rows: int
    columns: dict[int, int]
    step: float

    @property
    def width(self) -> float:
        return 2 * _LEFT + _BOX_W + 24 + self.step * (len(self.columns) - 1)

    def x(self, box: Box) -> float:
        return _LEFT + self.step * box.column

    def y(self, box: Box) -> float:
        return self.row_y(box.row)

    def row_y(self, row: int) -> float:
        return _TOP + row * _ROW + 22.0 * sum(1 for first in self.headings if first <= row) + 14

    @property
    def height(self) -> float:
        return self.row_y(self.rows - 1) + _BOX_H + 28


def layout(run: Run) -> Layout:
    """Place every (name, generation): a family after the other, in each a name on the first row where it fits."""
    groups: dict[tuple[str, int], list[Node]] = {}
    for node in run.nodes:
        groups.setdefault((node.name, node.generation), []).append(node)
    columns = {g: i for i, g in enumerate(sorted({generation for _, generation in groups}))}
    step = max(_BOX_W + 22, min(150.0, 990 / max(1, len(columns) - 1)))
    rows, headings, total = _rows(groups, columns, step)
    boxes = {(name, g): Box(name, g, tuple(nodes), columns[g], rows[name]) for (name, g), nodes in groups.items()}
    return Layout(boxes, headings, total, columns, step)


def _rows(
    groups: dict[tuple[str, int], list[Node]], columns: dict[int, int], step: float
) -> tuple[dict[str, int], dict[int, str], int]:
    families: dict[str, dict[str, list[int]]] = {}
    for (name, generation), nodes in groups.items():
        families.setdefault(nodes[0].family, {}).setdefault(name, []).append(columns[generation])
    rows: dict[str, int] = {}
    headings: dict[int, str] = {}
    total = 0
    for family, names in families.items():
        headings[total] = family
        free: list[set[int]] = []
        for name, used in names.items():
            wide = math.ceil((len(name) * _LETTER + 8) / step)
            span = set(range(min(used), max(max(used) + 1, min(used) + wide)))
            row = next((i for i, taken in enumerate(free) if not span & taken), len(free))
            if row == len(free):
                free.append(set())
            free[row] |= span
            rows[name] = total + row
        total += len(free)
    return rows, headings, total


def lineage_svg(run: Run) -> str:
    """The drawing as an SVG element; every box links to the row of its first node in the table of nodes."""
    if not run.nodes:
        return ""
    place = layout(run)
    size = f'viewBox="0 0 {place.width:.0f} {place.height:.0f}" style="min-width:{place.width * 0.8:.0f}px;'
    size += f'max-width:{place.width * 1.15:.0f}px"'
    parts = [f'<svg class="lineage" role="img" aria-label="Lineage of {escape(run.name)}" {size}>']
    parts += [_heading(place, row, family) for row, family in place.headings.items()]
    parts += [_axis(place, generation, column) for generation, column in place.columns.items()]
    parts += [_edge(place, source, box, role) for box in place.boxes.values() for source, role in _sources(place, box)]
    first = {name: min(g for other, g in place.boxes if other == name) for name, _ in place.boxes}
    parts += [_box(place, box, named=first[box.name] == box.generation) for box in place.boxes.values()]
    return "\n".join([*parts, "</svg>"])


def _axis(place: Layout, generation: int, column: int) -> str:
    word = "generation " if column == 0 or place.step > 110 else ""
    return f'<text class="axis" x="{_LEFT + _BOX_W / 2 + place.step * column:.0f}" y="16">{word}{generation}</text>'


def _heading(place: Layout, row: int, family: str) -> str:
    y = place.row_y(row) - 26
    line = f'<line class="rule" x1="{_LEFT}" x2="{place.width - _LEFT:.0f}" y1="{y - 15:.0f}" y2="{y - 15:.0f}"/>'
    return line + f'<text class="family" x="{_LEFT}" y="{y:.0f}">{escape(family)}</text>'


def _sources(place: Layout, box: Box) -> list[tuple[Box, str]]:
    at = {node.key: other for other in place.boxes.values() for node in other.nodes}
    found = {(at[p.key].ident, p.role): (at[p.key], p.role) for n in box.nodes for p in n.parents if p.key in at}
    return list(found.values())


def _edge(place: Layout, source: Box, target: Box, role: str) -> str:
    columns = target.column - source.column
    shape = _loop if columns < 1 else _near if columns == 1 else _far
    far = " far" if columns > 1 else ""
    ends = f'data-role="{escape(role)}" data-from="{escape(source.ident)}" data-to="{escape(target.ident)}"'
    return (
        f'<path class="edge{far}" style="stroke:var(--{ROLES.get(role, "muted")})" {ends}'
        f' d="{shape(place, source, target, role)}"><title>{escape(source.ident)} is {escape(role)} of'
        f" {escape(target.ident)}</title></path>"
    )


def _near(place: Layout, source: Box, target: Box, role: str) -> str:
    middle = _BOX_H / 2 + _SHIFT.get(role, 0.0)
    x0, y0 = place.x(source) + _BOX_W, place.y(source) + middle
    x1, y1 = place.x(target), place.y(target) + middle
    # Far apart rows leave steeply, so that the line keeps to the gap between the columns.
    bend = (x1 - x0) * (0.5 if abs(y1 - y0) < _ROW else 0.8)
    return f"M{x0:.1f},{y0:.1f}C{x0 + bend:.1f},{y0:.1f} {x1 - bend:.1f},{y1:.1f} {x1:.1f},{y1:.1f}"


def _far(place: Layout, source: Box, target: Box, role: str) -> str:
    track = place.y(target) + _BOX_H + _TRACK.get(role, 7.0)
    end = place.x(target) + _BOX_W / 2 - 12
    tail = f"H{end - 8:.1f}Q{end:.1f},{track:.1f} {end:.1f},{place.y(target) + _BOX_H:.1f}"
    if source.row == target.row:
        x0, y0 = place.x(source) + _BOX_W / 2 + 12, place.y(source) + _BOX_H
        return f"M{x0:.1f},{y0:.1f}Q{x0:.1f},{track:.1f} {x0 + 8:.1f},{track:.1f}{tail}"
    x0, y0 = place.x(source) + _BOX_W, place.y(source) + _BOX_H / 2
    gap = place.x(source) + place.step
    return f"M{x0:.1f},{y0:.1f}C{gap:.1f},{y0:.1f} {x0:.1f},{track:.1f} {gap:.1f},{track:.1f}{tail}"


def _loop(place: Layout, source: Box, target: Box, role: str) -> str:
    x0, y0 = place.x(source) + _BOX_W, place.y(source) + _BOX_H / 2
    x1, y1 = place.x(target) + _BOX_W, place.y(target) + _BOX_H / 2
    return f"M{x0:.1f},{y0:.1f}C{x0 + 24:.1f},{y0:.1f} {x1 + 24:.1f},{y1:.1f} {x1:.1f},{y1:.1f}"


def _box(place: Layout, box: Box, named: bool) -> str:
    x, y, middle = place.x(box), place.y(box), place.x(box) + _BOX_W / 2
    grown = [node for node in box.nodes if node.record is not None]
    state = "" if len(grown) == len(box.nodes) else " pending"
    keys = " ".join(node.key for node in box.nodes)
    label = f'<text class="name" x="{x:.1f}" y="{y - 6:.1f}">{escape(box.name)}</text>' if named else ""
    seeds = f' <tspan class="seeds">×{len(box.nodes)}</tspan>' if len(box.nodes) > 1 else ""
    dot = (
        f'<circle class="real" cx="{x + 5:.1f}" cy="{y + 5:.1f}" r="2.5"/>'
        if any(node.reads_real_text for node in grown)
        else ""
    )
    return (
        f'<a class="box{state}" href="#node-{escape(box.nodes[0].key)}"'
        f' data-box="{escape(box.ident)}" data-keys="{escape(keys)}">{label}'
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{_BOX_W}" height="{_BOX_H}" rx="7"/>{dot}'
        f'<text x="{middle:.1f}" y="{y + 14.5:.1f}">@{box.generation}{seeds}</text>'
        f'<text class="value" x="{middle:.1f}" y="{y + 27.5:.1f}">{escape(_value(box, grown))}</text>'
        f"<title>{escape(box.ident)}: {escape(keys)}</title></a>"
    )


def _value(box: Box, grown: list[Node]) -> str:
    if not grown:
        return "pending"
    if len(grown) < len(box.nodes):
        return f"{len(grown)} of {len(box.nodes)}"
    value = spread(node.metric("perplexity") for node in grown)
    return real(value.mean) if value else "grown"
