"""The figures of a report. Each takes a run and returns {name: SVG}, empty where there is nothing to draw."""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from epigone.report import box, populations
from epigone.report.curves import curves_figure, imitation_figure
from epigone.report.formats import real
from epigone.report.records import Run, finite
from epigone.report.style import INK, MUTED, colour, fit_scale, grid, house_style, marker, save, stroke, whole_numbers
from epigone.report.summaries import Comparison, Series, Spread
from epigone.storage.places import on_store

# Metrics of coherence and diversity in the order in which they are drawn; others are in the table only.
DIVERSITY = {
    "learned_heterozygosity": "text learned: two words differ",
    "words_left": "words of generation 0 left in it",
    "triples_left": "triples of generation 0 left in it",
    "distinct_1": "distinct-1: different words / words",
    "distinct_2": "distinct-2: different pairs / pairs",
    "distinct_3": "distinct-3: different triples / triples",
    "vocabulary": "vocabulary left: different words",
    "seen_2": "seen pairs (1 - novelty)",
    "seen_3": "seen triples (1 - novelty)",
    "seen_4": "seen 4-grams (1 - novelty)",
    "copied": "copied from real text",
    "repetition": "repetition within a text",
    "self_repetition": "repetition between texts",
    "self_bleu": "self-BLEU: texts are like others",
    "vendi": "Vendi: different texts of 150",
    "mauve": "MAUVE by words: like real text",
    "information_1": "what a word tells of the next, nats",
    "information_4": "what it tells of the fourth, nats",
    "sentence_length": "length of a text, words",
    "real_perplexity": "its text to generation 0: perplexity",
    "judge_bits_per_byte": "its text to the judge: bits a byte",
    "judge_vendi": "Vendi by the judge: texts of 100",
    "judge_mauve": "MAUVE by the judge: like real text",
}

THEORY = "theory"
"""Label of what closed forms expect."""


def draw_all(run: Run, series: list[Series], compared: list[Comparison], directory: Path) -> dict[str, str]:
    """Every figure that the records allow: writes directory/NAME.png, returns {NAME: inline SVG}."""
    if not on_store(directory):
        directory.mkdir(parents=True, exist_ok=True)
    grouped = families(series).values()
    with house_style():
        figures = {
            "perplexity": perplexity_figure(series),
            "student-control": comparison_figure(compared),
            **{f"diversity-{i}": diversity_figure(group, regimes(series)) for i, group in enumerate(grouped)},
            "populations": populations.map_figure(run),
            "factors": populations.factors_figure(run),
            "box": box.figure(run),
            "imitation": imitation_figure(run),
            "curves": curves_figure(run),
        }
        labels = {"perplexity": "Held-out perplexity against generation", "student-control": "Student against control",
                  "imitation": "Student beside teacher, against tokens",
                  "populations": "What populations have in common", "factors": "What they have in common, by factor",
                  "box": "Students outside a prompt box, by what they learned from",
                  "curves": "Training loss against tokens"}  # fmt: skip
        return {
            name: save(figure, name, directory, labels.get(name, "Coherence and diversity against generation"))
            for name, figure in figures.items()
            if figure is not None
        }


def families(series: list[Series]) -> dict[str, list[Series]]:
    """Series by family, in the order of the lineage."""
    groups: dict[str, list[Series]] = {}
    for one in series:
        groups.setdefault(one.family, []).append(one)
    return groups


def regimes(series: list[Series]) -> dict[str, int]:
    """The colour index of each regime, the same in all figures."""
    return {regime: i for i, regime in enumerate(dict.fromkeys(one.regime for one in series))}


def perplexity_figure(series: list[Series]) -> Figure | None:
    """Held-out perplexity against generation: a panel a family, a line a regime, a band from lowest to highest seed."""
    drawn = {name: group for name, group in families(series).items() if _has(group, "perplexity")}
    if not drawn:
        return None
    figure, panels = grid(len(drawn), columns=2, height=3.7)
    for axes, (name, group) in zip(panels, drawn.items(), strict=True):
        _curves(axes, group, regimes(series), "perplexity")
        axes.set_title(name)
        axes.set_xlabel("generation")
        axes.legend(loc="best" if len(group) > 4 else "upper left", ncols=1 + len(group) // 7)
    panels[0].set_ylabel("held-out perplexity (lower is better)")
    return figure


def diversity_figure(group: list[Series], order: dict[str, int]) -> Figure | None:
    """Small multiples of coherence and diversity for the series of one family."""
    metrics = [name for name in DIVERSITY if _has(group, name)]
    if not metrics:
        return None
    figure, panels = grid(len(metrics), columns=4, height=2.05)
    for axes, metric in zip(panels, metrics, strict=True):
        _curves(axes, group, order, metric, log=False)
        whole_numbers(axes, most=5)
        axes.set_title(DIVERSITY[metric], fontsize=9.5)
        axes.locator_params(axis="y", nbins=5)
    labelled = (dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True)) for axes in panels)
    legend = {name: handle for named in labelled for name, handle in named.items()}
    names = sorted(legend, key=lambda name: name == THEORY)
    told = [name if name == THEORY else f"{group[0].family} · {name}" for name in names]
    figure.legend([legend[name] for name in names], told, loc="outside upper left", ncols=5)
    return figure


