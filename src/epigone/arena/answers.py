"""What tokens become on their way out: text in pieces, cut where it is to stop, and the scores beside them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from epigone.arena.engine import Told, Why
from epigone.data.tokenizers import Tokenizer
from epigone.sampling.loop import Seen


class Place(NamedTuple):
    """A token that was written or read, where it stands, and what is shown of its scores.

    Attributes:
        token: its id.
        offset: characters before it.
        score: its log-probability, or None where it is not shown.
        best: ids and log-probabilities of the highest that are shown, best first.
    """

    token: int
    offset: int
    score: float | None
    best: list[tuple[int, float]]


class Piece(NamedTuple):
    """What can be sent of a text: characters and places since the last piece, and why it ended, if it did."""

    text: str
    places: list[Place]
    why: Why | None


class Writing:
    """A text that is written: what is told of its tokens goes in, pieces of text come out.

    Text is held back as long as it may be part of a character or of a string at which the text stops.

    Args:
        tokenizer: of the model.
        stops: strings before the first of which the text is cut.
        best: scores that are wanted of each place beside its own; None for no scores at all.
        head: tokens that the text goes on from: whether a space is between, and what is a whole character, depends on
            them.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], best: int | None, head: Sequence[int] = ()) -> None:
        self._decoder, self._stops, self._best = tokenizer.stream_decoder(), stops, best
        self._decoder.add(head)
        self._ends = {tokenizer.specials.eos, *tokenizer.specials.stops}
        self._held = max((len(stop) - 1 for stop in stops), default=0)
        self._text, self._sent = "", 0
        self._places: list[Place] = []
        self.written = 0

    def add(self, told: Told) -> Piece:
        """What can be sent now. After a piece that says why, nothing must be added."""
        tokens = told.tokens[:-1] if len(told.tokens) and int(told.tokens[-1]) in self._ends else told.tokens
        end = None
        if self._best is None and not self._stops:
            self._text += self._decoder.add(tokens)
            self.written += len(tokens)
        else:  # token by token: where it stops does not depend on how many are told of at once
            for number, token in enumerate(tokens):
                if self._best is not None:
                    self._places.append(_place(int(token), len(self._text), told.seen, number, self._best))
                self.written += 1
                if (end := self._grown(self._decoder.add([token]))) is not None:
                    break
        if told.why is not None and end is None:
            end = self._grown(self._decoder.end())
        why = told.why if end is None else Why.STOP
        certain = len(self._text) - (self._undecided() if why is None else 0)
        text, self._sent = self._text[self._sent : certain], max(self._sent, certain)
        return Piece(text, self._take(None if end is None and why else self._sent), why)

    def _grown(self, more: str) -> int | None:
        """Where the text is cut, if it is, when it has grown: before the string that is complete first."""
        first = max(0, len(self._text) - self._held)
        self._text += more
        found = [(at + len(stop), at) for stop in self._stops if (at := self._text.find(stop, first)) >= 0]
        if not found:
            return None
        self._text = self._text[: min(found)[1]]
        return len(self._text)

    def _undecided(self) -> int:
        """Characters at the end that may be the beginning of a string at which the text stops."""
        sizes = range(min(self._held, len(self._text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(self._text[-size:]) for stop in self._stops)), 0)

    def _take(self, end: int | None) -> list[Place]:
        """The places that begin before the end, or all of them, which are forgotten."""
        count = len(self._places)
        if end is not None:
            count = next((n for n, place in enumerate(self._places) if place.offset >= end), count)
        taken, self._places = self._places[:count], self._places[count:]
        return taken


def places_of(tokens: np.ndarray, offsets: Sequence[int], seen: Seen, best: int) -> list[Place]:
    """The places of a text that is there, with what is shown of its scores."""
    return [
        _place(int(token), int(offset), seen, number, best)
        for number, (token, offset) in enumerate(zip(tokens, offsets, strict=True))
    ]


def offsets_of(tokenizer: Tokenizer, tokens: np.ndarray) -> tuple[str, list[int]]:
    """The text of ids, and the characters before each."""
    decoder, text, offsets = tokenizer.stream_decoder(), "", []
    for token in tokens:
        offsets.append(len(text))
        text += decoder.add([token])
    return text + decoder.end(), offsets


def _place(token: int, offset: int, seen: Seen | None, number: int, best: int) -> Place:
    if seen is None:
        return Place(token, offset, None, [])
    own = float(seen.own[number])
    pairs = zip(seen.ids[number, :best].tolist(), seen.log_probs[number, :best].tolist(), strict=True)
    return Place(token, offset, None if np.isnan(own) else own, [pair for pair in pairs if pair[0] >= 0])
