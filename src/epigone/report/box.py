"""What students outside made of what they asked a prompt box: by the way in which they learned, and what they asked.

Nodes with the labels `way` and `asked` (tokens) are drawn. What a way is worth is told in text: how many tokens the
students that learned from the text alone (`TEXT`) would have had to ask for to be as good.
"""

import math
import statistics
from collections import defaultdict
from itertools import pairwise
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from epigone.report.formats import count, duration, real
from epigone.report.records import Node, Run, finite
from epigone.report.style import INK, MUTED, colour, marker
from epigone.report.summaries import Spread, spread

TEXT = "text"
"""The way that all others are held against."""

ANY = "any of them"
"""The name under which all detectors together are told."""


class Asked(NamedTuple):
    """Students of one way and number of tokens.

    Attributes:
        way: how they learned.
        tokens: that each asked for.
        perplexity: held out, over seeds.
        nats: the same, nats a token.
        agreement: with the teacher's first choice, over seeds; None where it was not measured.
    """

    way: str
    tokens: float
    perplexity: Spread
    nats: Spread
    agreement: Spread | None


def asked(run: Run) -> list[Asked]:
    """All that were measured: the ways in the order of the lineage, each from few tokens to many."""
    groups: dict[tuple[str, float], list[Node]] = defaultdict(list)
    for node in run.grown:
        if (way := node.labels.get("way")) and (tokens := _tokens(node)) is not None:
            groups[way, tokens].append(node)
    order = list(dict.fromkeys(way for way, _ in groups))
    found = []
    for way, tokens in sorted(groups, key=lambda group: (order.index(group[0]), group[1])):
        nodes = groups[way, tokens]
        values = [finite(node.metric("perplexity")) for node in nodes]
        perplexity, nats = spread(values), spread(None if v is None else math.log(v) for v in values)
        if perplexity and nats:
            found.append(Asked(way, tokens, perplexity, nats, spread(map(_agreement, nodes))))
    return found


def _tokens(node: Node) -> float | None:
    try:
        tokens = finite(float(node.labels["asked"]))
    except (KeyError, ValueError):
        return None
    return tokens if tokens and tokens > 0 else None


def _agreement(node: Node) -> float | None:
    told = node.get("agreement", {})
    return next((value for one in told.values() if (value := finite(one.get("top1"))) is not None), None)


def worth(one: Asked, text: list[Asked]) -> tuple[float, str] | None:
    """(tokens of text that teach as much, "" or the sign "<" or ">" where that is beyond what was measured).

    Between two measured numbers of tokens the nats lie on a line over their logarithm. None without two of them, and
    where more text did not teach more.
    """
    nats = [other.nats.mean for other in text]
    if len(text) < 2 or any(after >= before for before, after in pairwise(nats)):
        return None
    if one.nats.mean >= nats[0]:
        return (text[0].tokens, "" if one.nats.mean == nats[0] else "<")
    for low, high in pairwise(text):
        if one.nats.mean >= high.nats.mean:
            share = (low.nats.mean - one.nats.mean) / (low.nats.mean - high.nats.mean)
            return low.tokens * (high.tokens / low.tokens) ** share, ""
    return text[-1].tokens, ">"


def rows(run: Run) -> list[tuple[str, list[str]]]:
    """The table: the way; tokens, perplexity, agreement, the text that would teach as much, and its ratio."""
    every = asked(run)
    text = [one for one in every if one.way == TEXT]
    return [(one.way, [count(one.tokens), _range(one.perplexity), _share(one.agreement), *_worth(one, text)])
            for one in every]  # fmt: skip


def _worth(one: Asked, text: list[Asked]) -> list[str]:
    found = worth(one, text)
    if found is None:
        return ["", ""]
    tokens, sign = found
    return [f"{sign}{count(float(f'{tokens:.2g}'))}", f"{sign}{tokens / one.tokens:.2g}"]


def _range(found: Spread) -> str:
    return real(found.mean) + (f" ({real(found.low)}–{real(found.high)})" if found.count > 1 else "")


def _share(found: Spread | None) -> str:
    return "" if found is None else f"{found.mean:.1%}"


def figure(run: Run) -> Figure | None:
    """Left the ways that were asked for equally many tokens, best first; right those with several numbers of them."""
    every = asked(run)
    if not every:
        return None
    sizes = [one.tokens for one in every]
    usual = max(set(sizes), key=lambda size: (sizes.count(size), size))
    same = sorted((one for one in every if one.tokens == usual), key=lambda one: -one.perplexity.mean)
    several = {way: found for way in dict.fromkeys(one.way for one in every)
               if len(found := [one for one in every if one.way == way]) > 1}  # fmt: skip
    drawn = Figure(figsize=(11.5, max(3.4, 0.3 * len(same) + 1.2)), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=(3, 2)) if several else (drawn.subplots(), None)
    _dots(left, same, usual)
    if right is not None:
        _lines(right, several)
    return drawn


