"""What is asked of a lineage when it is grown: measures of every node, populations, the claims of others."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from epigone.errors import UserError, check_name, check_sizes
from epigone.identity import WHERE_SET
from epigone.texts import Text


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
        check_sizes(self, write_tokens=0, contexts=1, samples=0, seed=0)


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
        check_name(self.name)
        check_sizes(self, seed=0)
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


# As the types of `texts`: records name these by the module from which everybody takes them.
Evaluation.__module__ = Population.__module__ = Claim.__module__ = "epigone.lineage"
