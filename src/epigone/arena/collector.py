"""Very many prompts, an endpoint, a journal: what is asked, what it costs, when it stops."""

import asyncio
import hashlib
import heapq
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from epigone.arena.endpoint import Asking, Client, Endpoint, Unanswerable, most_tokens
from epigone.arena.journal import Journal, Kept, key_of
from epigone.data.datasets import CARD, read_text, write_text
from epigone.errors import UserError, check_name, check_sizes

REFUSALS = 20
"""Prompts of which not one was answered: then it is the question that is wrong, not they."""

AT_ONCE = 256
"""Prompts that are looked up in the journal together."""


@dataclass(frozen=True)
class Budget:
    """What may be spent, over all that one journal ever asks; None is no limit.

    Attributes:
        questions: prompts that are answered or refused.
        tokens: read and written.
        money: by the endpoint's prices.
    """

    questions: int | None = None
    tokens: int | None = None
    money: float | None = None

    def __post_init__(self) -> None:
        check_sizes(self, questions=1, tokens=1)
        if self.money is not None and self.money <= 0:
            raise UserError(f"money={self.money}: above 0, or None for no limit")


@dataclass(frozen=True)
class Collection:
    """What is to be collected.

    Attributes:
        name: of the collection, and of its folder.
        endpoint: who is asked.
        prompts: what is asked, a strategy of `epigone.arena.prompts`.
        asking: how.
        budget: what it may cost.
    """

    name: str
    endpoint: Endpoint
    prompts: Any
    asking: Asking = field(default_factory=Asking)
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def settings(self) -> dict[str, Any]:
        """What an answer depends on beside its prompt."""
        endpoint = {name: getattr(self.endpoint, name) for name in ("url", "model", "chat")}
        return endpoint | asdict(self.asking)


class Share(NamedTuple):
    """One of several programs that collect the same: it asks the prompts whose hash falls to its number."""

    number: int = 0
    of: int = 1

    def has(self, prompt: str) -> bool:
        """Whether a prompt is this one's."""
        return int.from_bytes(key_of(prompt)[:8], "little") % self.of == self.number

    def journal(self, folder: Path) -> Path:
        """Where its journal is."""
        return folder / f"journal-{self.number}-of-{self.of}.sqlite"


@dataclass
class Progress:
    """How far a collection is. Tokens and money are those that are spent; what is under way is held back beside them.

    Attributes:
        asked: prompts answered or refused, before and now.
        refused: those that the endpoint will not answer.
        now: prompts since this program began.
        tokens: read and written.
        money: by the endpoint's prices.
        held: tokens and money that questions under way may cost.
        allowed: questions that may be under way.
        waits: questions that had to be tried again.
        stopped: why nothing more is asked, where the budget says so.
    """

    asked: int = 0
    refused: int = 0
    now: int = 0
    tokens: int = 0
    money: float = 0.0
    held: tuple[int, float] = (0, 0.0)
    allowed: int = 0
    waits: int = 0
    stopped: str = ""


class Estimate(NamedTuple):
    """What a collection may cost at most: prompts, tokens, money; of `seen` prompts where there are more."""

    prompts: int
    tokens: int
    money: float
    is_all: bool


def estimate(collection: Collection, prompts: Iterable[str], look_at: int = 100_000) -> Estimate:
    """What the prompts, or the first of them, may cost at most: a prompt has no more tokens than bytes."""
    total, tokens, money = 0, 0, 0.0
    stream = iter(prompts)
    for prompt in islice(stream, look_at):
        total += 1
        more = _most(collection, prompt)
        tokens, money = tokens + more[0], money + more[1]
    return Estimate(total, tokens, money, next(stream, None) is None)


def _most(collection: Collection, prompt: str) -> tuple[int, float]:
    """Tokens and money that a prompt may cost."""
    read, written = most_tokens(collection.endpoint, collection.asking, prompt)
    return read + written, _price(collection.endpoint, read, written)


