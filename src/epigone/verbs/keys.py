"""`epigone keys BOX`: who may ask a node that is served; a server that runs heeds a change at once."""

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from epigone.arena.accounts import Accounts, State
from epigone.errors import UserError


@dataclass(frozen=True)
class Keys:
    """Show the keys of a box and what they used today, or change one of them.

    Attributes:
        box: the file that 'epigone serve' keeps, by default RUN/box.sqlite; it is made if it is not there.
        add: make a key of this name and print it; it is stored nowhere else.
        a_minute: questions that the new key may ask in a minute.
        a_day: tokens that the new key may read and write in a day (UTC).
        degrade: show no scores to the key of this name any more.
        refuse: answer no question of it any more.
        reopen: do neither.
        delete: forget it.
    """

    box: tyro.conf.Positional[Path]
    add: str | None = None
    a_minute: int = 600
    a_day: int = 10_000_000
    degrade: str | None = None
    refuse: str | None = None
    reopen: str | None = None
    delete: str | None = None


def change_keys(given: Keys) -> None:
    """Change a key, or show all. Raises UserError for a name that is taken or unknown."""
    changes = [change for change in (given.add, given.degrade, given.refuse, given.reopen, given.delete) if change]
    if len(changes) > 1:
        raise UserError(f"one change at a time, not those of {', '.join(changes)}")
    if not given.add and not given.box.exists():
        raise UserError(f"there is no box {given.box}: make its first key with --add NAME")
    with Accounts(given.box) as accounts:
        if given.add:
            print(accounts.add(given.add, given.a_minute, given.a_day))
        elif given.delete:
            accounts.delete(given.delete)
        elif changes:
            states = ((given.degrade, State.DEGRADED), (given.refuse, State.REFUSED), (given.reopen, State.OPEN))
            for name, state in states:
                if name:
                    accounts.change(name, state)
        else:
            _show(accounts)


def _show(accounts: Accounts) -> None:
    table = Table("name", "state", "questions today", "tokens today", "a day", "a minute", box=None)
    for key, used in accounts.everyone():
        numbers = (used.questions, used.tokens, key.a_day, key.a_minute)
        table.add_row(key.name, key.state, *(f"{number:,}" for number in numbers))
    Console().print(table)
