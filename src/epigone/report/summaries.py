"""Statistics over seeds: curves over generations, and students paired with their controls."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from epigone.report.records import Claim, Node, Run, finite


@dataclass(frozen=True)
class Spread:
    """Mean, lowest and highest of `count` values; nan or inf in the values shows in the mean."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Series:
    """One curve over generations: for each seed a chain of nodes, first the ancestor, then nodes of one name."""

    name: str
    family: str
    regime: str
    chains: dict[int, tuple[Node, ...]]

    @property
    def generations(self) -> list[int]:
        return sorted({node.generation for chain in self.chains.values() for node in chain})

    def nodes(self, generation: int) -> list[Node]:
        """The distinct nodes of a generation: an ancestor that several seeds share counts once."""
        found = (node for chain in self.chains.values() for node in chain if node.generation == generation)
        return list({node.key: node for node in found}.values())

    def points(self, metric: str) -> dict[int, Spread]:
        """generation -> spread over seeds, only where the metric is there."""
        return self._spreads(lambda node: node.metric(metric))

    def theory(self, metric: str) -> dict[int, float]:
        """generation -> mean over seeds of what theory expects, only where it says something."""
        return {g: value.mean for g, value in self._spreads(lambda node: node.theory(metric)).items()}

    def _spreads(self, value_of: Callable[[Node], float | None]) -> dict[int, Spread]:
        spreads = {g: spread(value_of(node) for node in self.nodes(g)) for g in self.generations}
        return {g: value for g, value in spreads.items() if value is not None}


@dataclass(frozen=True)
class Comparison:
    """Students against controls on held-out perplexity, paired by seed.

    difference = mean over seeds of (student - control), negative where the student is better;
    [low, high] is its 95 % Student t interval, None with fewer than two pairs.
    """

    student: str
    control: str
    family: str
    teachers: tuple[Node, ...]
    pairs: tuple[tuple[int, float, float], ...]
    difference: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """ "better", "worse", "tie" (the interval contains 0), or "one seed" (no interval)."""
        if self.low is None or self.high is None:
            return "one seed"
        if self.low <= 0.0 <= self.high:
            return "tie"
        return "better" if self.high < 0.0 else "worse"

    @property
    def gap_closed(self) -> Spread | None:
        """Share of the way from the control to the teacher that the student goes, in nats per token, over seeds.

        (ln control - ln student) / (ln control - ln teacher) of the perplexities: 0 is the control, 1 the teacher.
        None without one teacher that is better than every control.
        """
        perplexities = [finite(teacher.metric("perplexity")) for teacher in self.teachers]
        aim = perplexities[0] if len(perplexities) == 1 else None
        if aim is None or not all(aim < control for _, _, control in self.pairs):
            return None
        return spread(math.log(theirs / ours) / math.log(theirs / aim) for _, ours, theirs in self.pairs)


@dataclass(frozen=True)
class Tried:
    """A claim held against the records: what was measured of each group, and the seeds in which all of it holds.

    Groups are called as their curves are. One of a single node, such as a teacher of all, is the same in every seed.
    """

    claim: Claim
    labels: tuple[str, ...]
    measured: tuple[Spread, ...]
    seeds: int
    holding: int
    on_average: bool

    @property
    def verdict(self) -> str:
        """ "holds" in every seed, "holds on average", or "does not hold"."""
        if self.holding == self.seeds:
            return "holds"
        return "holds on average" if self.on_average else "does not hold"


def tried(run: Run) -> list[Tried]:
    """The claims about groups that are all measured."""
    return [one for claim in run.claims if (one := _try(claim, run)) is not None]


