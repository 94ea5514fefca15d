"""One program in several processes: joining them, and letting the first one prepare what all of them read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from epigone.errors import Fault

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""What a launcher sets."""


def _several() -> bool:
    return os.environ.get(VARIABLES[1], "1") != "1"


@cache
def join() -> int:
    """Join the program that the environment describes; the number of this process in it, 0 when it is alone.

    A process that cannot join ends the run: going on alone would train the same model many times.
    """
    if not _several():
        return 0
    import jax

    address, count, rank = (os.environ.get(name, "") for name in VARIABLES)
    try:
        jax.distributed.initialize(address, int(count), int(rank))
    except (ValueError, RuntimeError) as error:
        given = f"{VARIABLES[0]}={address} {VARIABLES[1]}={count} {VARIABLES[2]}={rank}"
        raise Fault(f"this process could not join the others ({given}): {str(error).splitlines()[0]}") from None
    return jax.process_index()


def is_first() -> bool:
    """Whether this process writes files; exactly one does."""
    return join() == 0


def wait(place: str) -> None:
    """Go on when all processes are at the same place."""
    if _several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(place)


@contextmanager
def first_then_all(place: str) -> Iterator[None]:
    """The body runs in the first process, then, with its files there, in all others."""
    if not is_first():
        wait(f"{place}: first")
    yield
    if is_first():
        wait(f"{place}: first")
    wait(f"{place}: all")
