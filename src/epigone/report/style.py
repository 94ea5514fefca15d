"""One look for every figure: a PNG file for papers, and the same drawing as SVG that follows the page's theme.

The SVG is drawn in the colours of the light theme; each is then replaced by a CSS variable, so that the page's
style sheet decides, and a dark page has legible figures.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from epigone.report.formats import real
from epigone.storage.places import write_whole

INK, MUTED, LINE = "#1c2127", "#66707b", "#dfe3e8"

# Okabe & Ito's palette, safe for colour-blind readers; its yellow is too pale on white and left out.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

DPI = 130
"""Pixels an inch of the PNG files."""

_RC: dict[Any, Any] = {
    "font.size": 10, "font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "epigone",
    "text.color": INK, "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "axes.titlecolor": INK,
    "xtick.color": MUTED, "ytick.color": MUTED, "axes.titlesize": 10.5, "axes.titlelocation": "left",
    "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9.5,
    "lines.linewidth": 1.8, "lines.markersize": 4.5, "text.parse_math": False,
}  # fmt: skip


def colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def stroke(index: int) -> str:
    """Solid lines for the first round through the palette, dashed and dotted ones for the next."""
    return ("-", "--", ":")[index // len(PALETTE) % 3]


@contextmanager
def house_style() -> Iterator[None]:
    """matplotlib settings of the report; figures must be made, filled and saved inside."""
    with matplotlib.rc_context(_RC):
        yield


def grid(panels: int, columns: int, width: float = 11.5, height: float = 2.5) -> tuple[Figure, list[Axes]]:
    """A figure of `panels` axes, at most `columns` a row; width of the whole, height of one row, in inches."""
    columns = max(1, min(columns, panels))
    figure_rows = -(-panels // columns)
    figure = Figure(figsize=(width, height * figure_rows), layout="constrained")
    cells = figure.subplots(figure_rows, columns, squeeze=False).ravel().tolist()
    for unused in cells[panels:]:
        unused.set_visible(False)
    return figure, cells[:panels]


def heat(axes: Axes, values: list[list[float | None]], rows: list[str], columns: list[str]) -> None:
    """A table of cells, stronger in colour where the value is larger, each with its number; None is left open.

    The colour is one that the page sees through, so that the numbers are legible on a dark page too.
    """
    known = [value for line in values for value in line if value is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if value is None:
                continue
            strength = 0.08 + 0.6 * ((value - low) / (high - low) if high > low else 0.0)
            axes.add_patch(Rectangle((j, i), 1, 1, facecolor=colour(0), alpha=strength, linewidth=0))
            axes.text(j + 0.5, i + 0.5, real(value), ha="center", va="center", color=INK, fontsize=9.5)
    axes.set_xlim(0, len(columns))
    axes.set_ylim(0, len(rows))
    axes.set_xticks([j + 0.5 for j in range(len(columns))], columns)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
    axes.grid(visible=False)
    axes.tick_params(length=0)


def whole_numbers(axes: Axes, most: int = 11) -> None:
    """Ticks of generations: whole numbers only, at most `most` steps."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=most, min_n_ticks=1))


def fit_scale(axes: Axes, values: list[float], ratio: float = 3.0) -> None:
    """A logarithmic axis with plain numbers where positive values span more than `ratio`."""
    if not values or min(values) <= 0 or max(values) < ratio * min(values):
        return
    axes.set_yscale("log")
    span = max(values) / min(values)
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if span < 12 else (1.0, 2.0, 5.0) if span < 300 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}".replace(",", " ")))
    axes.yaxis.set_minor_formatter(NullFormatter())


def save(figure: Figure, name: str, directory: Path, label: str) -> str:
    """Write `directory/name.png`; return the figure as an inline SVG element with the accessible name `label`."""
    figure.set_dpi(DPI)
    if (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)
    figure.set_layout_engine(None)  # all is in its place; a figure with a layout is drawn twice for each file
    figure.savefig(_buffer := BytesIO(), format="png", dpi=DPI, facecolor="white")
    write_whole(directory / f"{name}.png", _buffer.getvalue())
    text = StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(text.getvalue(), name, label)


def _themed(svg: str, name: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # Ids are unique in one drawing only, and a page holds several.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", svg)
    svg = re.sub(r"font: (?:\d+ )?([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    named = {INK: "ink", MUTED: "muted", LINE: "line"} | {value: f"c{i}" for i, value in enumerate(PALETTE)}
    for value, variable in named.items():
        svg = svg.replace(value, f"var(--{variable})")
    safe = label.replace("&", "and").replace('"', "'").replace("<", "").replace(">", "")
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg class="chart" role="img" aria-label="{safe}" \1>', svg)
