"""The report of a run: one page that opens from disk, the same numbers as JSON and CSV, and the plots as PNG files."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from epigone.errors import UserError
from epigone.report import box, populations, reading, sections
from epigone.report.explorer import exploration
from epigone.report.formats import probability
from epigone.report.graph import lineage_svg
from epigone.report.plots import draw_all
from epigone.report.records import Run, joined, load_run
from epigone.report.summaries import Comparison, Series, comparisons, generation_series, tried
from epigone.report.tables import results_csv, results_json
from epigone.storage.places import write_whole

HERE = Path(__file__).parent


def write_report(run: Path, beside: Sequence[Path] = (), to: Path | None = None) -> Path:
    """Write report.html, results.json, results.csv and plots/*.png from lineages and records.

    Nodes without a record are shown as pending; records of no node in the lineage are ignored.

    Args:
        run: the directory of a run, with lineage.json and nodes/*/record.json.
        beside: other runs that are shown on the same page; names are told apart by those of the directories.
        to: the folder that is written to; by default the run's.

    Returns:
        The path of report.html, which needs no other file.

    Raises:
        UserError: a directory holds no lineage; several runs and no folder, or runs of one name.
        Fault: a lineage or a record is damaged.
    """
    if beside and to is None:
        raise UserError(f"a report of {1 + len(beside)} runs belongs to none of them: name a folder with --to")
    folder = to or run
    loaded = joined([run, *beside], folder) if beside else load_run(run, folder)
    series, compared = generation_series(loaded), comparisons(loaded)
    figures = draw_all(loaded, series, compared, folder / "plots")
    _replace(folder / "results.json", results_json(loaded, series, compared))
    _replace(folder / "results.csv", results_csv(loaded))
    page = folder / "report.html"
    _replace(page, render(loaded, series, compared, figures))
    return page


def render(run: Run, series: list[Series], compared: list[Comparison], figures: dict[str, str]) -> str:
    """The page as HTML; every text in it is escaped, the drawings are not (they escape their own labels)."""
    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["probability"] = probability
    return environment.get_template("page.html").render(
        run=run,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        figures={name: Markup(svg) for name, svg in figures.items()},
        diversity=[Markup(svg) for name, svg in figures.items() if name.startswith("diversity")],
        lineage=Markup(lineage_svg(run)),
        lessons=sections.lessons(run),
        headlines=sections.headlines(run, series, compared),
        facts=sections.facts(run),
        bands=sections.bands(series),
        not_drawn=sections.not_drawn(series),
        held=populations.held(run),
        outside=box.rows(run),
        watched=box.detectors(run),
        copies=box.copies(run),
        learned_from=box.learned_from(run),
        boxes=box.boxes(run),
        comparisons=[(one, sections.verdict(one), sections.compared_table(run, one)) for one in compared],
        claims=[(one, sections.measured(one), sections.outcome(one)) for one in tried(run)],
        exploration=Markup(exploration(run, series)),
        samples=reading.samples(series),
        loose_samples=reading.loose_samples(run, series),
        predictions=reading.predictions(run, series, compared),
        columns=sections.node_columns(run),
        rows=[(node, sections.node_cells(run, node)) for node in run.nodes],
        cards=sections.cards(run),
    )


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all: a reader never sees half a page."""
    write_whole(path, text.encode("utf-8", errors="replace"))