def _try(claim: Claim, run: Run) -> Tried | None:
    groups: list[dict[int, float]] = []
    labels = []
    for name in claim.order:
        nodes = [node for node in run.nodes if node.group == name]
        values = {node.seed: value for node in nodes if (value := node.metric(claim.metric)) is not None}
        if not nodes or len(values) < len(nodes):
            return None
        groups.append(values)
        labels.append(f"{nodes[0].regime}@{nodes[0].generation}")
    seeds = sorted({seed for values in groups for seed in values if len(values) > 1} or {next(iter(groups[0]))})
    rows = [[values.get(seed, next(iter(values.values()))) for values in groups] for seed in seeds]
    means = [math.fsum(values.values()) / len(values) for values in groups]

    def holds(row: Sequence[float]) -> bool:
        return all(low < claim.factor * high for low, high in itertools.pairwise(row))

    measured = tuple(found for values in groups if (found := spread(values.values())) is not None)
    return Tried(claim, tuple(labels), measured, len(seeds), sum(map(holds, rows)), holds(means))


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of those values that are there; None if none is."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    return Spread(math.fsum(present) / len(present), min(present), max(present), len(present))


def paired_interval(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean of paired differences.

    mean +- t_{(1 + confidence) / 2, n - 1} * s / sqrt(n), with s the sample standard deviation. None for n < 2.
    """
    count = len(differences)
    if count < 2:
        return None
    half = stats.t.ppf((1 + confidence) / 2, count - 1) * np.std(differences, ddof=1) / math.sqrt(count)
    mean = float(np.mean(differences))
    return mean - float(half), mean + float(half)


def generation_series(run: Run) -> list[Series]:
    """The curves of a run: names with a regime label or with several generations, each begun at its ancestor."""
    by_name: dict[str, list[Node]] = defaultdict(list)
    for node in run.nodes:
        by_name[node.name].append(node)
    found = []
    for name, nodes in by_name.items():
        if "regime" not in nodes[0].labels and len({node.generation for node in nodes}) < 2:
            continue
        chains = {seed: _chain(run, nodes, seed) for seed in sorted({node.seed for node in nodes})}
        series = Series(name, nodes[0].family, nodes[0].regime, chains)
        if len(series.generations) > 1:
            found.append(series)
    return found


def _chain(run: Run, nodes: list[Node], seed: int) -> tuple[Node, ...]:
    chain = sorted((node for node in nodes if node.seed == seed), key=lambda node: node.generation)
    ancestor = _ancestor(run, chain[0])
    return (ancestor, *chain) if ancestor else tuple(chain)


def _ancestor(run: Run, first: Node) -> Node | None:
    """The parent from which a chain departs: a text's writer before a starting point before a teacher."""
    preference = {"text": 0, "start": 1, "teacher": 2}
    candidates = []
    for parent in first.parents:
        node = run.by_key.get(parent.key)
        if node and node.name != first.name and node.generation < first.generation:
            candidates.append((preference.get(parent.role, 3), -node.generation, node))
    return min(candidates, key=lambda item: item[:2])[2] if candidates else None


def comparisons(run: Run) -> list[Comparison]:
    """Every student (label role) against every control of its family and generation, where both are grown."""
    students, controls = _by_group(run, "student"), _by_group(run, "control")
    pairs = (
        _compare(run, ours, theirs)
        for (family, generation, _), ours in students.items()
        for (other, level, _), theirs in controls.items()
        if (family, generation) == (other, level)
    )
    return [one for one in pairs if one is not None]


def _by_group(run: Run, role: str) -> dict[tuple[str, int, str], list[Node]]:
    groups: dict[tuple[str, int, str], list[Node]] = defaultdict(list)
    for node in run.nodes:
        if node.role == role:
            groups[node.family, node.generation, node.name].append(node)
    return groups


def _compare(run: Run, students: list[Node], controls: list[Node]) -> Comparison | None:
    scores = {node.seed: finite(node.metric("perplexity")) for node in controls}
    pairs = tuple(
        (node.seed, ours, theirs)
        for node in sorted(students, key=lambda node: node.seed)
        if (ours := finite(node.metric("perplexity"))) is not None and (theirs := scores.get(node.seed)) is not None
    )
    if not pairs:
        return None
    differences = [ours - theirs for _, ours, theirs in pairs]
    low, high = paired_interval(differences) or (None, None)
    keys = dict.fromkeys(p.key for node in students for p in node.parents if p.role == "teacher")
    teachers = tuple(run.by_key[key] for key in keys if key in run.by_key)
    mean = math.fsum(differences) / len(differences)
    first = students[0]
    return Comparison(first.group, controls[0].group, first.family, teachers, pairs, mean, low, high)
