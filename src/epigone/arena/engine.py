"""Texts for many who ask at once: they wait in a line that is bounded, and grow side by side on one device.

A thread of its own does all that touches the device. Who asks is told, in that thread, what the text gained since the
last time. A text depends on its prompt, seed and sample alone, up to float32 rounding, not on who else asked. Texts
that are there, and whose scores are asked for, have a line of their own, from which some are read at every turn.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from enum import StrEnum
from functools import partial
from itertools import count, product, takewhile
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from epigone.arena.policies import Policy, Showing, shown_scores
from epigone.errors import UserError
from epigone.models.config import DecoderConfig
from epigone.models.language_model import Document
from epigone.models.sharding import Sharding
from epigone.sampling.loop import Knobs, Seen, Switches, Until, prepare, switches
from epigone.sampling.slots import SHORTEST_PROMPT, Slots, Text

STEPS = 8
"""Tokens after which every text is looked at: who reads along waits for no more."""


class Why(StrEnum):
    """Why a text ended: the model said so, it is as long as was asked for, its time was over, the engine broke."""

    STOP = "stop"
    LENGTH = "length"
    TIME = "time"
    ERROR = "error"


class Ask(NamedTuple):
    """What is asked for.

    Attributes:
        prompt: token ids, without bos.
        length: tokens that are written, at most.
        seed: of what is drawn, 0 to 2^32 - 1.
        sample: number of the text, of several with this prompt and seed.
        knobs: how tokens are chosen.
        scores: whether scores are told.
    """

    prompt: Document
    length: int
    seed: int
    sample: int
    knobs: Knobs
    scores: bool = True


class Told(NamedTuple):
    """What a text gained, an end token included, scores as the policy shows them, and why it ended, if it did."""

    tokens: np.ndarray
    seen: Seen | None
    why: Why | None


class Full(Exception):
    """The line is as long as it may be."""


class Ticket:
    """A text that was asked for, or one whose scores are; what tells it apart is that it is this one."""

    __slots__ = ("deadline", "tell", "what")

    def __init__(self, what: Any, tell: Callable[[Told], None], deadline: float) -> None:
        self.what, self.tell, self.deadline = what, tell, deadline


class Engine:
    """A decoder behind a policy that many may ask; used as a context, in which its thread runs.

    Args:
        config: of the decoder.
        params: its parameters.
        policy: what leaves the box.
        best: scores that are shown of a place, at most; 0 shows that of the token alone.
        slots: texts that grow side by side.
        waiting: texts that may wait for a slot, and as many that wait to be read.
    """

    def __init__(
        self, config: DecoderConfig, params: Any, policy: Policy, *, best: int, slots: int, waiting: int
    ) -> None:
        if min(slots, waiting) < 1 or best < 0:
            raise UserError(f"slots={slots} and waiting={waiting} are at least 1, best={best} at least 0")
        self._config, self._params, self._most = config, params, waiting
        self._show = show = Showing(policy, min(best, config.sizes.V))
        prepared = prepare(config, Sharding(), params)
        self._slots = Slots(config, Sharding(), prepared, slots, config.max_length, policy.marks, show, STEPS)
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._unread: deque[Ticket] = deque()
        self._growing: set[Ticket] = set()
        self._given_up: set[Ticket] = set()
        self._is_open, self.error = False, ""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def __enter__(self) -> Self:
        self._is_open = True
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._is_open = False
            self._changed.notify()
        self._thread.join()

    @property
    def load(self) -> tuple[int, int]:
        """Texts that grow, and texts that wait."""
        with self._changed:
            return len(self._growing), len(self._waiting) + len(self._unread)

    def ask(self, asks: Iterable[Ask], tell: Callable[[int, Told], None], seconds: float) -> list[Ticket]:
        """Put texts into the line, all or none; `tell(number, told)` hears of each until it has ended.

        Raises Full where the line has no room for all of them, or the engine does not run, and UserError for a prompt
        that leaves no room for a token and for knobs outside their range.
        """
        tickets = _tickets(asks, tell, seconds)
        switches(*(ticket.what.knobs for ticket in tickets))
        for ticket in tickets:
            if (n := len(ticket.what.prompt)) >= self._config.max_length or ticket.what.length < 1:
                most = self._config.max_length - 1
                raise UserError(
                    f"a prompt of {n} tokens, and {ticket.what.length} more: {most} at most, and 1 at least"
                )
        return self._line_up(self._waiting, tickets)

    def read(self, documents: Iterable[Document], tell: Callable[[int, Told], None], seconds: float) -> list[Ticket]:
        """Ask for the scores of texts as the policy shows them; `tell` hears of each once, and `ask` says the rest."""
        tickets = _tickets(documents, tell, seconds)
        for ticket in tickets:
            if (n := len(ticket.what)) >= self._config.max_length:
                raise UserError(f"a text of {n} tokens: {self._config.max_length - 1} at most")
        return self._line_up(self._unread, tickets)

    def warm(self) -> None:
        """Compile now what the first to ask would wait for. Raises Full where the engine broke meanwhile."""
        most = self._config.max_length - 1
        lengths = [0, *takewhile(lambda n: n < most, (SHORTEST_PROMPT << n for n in count())), most]
        for length in lengths:
            prompt = np.full(length, self._config.specials.bos, np.int32)
            self._wait_for(lambda tell: self.ask([Ask(prompt, 1, 0, 0, Knobs(), False)], tell, math.inf))  # noqa: B023
            if self._show.policy.shows:
                self._wait_for(lambda tell: self.read([prompt], tell, math.inf))  # noqa: B023
        for knobs, scores in product((Knobs(), Knobs(top_k=1)), (False, True) if self._show.policy.shows else (False,)):
            one = Ask(np.zeros(0, np.int32), 1, 0, 0, knobs, scores)
            self._wait_for(lambda tell: self.ask([one], tell, math.inf))  # noqa: B023

    def _wait_for(self, enlist: Callable[[Callable[[int, Told], None]], list[Ticket]]) -> None:
        ended = threading.Event()
        enlist(lambda _, told: ended.set() if told.why is not None else None)
        ended.wait()

    def _line_up(self, line: deque[Ticket], tickets: list[Ticket]) -> list[Ticket]:
        with self._changed:
            if not self._is_open or len(line) + len(tickets) > self._most:
                raise Full(self.error or f"{len(line)} texts wait, of {self._most} that may")
            line.extend(tickets)
            self._changed.notify()
        return tickets

    def give_up(self, tickets: Iterable[Ticket]) -> None:
        """Nobody waits for these texts any more: they are not told of again, and make room for others."""
        with self._changed:
            self._given_up.update(tickets)
            self._changed.notify()

    def _work(self) -> None:
        """The thread: until the engine is closed or something fails, which all who wait are told."""
        try:
            while self._turn():
                pass
        except Exception as error:  # whatever it is, who waits must hear of it
            self.error = f"{type(error).__name__}: {error}"
        with self._changed:
            self._is_open = False
            left = [*self._growing, *self._waiting, *self._unread]
            self._growing.clear()
            self._waiting.clear()
            self._unread.clear()
        for ticket in left:
            ticket.tell(_nothing(Why.ERROR))

    def _turn(self) -> bool:
        """Let texts in and grow all of them by some tokens; False where the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._unread or self._growing or not self._is_open)
            if not self._is_open:
                return False
            late = self._leaving()
            come, to_read = _first(self._waiting, self._slots.free), _first(self._unread, self._slots.count)
            self._growing.update(come)
            more = bool(self._waiting)
        for ticket in late:
            ticket.tell(_nothing(Why.TIME))
        if come:
            self._slots.fill([_text(ticket) for ticket in come], self._slots.few)
        if to_read:
            try:
                shown = self._shown([ticket.what for ticket in to_read])
            except Exception:
                with self._changed:
                    self._unread.extendleft(reversed(to_read))  # they are told with all others
                raise
            for ticket, seen in zip(to_read, shown, strict=True):
                ticket.tell(Told(np.zeros(0, np.int32), seen, Why.STOP))
        if self._growing:
            limits = any(
                knobs.top_k > 0 or knobs.top_p < 1 for knobs in (ticket.what.knobs for ticket in self._growing)
            )
            # Few programs for whoever asks together, not one for each mixture of wishes.
            switch = Switches(greedy=False, top_k=limits, top_p=limits, mixed=True)
            shows = any(ticket.what.scores for ticket in self._growing)
            free = max(self._slots.free + 1, self._slots.few) if more else self._slots.count
            for growth in self._slots.grow(switch, Until(STEPS, free), shows):
                self._tell(growth.owner, growth.tokens, growth.seen, growth.is_complete)
        return True

    def _shown(self, documents: list[Document]) -> list[Seen]:
        return shown_scores(self._config, self._params, self._show.policy, documents, self._show.best)

    def _leaving(self) -> list[Ticket]:
        """Forget who gave up and whose time is over, with the lock held; those whose time is over are told later."""
        now = time.monotonic()
        lines = (self._growing, self._waiting, self._unread)
        late = [t for line in lines for t in line if t.deadline < now and t not in self._given_up]
        gone = self._given_up | set(late)
        for ticket in self._growing & gone:
            self._slots.drop(ticket)
        self._growing -= gone
        for line in (self._waiting, self._unread):
            here = [ticket for ticket in line if ticket not in gone]
            line.clear()
            line.extend(here)
        self._given_up.clear()
        return late

    def _tell(self, ticket: Ticket, tokens: np.ndarray, seen: Seen | None, is_complete: bool) -> None:
        specials = self._config.specials
        ends = len(tokens) > 0 and tokens[-1] in (specials.eos, *specials.stops)
        why = None if not is_complete else Why.STOP if ends else Why.LENGTH
        if is_complete:
            with self._changed:
                self._growing.discard(ticket)
        if ticket not in self._given_up:
            ticket.tell(Told(tokens, seen, why))


def _tickets(all_: Iterable[Any], tell: Callable[[int, Told], None], seconds: float) -> list[Ticket]:
    until = time.monotonic() + seconds
    return [Ticket(one, partial(tell, number), until) for number, one in enumerate(all_)]


def _first(line: deque[Ticket], most: int) -> list[Ticket]:
    """Those at the head of a line, who leave it."""
    return [line.popleft() for _ in range(min(most, len(line)))]


def _text(ticket: Ticket) -> Text:
    ask = ticket.what
    return Text(ticket, ask.prompt, ask.length, (ask.seed, 0, ask.sample), ask.knobs)


def _nothing(why: Why) -> Told:
    return Told(np.zeros(0, np.int32), None, why)
