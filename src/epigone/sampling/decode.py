"""A decoder as a language model: it continues prompts, writes documents and scores them.

Everything is compiled once for each config and shape bucket; models of one config share what is compiled.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from epigone.errors import UserError
from epigone.models.config import DecoderConfig
from epigone.models.language_model import MAX_LENGTH, Document, Specials
from epigone.models.sharding import Sharding, batch_parts
from epigone.sampling.beam import beam_search
from epigone.sampling.loop import IDLE, Drawn, Knobs, Prepared, Until, decode, prepare, start_empty, switches
from epigone.sampling.scores import FEW, bucket, embeddings, next_scores, windows_of, windows_scores
from epigone.sampling.slots import CHUNK, Piece, Work, pieces, round_up
from epigone.sampling.watermark import Mark, widest

SLOTS = 128
"""Texts that are written side by side."""
SHORT = 8
"""Tokens of a short text. Where so many for each slot are not asked for, there are fewer slots."""
STREAMED = 8
"""Tokens of a text between two looks at it, where it is shown while it grows."""


class Sample(NamedTuple):
    """A continuation: its tokens, an end of text included if it was drawn, and the natural-log probability of each.

    The probabilities are the model's own: before temperature, top-k and top-p.
    """

    tokens: np.ndarray
    log_probs: np.ndarray


def sample(
    config: DecoderConfig,
    params: nnx.State,
    prompts: Sequence[Document],
    seed: int,
    *,
    samples: int = 1,
    length: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    slots: int = SLOTS,
    sharding: Sharding = Sharding(),
    prepared: Prepared | None = None,
    marks: tuple[Mark, ...] = (),
) -> list[list[Sample]]:
    """Continue bos + each prompt `samples` times, by up to `length` tokens, until eos, a stop or the max_length.

    Sample j of prompt i depends on the prompt and on (seed, i, j) alone, not on the other rows or on `slots`,
    up to float32 rounding. `prepared` are the same parameters as `loop.prepare` gives them, if they are at hand. The
    `marks` change what is drawn, by the tokens before.
    Raises UserError for a prompt that leaves no room for a token.
    """
    work, knobs = Work(prompts, samples, length, slots), Knobs(temperature, top_k, top_p)
    ready = prepared or prepare(config, sharding, params)
    grown: list[list[list[Piece]]] = [[[] for _ in range(samples)] for _ in prompts]
    for piece in pieces(config, sharding, ready, work, seed, knobs, marks=marks):
        grown[piece.prompt][piece.sample].append(piece)
    return [[_joined(parts) for parts in row] for row in grown]


def _joined(parts: list[Piece]) -> Sample:
    """The pieces of one text; of most there is one."""
    empty = Piece(0, 0, np.zeros(0, np.int32), np.zeros(0, np.float32))
    tokens, log_probs = (np.concatenate(arrays) for arrays in list(zip(empty, *parts, strict=True))[2:])
    return Sample(tokens, log_probs)


class DecoderLanguageModel:
    """A decoder and its parameters as a LanguageModel; `marks` change what it writes, and none of its scores."""

    def __init__(
        self,
        config: DecoderConfig,
        params: Any,
        sharding: Sharding = Sharding(),
        slots: int = SLOTS,
        marks: tuple[Mark, ...] = (),
    ) -> None:
        self.config, self.params, self.sharding, self.slots, self.marks = config, params, sharding, slots, marks
        if config.vocab_size is None:
            raise UserError("vocab_size is open: fill it with the tokenizer's size before the model is used")
        self.vocab_size = config.vocab_size

    def marked(self, marks: tuple[Mark, ...]) -> "DecoderLanguageModel":
        """The same model, with these marks in what it writes."""
        found = DecoderLanguageModel(self.config, self.params, self.sharding, self.slots, marks)
        found._prepared = self._prepared
        return found

    def log_probs(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Natural-log probabilities of x_1..x_n and eos, for each document: float32 of lengths n + 1.

        A document longer than max_length is read in windows of that length which overlap by half, and each
        token is scored where it has the most context.
        """
        scores = [np.zeros(len(document) + 1, np.float32) for document in documents]
        windows = windows_of(documents, self.config.max_length, self.specials)
        for window, values in windows_scores(self.config, self.sharding, self.params, windows):
            scores[window.document][window.first :][: window.scored] = values
        return scores

    def next_log_probs(self, contexts: Sequence[Document]) -> np.ndarray:
        """Log-probabilities [contexts, vocab_size] of the token after bos + context, or after its last max_length."""
        return next_scores(self.config, self.sharding, self.params, contexts)

    def embed(self, documents: Sequence[Document]) -> np.ndarray:
        """What the model makes of each document: the mean of its last layer's states, float32 [documents, D]."""
        return embeddings(self.config, self.sharding, self.params, documents)

    def write(
        self,
        tokens: int,
        seed: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        max_length: int = MAX_LENGTH,
    ) -> list[Document]:
        """Sample documents until their tokens (each with its eos) reach `tokens`; the same for the same seed.

        Document i is sample i of an empty prompt. It ends at eos, after `max_length` tokens, or where bos and
        its tokens fill the model's own max_length, so that the model can score what it wrote. It does not
        depend on how many are written side by side, up to float32 rounding.
        """
        if tokens <= 0:
            return []
        limit = max(1, min(max_length, self.config.max_length - 1))
        records = list(self._records(tokens, seed, Knobs(temperature, top_k, top_p), limit))
        documents = _documents(self.specials, records)
        counts = np.cumsum([len(document) + 1 for document in documents])
        return documents[: int(np.searchsorted(counts, tokens)) + 1]

    def sample(
        self,
        prompts: Sequence[Document],
        seed: int,
        *,
        samples: int = 1,
        length: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> list[list[Document]]:
        """`samples` continuations of bos + each prompt, each until an end (not included) or `length` tokens."""
        knobs: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        sizes: dict[str, Any] = {"samples": samples, "length": length, "slots": self._slots(len(prompts) * samples)}
        placed: dict[str, Any] = {"sharding": self.sharding, "prepared": self._prepared, "marks": self.marks}
        found = sample(self.config, self.params, prompts, seed, **sizes, **knobs, **placed)
        return [[_without_end(self.specials, one.tokens) for one in row] for row in found]

    def beam(self, prompts: Sequence[Document], *, beams: int, length: int) -> list[Document]:
        """A very probable continuation of bos + each prompt, at most `length` tokens (`epigone.sampling.beam`)."""
        return beam_search(self.config, self.params, self._prepared, list(prompts), beams, length)

    def stream(
        self,
        prompts: Sequence[Document],
        seed: int,
        *,
        samples: int = 1,
        length: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Iterator[tuple[int, int, Document]]:
        """The texts of `sample` while they grow: index of the prompt, index of the sample, and its new tokens.

        Every text is looked at after a few tokens. Nothing that was given is kept, so that memory stays flat however
        many texts are asked for. On a mesh it has to be set for as long as this is read.
        """
        work = Work(prompts, samples, length, self._slots(len(prompts) * samples))
        knobs = Knobs(temperature, top_k, top_p)
        for piece in pieces(self.config, self.sharding, self._prepared, work, seed, knobs, STREAMED, self.marks):
            tokens = _without_end(self.specials, piece.tokens)
            if len(tokens):
                yield piece.prompt, piece.sample, tokens

    def _slots(self, texts: int) -> int:
        """A power of two of slots, not many more than there are texts."""
        return min(self.slots, 1 << max(0, texts - 1).bit_length())

    @cached_property
    def _prepared(self) -> Prepared:
        """The parameters for the loop. They are kept, and cost as much memory as those of the layers once more."""
        return prepare(self.config, self.sharding, self.params)

    @property
    def specials(self) -> Specials:
        """The token ids with a meaning of their own."""
        return self.config.specials

    def _records(self, tokens: int, seed: int, knobs: Knobs, limit: int) -> Iterator[Drawn]:
        """What was drawn, chunk by chunk, until every document that was started has ended."""
        config, sharding, switch = self.config, self.sharding, switches(knobs)
        wanted = self.slots if tokens >= SHORT * self.slots else max(1, self.slots // FEW)
        rows = round_up(wanted, batch_parts(sharding))
        begin = (np.int32(limit), widest(self.marks), np.uint32(seed), knobs)
        state = start_empty(config, sharding, rows, bucket(limit), self.params, *begin)
        until = Until(CHUNK, rows, tokens)
        live = True
        while live:
            state, record = decode(config, sharding, CHUNK, switch, self._prepared, state, until, self.marks)
            yield jax.device_get(record)
            live = bool(np.any(state.live_B))


def _documents(specials: Specials, records: Sequence[Drawn]) -> list[Document]:
    """The tokens of all chunks, put together by document; an end of text is taken off."""
    samples, tokens = (
        np.concatenate([getattr(r, name) for r in records]).T.ravel() for name in ("samples_CB", "tokens_CB")
    )
    used = samples != IDLE
    samples, tokens = samples[used], tokens[used]
    order = np.argsort(samples, kind="stable")
    parts = np.split(tokens[order], np.cumsum(np.bincount(samples))[:-1])
    return [_without_end(specials, part) for part in parts]


def _without_end(specials: Specials, tokens: np.ndarray) -> Document:
    return tokens[:-1] if len(tokens) and int(tokens[-1]) in (specials.eos, *specials.stops) else tokens
