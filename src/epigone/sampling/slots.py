"""Many prompts in few slots: when a text ends, the next one takes its place, so that none waits for the longest."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np

from epigone.errors import UserError
from epigone.models.config import DecoderConfig
from epigone.models.language_model import Document
from epigone.models.sharding import Sharding, batch_parts
from epigone.sampling.loop import (
    IDLE,
    Knobs,
    Prepared,
    Seen,
    Show,
    State,
    Switches,
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


class Text(NamedTuple):
    """A text that waits for a slot.

    Attributes:
        owner: whatever the caller knows it by; not None.
        prompt: what it goes on from, without bos.
        length: tokens that may be drawn, at most.
        draw: seed, number of the prompt, number of the sample: all that its randomness follows from.
        knobs: how its tokens are chosen.
    """

    owner: Any
    prompt: Document
    length: int
    draw: tuple[int, int, int]
    knobs: Knobs


class Growth(NamedTuple):
    """What the text of this owner gained, if anything, whether it is complete, and the scores that are shown of it."""

    owner: Any
    tokens: np.ndarray
    log_probs: np.ndarray
    is_complete: bool
    seen: Seen | None = None


class Slots:
    """Texts that grow side by side, each by its own seed and knobs; where one ends, another may begin.

    What a text becomes does not depend on the others, up to float32 rounding.

    Args:
        config: of the decoder.
        sharding: of the mesh that is set, for as long as this is used.
        prepared: the decoder's parameters.
        count: of the slots, rounded up to what the mesh divides.
        columns: tokens that a text may hold, prompt included, and more where prompts are padded.
        marks: change what is drawn, by the tokens before.
        show: says which scores are seen; None: none are.
        chunk: steps for which there is room between two looks.
    """

    def __init__(
        self,
        config: DecoderConfig,
        sharding: Sharding,
        prepared: Prepared,
        count: int,
        columns: int,
        marks: tuple[Mark, ...] = (),
        show: Show | None = None,
        chunk: int = CHUNK,
    ) -> None:
        self._config, self._sharding, self._prepared, self._chunk = config, sharding, prepared, chunk
        self._marks, self._show = marks, show
        self.count = round_up(count, batch_parts(sharding))
        self.few = min(self.count, round_up(max(1, self.count // SHARE), batch_parts(sharding)))
        self._owners: list[Any] = [None] * self.count
        width = max(widest(marks), show.width if show else 0)
        self._state = start_empty(config, sharding, self.count, columns, prepared.params, np.int32(0), width)

    @property
    def free(self) -> int:
        """Slots without a text."""
        return self._owners.count(None)

    def fill(self, texts: Sequence[Text], size: int) -> None:
        """Put texts into free slots: `size` of them are read together, or as many as may be.

        A part of them that is smaller is filled up with the last one, so that there is one program for all.
        """
        free = [slot for slot, owner in enumerate(self._owners) if owner is None][: len(texts)]
        for slot, text in zip(free, texts, strict=True):
            self._owners[slot] = text.owner
        longest = max(len(text.prompt) for text in texts)
        together = min(size, _readable(longest, batch_parts(self._sharding)))
        for first in range(0, len(texts), together):
            order = [min(r, len(texts) - 1) for r in range(first, first + together)]
            laid = _laid(self._config, [texts[r] for r in order], [free[r] for r in order])
            self._state = refill(self._config, self._sharding, self._prepared, self._state, laid)

    def grow(self, switch: Switches, until: Until, shows: bool = True) -> list[Growth]:
        """Go on with all texts, for at most `chunk` steps, and tell what they gained; complete ones leave.

        Scores are seen unless `shows` is False: on a CPU, to find the best takes as long as to compute all.
        """
        given = (self._config, self._sharding, self._chunk, switch, self._prepared, self._state)
        self._state, record = decode(*given, until, self._marks, self._show if shows else None)
        record = jax.device_get(record)
        count_B, live_B = (record.samples_CB != IDLE).sum(axis=0), np.asarray(self._state.live_B)
        found = []
        for slot, owner in enumerate(self._owners):
            if owner is None:
                continue
            n, done = count_B[slot], not live_B[slot]
            tokens, log_probs, _, seen = jax.tree.map(lambda x: x[:n, slot].copy(), record)  # noqa: B023
            if n or done:
                found.append(Growth(owner, tokens, log_probs, done, seen))
            if done:
                self._owners[slot] = None
        return found

    def drop(self, owner: Any) -> None:
        """End a text before its time; one that has no slot is none."""
        if owner in self._owners:
            slot = self._owners.index(owner)
            self._owners[slot] = None
            self._state = _ended(self._state, np.int32(slot))


@partial(jax.jit, donate_argnames=("state",))
def _ended(state: State, slot: jax.Array) -> State:
    return state._replace(live_B=state.live_B.at[slot].set(False))


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
    waiting, left = _waiting(work, seed, knobs), len(work.prompts) * work.samples
    slots = Slots(config, sharding, prepared, work.slots, _columns(config, longest, work.length), marks)
    while left or slots.free < slots.count:
        size = slots.few if slots.free < slots.count else slots.count
        while left and slots.free >= min(size, left):
            slots.fill(list(islice(waiting, min(size, left))), size)
            left -= min(size, left)
            size = slots.few
        for grown in slots.grow(switch, Until(steps, min(slots.few, left) if left else slots.count)):
            if len(grown.tokens):
                prompt, sample = grown.owner
                yield Piece(prompt, sample, grown.tokens, grown.log_probs)


def _waiting(work: Work, seed: int, knobs: Knobs) -> Iterator[Text]:
    """Every text; long prompts first, so that those read together are of similar length."""
    sizes = np.array([_padded(len(prompt)) for prompt in work.prompts])
    for i in map(int, np.argsort(-sizes, kind="stable")):
        for j in range(work.samples):
            yield Text((i, j), work.prompts[i], work.length, (seed, i, j), knobs)


def _laid(config: DecoderConfig, texts: Sequence[Text], slots: Sequence[int]) -> Texts:
    """Texts and their slots as arrays."""
    T = min(_padded(max(len(text.prompt) for text in texts)) + 1, config.max_length)
    tokens_RT, length_R = aligned([text.prompt for text in texts], T, right=True, specials=config.specials)
    most_R = np.array([min(text.length, config.max_length) for text in texts], np.int32)
    limit_R = np.minimum(length_R - 1 + most_R, config.max_length).astype(np.int32)
    seed_R, prompt_R, sample_R = np.array([text.draw for text in texts], np.uint32).T
    numbers_R2 = (prompt_R.astype(np.int32), sample_R.astype(np.int32))
    asked = [np.array(values) for values in zip(*(text.knobs for text in texts), strict=True)]
    knobs = Knobs(*(x.astype(kind) for x, kind in zip(asked, (np.float32, np.int32, np.float32), strict=True)))
    return Texts(np.array(slots, np.int32), tokens_RT, length_R, limit_R, *numbers_R2, seed_R, knobs)


def _readable(length: int, parts: int) -> int:
    """A power of two of prompts up to this length that hold no more than TOKENS, times the parts of the batch."""
    return parts << (max(1, TOKENS // max(1, _padded(length)) // parts).bit_length() - 1)


def _columns(config: DecoderConfig, longest: int, length: int) -> int:
    """Columns of a ring that hold the longest prompt as it is padded, and what may be written behind any."""
    return max(_padded(longest), min(_padded(longest) + bucket(length), config.max_length))


def _padded(length: int) -> int:
    """The columns in which a prompt of this length is read: 0, or the smallest 16 * 2^k that holds it."""
    return SHORTEST_PROMPT << max(0, (length - 1) // SHORTEST_PROMPT).bit_length() if length else 0


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is at least `size`."""
    return -(-size // multiple) * multiple
