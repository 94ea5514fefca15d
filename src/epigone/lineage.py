"""The one idea: a directed acyclic graph of models (nodes) and of what they learned from whom (lessons).

Nothing here knows JAX, a file, or how anything is trained. `model`, `tokenizer`, `objective`, `training` and `corpus`
are frozen dataclasses of the rooms that can use them.
"""

import graphlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from epigone.errors import UserError
from epigone.identity import WHERE_SET, fingerprint


@dataclass(frozen=True)
class Text:
    """Real text: whole documents of one split of a corpus, in a fixed shuffled order.

    Attributes:
        corpus: where the text comes from, a config of `epigone.data.corpora`.
        split: which part of the corpus: train, validation or test.
        skip: tokens of the shuffled order to leave out before the first document.
        tokens: how many tokens to take (the document in which the number is reached is taken whole); None takes all.
        subsample: tokens of whole documents that are drawn of these at random, none twice; None: all are read.
    """

    corpus: Any
    split: str = "train"
    skip: int = 0
    tokens: int | None = None
    subsample: int | None = field(default=None, metadata={"identity": WHERE_SET})

    @property
    def size(self) -> int | None:
        """Tokens that are read of it; None: all that there are."""
        return self.tokens if self.subsample is None else self.subsample

    @property
    def whole(self) -> "Text":
        """The text of which this may be drawn."""
        return self if self.subsample is None else replace(self, subsample=None)

    def __post_init__(self) -> None:
        _check_sizes(self, skip=0, tokens=1, subsample=1)
        _check_subsample(self)


@dataclass(frozen=True)
class Written:
    """Text that another node of the lineage writes: sequence-level distillation (Kim & Rush 2016).

    A document's score is its mean log-probability per token under the judge, at temperature 1: over what was written,
    its end included where it has one, and not over a prompt. A verifier has scores of its own.

    Attributes:
        by: key of the node that writes.
        tokens: how many tokens it writes (whole documents until the number is reached).
        temperature: divides the logits before sampling.
        top_k: sample among the k most probable tokens only; 0 is off.
        top_p: sample in the smallest set that holds this probability; 1 is off.
        max_length: a document is cut after this many tokens.
        beams: documents are not sampled but searched for, by so many beams: of each prompt the model's most probable
            continuation, or nearly; 0 samples.
        best_of: candidates for each document; the one with the best score is taken.
        keep: share of the documents that is kept, those with the best scores; documents are written until `tokens` are
            kept.
        judge: key of the node that gives scores; None: the writer itself.
        verifier: gives the scores in a node's place, a config of `epigone.verifiers`.
        rule: a function of a text; documents of which it is not true are left out before others are chosen.
        prompts: real text; each document begins as one of its documents does, in their order and then again from the
            first, and the writer completes it. None: the writer begins by itself.
        prompt_tokens: tokens that are given of each of them, part of the text; shorter documents give no prompt.
        subsample: tokens of whole documents that are drawn of the text at random, none twice; None: all are read.
        draw: number of the text: with another one the writer writes others of the same kind.
    """

    by: str
    tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_length: int = 256
    beams: int = field(default=0, metadata={"identity": WHERE_SET})
    best_of: int = field(default=1, metadata={"identity": WHERE_SET})
    keep: float = field(default=1.0, metadata={"identity": WHERE_SET})
    judge: str | None = field(default=None, metadata={"identity": WHERE_SET})
    verifier: Any = field(default=None, metadata={"identity": WHERE_SET})
    rule: Any = field(default=None, metadata={"identity": WHERE_SET})
    prompts: Text | None = field(default=None, metadata={"identity": WHERE_SET})
    prompt_tokens: int = field(default=0, metadata={"identity": WHERE_SET})
    subsample: int | None = field(default=None, metadata={"identity": WHERE_SET})
    draw: int = field(default=0, metadata={"identity": WHERE_SET})

    @property
    def size(self) -> int:
        """Tokens that are read of it."""
        return self.tokens if self.subsample is None else self.subsample

    @property
    def whole(self) -> "Written":
        """The text that is written, of which this may be a part."""
        return self if self.subsample is None else replace(self, subsample=None)

    @property
    def is_judged(self) -> bool:
        """Whether documents are chosen by their scores."""
        return self.best_of > 1 or self.keep < 1

    @property
    def judged_by(self) -> str | None:
        """Key of the node that gives scores; None where no node does."""
        return (self.judge or self.by) if self.is_judged and self.verifier is None else None

    def __post_init__(self) -> None:
        _check_sizes(self, tokens=0, top_k=0, max_length=1, beams=0, best_of=1, prompt_tokens=0, subsample=1, draw=0)
        _check_subsample(self)
        if not (self.temperature >= 1e-6 and 0 < self.top_p <= 1):
            raise UserError(
                f"written by '{self.by}': temperature {self.temperature} (1e-6 or more), top_p {self.top_p}"
            )
        sampled = self.temperature != 1 or self.top_k or self.top_p < 1 or self.best_of > 1 or self.draw
        if self.beams and (sampled or self.prompts is None):
            raise UserError(
                f"written by '{self.by}': beams={self.beams} finds one text of each prompt: it takes prompts, and no "
                "temperature, top_k, top_p, best_of or draw"
            )
        if not 0 < self.keep <= 1:
            raise UserError(f"written by '{self.by}': keep={self.keep} is a share: above 0, up to 1 for all")
        if (self.judge or self.verifier) and not self.is_judged:
            raise UserError(
                f"written by '{self.by}': nothing to judge for '{self.judge or self.verifier}': set best_of or keep"
            )
        if self.judge and self.verifier:
            raise UserError(f"written by '{self.by}': judge='{self.judge}' and a verifier: choose one")
        if self.rule is not None and not callable(self.rule):
            raise UserError(f"written by '{self.by}': rule={self.rule!r} is no function of a text")
        if (self.prompts is None) != (self.prompt_tokens == 0):
            raise UserError(
                f"written by '{self.by}': prompt_tokens={self.prompt_tokens} and {'no' if not self.prompts else 'a'} "
                "text of prompts: set both, or neither"
            )
        if self.prompt_tokens >= self.max_length:
            raise UserError(
                f"written by '{self.by}': prompt_tokens={self.prompt_tokens} leaves nothing to write of "
                f"max_length={self.max_length}: shorten the prompts"
            )


