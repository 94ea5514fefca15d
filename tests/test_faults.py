"""A short run of the harness of faults, and that it sees what is broken. `make test-faults` is the long one."""

import json
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from faults.harness import Harness
from faults.kinds import KINDS, Fault, Kind, sigkill
from faults.place import ground
from faults.promises import Promise, broken_by

SHORT = {"SIGKILL", "SIGTERM", "corrupted checkpoint"}

SLOW = """
import time

from epigone.training.checkpoint import Checkpointer

save = Checkpointer.save

def slowly(self, *given):
    save(self, *given)
    time.sleep(0.2)

Checkpointer.save = slowly
"""
"""Some steps are left when a fault comes that waited for a checkpoint."""

DRIFTS = """
import jax

restore = Checkpointer.restore

def drifts(self, abstract):
    found = restore(self, abstract)
    return found and (jax.tree.map(lambda x: x * (1 + 1e-6) if x.ndim else x, found[0]), found[1])

Checkpointer.restore = drifts
"""


@pytest.fixture(scope="module")
def place():
    with ground(own_disk=False) as made:
        yield made


def disturbed(place, faults, kinds, more=""):
    """One process, one node, few steps."""
    harness = Harness(place, Random(7), faults, steps=20, nodes=1, processes=(1,), kinds=kinds, more=SLOW + more)
    harness.go()
    return harness


def test_nothing_is_lost_and_no_bit_differs(place):
    harness = disturbed(place, 3, tuple(kind for kind in KINDS if kind.name in SHORT))
    assert not harness.broken
    result = harness.result()
    assert {kind: count for kind, count in result["counts"].items() if count} == dict.fromkeys(SHORT, 1)
    assert sum(run["faults"] for run in result["runs"]) == 3
    json.dumps(result)


def test_a_product_that_breaks_a_promise_is_seen(place):
    """The command is broken on purpose: where it goes on, weights are a millionth larger. The fault comes behind a
    checkpoint, so that there is one to go on from."""
    harness = disturbed(place, 1, (Kind("SIGKILL", sigkill),), DRIFTS)
    assert any("differ from those of an undisturbed run" in line for line in harness.broken), harness.broken


# ------------------------------------------------------------------ what a start shall keep
NEWEST, BEFORE = (Path(f"/run/nodes/a@0-1f/training/checkpoints/step_0000000{step}") for step in (4, 2))
WARNED = f"{NEWEST} is damaged (a bit); using {BEFORE}"
HARMED = Fault("corrupted checkpoint", "a file", damaged={NEWEST: BEFORE})


@pytest.mark.parametrize(
    ("promise", "output", "broken"),
    [
        (Promise({"a@0": 4}), "a@0 train: goes on at step 5 of 9", None),
        (Promise({"a@0": 4}), "a@0 train: goes on at step 4 of 9", "its last whole checkpoint was of step 4"),
        (Promise({"a@0": 4}), "", "a@0 did not go on from step 4"),
        (Promise({"a@0": 2}, fault=HARMED), f"{WARNED}\na@0 train: goes on at step 3 of 9", None),
        (Promise({"a@0": 2}, fault=HARMED), "a@0 train: goes on at step 3 of 9", "no warning names step_00000004"),
        (Promise(done={"a@0": "noon"}), "", "a@0 was done, and was grown again"),
        (Promise(fault=HARMED), "", "no warning names"),
        (Promise(), "Traceback (most recent call last):", "a traceback"),
    ],
    ids=["kept", "another step", "anew", "warned", "not warned", "grown again", "no warning", "traceback"],
)
def test_what_is_broken_is_told(promise, output, broken, tmp_path):
    running = SimpleNamespace(output=output, last_line="", progress=lambda: 1, command=SimpleNamespace(run=tmp_path))
    told = list(broken_by(running, promise))
    assert not told if broken is None else broken in "".join(told)
