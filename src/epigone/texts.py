"""What is read: real text, text that a node of the lineage writes, and the tokenizer that is trained on a text."""

from dataclasses import dataclass, field, replace
from typing import Any

from epigone.errors import UserError, check_sizes
from epigone.identity import WHERE_SET


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
        check_sizes(self, skip=0, tokens=1, subsample=1)
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
        marks: change what is drawn, token by token, as a prompt box does: watermarks of `epigone.sampling.watermark`,
            and other marks of `epigone.arena.policies`.
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
    marks: tuple[Any, ...] = field(default=(), metadata={"identity": WHERE_SET})

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
        check_sizes(self, tokens=0, top_k=0, max_length=1, beams=0, best_of=1, prompt_tokens=0, subsample=1, draw=0)
        _check_subsample(self)
        if not isinstance(self.marks, tuple):
            raise UserError(f"written by '{self.by}': marks={self.marks!r} is no tuple of marks: put it into one")
        if not (self.temperature >= 1e-6 and 0 < self.top_p <= 1):
            raise UserError(
                f"written by '{self.by}': temperature {self.temperature} (1e-6 or more), top_p {self.top_p}"
            )
        sampled = self.temperature != 1 or self.top_k or self.top_p < 1 or self.best_of > 1 or self.draw or self.marks
        if self.beams and (sampled or self.prompts is None):
            raise UserError(
                f"written by '{self.by}': beams={self.beams} finds one text of each prompt: it takes prompts, and no "
                "temperature, top_k, top_p, best_of, draw or marks"
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


def _check_subsample(text: Text | Written) -> None:
    if text.subsample is not None and text.tokens and text.subsample > text.tokens:
        raise UserError(
            f"{type(text).__name__}: subsample={text.subsample} of tokens={text.tokens}: there are not so many"
        )


# Identities and records name a type by its module. Everybody takes these from `lineage`, and there they are in records.
Text.__module__ = Written.__module__ = TrainedTokenizer.__module__ = "epigone.lineage"