@dataclass(frozen=True)
class TrainedTokenizer:
    """A tokenizer and the text that it is trained on.

    Attributes:
        algorithm: a config of `epigone.data.tokenizers`: words, byte-pair encoding or bytes.
        text: the real text that its vocabulary comes from.
    """

    algorithm: Any
    text: Text


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
        _check_sizes(self, initialisation=0)
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
        _check_name(self.name)
        _check_sizes(self, generation=0, seed=0)

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
class Evaluation:
    """What is measured of every node. No part of a node's identity: a change measures again and trains nothing.

    Attributes:
        text: held-out text for perplexity, calibration and agreement.
        real: the real text against which novelty is counted.
        write_tokens: tokens that every node writes for the measures of diversity.
        contexts: held-out contexts for calibration and agreement.
        prompts: contexts whose next-word probabilities the report shows.
        compare: node name -> key of a node (not its teacher) with which it is also compared, if that is done by then.
        samples: how many written documents a record keeps to be read.
        seed: chooses the contexts.
        judge: key of a node that reads what every node writes, if that is done by then: one of other origin, such as a
            pretrained model, whose tokenizer may be another.
    """

    text: Text
    real: Text
    write_tokens: int = 20_000
    contexts: int = 1_000
    prompts: tuple[str, ...] = ()
    compare: Mapping[str, str] = field(default_factory=dict)
    samples: int = 8
    seed: int = 0
    judge: str | None = field(default=None, metadata={"identity": WHERE_SET})

    def __post_init__(self) -> None:
        _check_sizes(self, write_tokens=0, contexts=1, samples=0, seed=0)


@dataclass(frozen=True)
class Population:
    """Nodes that are held against each other when all are grown. No part of anyone's identity.

    Attributes:
        name: what the population is called; repetitions of one kind share it.
        members: keys of two nodes or more, of one vocabulary.
        factors: what it differs in from other populations of the lineage, such as `{"teachers": 2, "dose": 0.5}`; the
            report draws measures against them.
        seed: tells apart repetitions.
    """

    name: str
    members: tuple[str, ...]
    factors: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_sizes(self, seed=0)
        if len(set(self.members)) < max(2, len(self.members)):
            raise UserError(f"population '{self.name}' of {list(self.members)}: name two nodes or more, each once")

    @property
    def key(self) -> str:
        """`name`, and `.sN` behind it for seeds other than 0."""
        return self.name + (f".s{self.seed}" if self.seed else "")


@dataclass(frozen=True)
class Claim:
    """What a source says of such models; the report holds it against what was measured. No part of anyone's identity.

    Attributes:
        says: the claim, in a sentence.
        source: who makes it, and where.
        order: `name@generation` of two groups of nodes or more; what is measured of each is less than `factor` times
            what is measured of the next.
        factor: 1 for a plain order.
        metric: a measure of the records.
    """

    says: str
    source: str
    order: tuple[str, ...]
    factor: float = 1.0
    metric: str = "perplexity"

    def __post_init__(self) -> None:
        if len(set(self.order)) < max(2, len(self.order)) or self.factor <= 0:
            raise UserError(
                f"the claim '{self.says}' orders {list(self.order)} by the factor {self.factor:g}: name two groups or "
                "more, each once, and a positive factor"
            )


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
    """

    name: str
    nodes: tuple[Node, ...]
    evaluation: Evaluation | None
    description: str = ""
    populations: tuple[Population, ...] = ()
    claims: tuple[Claim, ...] = ()

    def __post_init__(self) -> None:
        _check_name(self.name)
        for population in self.populations:
            for key in population.members:
                _ = self[key]
        keys = [population.key for population in self.populations]
        if double := next((key for key in keys if keys.count(key) > 1), None):
            raise UserError(f"lineage '{self.name}' has two populations '{double}': give one another name or seed")
        named = [*self.evaluation.compare.values(), self.evaluation.judge] if self.evaluation else []
        for key in filter(None, named):
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


def _check_name(name: str) -> None:
    """Names become names of directories."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"name '{name[:120]}': use letters, digits, '.', '_' and '-', a hundred at most")


def _check_sizes(config: Any, **least: int) -> None:
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise UserError(f"{type(config).__name__}: {name}={value} must be at least {smallest}")


def _check_subsample(text: Text | Written) -> None:
    if text.subsample is not None and text.tokens and text.subsample > text.tokens:
        raise UserError(
            f"{type(text).__name__}: subsample={text.subsample} of tokens={text.tokens}: there are not so many"
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known word, or all of them when none is near and they are few."""
    known = list(known)
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= 12 else ""
