"""Real processes on this machine that form one program."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from compiler_flags import QUICK

LAUNCHER = Path(__file__).parent.parent.parent / "launch" / "local_processes.py"


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"XLA_FLAGS": QUICK}
    command = [sys.executable, str(LAUNCHER), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)


def metrics(folder: Path) -> dict[str, dict]:
    records = [json.loads(path.read_text()) for path in folder.glob("nodes/*/record.json")]
    return {record["key"]: record["metrics"] for record in records}


def test_two_processes_grow_the_lineage_that_one_grows(tmp_path):
    tiny.write_config(tmp_path)
    command = ["--", sys.executable, "-m", "epigone", "run", "tiny.py"]
    done = launch(tmp_path, "--processes", "2", *command, "--run", "runs/two", "--hardware.data", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("report: runs/two/report.html") == 1
    alone = launch(tmp_path, "--processes", "1", *command, "--run", "runs/one")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    two, one = metrics(tmp_path / "runs" / "two"), metrics(tmp_path / "runs" / "one")
    assert sorted(two) == sorted(tiny.NODES)
    for key in ("trigram@0", "copy@1", "teacher@0", "student@1"):
        assert two[key]["nats_per_token"] == pytest.approx(one[key]["nats_per_token"], abs=1e-3)


def test_a_dry_run_prints_what_would_be_started(tmp_path):
    shown = launch(tmp_path, "--processes", "3", "--devices", "2", "--dry-run", "--", "epigone", "run", "x.py").stdout
    lines = shown.splitlines()
    assert [line.partition("JAX_PROCESS_ID=")[2][0] for line in lines] == ["0", "1", "2"]
    assert all("JAX_NUM_PROCESSES=3" in line and line.endswith("epigone run x.py") for line in lines)
    assert len({line.partition(" ")[0] for line in lines}) == 1
    assert all("device_count=2" in line for line in lines)


def test_the_first_failure_ends_all_with_its_exit_code(tmp_path):
    code = "import os, sys, time; sys.exit(7) if os.environ['JAX_PROCESS_ID'] == '1' else time.sleep(200)"
    assert launch(tmp_path, "--processes", "2", "--", sys.executable, "-c", code).returncode == 7


def test_bad_input_in_one_process_ends_both_with_its_line_and_its_exit_code(tmp_path):
    """The other one is waiting for it by then; nobody waits for the time limit of a hung program."""
    tiny.write_config(tmp_path)
    command = ["--", sys.executable, "-m", "epigone", "run", "tiny.py", "--hardware.data", "2"]
    began = time.monotonic()
    done = launch(tmp_path, "--processes", "2", *command, "--set", "evaluation.text.split=tset")
    assert done.returncode == 2
    assert done.stdout.count("has no split 'tset'") == 1
    assert time.monotonic() - began < 120


@pytest.mark.parametrize("arguments", [[], ["--processes", "0", "--", "true"], ["--processes", "2", "--"]])
def test_bad_arguments_end_with_2(arguments, tmp_path):
    done = launch(tmp_path, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_process_that_cannot_join_ends_the_run(tmp_path):
    tiny.write_config(tmp_path)
    variables = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "1"}
    command = [sys.executable, "-m", "epigone", "run", "tiny.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 1
    assert "could not join the others" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "tiny" / "nodes").exists()
