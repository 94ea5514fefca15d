"""Flat rows of a run, as results.csv and results.json."""

import csv
import json
import math
from dataclasses import asdict
from io import StringIO
from typing import Any

from epigone.report.records import Node, Run, number
from epigone.report.summaries import Comparison, Series, tried

HEAD = (
    "key", "name", "generation", "seed", "kind", "family", "regime", "role", "identity", "status", "parents",
    "parameters", "tokens", "flops", "seconds", "device", "git_commit", "finished",
)  # fmt: skip


def rows(run: Run) -> list[dict[str, Any]]:
    """One flat dict a node: the head columns, every metric under its own name, theory.NAME, agreement.TEACHER.NAME.

    Numbers stay numbers (inf and nan included); what a record lacks is not in its row.
    """
    return [_row(node) for node in run.nodes]


def _row(node: Node) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(node, name) for name in HEAD[:8]}
    row["regime"] = node.labels.get("regime")
    row["identity"] = node.identity
    row["status"] = "pending" if node.record is None else "grown"
    row["parents"] = " ".join(f"{parent.key}:{parent.role}" for parent in node.parents)
    row |= {name: node.get(name) for name in HEAD[11:]}
    row |= {name: number(value) for name, value in node.get("metrics", {}).items()}
    row |= {f"theory.{name}": number(value) for name, value in node.get("theory", {}).items()}
    for teacher, values in node.get("agreement", {}).items():
        row |= {f"agreement.{teacher}.{name}": number(value) for name, value in values.items()}
    return {name: value for name, value in row.items() if value not in (None, "")}


def results_csv(run: Run) -> str:
    """The rows as CSV: the union of all columns, an empty cell where a row has no value."""
    table = rows(run)
    columns = list(dict.fromkeys([*HEAD, *(name for row in table for name in row)]))
    text = StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def results_json(run: Run, series: list[Series], compared: list[Comparison]) -> str:
    """Rows, generation curves and comparisons as valid JSON: inf and nan are the strings "inf", "-inf", "nan"."""
    table = rows(run)
    results = {
        "name": run.name,
        "description": run.description,
        "epigone": run.version,
        "nodes": table,
        "series": [_series(one, table) for one in series],
        "comparisons": [_comparison(one) for one in compared],
        "claims": [asdict(one) | {"verdict": one.verdict} for one in tried(run)],
        "populations": [asdict(population) for population in run.populations],
    }
    return json.dumps(_plain(results), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _series(series: Series, table: list[dict[str, Any]]) -> dict[str, Any]:
    keys = {node.key for generation in series.generations for node in series.nodes(generation)}
    own = [row for row in table if row["key"] in keys]
    metrics = dict.fromkeys(name for row in own for name in row if name not in HEAD and "." not in name)
    points = {
        name: [{"generation": g, **asdict(value)} for g, value in series.points(name).items()] for name in metrics
    }
    expected = {name: [{"generation": g, "mean": mean} for g, mean in series.theory(name).items()] for name in metrics}
    told = {"theory": {name: line for name, line in expected.items() if line}}
    return {"name": series.name, "family": series.family, "regime": series.regime, "points": points, **told}


def _comparison(one: Comparison) -> dict[str, Any]:
    return {
        "student": one.student,
        "control": one.control,
        "family": one.family,
        "teachers": [teacher.key for teacher in one.teachers],
        "metric": "perplexity",
        "pairs": [{"seed": seed, "student": ours, "control": theirs} for seed, ours, theirs in one.pairs],
        "difference": one.difference,
        "interval_95": None if one.low is None else [one.low, one.high],
        "verdict": one.verdict,
        "gap_closed": asdict(one.gap_closed) if one.gap_closed else None,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
