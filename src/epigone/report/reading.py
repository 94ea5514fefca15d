"""What a reader reads: texts that the models wrote, and what they expect next."""

from typing import Any, NamedTuple

from epigone.report.records import Node, Run, finite
from epigone.report.summaries import Comparison, Series

# Most letters of a sample, samples of a node, words of a prediction, models side by side; records keep the rest.
_LETTERS, _SAMPLES, _WORDS, _MODELS = 320, 4, 8, 4


class Samples(NamedTuple):
    """Sample texts of one series and seed: a column a generation, a row a sample; an absent text is None."""

    title: str
    seed: int
    generations: list[int]
    rows: list[list[str | None]]


class Word(NamedTuple):
    """One predicted word: probability, width of its bar in per cent, and whether the first column has it too."""

    text: str
    probability: float
    width: float
    shared: bool


class Predictions(NamedTuple):
    """One context and each model's most probable next words."""

    context: str
    columns: list[tuple[str, str, list[Word]]]


def samples(series: list[Series]) -> list[Samples]:
    """Each series' sample texts at a few generations, of the lowest seed whose nodes have any."""
    return [found for one in series if (found := _series_samples(one))]


def _series_samples(one: Series) -> Samples | None:
    for seed, chain in one.chains.items():
        texts = {node.generation: node.get("samples", []) for node in chain}
        texts = {generation: found for generation, found in texts.items() if found}
        if texts:
            shown = milestones(sorted(texts))
            rows = [[_clip(texts[g][i]) if i < len(texts[g]) else None for g in shown] for i in range(_SAMPLES)]
            rows = [row for row in rows if any(row)]
            return Samples(f"{one.family} · {one.regime}", seed, shown, rows)
    return None


def loose_samples(run: Run, series: list[Series]) -> list[tuple[str, list[str]]]:
    """Samples of the nodes of the lowest seed that belong to no series."""
    drawn = {node.key for one in series for chain in one.chains.values() for node in chain}
    lowest: dict[tuple[str, int], Node] = {}
    for node in run.grown:
        if node.key not in drawn and node.get("samples"):
            lowest.setdefault((node.name, node.generation), node)
    return [(node.key, clipped_samples(node)) for node in lowest.values()]


def clipped_samples(node: Node) -> list[str]:
    """The first texts that a node wrote, as they are shown."""
    return [_clip(text) for text in node.get("samples", [])[:_SAMPLES]]


def milestones(generations: list[int]) -> list[int]:
    """At most five generations: all of them, or the first three, the middle and the last."""
    if len(generations) <= 5:
        return generations
    return [*generations[:3], generations[len(generations) // 2], generations[-1]]


def _clip(text: Any) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= _LETTERS else line[:_LETTERS].rsplit(" ", 1)[0] + " …"


def predictions(run: Run, series: list[Series], compared: list[Comparison]) -> list[Predictions]:
    """Each context's most probable next words under the models that are worth a look side by side."""
    chosen = _pairs(run, compared) or _ends(series) or [(node, "") for node in run.grown]
    nodes = list({node.key: (node, role) for node, role in chosen if node.get("predictions")}.values())
    shown = nodes if compared else nodes[:_MODELS]
    contexts = dict.fromkeys(str(p["context"]) for node, _ in shown for p in node.get("predictions"))
    return [Predictions(context, _columns(shown, context)) for context in contexts]


def _pairs(run: Run, compared: list[Comparison]) -> list[tuple[Node, str]]:
    """Teacher, student and control of the lowest seed of each comparison, with their roles."""
    found: list[tuple[Node, str]] = []
    for one in compared:
        found += [(teacher, "teacher") for teacher in one.teachers[:1]]
        for name, role in ((one.student, "student"), (one.control, "control")):
            found += [(node, role) for node in run.nodes if node.group == name and node.seed == one.pairs[0][0]]
    return found


def _ends(series: list[Series]) -> list[tuple[Node, str]]:
    """The first model of the first series, and the last grown model of each."""
    chains = [[node for node in next(iter(one.chains.values())) if node.get("predictions")] for one in series]
    chains = [chain for chain in chains if chain]
    return [(chain[0], "") for chain in chains[:1]] + [(chain[-1], "") for chain in chains]


def _columns(nodes: list[tuple[Node, str]], context: str) -> list[tuple[str, str, list[Word]]]:
    tops = [(node.key, role, _top(node, context)) for node, role in nodes]
    highest = max((p for *_, top in tops for _, p in top), default=1.0) or 1.0
    first = {word for word, _ in tops[0][2]}
    return [
        (key, role, [Word(word, p, 100 * p / highest, i > 0 and word in first) for word, p in top])
        for i, (key, role, top) in enumerate(tops)
    ]


def _top(node: Node, context: str) -> list[tuple[str, float]]:
    for prediction in node.get("predictions"):
        if prediction.get("context") == context:
            top = [(str(word), finite(p)) for word, p in prediction.get("top", [])[:_WORDS]]
            return [(word, p) for word, p in top if p is not None]
    return []
