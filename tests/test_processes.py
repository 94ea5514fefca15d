"""Joining: by three variables, by what JAX finds itself, or not at all, and then with one line."""

import re

import jax
import pytest

from epigone import processes, watchdog
from epigone.errors import Fault

ADDRESS, COUNT, RANK = processes.VARIABLES
OTHERS = (processes.CLUSTER, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES")


@pytest.fixture
def joined(monkeypatch):
    """Join under some variables, as one of `count` processes; the arguments that JAX got."""
    for name in (*processes.VARIABLES, *OTHERS):
        monkeypatch.delenv(name, raising=False)

    def join(count=1, error=None, **variables):
        given = []

        def initialize(**arguments):
            assert arguments.pop("heartbeat_timeout_seconds") > watchdog.DEFAULT_SECONDS
            given.append(arguments)
            if error:
                raise error

        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(watchdog, "watch", lambda *_: None)
        processes.join.cache_clear()
        processes.join()
        return given

    yield join
    processes.join.cache_clear()


def test_alone_nothing_is_joined(joined):
    assert joined() == []
    assert joined(**{COUNT: "1", ADDRESS: "a:1", RANK: "0"}) == []


def test_three_variables_or_jaxs_own_detection(joined):
    expected = {"coordinator_address": "host:1234", "num_processes": 2, "process_id": 1}
    assert joined(2, **{ADDRESS: "host:1234", COUNT: "2", RANK: "1"}) == [expected]
    assert joined(2, SLURM_STEP_NODELIST="a", **{processes.CLUSTER: "slurm"}) == [{"cluster_detection_method": "slurm"}]
    assert joined(2, **{processes.CLUSTER: "tpu"}) == [{}]


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({ADDRESS: "host:1"}, f"({ADDRESS}=host:1): set {COUNT}, {RANK} too"),
        ({COUNT: "2", RANK: "0"}, f"set {ADDRESS} too"),
        ({ADDRESS: "host:1", COUNT: "two", RANK: "0"}, f"{COUNT}=two"),
        ({processes.CLUSTER: "pbs"}, f"({processes.CLUSTER}=pbs): {processes.CLUSTER} is one of slurm, tpu, none"),
        ({processes.CLUSTER: "tpu", COUNT: "4"}, "2 processes were found, 4 should be there"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, f"8 tasks are in this step of srun .*set {processes.CLUSTER}=slurm"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, f"several hosts .*a,b.*set {processes.CLUSTER}=tpu"),
    ],
)
def test_a_process_that_cannot_join_says_what_was_given_and_what_to_do(joined, variables, line):
    with pytest.raises(Fault) as raised:
        joined(2, **variables)
    assert re.search(line, str(raised.value)) or line in str(raised.value), str(raised.value)


@pytest.mark.parametrize("error", [ValueError("coordinator_address should be defined."), OSError("no metadata")])
def test_no_error_of_jax_lets_a_process_go_on_alone(joined, error):
    with pytest.raises(Fault, match=f"could not join the others .{processes.CLUSTER}=tpu.: {error}"):
        joined(error=error, **{processes.CLUSTER: "tpu"})


def test_tasks_may_say_that_each_works_alone(joined):
    assert joined(SLURM_STEP_NUM_TASKS="8", **{processes.CLUSTER: "none"}) == []


def test_outside_srun_there_is_no_step_to_join(joined):
    with pytest.raises(Fault, match=r"no task of srun .SLURM_STEP_NODELIST is not set.: start it with srun"):
        joined(**{processes.CLUSTER: "slurm"})


def test_jaxs_own_detection_has_the_names_that_are_asked_for():
    known = {cluster.name for cluster in jax._src.clusters.ClusterEnv._cluster_types}
    asked = {arguments.get("cluster_detection_method") for arguments in processes.CLUSTERS.values()}
    assert asked - {None} <= known
    assert {"gcetpu", "gketpu"} <= known  # found without a name