def _has(group: list[Series], metric: str) -> bool:
    points = ((g > one.generations[0], p) for one in group for g, p in one.points(metric).items())
    return any(own and math.isfinite(point.mean) for own, point in points)


def _curves(axes: Axes, group: list[Series], order: dict[str, int], metric: str, log: bool = True) -> None:
    values: list[float] = []
    for one in group:
        points = {g: p for g, p in one.points(metric).items() if math.isfinite(p.mean)}
        # A series of which only the ancestor is grown has no curve yet.
        if points and max(points) > one.generations[0]:
            _line(axes, one.regime, points, order[one.regime])
            _theory(axes, one, metric)
            values += [value for p in points.values() for value in (p.low, p.high)]
    whole_numbers(axes)
    if not any(values):
        axes.set_ylim(0, 1)
    if log:
        fit_scale(axes, values)


def _line(axes: Axes, label: str, points: dict[int, Spread], index: int) -> None:
    generations, spreads = list(points), list(points.values())
    means = [p.mean for p in spreads]
    axes.plot(generations, means, color=colour(index), marker=marker(index), linestyle=stroke(index), label=label)
    if any(p.count > 1 for p in spreads):
        low, high = [p.low for p in spreads], [p.high for p in spreads]
        axes.fill_between(generations, low, high, color=colour(index), alpha=0.18, linewidth=0)


def _theory(axes: Axes, one: Series, metric: str) -> None:
    """What closed forms expect: thin and dotted over the line, in ink, so that it shows on top of what it explains."""
    expected = {g: value for g, value in one.theory(metric).items() if math.isfinite(value)}
    if len(expected) > 1:
        named = THEORY not in axes.get_legend_handles_labels()[1]
        label = THEORY if named else None
        axes.plot(list(expected), list(expected.values()), ":", color=INK, linewidth=1.3, label=label, zorder=4)


def comparison_figure(compared: list[Comparison]) -> Figure | None:
    """For each comparison: each seed's pair with the teacher's line, and the mean difference with its interval."""
    if not compared:
        return None
    figure = Figure(figsize=(11.5, 3.4 * len(compared)), layout="constrained")
    panels = figure.subplots(len(compared), 2, squeeze=False, width_ratios=(3, 2)).tolist()
    for (pairs, difference), one in zip(panels, compared, strict=True):
        _pairs(pairs, one)
        _difference(difference, one)
    return figure


def _pairs(axes: Axes, one: Comparison) -> None:
    for _, ours, theirs in one.pairs:
        axes.plot([0, 1], [theirs, ours], color=MUTED, linewidth=1, alpha=0.7)
    axes.plot([0] * len(one.pairs), [p[2] for p in one.pairs], "s", color=colour(1), markersize=7)
    axes.plot([1] * len(one.pairs), [p[1] for p in one.pairs], "o", color=colour(0), markersize=7)
    for teacher in one.teachers:
        if (value := finite(teacher.metric("perplexity"))) is not None:
            axes.axhline(value, color=colour(2), linestyle="--", linewidth=1.4)
            note = f"{teacher.key}  {real(value)}"
            axes.annotate(note, (1.45, value), xytext=(0, 4), textcoords="offset points", ha="right", color=INK)
    axes.set_xticks([0, 1], [one.control, one.student])
    axes.set_xlim(-0.5, 1.5)
    axes.margins(y=0.15)
    axes.set_title("each line is one seed")
    axes.set_ylabel("held-out perplexity")


def _difference(axes: Axes, one: Comparison) -> None:
    axes.axvline(0, color=INK, linewidth=1)
    seeds = [ours - theirs for _, ours, theirs in one.pairs]
    axes.plot(seeds, [0.75] * len(seeds), "o", color=MUTED, markersize=6, alpha=0.8)
    if one.low is not None and one.high is not None:
        reach = [[one.difference - one.low], [one.high - one.difference]]
        axes.errorbar([one.difference], [0.35], xerr=reach, fmt="D", color=colour(0), capsize=5, linewidth=2)
    axes.set_ylim(0, 1.1)
    axes.set_yticks([0.75, 0.35], ["seeds", "mean, 95 %"])
    axes.set_title("student minus control (left of 0: student better)")
    axes.set_xlabel("difference in perplexity")
