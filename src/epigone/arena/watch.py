"""A provider's side of the whole game: who is caught, what an extractor gets before, and what honest users pay for it.

Honest traffic is made up in three parts, of other users each: one that detectors know, one on whose windows thresholds
are calibrated, and one on which false alarms and their price are counted. An account is refused from the end of the
first window on in which a detector gives an alarm. Coordination is looked at when a day is over; volume, of the last
hour, at every query.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from epigone.arena.detectors import (
    Query,
    Threshold,
    calibrated,
    coordination,
    coverage,
    detected,
    mmd,
    novelty,
    pairs,
    prada,
    regularity,
    repetition,
    running,
)
from epigone.arena.policies import Policy, shown_scores
from epigone.arena.traffic import DAY, KINDS, Extractor, by_account, extraction, honest, windows
from epigone.errors import UserError, check_sizes
from epigone.evaluate.diversity import distinct
from epigone.evaluate.ngrams import NGramIndex
from epigone.models.language_model import Document, LanguageModel
from epigone.models.ngram import NGram, NGramModel
from epigone.sampling.decode import DecoderLanguageModel

TOGETHER = "coordination"
VOLUME = "volume"
ANY = "any of them"
KNOWN_QUERIES = 200
"""Honest queries with which MMD compares a window."""

ANSWER = 64
"""Tokens of an answer to an honest user, at most."""

Log = list[Query]
Score = Callable[[Sequence[Query]], float]


@dataclass(frozen=True)
class Watch:
    """Traffic at a box that is made up, and what its detectors and policies make of it.

    Attributes:
        teacher: key of the node in the box.
        text: real text; what is asked are pieces of its documents.
        extractors: those who want to copy, by name.
        hard: names of extractors that ask what a small student, which has read a part of the text, knows least.
        boxes: policies by name, whose price for honest users is measured.
        more: further detectors by name, functions of a window (`epigone.arena.detectors.Query`s of one account).
        frames: ways to ask, of which programs and some extractors have one each.
        users: honest users, in three parts.
        days: of honest traffic.
        window: queries of an account that are looked at together.
        rate: false alarms that are asked for, as a share of honest windows.
        runs: how often each extractor tries.
        limit: queries of an account that are answered within a minute.
        price: of a million tokens.
        seed: of all that is made up.
    """

    teacher: str
    text: Any
    extractors: Mapping[str, Extractor]
    hard: tuple[str, ...] = ()
    boxes: Mapping[str, Policy] = field(default_factory=dict)
    more: Mapping[str, Callable[[Sequence[Query]], float]] = field(default_factory=dict)
    frames: tuple[str, ...] = ("say in other words", "what comes after", "tell me more of this")
    users: int = 450
    days: float = 7.0
    window: int = 50
    rate: float = 0.01
    runs: int = 5
    limit: int = 20
    price: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, users=3, window=5, runs=1, limit=1, seed=0)
        if not self.days > 0 or not 0 < self.rate < 1:
            raise UserError(f"watch: days={self.days} is above 0, and rate={self.rate} between 0 and 1")
        if unknown := set(self.hard) - set(self.extractors):
            raise UserError(f"watch: hard names {sorted(unknown)}, which no extractor is called")


def watch(config: Watch, documents: Sequence[Document], frames: Sequence[Document], vocab_size: int) -> dict[str, Any]:
    """Thresholds, what they catch, and what they cost: plain numbers, so that a report needs no more.

    Args:
        config: says what is made up.
        documents: the tokens of its text.
        frames: those of its frames.
        vocab_size: ids of the tokenizer.

    Where there are too few honest windows for a rate, a detector gives no alarm: its threshold is infinite.
    """
    known, calibration, fresh = (_honest(config, documents, frames, part) for part in range(3))
    guard = Guard(config, known, calibration)
    seen = guard.look(fresh)
    answered, asked = guard.answered(seen), {account: len(queries) for account, queries in seen.accounts.items()}
    delayed, wait = delays(fresh, config.limit)
    return {
        "rate": config.rate,
        "window": config.window,
        "days": config.days,
        "price": config.price,
        "limit": config.limit,
        "detectors": guard.told(seen),
        "honest": {
            "users": len(asked),
            "queries": len(fresh),
            "flagged": {name: np.mean([n < asked[a] for a, n in got.items()]) for name, got in answered.items()},
            "refused": {name: 1 - sum(got.values()) / len(fresh) for name, got in answered.items()},
            "delayed": delayed,
            "wait": wait,
        },
        "extractors": {
            name: _tried(config, name, documents, frames, fresh, guard, vocab_size) for name in config.extractors
        },
    }


def _honest(config: Watch, documents: Sequence[Document], frames: Sequence[Document], part: int) -> Log:
    """The users of one part, the kinds in turn."""
    kinds = list(KINDS.values())
    log: Log = []
    for user in range(part, config.users, 3):
        seed = config.seed * 1_000_003 + user
        log += honest(kinds[user // 3 % len(kinds)], f"u{user}", documents, frames, config.days, seed)
    return sorted(log, key=lambda query: query.time)


def _tried(
    config: Watch,
    name: str,
    documents: Sequence[Document],
    frames: Sequence[Document],
    fresh: Log,
    guard: "Guard",
    vocab_size: int,
) -> dict[str, Any]:
    """What one extractor gets, in each of its runs, among honest users."""
    plan = config.extractors[name]
    if name in config.hard:
        plan = replace(plan, hard=_least_known(documents, vocab_size))
    got: dict[str, list[int]] = {}
    alarms: dict[str, list[bool]] = {}
    days, asked = 0.0, 0
    for run in range(config.runs):
        log = extraction(plan, documents, frames, config.seed * 1_000_003 + run)
        days, asked = max(days, (log[-1].time - log[0].time) / DAY), len(log)
        seen = guard.look(log, fresh)
        for detector, accounts in guard.answered(seen).items():
            got.setdefault(detector, []).append(round(sum(accounts.values()) * plan.queries / len(log)))
        for detector, threshold in guard.alone.items():
            found = [threshold.alarm(value) for value in seen.values(detector)]
            alarms.setdefault(detector, []).extend(found)
    caught = {detector: _share(found) for detector, found in alarms.items()}
    # At the limit an account waits: so many days at least.
    least = asked / plan.accounts / config.limit / (DAY / 60)
    return {"wanted": plan.queries, "asked": asked, "days": max(days, least), "got": got, "caught": caught}


def _least_known(documents: Sequence[Document], vocab_size: int) -> Callable[[Sequence[Document]], np.ndarray]:
    """How little a student that counts pairs, and has read every sixth document, knows of each prompt: nats a token.

    Neither its first token counts, for which there is nothing before, nor the end that it does not have.
    """
    young = NGramModel.fit(NGram(order=2), list(documents[::6]), vocab_size)
    return lambda prompts: np.array([-np.mean(one[1:-1]) if len(one) > 2 else 0.0 for one in young.log_probs(prompts)])


def _share(found: Sequence[bool]) -> list[float] | None:
    """A share, and its exact 95 % interval; None of nothing."""
    return list(detected([float(one) for one in found], Threshold(0.5, 0.5, 0.0, 1.0, 1))) if found else None


def delays(log: Log, limit: int) -> tuple[float, float]:
    """The share of queries that wait where an account has `limit` answers in any 60 seconds, and their mean wait."""
    waits: list[float] = []
    for queries in by_account(log).values():
        begins: list[float] = []
        for query in queries:
            free = begins[-limit] + 60.0 if len(begins) >= limit else -np.inf
            begins.append(max(query.time, free))
            waits.append(begins[-1] - query.time)
    late = [wait for wait in waits if wait > 0]
    return len(late) / len(waits), float(np.mean(late)) if late else 0.0


class Look(NamedTuple):
    """What a guard sees of a log.

    Attributes:
        accounts: the queries of each account.
        windows: what each detector says of each window of each account, by account and detector.
        hours: at each query of each account, its queries in the hour up to it.
        days: (day, account, with how many others it acts together).
    """

    accounts: dict[str, Log]
    windows: dict[str, dict[str, list[float]]]
    hours: dict[str, np.ndarray]
    days: list[tuple[int, str, float]]

    def values(self, detector: str) -> list[float]:
        """All that a detector says: of windows, or of the days of accounts."""
        if detector == TOGETHER:
            return [value for _, account, value in self.days if account in self.accounts]
        if detector == VOLUME:
            most: dict[tuple[str, int], float] = {}
            for account, queries in self.accounts.items():
                for query, count in zip(queries, self.hours[account].tolist(), strict=True):
                    day = (account, int(query.time // DAY))
                    most[day] = max(float(count), most.get(day, 0.0))
            return list(most.values())
        return [value for one in self.windows.values() for value in one[detector]]


class Guard:
    """Detectors that know some honest traffic, with thresholds that are calibrated on other honest traffic.

    Args:
        config: window and rate.
        known: honest traffic for those that compare.
        calibration: other honest traffic.
    """

    def __init__(self, config: Watch, known: Log, calibration: Log) -> None:
        picked = np.random.default_rng(config.seed).permutation(len(known))[:KNOWN_QUERIES]
        self.size = config.window
        self.scores: dict[str, Score] = {
            "regularity": regularity,
            "coverage": coverage,
            "novelty": partial(novelty, seen=pairs(known)),
            "repetition": repetition,
            "prada": prada,
            "mmd": partial(mmd, honest=[known[int(i)] for i in picked]),
            **config.more,
        }
        seen, names = self.look(calibration), (VOLUME, *self.scores, TOGETHER)
        self.alone = {name: _calibrated(seen.values(name), config.rate) for name in names}
        self.jointly = {name: _calibrated(seen.values(name), config.rate / len(names)) for name in names}

    def look(self, log: Log, others: Sequence[Query] = ()) -> Look:
        """What detectors say of a log, while `others` ask beside."""
        accounts = by_account(log)
        said = {}
        for account, queries in accounts.items():
            parts = windows(queries, self.size)
            said[account] = {name: [score(part) for part in parts] for name, score in self.scores.items()}
        hours = {account: running(queries) for account, queries in accounts.items()}
        return Look(accounts, said, hours, _together([*log, *others]))

    def told(self, fresh: Look) -> dict[str, Any]:
        """Of each detector its threshold, the interval of its rate, and the share of fresh honest windows above it."""
        found = {}
        for name, threshold in self.alone.items():
            share, low, high = detected(fresh.values(name), threshold)
            rates = {"low": threshold.low, "high": threshold.high, "windows": threshold.windows}
            found[name] = {"threshold": threshold.value, **rates, "false": share, "false_low": low, "false_high": high}
        return found

    def answered(self, seen: Look) -> dict[str, dict[str, int]]:
        """By detector, and by any of them, how many queries of each account are answered.

        The rate of false alarms is shared out among detectors where any of them refuses.
        """
        ends, joint_ends = (_ends(seen.days, limits[TOGETHER]) for limits in (self.alone, self.jointly))
        found: dict[str, dict[str, int]] = {name: {} for name in (*self.alone, ANY)}
        for account, queries in seen.accounts.items():
            values, hours = seen.windows[account], seen.hours[account]
            joint = [_until(queries, joint_ends.get(account)), _first_above(hours, self.jointly[VOLUME])]
            found[VOLUME][account] = _first_above(hours, self.alone[VOLUME])
            for name in self.scores:
                found[name][account] = self._until_alarm(values[name], self.alone[name], len(queries))
                joint.append(self._until_alarm(values[name], self.jointly[name], len(queries)))
            found[TOGETHER][account] = _until(queries, ends.get(account))
            found[ANY][account] = min(joint)
        return found

    def _until_alarm(self, values: Sequence[float], threshold: Threshold, queries: int) -> int:
        first = next((number for number, value in enumerate(values, 1) if threshold.alarm(value)), None)
        return queries if first is None else first * self.size


def _first_above(hours: np.ndarray, threshold: Threshold) -> int:
    """Queries before the first one that is too many for its hour; all where none is."""
    above = np.flatnonzero(hours > threshold.value)
    return int(above[0]) if len(above) else len(hours)


def _calibrated(honest: Sequence[float], rate: float) -> Threshold:
    """The threshold; one that nothing passes where there are too few honest windows for such a rate."""
    if (len(honest) + 1) * rate < 1:
        return Threshold(np.inf, rate, 0.0, 0.0, len(honest))
    return calibrated(honest, rate)


def _together(log: Log) -> list[tuple[int, str, float]]:
    """(day, account, with how many others it acts together) of each day on which an account asks at all."""
    days: dict[int, Log] = {}
    for query in log:
        days.setdefault(int(query.time // DAY), []).append(query)
    return [
        (day, account, value)
        for day, queries in sorted(days.items())
        for account, value in coordination(by_account(queries)).items()
    ]


def _ends(together: Sequence[tuple[int, str, float]], threshold: Threshold) -> dict[str, float]:
    """When accounts that act together are refused: at the end of the first such day."""
    ends: dict[str, float] = {}
    for day, account, value in together:
        if threshold.alarm(value):
            ends.setdefault(account, (day + 1) * DAY)
    return ends


def _until(queries: Log, end: float | None) -> int:
    return len(queries) if end is None else sum(query.time < end for query in queries)


def utility(
    own: LanguageModel,
    policy: Policy,
    documents: Sequence[Document],
    prompts: Sequence[Document],
    seed: int,
) -> dict[str, float]:
    """What a policy leaves an honest user of its scores and of its text.

    `shown`: the share of places whose own token has a score; `error`: the mean distance of such a score from the
    model's own, nats; `text_nats`: what the model itself thinks of the texts that it answers, nats a token, which
    rises where a mark or a temperature makes them worse; `distinct_2`: different pairs of tokens in them.
    """
    assert isinstance(own, DecoderLanguageModel)  # `grow.check` refuses others
    plain, shown = own.log_probs(documents), shown_scores(own.config, own.params, policy, documents, 0)
    gaps = np.concatenate([np.abs(seen.own - true) for seen, true in zip(shown, plain, strict=True)])
    answers = [row[0] for row in own.marked(policy.marks).sample(prompts, seed, length=ANSWER)]
    whole = [np.r_[prompt, answer].astype(np.int32) for prompt, answer in zip(prompts, answers, strict=True)]
    nats = [one[len(p) : len(w)] for one, p, w in zip(own.log_probs(whole), prompts, whole, strict=True)]
    told = {"shown": float(np.isfinite(gaps).mean()), "text_nats": -float(np.mean(np.concatenate(nats)))}
    told["distinct_2"] = distinct(NGramIndex.build(answers, own.vocab_size), 2)
    return told | ({"error": float(np.nanmean(gaps))} if np.isfinite(gaps).any() else {})
