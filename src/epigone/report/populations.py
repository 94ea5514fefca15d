"""Populations: what their members have in common, against each factor in which they differ."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from epigone.report.records import Population, Run
from epigone.report.style import colour, grid, heat
from epigone.report.summaries import Spread, spread

SAMENESS = {
    "effective_models": "models that they are worth",
    "error_kappa": "wrong in the same way (kappa)",
    "capa_normalised": "answers alike (CAPA, normalised)",
    "systemic_failure_ratio": "all fail: times what chance gives",
    "union_distinct_2": "pairs of words in all they write",
    "union_vendi": "different texts of all they write",
}
"""Measures that are drawn, in this order; others are in results.json."""


class Cells(NamedTuple):
    """One measure over two factors: mean over repetitions, None where no population is."""

    rows: list[float]
    columns: list[float]
    means: list[list[float | None]]


def measured(run: Run) -> list[Population]:
    """The populations that were held against each other."""
    return [population for population in run.populations if population.metrics]


def factors(populations: Iterable[Population]) -> list[str]:
    """The factors in which populations differ, in the order in which they were named."""
    seen: dict[str, set[float]] = {}
    for population in populations:
        for name, value in population.factors.items():
            seen.setdefault(name, set()).add(value)
    return [name for name, values in seen.items() if len(values) > 1]


def usual(populations: list[Population]) -> dict[str, float]:
    """The most frequent value of each factor: what is held where another one is looked at."""
    names = factors(populations)
    counts = {name: Counter(p.factors[name] for p in populations if name in p.factors) for name in names}
    return {name: count.most_common(1)[0][0] for name, count in counts.items()}


def along(populations: list[Population], factor: str, metric: str) -> dict[float, Spread]:
    """value of a factor -> spread of a measure over repetitions, all other factors at their usual value."""
    held = {name: value for name, value in usual(populations).items() if name != factor}
    values = sorted({p.factors[factor] for p in populations if factor in p.factors})
    found = {}
    for value in values:
        wanted = held | {factor: value}
        if (one := _spread(populations, wanted, metric)) is not None:
            found[value] = one
    return found


def cells(populations: list[Population], row: str, column: str, metric: str) -> Cells:
    """A measure over two factors, all others at their usual value."""
    held = {name: value for name, value in usual(populations).items() if name not in (row, column)}
    rows, columns = (sorted({p.factors[name] for p in populations if name in p.factors}) for name in (row, column))

    def mean(a: float, b: float) -> float | None:
        found = _spread(populations, held | {row: a, column: b}, metric)
        return None if found is None else found.mean

    means = [[mean(a, b) for b in columns] for a in rows]
    kept_rows = [i for i, line in enumerate(means) if any(value is not None for value in line)]
    kept = [j for j in range(len(columns)) if any(means[i][j] is not None for i in kept_rows)]
    left = [[means[i][j] for j in kept] for i in kept_rows]
    return Cells([rows[i] for i in kept_rows], [columns[j] for j in kept], left)


def _spread(populations: list[Population], wanted: dict[str, float], metric: str) -> Spread | None:
    same = [p for p in populations if all(p.factors.get(name) == value for name, value in wanted.items())]
    return spread(population.metric(metric) for population in same)


def map_figure(run: Run) -> Figure | None:
    """A panel a measure: the first two factors in which populations differ, darker where the value is larger."""
    populations = measured(run)
    names = factors(populations)
    drawn = [metric for metric in SAMENESS if any(p.metric(metric) is not None for p in populations)]
    if len(names) < 2 or not drawn:
        return None
    figure, panels = grid(len(drawn), columns=3, height=3.0)
    for axes, metric in zip(panels, drawn, strict=True):
        found = cells(populations, names[0], names[1], metric)
        heat(axes, found.means, [f"{v:g}" for v in found.rows], [f"{v:g}" for v in found.columns])
        axes.set_title(SAMENESS[metric], fontsize=9.5)
        axes.set_ylabel(names[0])
        axes.set_xlabel(names[1])
    return figure


def factors_figure(run: Run) -> Figure | None:
    """A row a factor, a panel a measure: mean over repetitions, and a band from the lowest to the highest."""
    populations = measured(run)
    names = factors(populations)
    drawn = [metric for metric in SAMENESS if any(p.metric(metric) is not None for p in populations)][:4]
    if not names or not drawn:
        return None
    figure, panels = grid(len(names) * len(drawn), columns=len(drawn), height=2.2)
    for row, factor in enumerate(names):
        for axes, metric in zip(panels[row * len(drawn) :], drawn, strict=False):
            _line(axes, along(populations, factor, metric), row)
            axes.set_title(SAMENESS[metric], fontsize=9.5)
            axes.set_xlabel(factor)
    return figure


def _line(axes: Axes, points: dict[float, Spread], index: int) -> None:
    at, spreads = list(points), list(points.values())
    axes.plot(at, [one.mean for one in spreads], color=colour(index), marker="o")
    if any(one.count > 1 for one in spreads):
        low, high = [one.low for one in spreads], [one.high for one in spreads]
        axes.fill_between(at, low, high, color=colour(index), alpha=0.18, linewidth=0)
    axes.set_xticks(at, [f"{value:g}" for value in at])
    axes.locator_params(axis="y", nbins=5)


def held(run: Run) -> str:
    """In words, what is held where another factor is looked at."""
    return ", ".join(f"{name} {value:g}" for name, value in usual(measured(run)).items())
