"""The one idea: a directed acyclic graph of models (nodes) and of what they learned from whom (lessons).

Nothing here knows JAX, a file, or how anything is trained. `model`, `tokenizer`, `objective`, `training` and `corpus`
are frozen dataclasses of the rooms that can use them.
"""

import graphlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from epigone.errors import UserError, check_name, check_sizes, did_you_mean
from epigone.identity import WHERE_SET, fingerprint
from epigone.questions import Claim, Evaluation, Population
from epigone.texts import Text, TrainedTokenizer, Written

__all__ = [
    "Claim",
    "Evaluation",
    "Lesson",
    "Lineage",
    "Node",
    "Population",
    "Pretrained",
    "Text",
    "TrainedTokenizer",
    "Written",
]


@dataclass(frozen=True)
class Pretrained:
    """Weights that were trained elsewhere and come from files.

    Attributes:
        path: a Hugging Face folder or a GGUF file; where it lies is no part of a node's identity.
        digest: hash of what is in it.
        licence: what it says of its licence; no part of the identity either.
    """

    path: str = field(compare=False, metadata={"identity": False})
    digest: str
    licence: str | None = field(default=None, compare=False, metadata={"identity": False})


@dataclass(frozen=True)
class Lesson:
    """How a node learns: from which text, from whose scores, towards which objective.

    Attributes:
        text: sources of text, real or written by other nodes.
        weights: share of each source in the mixture; None joins the sources in proportion to their size.
        teacher: key of the node whose scores are learned, or keys of several; None learns from the text alone.
        ensemble: how several teachers become one, a config of `epigone.teachers.ensemble`; None: the mean of their
            probabilities.
        scores: what is kept on disk of the teacher's scores, a config of `epigone.teachers.kept`, so that it is asked
            once; None: it scores every batch beside the student, and all its scores count.
        start_from: key of the node whose weights are the start; None starts fresh.
        inherit: which of them are taken where the two differ in size, a config of `epigone.models.inherit`; None: all.
        adapters: low-rank adapters which alone are trained, beside the weights that it starts from, a config of
            `epigone.models.adapters`; None trains all weights.
        source: files with the weights; such a node learns nothing, and has no text.
        objective: what is minimised, a config of `epigone.lessons.objective`; None for models that count.
        training: steps, batch, optimizer, a config of `epigone.training.loop`; None for models that count.
        mean_teacher: the student learns from the scores of the running average of its own weights, that of the
            training's `ema_decay`, in the place of a teacher's.
        initialisation: number of the initial weights and of the order of batches, beside the seed: a student with its
            teacher's model, text and training begins as its teacher did, where it has its number too.
        on_policy: which steps learn from the student's own texts, a config of `epigone.training.on_policy`; None: none.
        validation: held-out text on which a model that counts tunes its count scale; None does not tune.
    """

    text: tuple[Text | Written, ...] = ()
    weights: tuple[float, ...] | None = None
    teacher: str | tuple[str, ...] | None = None
    ensemble: Any = None
    scores: Any = None
    start_from: str | None = None
    inherit: Any = None
    adapters: Any = field(default=None, metadata={"identity": WHERE_SET})
    source: Pretrained | None = None
    objective: Any = None
    training: Any = None
    on_policy: Any = None
    validation: Text | None = None
    mean_teacher: bool = field(default=False, metadata={"identity": WHERE_SET})
    initialisation: int = field(default=0, metadata={"identity": WHERE_SET})

    @property
    def teachers(self) -> tuple[str, ...]:
        """Keys of all teachers."""
        if self.teacher is None:
            return ()
        return (self.teacher,) if isinstance(self.teacher, str) else tuple(self.teacher)

    def __post_init__(self) -> None:
        learns = self.text or self.teacher or self.start_from or self.objective or self.training or self.weights
        learns = learns or self.on_policy or self.adapters or self.mean_teacher
        if self.source and learns:
            raise UserError(
                f"a node of '{self.source.path}' has its weights: it takes no text, teacher, start_from or training"
            )
        if self.inherit and not self.start_from:
            raise UserError("a lesson says what to inherit and from nobody: name the node with start_from")
        if self.adapters and not self.start_from:
            raise UserError("a lesson has adapters, and no weights that they lie beside: name the node with start_from")
        check_sizes(self, initialisation=0)
        others = [name for name in ("teacher", "ensemble", "scores", "on_policy") if getattr(self, name)]
        if self.mean_teacher and others:
            raise UserError(
                f"a lesson has mean_teacher, the student's own average, and {others[0]}, which is of a teacher that is "
                "named: drop one"
            )
        if self.on_policy and not (self.teacher and self.training):
            raise UserError("a lesson has on_policy, own texts, and no teacher or no training: name both")


