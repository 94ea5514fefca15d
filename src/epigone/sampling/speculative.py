"""Speculative decoding: a small draft proposes tokens, and the target reads them all in one pass.

Leviathan et al. 2023, "Fast inference from transformers via speculative decoding", and Chen et al. 2023, "Accelerating
large language model decoding with speculative sampling". What is written has exactly the target's distribution,
whatever the draft is; a good draft, such as a student distilled from the target, makes it fast.

Every row moves at its own speed. A token at position p of its row lies in column p of the row's ring, and what was
refused is overwritten by the next pass before anything can see it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from epigone.errors import UserError
from epigone.models.config import DecoderConfig
from epigone.models.language_model import Document
from epigone.models.sharding import Sharding
from epigone.sampling.decode import SLOTS, Sample
from epigone.sampling.loop import Knobs, switches
from epigone.sampling.scores import aligned, bucket, fitting_rows
from epigone.sampling.speculative_loop import Pair, Tally, speculate

Model = tuple[DecoderConfig, nnx.State]
"""A decoder's config and its parameters."""


@dataclass(frozen=True)
class SpeculationReport:
    """What the draft was good for. A pass of the target over several rows counts once for each row that still writes.

    Attributes:
        tokens: tokens written, ends included.
        passes: passes of the target over a batch of rows.
        row_passes: passes, counted once for each row in them.
        proposed: tokens proposed that there was still room for.
        judged: proposals up to the first that was refused, itself included.
        accepted: proposals that became text.
    """

    tokens: int
    passes: int
    row_passes: int
    proposed: int
    judged: int
    accepted: int

    @property
    def acceptance_rate(self) -> float:
        """accepted / proposed; 0 where nothing was proposed."""
        return self.accepted / max(1, self.proposed)

    @property
    def judged_rate(self) -> float:
        """accepted / judged: the chance of one proposal, alpha of Leviathan et al. 2023; 0 where none was judged."""
        return self.accepted / max(1, self.judged)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a row gains by one pass of the target: from 1 to draft_length + 1."""
        return self.tokens / max(1, self.row_passes)

    @property
    def rows_per_pass(self) -> float:
        """Rows that still write, on average over the passes: how well the slots are used."""
        return self.row_passes / max(1, self.passes)


def speculative_sample(
    target: Model,
    draft: Model,
    prompts: Sequence[Document],
    seed: int,
    *,
    samples: int = 1,
    length: int = 64,
    draft_length: int = 4,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    slots: int = SLOTS,
    sharding: Sharding = Sharding(),
) -> tuple[list[list[Sample]], SpeculationReport]:
    """Continue bos + each prompt `samples` times as `sample` does, with `draft` proposing `draft_length` tokens a pass.

    A text has the distribution that the target alone gives it at this temperature, top-k and top-p, and is its greedy
    text at temperature 0; the draft's own scores go through the same temperature, top-k and top-p. Sample j of prompt
    i depends on the models, the prompt, draft_length and (seed, i, j), not on the other rows, up to float32 rounding;
    it is another text than `sample` draws with the same seed. No array over the vocabulary is larger than
    [slots, draft_length + 1, vocabulary], and no more of the slots are used than keep that within `scores.LOGITS`.

    Raises UserError for two models that do not read the same tokens, and for texts that do not fit them.
    """
    config, draft_config = target[0], draft[0]
    _check(config, draft_config, prompts, length, draft_length)
    length = min(length, config.max_length)
    knobs = Knobs(temperature, top_k, top_p)
    pair = Pair(config, draft_config, sharding, switches(knobs), draft_length, bucket(length))
    rows = [(i, j) for i in range(len(prompts)) for j in range(samples)]
    B, T = _shape(pair, prompts, min(slots, len(rows)))
    drawn, tallies = [], []
    for start in range(0, len(rows), B):
        part = rows[start : start + B]
        placed = _prompt_rows(config, [prompts[i] for i, _ in part], np.array(part, np.int32), B, T, length)
        found = speculate(pair, target[1], draft[1], *placed, jax.random.key(seed), knobs)
        *texts, tally = jax.device_get(found)
        drawn += [Sample(tokens[:n], scores[:n]) for tokens, scores, n in list(zip(*texts, strict=True))[: len(part)]]
        tallies.append(tally)
    totals = np.sum(tallies, axis=0) if tallies else np.zeros(len(Tally._fields))
    report = SpeculationReport(sum(len(text.tokens) for text in drawn), *map(int, totals))
    return [drawn[i * samples : (i + 1) * samples] for i in range(len(prompts))], report


def _shape(pair: Pair, prompts: Sequence[Document], rows: int) -> tuple[int, int]:
    """Rows, a power of two of those whose logits fit, times the parts of the batch; and columns of the prompts."""
    B = fitting_rows(pair.target, pair.sharding, 1, pair.draft_length + 1, rows)
    longest = max((len(prompt) for prompt in prompts), default=0)
    return B, min(bucket(longest + 1), pair.target.max_length, pair.draft.max_length)


def _check(
    target: DecoderConfig, draft: DecoderConfig, prompts: Sequence[Document], length: int, draft_length: int
) -> None:
    if draft_length < 1:
        raise UserError(f"draft_length is {draft_length}: the draft proposes at least 1 token a pass")
    if length < 1:
        raise UserError(f"length is {length}: at least 1 token is written")
    if target.vocab_size != draft.vocab_size:
        raise UserError(
            f"vocabulary of the target {target.vocab_size} != of the draft {draft.vocab_size}: a draft reads and "
            f"writes the target's own tokens, so both need one tokenizer"
        )
    if target.specials != draft.specials:
        raise UserError(
            f"special tokens of the target {target.specials} != of the draft {draft.specials}: both need one tokenizer"
        )
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest >= target.max_length:
        raise UserError(f"a prompt has {longest} tokens, and the model's max_length is {target.max_length}: shorten it")
    reached = min(longest + length, target.max_length)
    if reached > draft.max_length:
        raise UserError(
            f"texts of up to {reached} tokens, and the draft's max_length is {draft.max_length}: ask for fewer, or "
            f"take a draft that reads as far as its target"
        )


def _prompt_rows(
    config: DecoderConfig, prompts: list[Document], indices_M2: np.ndarray, B: int, T: int, length: int
) -> tuple[np.ndarray, ...]:
    """Tokens at the left end, lengths with bos, limits, prompt and sample indices; rows beyond the prompts are idle."""
    idle = B - len(prompts)
    tokens_BT, lengths_B = aligned(
        [*prompts, *[np.zeros(0, np.int32)] * idle], T, right=False, specials=config.specials
    )
    limit_B = np.minimum(lengths_B - 1 + length, config.max_length)
    limit_B[len(prompts) :] = 0
    prompt_B, sample_B = np.pad(indices_M2, ((0, idle), (0, 0))).T
    return tokens_BT, lengths_B, limit_B.astype(np.int32), prompt_B, sample_B
