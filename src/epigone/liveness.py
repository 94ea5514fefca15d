"""What several processes tell of themselves, and what follows from it: who is missing, and where each one was."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

LIMIT = "EPIGONE_HANG_SECONDS"
"""Seconds after which a process is missing: nothing was heard of it, or the others wait and it does not come."""


@dataclass(frozen=True)
class Sign:
    """What a process says of itself.

    Attributes:
        beat: a number that grows; -1 before anything was heard.
        host: where it runs.
        place: what it trains, or has trained; empty before.
        step: the last step that is done there; None when all are.
        state: `compiles`, `waits` (in JAX) or `works` (anywhere else).
        code: the line of Epigone that it stands at.
    """

    beat: int = -1
    host: str = "?"
    place: str = ""
    step: int | None = 0
    state: str = "works"
    code: str = "?"

    def moved(self) -> tuple[Any, ...]:
        """What changes where it goes on; one that compiles is always going on."""
        return (self.place, self.step, self.beat if self.state == "compiles" else None)


@dataclass(frozen=True)
class Seen:
    """One process as another sees it: its last sign, and the seconds since any sign and since it went on."""

    sign: Sign
    silent: float
    still: float


def missing(seen: Sequence[Seen], limit: float) -> tuple[list[int], str] | None:
    """The processes for which the others wait, and why they are held to be missing; None where nothing hangs.

    Nobody may be missing and all wait: then devices or the network hang.
    """
    if silent := [rank for rank, one in enumerate(seen) if one.silent > limit]:
        return silent, f"nothing was heard of it for {limit:g} s"
    there = [one.sign for one in seen]
    at_work = [rank for rank, sign in enumerate(there) if sign.step is not None]
    if len({sign.place for sign in there}) > 1 or not there[0].place or not at_work:
        return None
    if any(seen[rank].still <= limit for rank in at_work):
        return None
    waits = [rank for rank in at_work if there[rank].state == "waits"]
    steps = {there[rank].step or 0 for rank in at_work}
    why = f"it has not gone on for {limit:g} s, and the others wait for it"
    if len(steps) > 1 or len(at_work) < len(seen):
        return [rank for rank in at_work if there[rank].step == min(steps)], why
    if steps == {0} and len(waits) < len(at_work):
        return None  # what comes before the first step, as reading a checkpoint, takes as long as it takes
    if waits and len(waits) < len(at_work):
        return [rank for rank in at_work if rank not in waits], why
    return [], f"for {limit:g} s"


def described(found: tuple[list[int], str], seen: Sequence[Seen]) -> str:
    """One line: who is missing, where each process was last, what to do."""
    ranks, why = found
    named = ", ".join(f"{rank} (host {seen[rank].sign.host})" for rank in ranks[:8]) + (", ..." if ranks[8:] else "")
    who = f"missing: process {named}: {why}" if ranks else f"a collective hangs, and all processes wait in it {why}"
    do = "Look at that process and its host" if ranks else "Look at the devices and the network"
    return f"{who}. {_standing(seen)}. {do}; the same command goes on from the last checkpoint (time limit: {LIMIT})"


def _standing(seen: Sequence[Seen]) -> str:
    """Where each process was; those at the same place together."""
    groups: dict[str, list[int]] = {}
    for rank, one in enumerate(seen):
        groups.setdefault(_last(one.sign), []).append(rank)
    return "; ".join(
        f"process {', '.join(map(str, ranks[:8]))}{f' and {len(ranks) - 8} more' if ranks[8:] else ''}: {where}"
        for where, ranks in groups.items()
    )


def _last(sign: Sign) -> str:
    if sign.beat < 0:
        return "nothing heard yet"
    step = "all steps done" if sign.step is None else f"step {sign.step} done"
    return f"{f'{sign.place}, {step}, ' if sign.place else ''}{sign.state} at {sign.code}"


def standing(frame: FrameType | None) -> tuple[str, str]:
    """What a thread does, and the innermost line of Epigone in its stack."""
    state = "works"
    while frame is not None:
        name = frame.f_code.co_filename
        if f"{os.sep}epigone{os.sep}" in name:
            short = name.rpartition(f"{os.sep}epigone{os.sep}")[2]
            return state, f"{short}:{frame.f_lineno} ({frame.f_code.co_name})"
        if name.endswith(os.path.join("jax", "_src", "compiler.py")):
            state = "compiles"
        elif f"{os.sep}jax{os.sep}" in name and state == "works":
            state = "waits"
        frame = frame.f_back
    return state, "?"
