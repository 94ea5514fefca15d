"""One lineage on any mesh and in any number of processes, also when these change on the way: same data, same losses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from compiler_flags import QUICK
from rows_read import read, write_down

from epigone.grow import grow
from epigone.training.config import Hardware
from epigone.verbs.run import load_config

LAUNCHER = Path(__file__).parent.parent / "launch" / "local_processes.py"
STEPS, BATCH = 20, 8

CONFIG = f'''
"""A teacher and its student; what is read is written down, and one process may be told to stop."""

import os, signal, time
from dataclasses import replace

from epigone import watchdog
from epigone.data.corpora import TextFiles
from epigone.data.tokenizers import Words
from epigone.lessons.objective import Objective
from epigone.lineage import Lesson, Lineage, Node, Text, TrainedTokenizer
from epigone.models.config import DecoderConfig
from epigone.training.config import Training
from epigone.training.optimizer import Optimizer

CORPUS = TextFiles("{{pattern}}")
WORDS = TrainedTokenizer(Words(), Text(CORPUS))

if "READ" in os.environ:
    from rows_read import write_down

    write_down(setattr, os.environ["READ"] + os.environ["JAX_PROCESS_ID"])

if os.environ.get("STOP"):
    told = watchdog.at

    def stops(place, step):
        told(place, step)
        if place == "student@1" and step is not None and step >= int(os.environ["STOP"]):
            time.sleep(0.5)  # until all have heard of it
            if step == int(os.environ["STOP"]) and os.environ["JAX_PROCESS_ID"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)

    watchdog.at = stops


def lineage() -> Lineage:
    # With Adam's usual epsilon, a gradient that is nearly 0 turns rounding into a step of full size; and at 1e-2 one
    # seed in ten (seeds follow from the folder's name) makes rounding a hundred times larger in twenty steps.
    optimizer = Optimizer(learning_rate=3e-3, epsilon=1e-4)
    training = Training(steps={STEPS}, batch_size={BATCH}, sequence_length=16, optimizer=optimizer, log_every=1)
    model = DecoderConfig(layers=1, model_size=16, heads=2, max_length=16)
    alone = Lesson((Text(CORPUS),), objective=Objective(hard_weight=1.0), training=training)
    taught = replace(alone, teacher="teacher@0", objective=Objective(hard_weight=0.3), training=training)
    return Lineage("same", (Node("teacher", 0, model, WORDS, alone), Node("student", 1, model, WORDS, taught)), None)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("same")
    tiny.write_config(folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """The run that all others are held against: one process, one device."""
    with pytest.MonkeyPatch.context() as patched:
        write_down(patched.setattr, folder / "read-alone")
        return here(folder, "alone", Hardware())


def here(folder, name, hardware):
    grow(load_config(folder / "tiny.py")(), folder / name, hardware=hardware, view=tiny.Silent())
    return curves(folder / name)


def curves(run):
    """Per node, per point: the loss and all else that is not of the clock."""
    records = [json.loads(path.read_text()) for path in run.glob("nodes/*/record.json")]
    clock = {"seconds", "tokens_per_second", "flops_per_second", "mfu"}
    return {
        record["key"]: [{name: x for name, x in point.items() if name not in clock} for point in record["curve"]]
        for record in records
    }


def processes(folder, name, count, *arguments, stop=""):
    """The command in real processes; its exit code and what it printed."""
    environment = os.environ | {"XLA_FLAGS": QUICK}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    there = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(there)}
    environment |= {"READ": str(folder / f"read-{name}-{count}-"), "STOP": str(stop)}
    command = [sys.executable, str(LAUNCHER), "--processes", str(count), "--", sys.executable, "-m", "epigone"]
    command += ["run", "tiny.py", "--run", name, "--hardware.checkpoint-every-steps", "100", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    return done.returncode, done.stdout + done.stderr


def assert_same(mine, wanted):
    assert mine.keys() == wanted.keys() == {"teacher@0", "student@1"}
    for key, points in wanted.items():
        assert [point["step"] for point in mine[key]] == list(range(1, len(points) + 1))
        for name in ("loss", "tokens", "student_cross_entropy", "gradient_norm"):
            ours, theirs = ([point[name] for point in curve] for curve in (mine[key], points))
            rtol = 1e-4 if name == "gradient_norm" else 1e-5
            np.testing.assert_allclose(ours, theirs, rtol=rtol, err_msg=f"{key}: {name}")


@pytest.mark.parametrize(("data", "fsdp"), [(2, 4), (8, 1), (1, 8), (4, 2)])
def test_virtual_devices(data, fsdp, folder, alone):
    assert_same(here(folder, f"{data}x{fsdp}", Hardware(data=data, fsdp=fsdp)), alone)


def test_four_processes_then_two_then_eight_devices_in_one(folder, alone):
    """Real processes over gloo, of which one gets SIGTERM, so that all stop. Each reads its own rows, and all together
    are those of one process; nothing is read again that was learned. The teacher is all of the first four."""
    stopped = []
    for count, mesh, stop in [(4, "--hardware.data 2 --hardware.fsdp 2", 2), (2, "--hardware.data 2", 10)]:
        code, output = processes(folder, "moved", count, *mesh.split(), stop=stop)
        assert code == 143, output
        ends = set(re.findall(r"'student@1' stopped at step (\d+) of 20", output))
        assert len(ends) == 1, f"all stop at one step\n{output}"
        stopped.append(int(ends.pop()))
    assert 2 < stopped[0] < 10 < stopped[1] < STEPS
    with pytest.MonkeyPatch.context() as patched:
        write_down(patched.setattr, folder / "read-moved-1")
        assert_same(here(folder, "moved", Hardware(data=2, fsdp=4)), alone)
    rows = read(STEPS, *folder.glob("read-moved-*"))
    assert rows == read(STEPS, folder / "read-alone")
    assert len(rows) == STEPS * BATCH, "teacher and student read alike"
    assert len(set(rows.values())) > STEPS, "rows differ, so that another order would show"
    assert min(step for step, _ in read(STEPS, folder / "read-moved-1")) == stopped[1]
