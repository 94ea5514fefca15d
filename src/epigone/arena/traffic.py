"""Made-up traffic at a prompt box: honest users of several kinds, and those who ask in order to copy.

A prompt is a piece of a document of some corpus, perhaps in a frame ("say in other words: ..."). Honest users have
topics, which are neighbouring documents, and come in sessions; extractors want the whole corpus. Every function gives
the same log for the same seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from epigone.arena.detectors import Query
from epigone.errors import UserError
from epigone.models.language_model import Document

HOUR, DAY = 3600.0, 86_400.0


@dataclass(frozen=True)
class Honest:
    """One kind of honest user. Sessions are a Poisson process; queries within one follow each other at random gaps.

    Attributes:
        sessions: expected number of sessions a day.
        queries: expected number of queries a session, geometric.
        gap: mean seconds between two queries of a session, exponential.
        topics: parts of the corpus that the user asks about.
        breadth: documents of such a part, which are neighbours.
        framed: share of queries that have the user's own frame, as those of a program have.
        again: share of queries that ask what was asked before.
    """

    sessions: float = 2.0
    queries: float = 6.0
    gap: float = 40.0
    topics: int = 2
    breadth: int = 40
    framed: float = 0.0
    again: float = 0.1


KINDS = {
    "visitor": Honest(),
    "heavy": Honest(sessions=8.0, queries=30.0, gap=20.0, topics=6, breadth=120),
    "program": Honest(sessions=20.0, queries=8.0, gap=5.0, topics=2, breadth=200, framed=0.9),
    "reader": Honest(sessions=1.0, queries=15.0, gap=90.0, topics=1, breadth=80, again=0.3),
}
"""Honest users: most are few queries here and there, some are heavy, some are programs with a frame of their own."""


def honest(
    kind: Honest, account: str, corpus: Sequence[Document], frames: Sequence[Document], days: float, seed: int
) -> list[Query]:
    """The queries of one honest user over so many days, in order."""
    random = np.random.default_rng(seed)
    starts = np.sort(random.uniform(0, days * DAY, random.poisson(kind.sessions * days)))
    first = random.integers(0, max(1, len(corpus) - kind.breadth), kind.topics).tolist()
    frame = _frame(frames, random)
    log: list[Query] = []
    for start in starts:
        topic = first[random.integers(kind.topics)]
        count = random.geometric(1 / kind.queries)
        times = start + np.cumsum(random.exponential(kind.gap, count))
        for time in times:
            if log and random.random() < kind.again:
                prompt = log[random.integers(len(log))].prompt
            else:
                document = corpus[topic + int(random.integers(min(kind.breadth, len(corpus))))]
                piece = _piece(document, random)
                prompt = np.r_[frame, piece].astype(np.int32) if random.random() < kind.framed else piece
            log.append(Query(float(time), account, prompt))
    return sorted(log, key=lambda query: query.time)


def _frame(frames: Sequence[Document], random: np.random.Generator) -> Document:
    return frames[int(random.integers(len(frames)))] if frames else np.zeros(0, np.int32)


def _piece(document: Document, random: np.random.Generator, longest: int = 24) -> Document:
    """From somewhere in a document, 4 to `longest` tokens, or all of a short one."""
    length = min(len(document), int(random.integers(4, longest + 1)))
    start = random.integers(0, len(document) - length + 1)
    return np.asarray(document[start : start + length], np.int32)


@dataclass(frozen=True)
class Extractor:
    """Somebody who wants what the model knows, by so many queries over the whole corpus.

    Attributes:
        queries: how many in all.
        every: mean seconds between two of an account's; slow ones hide in the volume of honest users.
        accounts: accounts over which the queries are spread, all active at the same hours.
        framed: share of queries that have the extractor's one frame.
        mixed: share of each account's queries that are an honest visitor's, to look like one.
        jitter: gaps vary as a gamma distribution of this coefficient of variation; 0 is a clock.
        hard: ask what this function gives the highest number for, among `choice` times as many pieces: such as the
            student's uncertainty.
        choice: pieces that are looked at for each that is asked, where `hard` is given.
    """

    queries: int
    every: float = 2.0
    accounts: int = 1
    framed: float = 0.0
    mixed: float = 0.0
    jitter: float = 0.5
    hard: Callable[[Sequence[Document]], np.ndarray] | None = None
    choice: int = 4


def extraction(plan: Extractor, corpus: Sequence[Document], frames: Sequence[Document], seed: int) -> list[Query]:
    """The queries of all accounts of an extractor, in order. Raises UserError for a plan that asks nothing."""
    if plan.queries < 1 or plan.accounts < 1 or not 0 <= plan.mixed < 1:
        raise UserError(
            f"{plan.queries} queries of {plan.accounts} accounts, {plan.mixed} mixed: give 1, 1 and below 1"
        )
    random = np.random.default_rng(seed)
    pieces = _asked(plan, corpus, random)
    frame = _frame(frames, random)
    asked = [np.r_[frame, p].astype(np.int32) if random.random() < plan.framed else p for p in pieces]
    log: list[Query] = []
    for number in range(plan.accounts):
        account = f"x{seed}-{number}"
        own = asked[number :: plan.accounts]
        cover = round(len(own) * plan.mixed / (1 - plan.mixed))
        topic = int(random.integers(0, max(1, len(corpus) - 40)))
        near = [_piece(corpus[topic + int(random.integers(min(40, len(corpus))))], random) for _ in range(cover)]
        prompts = [(own + near)[i] for i in random.permutation(len(own) + cover)]
        gaps = np.full(len(prompts), plan.every)
        if plan.jitter:
            gaps = random.gamma(plan.jitter**-2, plan.every * plan.jitter**2, len(prompts))
        times = random.uniform(0, plan.every) + np.cumsum(gaps)
        log += [Query(float(time), account, prompt) for time, prompt in zip(times, prompts, strict=True)]
    return sorted(log, key=lambda query: query.time)


def _asked(plan: Extractor, corpus: Sequence[Document], random: np.random.Generator) -> list[Document]:
    """Pieces from all over the corpus, or the hardest of several times as many."""
    count = plan.queries * (plan.choice if plan.hard else 1)
    order = np.concatenate([random.permutation(len(corpus)) for _ in range(-(-count // len(corpus)))])[:count]
    pieces = [_piece(corpus[int(i)], random) for i in order]
    if plan.hard is None:
        return pieces
    hardest = np.sort(np.argsort(-plan.hard(pieces), kind="stable")[: plan.queries])
    return [pieces[i] for i in hardest]


def by_account(log: Sequence[Query]) -> dict[str, list[Query]]:
    """The queries of each account, in order."""
    found: dict[str, list[Query]] = {}
    for query in sorted(log, key=lambda query: query.time):
        found.setdefault(query.account, []).append(query)
    return found


def daily(log: Sequence[Query]) -> list[list[Query]]:
    """The queries of each account on each day on which it asked at all."""
    found: dict[tuple[str, int], list[Query]] = {}
    for query in sorted(log, key=lambda query: query.time):
        found.setdefault((query.account, int(query.time // DAY)), []).append(query)
    return list(found.values())


def windows(log: Sequence[Query], size: int) -> list[list[Query]]:
    """Windows of `size` queries of one account that do not overlap; what is left over at the end is in none."""
    found = []
    for queries in by_account(log).values():
        found += [queries[start : start + size] for start in range(0, len(queries) - size + 1, size)]
    return found
