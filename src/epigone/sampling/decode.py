"""A decoder as a language model: it continues prompts, writes documents and scores them.

Everything is compiled once for each config and shape bucket; models of one config share what is compiled.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from epigone.errors import UserError
from epigone.models.config import DecoderConfig
from epigone.models.language_model import EOS, MAX_LENGTH, Document
from epigone.models.sharding import Sharding, batch_parts
from epigone.sampling.loop import IDLE, Drawn, Knobs, decode, start_empty, start_prompts, switches
from epigone.sampling.scores import aligned, bucket, next_scores, windows_of, windows_scores

SLOTS = 128
"""Documents that are written side by side."""
CHUNK = 512
"""Steps between two looks of the host at what was drawn."""


class Sample(NamedTuple):
    """A continuation: its tokens, eos included if it was drawn, and the natural-log probability of each.

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
) -> list[list[Sample]]:
    """Continue bos + each prompt `samples` times, by up to `length` tokens, until eos or the model's max_length.

    Sample j of prompt i depends on the prompt and on (seed, i, j) alone, not on the other rows or on `slots`,
    up to float32 rounding. Raises UserError for a prompt that leaves no room for a token.
    """
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest >= config.max_length:
        raise UserError(f"a prompt has {longest} tokens, and the model's max_length is {config.max_length}: shorten it")
    knobs = Knobs(temperature, top_k, top_p)
    switch = switches(knobs)
    rows = [(i, j) for i in range(len(prompts)) for j in range(samples)]
    B, steps = _round_up(slots, batch_parts(sharding)), bucket(length)
    T = min(bucket(longest + 1), config.max_length)
    drawn: list[Sample] = []
    for start in range(0, len(rows), B):
        part = rows[start : start + B]
        placed = _prompt_rows(config, [prompts[i] for i, _ in part], np.array(part, np.int32), B, T, length)
        state = start_prompts(config, sharding, T + steps, params, *placed)
        _, record = decode(config, sharding, steps, switch, params, state, jax.random.key(seed), knobs, 0)
        drawn += _rows_drawn(jax.device_get(record), len(part))
    return [drawn[i * samples : (i + 1) * samples] for i in range(len(prompts))]


def _prompt_rows(
    config: DecoderConfig, prompts: list[Document], indices_M2: np.ndarray, B: int, T: int, length: int
) -> tuple[np.ndarray, ...]:
    """Tokens, lengths with bos, limits, prompt and sample indices of B rows; those beyond the prompts stay idle."""
    idle = B - len(prompts)
    tokens_BT, lengths_B = aligned([*prompts, *[np.zeros(0, np.int32)] * idle], T, right=True)
    limit_B = np.minimum(lengths_B - 1 + length, config.max_length)
    limit_B[len(prompts) :] = 0
    prompt_B, sample_B = np.pad(indices_M2, ((0, idle), (0, 0))).T
    return tokens_BT, lengths_B, limit_B.astype(np.int32), prompt_B, sample_B


def _rows_drawn(record: Drawn, count: int) -> list[Sample]:
    """What each of the first rows drew."""
    used_CB = np.asarray(record.samples_CB) != IDLE
    tokens_CB, log_probs_CB = np.asarray(record.tokens_CB), np.asarray(record.log_probs_CB)
    return [Sample(tokens_CB[used_CB[:, b], b], log_probs_CB[used_CB[:, b], b]) for b in range(count)]


class DecoderLanguageModel:
    """A decoder and its parameters as a LanguageModel."""

    def __init__(self, config: DecoderConfig, params: Any, sharding: Sharding = Sharding(), slots: int = SLOTS) -> None:
        self.config, self.params, self.sharding, self.slots = config, params, sharding, slots
        if config.vocab_size is None:
            raise UserError("vocab_size is open: fill it with the tokenizer's size before the model is used")
        self.vocab_size = config.vocab_size

    def log_probs(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Natural-log probabilities of x_1..x_n and eos, for each document: float32 of lengths n + 1.

        A document longer than max_length is read in windows of that length which overlap by half, and each
        token is scored where it has the most context.
        """
        scores = [np.zeros(len(document) + 1, np.float32) for document in documents]
        windows = windows_of(documents, self.config.max_length)
        for window, values in windows_scores(self.config, self.sharding, self.params, windows):
            scores[window.document][window.first :][: window.scored] = values
        return scores

    def next_log_probs(self, contexts: Sequence[Document]) -> np.ndarray:
        """Log-probabilities [contexts, vocab_size] of the token after bos + context, or after its last max_length."""
        return next_scores(self.config, self.sharding, self.params, contexts)

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
        documents = _documents(records)
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
        """`samples` continuations of bos + each prompt, each until eos (not included) or `length` tokens."""
        slots = min(self.slots, 1 << max(0, len(prompts) * samples - 1).bit_length())
        knobs: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        sizes: dict[str, Any] = {"samples": samples, "length": length, "slots": slots, "sharding": self.sharding}
        found = sample(self.config, self.params, prompts, seed, **sizes, **knobs)
        return [[_without_eos(one.tokens) for one in row] for row in found]

    def _records(self, tokens: int, seed: int, knobs: Knobs, limit: int) -> Iterator[Drawn]:
        """What was drawn, chunk by chunk, until every document that was started has ended."""
        config, sharding, params = self.config, self.sharding, self.params
        switch = switches(knobs)
        rows = _round_up(self.slots, batch_parts(sharding))
        state = start_empty(config, sharding, rows, bucket(limit), params, limit)
        live = True
        while live:
            state, record = decode(
                config, sharding, CHUNK, switch, params, state, jax.random.key(seed), knobs, np.int32(tokens)
            )
            yield jax.device_get(record)
            live = bool(np.any(state.live_B))


def _documents(records: Sequence[Drawn]) -> list[Document]:
    """The tokens of all chunks, put together by document; an eos is taken off."""
    samples, tokens = (
        np.concatenate([getattr(r, name) for r in records]).T.ravel() for name in ("samples_CB", "tokens_CB")
    )
    used = samples != IDLE
    samples, tokens = samples[used], tokens[used]
    order = np.argsort(samples, kind="stable")
    parts = np.split(tokens[order], np.cumsum(np.bincount(samples))[:-1])
    return [_without_eos(part) for part in parts]


def _without_eos(tokens: np.ndarray) -> Document:
    return tokens[:-1] if len(tokens) and tokens[-1] == EOS else tokens


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
