"""Text that is not taken as a node draws it: completions of prompts, what keeps a rule, the best of it.

Documents come in blocks. A block's seed follows from the writer's identity and the block's number, a document from that
seed and its place in the block: so it does not change with how many are written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from epigone.errors import Fault, UserError
from epigone.lineage import Written
from epigone.models.language_model import Document, LanguageModel
from epigone.models.ngram import NGram

BLOCK = 256
"""Documents that are written together; `keep` is a share of each block."""

HOPELESS = 20
"""Blocks without a document that keeps the rule, after which no more are written."""


@dataclass
class Tally:
    """What was drawn for a text, and the scores: sums over documents.

    Attributes:
        tokens: of all candidates, each with its end, prompts included.
        drawn: candidates.
        documents: that were complete, the best candidate of each.
        kept: of those.
        ruled_out: candidates that broke the rule.
        scores: the sum of the scores of the others.
        kept_scores: that of the documents that were kept.
        lowest: the lowest score of a document that was kept, summed over blocks.
        blocks: how many these are.
    """

    tokens: int = 0
    drawn: int = 0
    documents: int = 0
    kept: int = 0
    ruled_out: int = 0
    scores: float | None = None
    kept_scores: float | None = None
    lowest: float = 0.0
    blocks: int = 0

    @property
    def threshold(self) -> float | None:
        """The score from which a document is kept, the mean over blocks; None where none was scored."""
        return self.lowest / self.blocks if self.blocks and np.isfinite(self.lowest) else None

    def card(self) -> dict[str, Any]:
        """For the card of the text: counts and means. A mean that is infinite is left out."""
        told = {"candidates": self.drawn, "candidate_tokens": self.tokens, "kept": self.kept / max(1, self.documents)}
        told |= {"ruled_out": self.ruled_out / max(1, self.drawn)} if self.ruled_out else {}
        scored = self.drawn - self.ruled_out
        sums = {"score_of_candidates": (self.scores, scored), "score_of_kept": (self.kept_scores, self.kept)}
        return told | {name: of / n for name, (of, n) in sums.items() if of is not None and np.isfinite(of)}


def is_chosen(source: Written) -> bool:
    """Whether a text is more than what its writer draws by itself."""
    return bool(source.is_judged or source.prompts or source.rule or source.beams)


def check_sizes(source: Written, longest: int) -> None:
    """Refuse prompts that leave nothing to write, and a share below one document of a block. Raises UserError."""
    if source.prompt_tokens >= longest:
        raise UserError(
            f"written by '{source.by}': prompt_tokens={source.prompt_tokens}, and the longest document that it writes "
            f"has {longest} tokens: shorten the prompts"
        )
    if round(source.keep * BLOCK) < 1:
        raise UserError(
            f"written by '{source.by}': keep={source.keep:g} is less than one document of the {BLOCK} that are judged "
            f"together: keep {1 / BLOCK:g} or more"
        )


def prompts_of(source: Written, documents: Sequence[Document]) -> list[Document]:
    """The beginnings of the documents that go on behind them. Raises UserError where none does."""
    found = [document[: source.prompt_tokens] for document in documents if len(document) > source.prompt_tokens]
    if not found:
        raise UserError(
            f"written by '{source.by}': no document of the prompts has more than {source.prompt_tokens} tokens: "
            "lower prompt_tokens, or take another text"
        )
    return found


Scores = Callable[[Sequence[Document]], np.ndarray]


def write_chosen(
    source: Written,
    writer: LanguageModel,
    score: Scores | None,
    prompts: Sequence[Document] | None,
    longest: int,
    seed_of_block: Callable[[int], int],
    holds: Callable[[Document], bool] | None = None,
) -> tuple[list[Document], Tally]:
    """The documents of a text whose `is_chosen`, until they hold `source.tokens`, and what was drawn for it.

    Args:
        source: what is asked for.
        writer: draws; document d of a block and its candidate c are sample c of prompt d.
        score: of each document, the better the higher; None where nothing is judged.
        prompts: what `prompts_of` gives; None: empty ones.
        longest: tokens after which a document is cut, its prompt included. A cut document has no end to judge.
        seed_of_block: seed by the block's number.
        holds: whether a document keeps the rule; None: there is none.

    Raises:
        UserError: not one document of `HOPELESS` blocks kept the rule.
    """
    kept: list[Document] = []
    size, block, tally = 0, 0, Tally()
    while size < source.tokens:
        numbers = range(block * BLOCK, (block + 1) * BLOCK)
        if source.beams and prompts:  # a prompt has one text
            numbers = range(numbers.start, min(numbers.stop, len(prompts)))
            if not numbers:
                raise UserError(
                    f"written by '{source.by}': {len(prompts)} prompts gave {size} tokens by beam search, and "
                    f"tokens={source.tokens}: give more prompts, or ask for fewer tokens"
                )
        given = [prompts[i % len(prompts)] if prompts else np.zeros(0, np.int32) for i in numbers]
        fresh = _block(source, writer, score, holds, given, longest, seed_of_block(block), tally)
        kept, size, block = kept + fresh, size + sum(len(document) + 1 for document in fresh), block + 1
        if not kept and block == HOPELESS:
            rule = getattr(source.rule, "__name__", source.rule)
            raise UserError(f"written by '{source.by}': not one of {tally.drawn} documents keeps the rule '{rule}'")
    ends = np.cumsum([len(document) + 1 for document in kept])
    return kept[: int(np.searchsorted(ends, source.tokens)) + 1], tally


def _block(
    source: Written,
    writer: LanguageModel,
    score: Scores | None,
    holds: Callable[[Document], bool] | None,
    prompts: list[Document],
    longest: int,
    seed: int,
    tally: Tally,
) -> list[Document]:
    """The documents of one block that are kept, in their order."""
    candidates = _candidates(source, writer, prompts, longest, seed)
    tally.tokens += sum(len(candidate) + 1 for candidate in candidates)
    tally.drawn, tally.documents = tally.drawn + len(candidates), tally.documents + len(prompts)
    stands = np.array([holds is None or holds(candidate) for candidate in candidates])
    tally.ruled_out += int(np.count_nonzero(~stands))
    values = np.where(stands, 0.0, -np.inf)
    if score is not None and stands.any():
        values[stands] = score([candidate for candidate, stood in zip(candidates, stands, strict=True) if stood])
        tally.scores = (tally.scores or 0.0) + float(values[stands].sum())
    best_D = np.argmax(values.reshape(-1, source.best_of), axis=1) + source.best_of * np.arange(len(prompts))
    left_D = best_D[stands[best_D]]
    order = np.argsort(-values[left_D], kind="stable")[: max(1, round(source.keep * len(left_D)))]
    chosen = sorted(int(c) for c in left_D[order])
    tally.kept += len(chosen)
    if score is not None and chosen:
        tally.kept_scores = (tally.kept_scores or 0.0) + float(values[chosen].sum())
        tally.lowest, tally.blocks = tally.lowest + float(values[chosen].min()), tally.blocks + 1
    return [candidates[c] for c in chosen]


def _candidates(
    source: Written, writer: LanguageModel, prompts: list[Document], longest: int, seed: int
) -> list[Document]:
    """Prompts with what the writer makes of them, `best_of` of each in a row."""
    knobs: dict[str, Any] = {name: getattr(source, name) for name in ("temperature", "top_k", "top_p")}
    length = longest - source.prompt_tokens
    if source.beams:
        written = [[text] for text in writer.beam(prompts, beams=source.beams, length=length)]
    else:
        written = writer.sample(prompts, seed, samples=source.best_of, length=length, **knobs)
    return [
        np.concatenate([prompt, text]).astype(np.int32)
        for prompt, row in zip(prompts, written, strict=True)
        for text in row
    ]


def scores(judge: LanguageModel, documents: Sequence[Document], prompt_tokens: int, longest: int) -> np.ndarray:
    """1 / (n - k) sum_t=k+1..n log p(x_t | x_<t), float64, one a document: of its tokens and its end, in nats.

    The first k = `prompt_tokens` are given and not counted, nor is the end of a document of `longest` tokens, which was
    cut there. -inf where the judge rules a token out.
    """
    found = []
    for document, log_probs in zip(documents, judge.log_probs(documents), strict=True):
        last = len(document) + (len(document) < longest)
        found.append(np.mean(log_probs[prompt_tokens:last], dtype=np.float64))
    if np.isnan(found).any():
        raise Fault("a judge's log-probability of a written text is not a number: its weights are damaged")
    return np.array(found)


def drawn_tokens(source: Written) -> float:
    """Tokens that a text takes to write, about: of all candidates."""
    return source.tokens * source.best_of / source.keep


def writing_flops(tokens: float, models: Sequence[Any], longest: int) -> int:
    """Floating-point operations of drawing so many tokens, and of judging them. Models that count have none.

    Args:
        tokens: of all candidates.
        models: configs of the writer, and of the judge where there is one, vocab_size filled in.
        longest: tokens of the longest document.
    """
    decoders = [model for model in models if not isinstance(model, NGram)]
    if not decoders:
        return 0
    from epigone.models.decoder import flops_per_token

    return round(sum(tokens * flops_per_token(model, longest, training=False) for model in decoders))