@dataclass(frozen=True)
class Node:
    """One model of the lineage, at `name@generation`.

    Attributes:
        name: what the node is called; the nodes of one series share it.
        generation: how many lessons lie between it and real text.
        model: the architecture, a config of `epigone.models`.
        tokenizer: how text becomes tokens, trained here or pretrained elsewhere.
        lesson: how it learns.
        seed: tells apart repetitions of the same recipe.
        labels: for reports only and no part of the identity: family, regime, role.
    """

    name: str
    generation: int
    model: Any
    tokenizer: Any
    lesson: Lesson
    seed: int = 0
    labels: Mapping[str, str] = field(default_factory=dict, metadata={"identity": False})

    def __post_init__(self) -> None:
        check_name(self.name)
        check_sizes(self, generation=0, seed=0)

    @property
    def key(self) -> str:
        """`name@generation`, and `.sN` behind it for seeds other than 0."""
        return f"{self.name}@{self.generation}" + (f".s{self.seed}" if self.seed else "")

    @property
    def parents(self) -> tuple[tuple[str, str], ...]:
        """(key, role) of every node that this one needs; the role is teacher, start, text or judge."""
        lesson = self.lesson
        roles = [*((key, "teacher") for key in lesson.teachers), (lesson.start_from or "", "start")]
        written = [source for source in lesson.text if isinstance(source, Written)]
        roles += [(source.by, "text") for source in written]
        roles += [(source.judge or "", "judge") for source in written]
        return tuple(dict.fromkeys((key, role) for key, role in roles if key))


@dataclass(frozen=True)
class Lineage:
    """A named set of nodes that is closed under parents and has no cycle.

    Attributes:
        name: names the run directory.
        nodes: the nodes, in any order.
        evaluation: what is measured of each; None measures nothing.
        description: one paragraph for the reader of the report.
        populations: nodes that are held against each other, as the evaluation says.
        claims: what others say of such models; a claim about nodes that are not in the lineage is left out.
        watch: traffic at a node's prompt box, a config of `epigone.arena.watch`; None: nobody asks. No part of anyone's
            identity.
    """

    name: str
    nodes: tuple[Node, ...]
    evaluation: Evaluation | None
    description: str = ""
    populations: tuple[Population, ...] = ()
    claims: tuple[Claim, ...] = ()
    watch: Any = None

    def __post_init__(self) -> None:
        check_name(self.name)
        for population in self.populations:
            for key in population.members:
                _ = self[key]
        keys = [population.key for population in self.populations]
        if double := next((key for key in keys if keys.count(key) > 1), None):
            raise UserError(f"lineage '{self.name}' has two populations '{double}': give one another name or seed")
        named = [*self.evaluation.compare.values(), self.evaluation.judge] if self.evaluation else []
        for key in filter(None, [*named, self.watch and self.watch.teacher]):
            _ = self[key]
        _ = self.order

    @cached_property
    def by_key(self) -> dict[str, Node]:
        """The nodes by their key."""
        nodes = {node.key: node for node in self.nodes}
        if len(nodes) < len(self.nodes):
            keys = [node.key for node in self.nodes]
            double = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f"lineage '{self.name}' has two nodes '{double}': give one another name or seed")
        return nodes

    def __getitem__(self, key: str) -> Node:
        if key not in self.by_key:
            raise UserError(f"no node '{key}' in lineage '{self.name}'{did_you_mean(key, self.by_key)}")
        return self.by_key[key]

    @cached_property
    def order(self) -> tuple[Node, ...]:
        """Every node after its parents, and otherwise in the order in which they were given."""
        graph = {key: [parent for parent, _ in node.parents] for key, node in self.by_key.items()}
        for key, parents in graph.items():
            for parent in parents:
                if parent not in graph:
                    near = did_you_mean(parent, graph)
                    raise UserError(f"node '{key}' learns from '{parent}', which is not in the lineage{near}")
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            path = " -> ".join(reversed(error.args[1]))
            raise UserError(f"lineage '{self.name}' has a cycle: {path}; no node may be its own ancestor") from None
        placed: dict[str, Node] = {}
        waiting = list(reversed(graph))
        while waiting:
            missing = [parent for parent in graph[waiting[-1]] if parent not in placed]
            if missing:
                waiting += reversed(missing)
            else:
                key = waiting.pop()
                placed[key] = self.by_key[key]
        return tuple(placed.values())

    @cached_property
    def identities(self) -> dict[str, str]:
        """Identity of each node: a hash of its own config and of its parents' identities (16 hex digits)."""
        found: dict[str, str] = {}
        for node in self.order:
            parents = [(found[key], role) for key, role in node.parents]
            found[node.key] = fingerprint((node, parents))
        return found

    def ancestor(self, key: str) -> Node:
        """The generation from which a node descends: its first parents, followed up to one that has none."""
        node = self[key]
        while node.parents:
            node = self[node.parents[0][0]]
        return node