def _price(endpoint: Endpoint, read: int, written: int) -> float:
    return (read * endpoint.read_price + written * endpoint.write_price) / 1e6


async def collect(
    collection: Collection,
    journal: Journal,
    prompts: Iterable[str],
    share: Share = Share(),
    on_progress: Callable[[Progress], None] = lambda progress: None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Progress:
    """Ask all prompts that are this share's and not answered yet, until the budget is spent.

    Raises UserError where the endpoint refuses us, and Fault where it does not answer; what was answered is kept.
    """
    totals = journal.totals
    money = _price(collection.endpoint, totals.read, totals.written)
    progress = Progress(totals.questions, totals.refused, 0, totals.read + totals.written, money)
    async with Client(collection.endpoint, collection.asking, transport) as client:
        work = _Work(collection, journal, client, _groups(collection, journal, prompts, share), progress, on_progress)
        workers = [asyncio.create_task(work.run()) for _ in range(collection.endpoint.at_once)]
        try:
            await asyncio.gather(*workers)
            journal.write(work.refusals)
            work.count(work.refusals)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            journal.flush()
    return progress


def _groups(collection: Collection, journal: Journal, prompts: Iterable[str], share: Share) -> Iterator[list[str]]:
    """Prompts that are still to be asked, as many as go into one question."""
    texts = (prompt.encode(errors="replace").decode() for prompt in prompts)  # halves of characters are no text
    stream, left = (prompt for prompt in texts if share.has(prompt)), list[str]()
    while part := list(islice(stream, AT_ONCE)):
        left += journal.missing(list(dict.fromkeys(part)))
        while len(left) >= collection.endpoint.together:
            yield left[: collection.endpoint.together]
            del left[: collection.endpoint.together]
    if left:
        yield left


class _Work:
    """What the workers share."""

    def __init__(
        self,
        collection: Collection,
        journal: Journal,
        client: Client,
        groups: Iterator[list[str]],
        progress: Progress,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.collection, self.journal, self.client, self.groups = collection, journal, client, groups
        self.progress, self.on_progress = progress, on_progress
        self._under_way, self._settled = 0, asyncio.Event()
        self._answered, self.refusals = progress.asked > progress.refused, list[Kept]()

    async def run(self) -> None:
        """One worker: until there is nothing to ask, or nothing to spend."""
        while (group := await self._next()) is not None:
            most = [_most(self.collection, prompt) for prompt in group]
            self._hold(sum(tokens for tokens, _ in most), sum(money for _, money in most), len(group))
            try:
                kept = await self._ask(group)
                await self._keep(kept)
            finally:
                self._hold(-sum(tokens for tokens, _ in most), -sum(money for _, money in most), -len(group))
            self.progress.allowed, self.progress.waits = self.client.allowed, self.client.waits
            self.on_progress(self.progress)

    async def _next(self) -> list[str] | None:
        """The next prompts, when the budget has room for all that they may cost."""
        group = None if self.progress.stopped else next(self.groups, None)
        while group is not None and not self.progress.stopped:
            room, why = self._room(group)
            if room:
                return room
            if not self._under_way:
                self.progress.stopped = f"the budget of {why} has no room for another question"
                return None
            self._settled.clear()
            await self._settled.wait()  # what is under way may cost less than it might have
        return None

    def _room(self, group: list[str]) -> tuple[list[str], str]:
        """As many of the prompts as there is room for, and what there is too little of where that is none."""
        budget, progress = self.collection.budget, self.progress
        most = [_most(self.collection, prompt) for prompt in group]
        tokens = progress.tokens + sum(self.client.lost) + progress.held[0] + sum(one for one, _ in most)
        money = progress.money + progress.held[1] + sum(one for _, one in most)
        money += _price(self.collection.endpoint, *self.client.lost)
        for spent, limit, what in ((tokens, budget.tokens, "tokens"), (money, budget.money, "money")):
            if limit is not None and spent > limit:
                return [], f"{limit:,} {what}"
        if budget.questions is None:
            return group, ""
        asked = progress.asked + len(self.refusals) + self._under_way
        return group[: max(0, budget.questions - asked)], f"{budget.questions:,} questions"

    async def _ask(self, group: list[str]) -> list[Kept]:
        """Answers, or why there are none; where one of several prompts is refused, each is asked alone."""
        try:
            return await self.client.ask(group)
        except Unanswerable as error:
            if len(group) == 1:
                return [Kept(group[0], [], str(error), 0, 0)]
        for prompt in group:
            await self._keep(await self._ask([prompt]))
        return []

    async def _keep(self, kept: list[Kept]) -> None:
        """Keep and count answers; of refusals the first wait for an answer, since it may be that all is refused."""
        self._answered |= any(one.refused is None for one in kept)
        if not self._answered and kept:
            self.refusals += kept
            if len(self.refusals) >= REFUSALS:
                why = kept[-1].refused
                raise UserError(f"the first {len(self.refusals)} prompts were all refused ({why}): none of it is kept")
            return
        kept, self.refusals = [*self.refusals, *kept], []
        await self.journal.put(kept)
        self.count(kept)

    def _hold(self, tokens: int, money: float, questions: int) -> None:
        held = self.progress.held
        self.progress.held = (held[0] + tokens, held[1] + money)
        self._under_way += questions
        self._settled.set()

    def count(self, kept: list[Kept]) -> None:
        """They are on the disk."""
        for one in kept:
            self.progress.asked += 1
            self.progress.now += 1
            self.progress.refused += one.refused is not None
            self.progress.tokens += one.read + one.written
            self.progress.money += _price(self.collection.endpoint, one.read, one.written)


def publish(collection: Collection, folder: Path) -> dict[str, Any]:
    """Make the data set of all answers that the folder's journals hold, each question once; its card.

    A document is a prompt with its answer behind it, or, of a chat, the answer. What stands on the card of a data set
    that is there already, of the same answers, is left as it is.
    Raises UserError where there is no answer, Busy while a share is still being collected.
    """
    paths = sorted(folder.glob("journal-*-of-*.sqlite"))
    totals, hashed = dict.fromkeys(("questions", "refused", "answers", "read", "written"), 0), hashlib.sha256()
    for kept in _merged(collection, paths):
        totals["questions"] += 1
        totals["refused"] += kept.refused is not None
        totals["answers"] += len(kept.answers)
        totals["read"] += kept.read
        totals["written"] += kept.written
        hashed.update(key_of(kept.prompt) + repr([answer["text"] for answer in kept.answers]).encode())
    if not totals["answers"]:
        raise UserError(f"{folder} has no answers yet: collect some first")
    target = folder / "answers"
    card = {
        "name": collection.name,
        "source": f"{collection.endpoint.model} at {collection.endpoint.url}",
        "licence": "that of the model's answers: see the terms of its endpoint",
        "unit": "answer" if collection.endpoint.chat else "prompt and answer",
        "settings": collection.settings,
        "prompts": repr(collection.prompts),
        "collected": totals,
        "answers_sha256": hashed.hexdigest(),
    }
    if (target / CARD).exists() and read_text(target).card.get("answers_sha256") == card["answers_sha256"]:
        return card
    new, old = folder / ".answers.new", folder / ".answers.old"
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write_text(
        new, _documents(collection, paths), card | {"published": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    )
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return card


def _merged(collection: Collection, paths: list[Path]) -> Iterator[Kept]:
    """What several journals hold, each question once, in the order of the hashes."""
    with ExitStack() as stack:
        journals = [stack.enter_context(Journal(path, collection.settings, alone=True)) for path in paths]
        last = b""
        for kept in heapq.merge(*journals, key=lambda kept: key_of(kept.prompt)):
            if (key := key_of(kept.prompt)) != last:
                yield kept
            last = key


def _documents(collection: Collection, paths: list[Path]) -> Iterator[str]:
    for kept in _merged(collection, paths):
        head = "" if collection.endpoint.chat else kept.prompt
        yield from (head + answer["text"] for answer in kept.answers)
