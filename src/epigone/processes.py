"""One program in several processes: joining them, and letting the first one prepare what all of them read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from epigone.errors import Fault


@cache
def join() -> int:
    """Join the program that the environment describes; the number of this process in it, 0 when it is alone.

    The launcher sets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. A process that cannot join ends the
    run: going on alone would train the same model many times.
    """
    if int(os.environ.get("JAX_NUM_PROCESSES", "1")) == 1:
        return 0
    import jax

    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        address, rank = os.environ.get("JAX_COORDINATOR_ADDRESS"), os.environ.get("JAX_PROCESS_ID")
        raise Fault(f"process {rank} could not join the coordinator at {address}: {error}") from None
    return jax.process_index()


def is_first() -> bool:
    """Whether this process writes files; exactly one does."""
    return join() == 0


def wait(place: str) -> None:
    """Go on when all processes are at the same place."""
    if int(os.environ.get("JAX_NUM_PROCESSES", "1")) > 1:
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
