"""Many prompts in few slots: when a text ends, the next one takes its place, so that none waits for the longest."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from epigone.errors import UserError
from epigone.models.config import DecoderConfig
from epigone.models.language_model import Document
from epigone.models.sharding import Sharding, batch_parts
from epigone.sampling.loop import (
    IDLE,
    Drawn,
    Knobs,
    Prepared,
    State,
    Texts,
    Until,
    decode,
    refill,
    start_empty,
    switches,
)
from epigone.sampling.scores import TOKENS, aligned, bucket
from epigone.sampling.watermark import Mark, widest

CHUNK = 256
"""Steps for which a record of what was drawn has room; the host looks at it then, or when slots are free."""
SHARE = 8
"""One part in so many of the slots is refilled at once: fewer would read prompts slowly, more would wait idle."""
SHORTEST_PROMPT = 16
"""Prompts are padded to this times a power of two."""


class Work(NamedTuple):
    """What is to be written: `samples` texts for each prompt, each of at most `length` tokens, in so many slots."""

    prompts: Sequence[Document]
    samples: int
    length: int
    slots: int


class Piece(NamedTuple):
    """What a text gained since the last look: tokens, and the natural-log probability of each."""

    prompt: int
    sample: int
    tokens: np.ndarray
    log_probs: np.ndarray


def pieces(
    config: DecoderConfig,
    sharding: Sharding,
    prepared: Prepared,
    work: Work,
    seed: int,
    knobs: Knobs,
    steps: int = CHUNK,
    marks: tuple[Mark, ...] = (),
) -> Iterator[Piece]:
    """Texts in the order in which they grow, looked at after `steps` steps at the latest, longest prompts first.

    The host holds nothing of what it gave away: a million texts need no more of its memory than a hundred.
    Raises UserError for a prompt that leaves no room for a token.
    """
    longest = max((len(prompt) for prompt in work.prompts), default=0)
    if longest >= config.max_length:
        raise UserError(f"a prompt has {longest} tokens, and the model's max_length is {config.max_length}: shorten it")
    switch = switches(knobs)
    if work.length < 1:
        return
    key, waiting, left = jax.random.key(seed), _waiting(work), len(work.prompts) * work.samples
    slots = round_up(work.slots, batch_parts(sharding))
    few = min(slots, round_up(max(1, slots // SHARE), batch_parts(sharding)))
    owners: list[tuple[int, int] | None] = [None] * slots
    columns, width = _columns(config, longest, work.length), widest(marks)
    state = start_empty(config, sharding, slots, columns, prepared.params, np.int32(0), width)
    while left or any(owners):
        size = few if any(owners) else slots
        while left and owners.count(None) >= min(size, left):
            for texts in _texts(config, sharding, work, waiting, owners, size, min(size, left)):
                state = refill(config, sharding, prepared, state, texts)
            left -= min(size, left)
            size = few
        until = Until(steps, min(few, left) if left else slots)
        state, record = decode(config, sharding, CHUNK, switch, prepared, state, key, knobs, until, marks)
        yield from _grown(state, jax.device_get(record), owners)


def _waiting(work: Work) -> Iterator[tuple[int, int]]:
    """Prompt and sample of every text; long prompts first, so that those read together are of similar length."""
    sizes = np.array([_padded(len(prompt)) for prompt in work.prompts])
    return ((int(i), j) for i in np.argsort(-sizes, kind="stable") for j in range(work.samples))


def _texts(
    config: DecoderConfig,
    sharding: Sharding,
    work: Work,
    waiting: Iterator[tuple[int, int]],
    owners: list[tuple[int, int] | None],
    size: int,
    count: int,
) -> Iterator[Texts]:
    """The next `count` texts, put into free slots: `size` rows together, or as many as may be read together.

    The last text stands there again where there are fewer than that.
    """
    free = [slot for slot, owner in enumerate(owners) if owner is None][:count]
    rows = [next(waiting) for _ in free]
    for slot, row in zip(free, rows, strict=True):
        owners[slot] = row
    together = min(size, _readable(len(work.prompts[rows[0][0]]), batch_parts(sharding)))
    for first in range(0, count, together):
        yield _laid(config, work, [min(r, count - 1) for r in range(first, first + together)], free, rows)


def _laid(config: DecoderConfig, work: Work, order: list[int], free: list[int], rows: list[tuple[int, int]]) -> Texts:
    """Some of the rows and their slots, in this order, as arrays."""
    prompts = [work.prompts[rows[r][0]] for r in order]
    T = min(_padded(max(len(prompt) for prompt in prompts)) + 1, config.max_length)
    tokens_RT, length_R = aligned(prompts, T, right=True, specials=config.specials)
    limit_R = np.minimum(length_R - 1 + min(work.length, config.max_length), config.max_length)
    numbers_R2 = np.array([rows[r] for r in order], np.int32)
    slot_R = np.array([free[r] for r in order], np.int32)
    return Texts(slot_R, tokens_RT, length_R, limit_R.astype(np.int32), *numbers_R2.T)


def _readable(length: int, parts: int) -> int:
    """A power of two of prompts up to this length that hold no more than TOKENS, times the parts of the batch."""
    return parts << (max(1, TOKENS // max(1, _padded(length)) // parts).bit_length() - 1)


def _grown(state: State, record: Drawn, owners: list[tuple[int, int] | None]) -> Iterator[Piece]:
    """What each text gained; the slots of those that ended are free."""
    tokens_CB, log_probs_CB, samples_CB = map(np.asarray, record)
    count_B, live_B = (samples_CB != IDLE).sum(axis=0), np.asarray(state.live_B)
    for slot, owner in enumerate(owners):
        if owner is None:
            continue
        if count_B[slot]:
            n = count_B[slot]
            yield Piece(*owner, tokens_CB[:n, slot].copy(), log_probs_CB[:n, slot].copy())
        if not live_B[slot]:
            owners[slot] = None


def _columns(config: DecoderConfig, longest: int, length: int) -> int:
    """Columns of a ring that hold the longest prompt as it is padded, and what may be written behind any."""
    return max(_padded(longest), min(_padded(longest) + bucket(length), config.max_length))


def _padded(length: int) -> int:
    """The columns in which a prompt of this length is read: 0, or the smallest 16 * 2^k that holds it."""
    return SHORTEST_PROMPT << max(0, (length - 1) // SHORTEST_PROMPT).bit_length() if length else 0


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is at least `size`."""
    return -(-size // multiple) * multiple
