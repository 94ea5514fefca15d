"""What the page says in numbers and tables: headlines, comparisons, nodes and data cards."""

import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from epigone.report.formats import count, duration, real
from epigone.report.records import Node, Run, finite, number
from epigone.report.summaries import Comparison, Series, Tried, spread

# Headlines are to be read at a glance: a population of fifty has its curves in the plot.
_GROWTHS = 8
# Metrics with a column of their own in the table of nodes.
_COLUMNS = {"perplexity": "perplexity", "bits_per_byte": "bits/byte", "ece": "calib. error",
            "distinct_2": "distinct-2", "vocabulary": "vocabulary"}  # fmt: skip


class Headline(NamedTuple):
    """One number of the header: the value, what it is, and a quiet line below."""

    value: str
    label: str
    note: str
    tone: str = ""


class Cell(NamedTuple):
    """A table cell: the text, and the number by which the column sorts (None for text and for absent values)."""

    text: str
    sort: float | None = None


def headlines(run: Run, series: list[Series], compared: list[Comparison]) -> list[Headline]:
    """The numbers that a reader takes away, all computed from the records."""
    found = [_comparison_headline(one) for one in compared]
    found += [headline for one in series if (headline := _growth_headline(one))][:_GROWTHS]
    seconds = [value for node in run.grown if (value := finite(node.get("seconds"))) is not None]
    tokens = [value for node in run.grown if (value := finite(node.get("tokens"))) is not None]
    if seconds:
        note = f"{count(math.fsum(tokens))} tokens learned" if tokens else "sum over nodes"
        found.append(Headline(duration(math.fsum(seconds)), "growing time, sum over nodes", note))
    note = "all done" if len(run.grown) == len(run.nodes) else "the others are pending"
    found.append(Headline(f"{len(run.grown)} of {len(run.nodes)}", "nodes grown", note))
    return found


def _comparison_headline(one: Comparison) -> Headline:
    label = f"perplexity, {one.student} minus {one.control}"
    tone = {"better": "good", "worse": "bad"}.get(one.verdict, "")
    return Headline(_signed(one.difference), label, verdict(one), tone)


def verdict(one: Comparison) -> str:
    """A comparison in words, with its interval, the number of seeds, and how near to the teacher the student comes."""
    return _difference(one) + _gap(one)


def _gap(one: Comparison) -> str:
    gap = one.gap_closed
    if gap is None:
        return ""
    between = f" ({gap.low:.0%} to {gap.high:.0%})" if gap.count > 1 else ""
    if gap.mean < 0:
        return f"; no part of the gap to the teacher is closed: it is {-gap.mean:.0%} wider{between}, in nats per token"
    return f"; {gap.mean:.0%}{between} of the gap to the teacher is closed, in nats per token"


def _difference(one: Comparison) -> str:
    if one.low is None or one.high is None:
        return "one seed: no interval, no verdict"
    interval = f"95 % interval {_signed(one.low)} to {_signed(one.high)}, {len(one.pairs)} seeds"
    words = {"tie": "a tie", "better": "the student is better", "worse": "the control is better"}
    return f"{words[one.verdict]}: {interval}"


def outcome(one: Tried) -> str:
    """Whether a claim holds here, and in how many seeds."""
    seeds = "one seed" if one.seeds == 1 else f"{one.holding} of {one.seeds} seeds"
    where = {"holds": "holds", "holds on average": "holds on average", "does not hold": "does not hold at this scale"}
    return f"{where[one.verdict]}: {seeds}"


def measured(one: Tried) -> str:
    """What a claim's groups came to, in its order: mean, and lowest to highest seed."""
    parts = []
    for group, found in zip(one.labels, one.measured, strict=True):
        between = f" ({real(found.low)}–{real(found.high)})" if found.count > 1 else ""
        parts.append(f"{group} {real(found.mean)}{between}")
    sign = " < " if one.claim.factor == 1 else f" < {one.claim.factor:g} × "
    return sign.join(parts) if one.verdict != "does not hold" else ", ".join(parts)


def _signed(value: float) -> str:
    return ("+" if value > 0 else "−" if value < 0 else "") + real(abs(value))


def _growth_headline(one: Series) -> Headline | None:
    points, of = one.points("perplexity"), "perplexity"
    if not any(math.isfinite(point.mean) for point in points.values()):
        points, of = one.points("words_left"), "words of the first text left"
    if len(points) < 2:
        return None
    first, last = min(points), max(points)
    start, end = points[first].mean, points[last].mean
    ratio = f"×{end / start:.2f}" if math.isfinite(end) and math.isfinite(start) and start > 0 else real(end)
    seeds = f"{points[last].count} seeds" if points[last].count > 1 else "1 seed"
    note = f"{real(start)} → {real(end)}, generation {first} to {last}, {seeds}"
    return Headline(ratio, f"{of}, {one.family} · {one.regime}", note)


