"""Killed anywhere, a run goes on as if nothing had been; several processes are one run."""

import json
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training_toy import losses, measures, own_texts, run, weights

CHILD = Path(__file__).with_name("child.py")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def own_undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("own"), **own_texts())


def start(directory, *arguments):
    command = [sys.executable, str(CHILD), str(directory), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process):
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize(
    ("every", "pace"), [(1, 0.0), (4, 0.2)], ids=["while a checkpoint is written", "between checkpoints"]
)
def test_sigkill_at_a_random_step_then_the_same_to_the_bit(every, pace, undisturbed, tmp_path):
    step = random.randrange(7, 12)
    code, _, errors = end(start(tmp_path, "--kill", step, "--every", every, "--pace", pace))
    assert code == -signal.SIGKILL, errors
    seen = []
    resumed = run(tmp_path, on_step=lambda report: seen.append(report.step))
    assert 1 < seen[0] <= step + 1, f"killed at {step}, resumed at {seen[0]}"
    assert measures(resumed) == measures(undisturbed)
    for name, wanted in weights(undisturbed).items():
        np.testing.assert_array_equal(weights(resumed)[name], wanted, err_msg=f"{name}, killed at step {step}")


def test_two_processes_are_one_run_and_stop_together(undisturbed, tmp_path):
    """One of two processes gets SIGTERM: both stop at one step; a single process finishes what they began."""
    port = free_port()
    both = [start(tmp_path, "--process", i, 2, port, "--terminate", 99 if i else 2, "--pace", 0.5) for i in (0, 1)]
    ends = [end(process) for process in both]
    assert [code for code, _, _ in ends] == [0, 0], "\n".join(errors for _, _, errors in ends)
    messages = [json.loads(output.splitlines()[-1]) for _, output, _ in ends]
    assert messages[0] == messages[1]
    stopped_at = int(re.search(r"stopped at step (\d+) of 12", messages[0]).group(1))
    seen = []
    resumed = run(tmp_path, on_step=lambda report: seen.append(report.step))
    assert seen[0] == stopped_at + 1
    np.testing.assert_allclose(losses(resumed), losses(undisturbed), rtol=1e-5)


def test_two_processes_give_the_curve_of_one(undisturbed, tmp_path):
    port = free_port()
    ends = [end(p) for p in [start(tmp_path, "--process", i, 2, port, "--every", 100) for i in (0, 1)]]
    assert [code for code, _, _ in ends] == [0, 0], "\n".join(errors for _, _, errors in ends)
    for _, output, _ in ends:
        points = json.loads(output.splitlines()[-1])
        assert len(points) == 6
        assert "student_ece" in points[0]
        for point, wanted in zip(points, measures(undisturbed), strict=True):
            assert point == pytest.approx(wanted, rel=1e-4)


def test_a_killed_run_on_own_texts_goes_on_to_the_bit_with_its_replay(own_undisturbed, tmp_path):
    step = random.randrange(7, 12)
    code, _, errors = end(start(tmp_path, "--own", "--kill", step, "--every", 1))
    assert code == -signal.SIGKILL, errors
    seen = []
    resumed = run(tmp_path, on_step=lambda report: seen.append(report.step), **own_texts())
    assert 1 < seen[0] <= step + 1
    assert losses(resumed) == losses(own_undisturbed)
    for name, wanted in weights(own_undisturbed).items():
        np.testing.assert_array_equal(weights(resumed)[name], wanted, err_msg=f"{name}, killed at step {step}")


def test_two_processes_write_what_one_does_and_one_goes_on_from_them(own_undisturbed, tmp_path):
    port = free_port()
    both = [
        start(tmp_path, "--own", "--process", i, 2, port, "--terminate", 99 if i else 4, "--pace", 0.5) for i in (0, 1)
    ]
    ends = [end(process) for process in both]
    assert [code for code, _, _ in ends] == [0, 0], "\n".join(errors for _, _, errors in ends)
    assert "stopped at step" in json.loads(ends[0][1].splitlines()[-1])
    seen = []
    resumed = run(tmp_path, on_step=lambda report: seen.append(report.step), **own_texts())
    assert seen[0] > 4
    np.testing.assert_allclose(losses(resumed), losses(own_undisturbed), rtol=1e-4)