def _dots(axes: Axes, same: list[Asked], tokens: float) -> None:
    for place, one in enumerate(same):
        own = colour(1 if one.way == TEXT else 0)
        axes.plot([one.perplexity.low, one.perplexity.high], [place, place], color=own, linewidth=1.4)
        axes.plot([one.perplexity.mean], [place], "o", color=own, markersize=6)
        told = real(one.perplexity.mean)
        axes.annotate(told, (one.perplexity.high, place), xytext=(6, -3), textcoords="offset points", color=MUTED)
    axes.set_yticks(range(len(same)), [one.way for one in same])
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.margins(x=0.12)
    axes.set_title(f"{count(tokens)} tokens asked for")
    axes.set_xlabel("held-out perplexity of the student (further left: copied better)")


def _lines(axes: Axes, several: dict[str, list[Asked]]) -> None:
    for index, (way, found) in enumerate(several.items()):
        at, spreads = [one.tokens for one in found], [one.perplexity for one in found]
        axes.plot(at, [p.mean for p in spreads], color=colour(index), marker=marker(index), label=way)
        if any(p.count > 1 for p in spreads):
            axes.fill_between(at, [p.low for p in spreads], [p.high for p in spreads], color=colour(index), alpha=0.18)
    axes.set_xscale("log")
    ticks = sorted({one.tokens for found in several.values() for one in found})
    axes.set_xticks(ticks, [count(tokens) for tokens in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens asked for")
    axes.set_ylabel("held-out perplexity")
    axes.legend()


def detectors(run: Run) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """(names of extractors, rows): each detector's false alarms and their price, and what each extractor gets."""
    told = run.watch
    if not told:
        return [], []
    extractors, honest = told["extractors"], told["honest"]
    table = []
    for name in honest["flagged"]:
        one = told["detectors"].get(name)
        false = f"{one['false']:.1%} ({one['false_low']:.1%}–{one['false_high']:.1%})" if one else ""
        cells = [false, f"{honest['flagged'][name]:.0%}", f"{honest['refused'][name]:.0%}"]
        cells += [_got(extractor["got"][name], extractor["caught"].get(name)) for extractor in extractors.values()]
        table.append((name, cells))
    return [f"{name}, of {count(one['wanted'])}" for name, one in extractors.items()], table


def _got(runs: list[int], caught: list[float] | None) -> str:
    """The median over runs, the least and the most, and the share of windows with an alarm."""
    low, middle, high = min(runs), statistics.median(runs), max(runs)
    found = count(middle) + (f" ({count(low)}–{count(high)})" if low < high else "")
    return found + (f"; {caught[0]:.0%}" if caught else "")


def copies(run: Run) -> list[tuple[str, list[str]]]:
    """What each extractor gets before any detector refuses it: queries, time, money, and the students of that."""
    told, every = run.watch, asked(run)
    a_query = _tokens_a_query(run)
    if not told or not every or a_query is None:
        return []
    curves = {way: [one for one in every if one.way == way] for way in dict.fromkeys(one.way for one in every)}
    curves = {way: found for way, found in curves.items() if len(found) > 1}
    table = []
    for name, one in told["extractors"].items():
        queries = statistics.median(one["got"][ANY])
        tokens = queries * a_query
        days = one["days"] * queries / one["wanted"]
        paid = tokens * told["price"] / 1e6 * one["asked"] / one["wanted"]  # what hides it is paid, too
        cells = [count(queries), duration(days * 86_400), f"{paid:,.2f}"]
        table.append((name, cells + [_student(tokens, found) for found in curves.values()]))
    return table


def learned_from(run: Run) -> list[str]:
    """The ways of `copies`, in its order."""
    ways = [one.way for one in asked(run)]
    return [way for way in dict.fromkeys(ways) if ways.count(way) > 1]


def _tokens_a_query(run: Run) -> float | None:
    """Of the first text that a student outside asked for."""
    for node in run.grown:
        for card in node.get("data", []) if node.labels.get("way") else []:
            if card.get("parents") and card.get("tokens") and card.get("documents"):
                return float(card["tokens"] / card["documents"])
    return None


def _student(tokens: float, found: list[Asked]) -> str:
    """The perplexity after so many tokens, on lines over their logarithm; beyond them a sign, and the nearest."""
    if tokens <= found[0].tokens:
        return ("≥" if tokens < found[0].tokens else "") + real(found[0].perplexity.mean)
    for low, high in pairwise(found):
        if tokens <= high.tokens:
            share = math.log(tokens / low.tokens) / math.log(high.tokens / low.tokens)
            return real(math.exp((1 - share) * low.nats.mean + share * high.nats.mean))
    return "≤" + real(found[-1].perplexity.mean)


def boxes(run: Run) -> list[tuple[str, list[str]]]:
    """What each policy leaves an honest user: scores that are shown, how wrong they are, and what texts are worth."""
    table = []
    for name, one in (run.watch.get("boxes") or {}).items():
        values = (finite(one.get(measure)) for measure in ("error", "text_nats", "distinct_2"))
        numbers = ["" if value is None else real(round(value, 4)) for value in values]
        table.append((name, [f"{one['shown']:.0%}", *numbers]))
    return table