def lessons(run: Run) -> list[tuple[str, str]]:
    """The key to the drawing of the lineage: (role, meaning) of what occurs in it."""
    meanings = {"teacher": "scores of a teacher", "text": "text that a model wrote", "start": "weights to start from"}
    meanings |= {"judge": "choice of the text"}
    used = {parent.role for node in run.nodes for parent in node.parents}
    found = [(role, meaning) for role, meaning in meanings.items() if role in used]
    if any(node.reads_real_text for node in run.grown):
        found.append(("real", "learns real text"))
    return found


def not_drawn(series: list[Series]) -> list[str]:
    """Points that a perplexity plot cannot show, because a mean is infinite or not a number."""
    found = []
    for one in series:
        points = one.points("perplexity")
        missing = {g: real(point.mean) for g, point in points.items() if not math.isfinite(point.mean)}
        if len(missing) == len(points) and len(set(missing.values())) == 1:
            found.append(f"{one.family} · {one.regime}: {missing.popitem()[1]} at every generation")
        else:
            found += [f"{one.family} · {one.regime} @{g}: {value}" for g, value in missing.items()]
    return found


def bands(series: list[Series]) -> str:
    """How many seeds a band spans, in words."""
    counts = sorted({p.count for one in series for p in one.points("perplexity").values()})
    if not counts or counts[-1] < 2:
        return "There is one seed, so there is no band."
    some = f"{counts[-1]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"The band reaches from the lowest to the highest of {some} seeds; the line is their mean."


def compared_table(run: Run, one: Comparison) -> list[tuple[str, list[str]]]:
    """Rows of teacher, student, control: perplexity, calibration, agreement with the teacher; mean (lowest-highest)."""
    names = [*dict.fromkeys(teacher.group for teacher in one.teachers), one.student, one.control]
    rows = []
    for name in names:
        nodes = [node for node in run.grown if node.group == name]
        agreed = [_agreement(node, one) for node in nodes]
        cells = [_range(n.metric("perplexity") for n in nodes), _range(n.metric("ece") for n in nodes), _range(agreed)]
        rows.append((name, [str(len(nodes)), *cells]))
    return rows


def _agreement(node: Node, one: Comparison) -> float | None:
    told = node.get("agreement", {})
    values = (number(told.get(teacher.own_key, {}).get("top1")) for teacher in one.teachers)
    return next((value for value in values if value is not None), None)


def _range(values: Iterable[float | None]) -> str:
    found = spread(values)
    if found is None:
        return ""
    return real(found.mean) + (f" ({real(found.low)}–{real(found.high)})" if found.count > 1 else "")


def node_columns(run: Run) -> list[str]:
    """Headings of the table of nodes; a metric's column is there if any node has it."""
    return ["node", "parents", "parameters", "tokens", "FLOPs", "time", *(_COLUMNS[name] for name in _shown(run))]


def _shown(run: Run) -> list[str]:
    return [name for name in _COLUMNS if any(node.metric(name) is not None for node in run.grown)]


def node_cells(run: Run, node: Node) -> list[Cell]:
    """A row of the table of nodes, but for the node's own name."""
    parents = _many([f"{parent.key} ({parent.role})" for parent in reversed(node.parents)], most=2)
    sizes = [number(node.get(name)) for name in ("parameters", "tokens", "flops")]
    cells = [Cell(parents), *(Cell(count(size), size) for size in sizes)]
    seconds = number(node.get("seconds"))
    cells.append(Cell(duration(seconds), seconds))
    return cells + [Cell(real(value), value) for value in (node.metric(name) for name in _shown(run))]


def facts(run: Run) -> list[tuple[str, str]]:
    """Commit, device, versions and time of the records, several values joined."""
    found = {
        "commit": _values(_short(str(node.get("git_commit", ""))) for node in run.grown),
        "device": _values(node.get("device") for node in run.grown),
        "attention": _values(node.get("attention") for node in run.grown),
        "compiling": _compiling(run),
        "software": _values(_versions(node.get("versions", {})) for node in run.grown),
        "finished": max((str(node.get("finished", "")) for node in run.grown), default=""),
    }
    return [(name, value) for name, value in found.items() if value]


def _compiling(run: Run) -> str:
    """Seconds of all nodes, and how many programs had been compiled before."""
    told = [node.get("compilation") for node in run.grown if node.get("compilation")]
    if not told:
        return ""
    seconds, programs, kept = (sum(one[name] for one in told) for name in ("seconds", "programs", "from_cache"))
    return f"{duration(seconds)}, {programs - kept} programs, and {kept} from the cache"


def _values(values: Iterable[Any]) -> str:
    return "; ".join(dict.fromkeys(str(value) for value in values if value))


def _short(commit: str) -> str:
    name, mark, changed = commit.partition("-")
    return name[:12] + mark + changed


def _versions(versions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in versions.items())


def cards(run: Run) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Every text that was learned, once: its name, which nodes learned it, and the rest of its card."""
    texts: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for node in run.grown:
        for card in node.get("data", []):
            texts.setdefault(json.dumps(card, sort_keys=True, default=str), (card, []))[1].append(node.key)
    return [
        (str(card.get("name", "text")), _many(users), [(k, _plain(v)) for k, v in card.items() if k != "name"])
        for card, users in texts.values()
    ]


def _many(keys: list[str], most: int = 3) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return str(value)
