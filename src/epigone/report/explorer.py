"""What the page needs to step through generations: curves, texts and the fate of words, as JSON for its script."""

import json
import math
from typing import Any

from epigone.report import reading
from epigone.report.plots import DIVERSITY, regimes
from epigone.report.records import Node, Run
from epigone.report.summaries import Series

MOST_SERIES = 32
"""Series that can be stepped through; the records have the others."""

LABELS = {"perplexity": "held-out perplexity", **DIVERSITY}


def exploration(run: Run, series: list[Series]) -> str:
    """A JSON object that may stand inside a script element; empty where no series has two generations."""
    order = regimes(series)
    told = [_series(one, order[one.regime]) for one in series[:MOST_SERIES]]
    told = [one for one in told if len(one["generations"]) > 1]
    if not told:
        return ""
    known = {name for one in told for name in one["points"]}
    labels = {name: LABELS[name] for name in LABELS if name in known}
    others = sorted(known - set(labels))
    data = {"metrics": [[name, text] for name, text in labels.items()] + [[name, name] for name in others],
            "series": told}  # fmt: skip
    return json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _series(one: Series, colour: int) -> dict[str, Any]:
    """One series: its points over all seeds, and the texts and words of its lowest seed."""
    seed, chain = next(iter(one.chains.items()))
    grown = [node for node in chain if node.record is not None]
    names = sorted({name for node in grown for name in node.get("metrics", {})})
    points = {name: _finite({g: (p.mean, p.low, p.high) for g, p in one.points(name).items()}) for name in names}
    theory = {name: _finite({g: (mean,) for g, mean in one.theory(name).items()}) for name in names}
    return {
        "title": f"{one.family} · {one.regime}",
        "family": one.family,
        "colour": colour % 7,
        "dash": colour // 7 % 3,
        "seed": seed,
        "generations": [node.generation for node in grown],
        "points": {name: line for name, line in points.items() if line},
        "theory": {name: line for name, line in theory.items() if line},
        "samples": {node.generation: reading.clipped_samples(node) for node in grown},
        "words": [[str(word), int(count)] for word, count in grown[0].get("watched", [])] if grown else [],
        "lost": _lost_for_good(grown),
    }


def _finite(line: dict[int, tuple[float, ...]]) -> list[list[float]]:
    return [[g, *(round(v, 6) for v in values)] for g, values in line.items() if all(map(math.isfinite, values))]


def _lost_for_good(chain: list[Node]) -> dict[int, list[str]]:
    """generation -> watched words that its text lacks, and every later one's."""
    found: dict[int, list[str]] = {}
    gone: set[str] | None = None
    for node in reversed(chain):
        lost = {str(word) for word in node.get("lost", [])}
        gone = lost if gone is None else gone & lost
        found[node.generation] = sorted(gone)
    return found
