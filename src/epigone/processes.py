"""One program in several processes: joining them, and letting the first one prepare what all of them read."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from epigone import watchdog
from epigone.errors import Fault

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""What a launcher sets: host:port of the first process, how many there are, which one this is."""

CLUSTER = "EPIGONE_CLUSTER"
"""What it sets instead where JAX finds the others by itself: one of `CLUSTERS`."""

CLUSTERS = {"slurm": {"cluster_detection_method": "slurm"}, "tpu": {}, "none": {}}
"""Arguments of `jax.distributed.initialize`: `slurm` in a step of srun, `tpu` on Cloud TPU and in GKE's TPU pods.

`none`: this process is alone, whatever the place where it runs says.
"""


def several() -> bool:
    """Whether a launcher says that this process is one of several."""
    given = [os.environ.get(name) for name in VARIABLES]
    return os.environ.get(CLUSTER, "none") != "none" or (any(given) and given[1] != "1")


@cache
def join() -> int:
    """Join the program that the environment describes; the number of this process in it, 0 when it is alone.

    A process that cannot join ends the run: going on alone would train the same model many times. From then on the
    processes watch each other (`watchdog`).

    Raises:
        UserError: the time limit is none.
        Fault: it could not join, or it stands beside others and nothing says that they belong together.
    """
    if not several():
        _demand_to_be_alone()
        return 0
    import jax

    limit = watchdog.seconds()
    try:
        # JAX's own limit ends all processes without a name, so it comes later.
        jax.distributed.initialize(**_arguments(), heartbeat_timeout_seconds=2 * limit + 60)
    except Exception as error:
        raise Fault(f"{_could_not_join()}: {(str(error) or repr(error)).splitlines()[0]}") from None
    expected = os.environ.get(VARIABLES[1]) or jax.process_count()
    if int(expected) != jax.process_count():
        raise Fault(f"{_could_not_join()}: {jax.process_count()} processes were found, {expected} should be there")
    from jax._src.distributed import global_state

    watchdog.watch(global_state.client, jax.process_index(), jax.process_count())
    atexit.register(watchdog.stop)  # before JAX's own end, as it is registered later
    return jax.process_index()


def _arguments() -> dict:
    cluster = os.environ.get(CLUSTER, "none")
    if cluster not in CLUSTERS:
        raise ValueError(f"{CLUSTER} is one of {', '.join(CLUSTERS)}")
    if cluster == "slurm" and "SLURM_STEP_NODELIST" not in os.environ:
        raise ValueError("this is no task of srun (SLURM_STEP_NODELIST is not set): start it with srun")
    if cluster != "none":
        return CLUSTERS[cluster]
    address, count, rank = (os.environ.get(name, "") for name in VARIABLES)
    if missing := [name for name in VARIABLES if not os.environ.get(name)]:
        raise ValueError(f"set {', '.join(missing)} too")
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(rank)}


def _could_not_join() -> str:
    given = [f"{name}={os.environ[name]}" for name in (CLUSTER, *VARIABLES) if name in os.environ]
    return f"this process could not join the others ({' '.join(given)})"


def _demand_to_be_alone() -> None:
    """Refuse to be one of N processes that would each do the whole work."""
    tasks, hosts = os.environ.get("SLURM_STEP_NUM_TASKS", "1"), os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if os.environ.get(CLUSTER) == "none" or (tasks == "1" and "," not in hosts):
        return
    if tasks != "1":
        seen, value = f"{tasks} tasks are in this step of srun (SLURM_STEP_NUM_TASKS)", "slurm"
    else:
        seen, value = f"this TPU has several hosts (TPU_WORKER_HOSTNAMES={hosts})", "tpu"
    raise Fault(f"{seen}, and nothing joins them: set {CLUSTER}={value}, or {CLUSTER}=none where each works alone")


def is_first() -> bool:
    """Whether this process writes files; exactly one does."""
    return join() == 0


def wait(place: str) -> None:
    """Go on when all processes are at the same place."""
    if several():
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
