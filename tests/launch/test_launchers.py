"""Launchers as far as a machine without a cloud allows: what they would run, and what they do with stand-in tools.

`make test-launch` holds what they write against the real parsers and schemas, `make test-slurm` starts a real SLURM.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import yaml

ROOT = Path(__file__).parent.parent.parent
SBATCH = ROOT / "launch" / "slurm" / "epigone.sbatch"
COMMAND = ["--", "epigone", "run", "configs/quickstart.py", "--run", "/runs/a b", "--scale", "0.5"]
GIVEN = {
    "slurm": ["--nodes=2", "--gpus-per-node=8", "--time=1:00:00", "--sbatch=--partition=gpu --account=lab"],
    "gke_jobset": ["--name=copies", "--image=i", "--claim=runs", "--accelerator=nvidia-h100-80gb", "--chips=8"],
    "xpk": ["--name=copies", "--cluster=c", "--project=p", "--zone=z", "--tpu-type=v5litepod-16", "--image=i"],
    "tpu_vm": [
        *("--name=copies", "--project=p", "--zone=z", "--accelerator-type=v5litepod-16", "--runtime-version=v2"),
        *("--repository=https://example.com/e.git", "--spot", "--restarts=1"),
    ],
    "skypilot": ["--name=copies", "--infra=gcp", "--accelerators=H100:8", "--nodes=2", "--spot"],
}


def launch(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"launch.{name}", *arguments]
    environment = os.environ | variables
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)


def stand_in(folder: Path, name: str, script: str) -> None:
    """A program of that name that writes its arguments down and then does what the script says."""
    path = folder / name
    path.write_text(f'#!/bin/bash\necho "{name} $*" >>"{folder}/calls"\n{script}\n')
    path.chmod(0o755)


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def on_path(folder: Path) -> dict[str, str]:
    return {"PATH": f"{folder}:{os.environ['PATH']}", "LAUNCH_SECONDS_BETWEEN_LOOKS": "0.05"}


@pytest.mark.parametrize(("name", "missing"), [("gke_jobset", 6), ("xpk", 7), ("tpu_vm", 7), ("skypilot", 4)])
def test_everything_that_is_missing_is_named_at_once(name, missing):
    done = launch(name, "--dry-run")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0] == f"{missing} missing or wrong:"
    assert len(lines) == missing + 1
    assert "--name or LAUNCH_NAME" in lines[1]


def test_a_variable_takes_the_place_of_an_option_and_wrong_values_are_named_together():
    done = launch("skypilot", "--nodes=none", "--infra=gcp", "--", "epigone", "run", "x.py", LAUNCH_NAME="Not so")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "4 missing or wrong:"
    for part in ("--name 'Not so'", "--accelerators or LAUNCH_ACCELERATORS", "--nodes 'none'", "--run in the command"):
        assert part in done.stderr


@pytest.mark.parametrize("name", GIVEN)
def test_the_command_is_passed_on_as_it_is_and_the_code_and_job_are_named(name):
    shown = launch(name, *GIVEN[name], "--dry-run", *COMMAND)
    assert shown.returncode == 0, shown.stderr
    if name == "gke_jobset":
        text = shown.stdout.partition("<<'EOF'\n")[2].partition("EOF")[0]
        [container] = containers(yaml.safe_load(text))
        assert container["command"] == COMMAND[1:]
        assert {"EPIGONE_COMMIT", "EPIGONE_JOB"} <= {variable["name"] for variable in container["env"]}
    else:
        assert shlex.join(COMMAND[1:]) in shown.stdout.replace("""'"'"'""", "'")
        assert "EPIGONE_COMMIT" in shown.stdout
        assert "EPIGONE_JOB" in shown.stdout + SBATCH.read_text()


def containers(jobset: dict) -> list[dict]:
    [workers] = jobset["spec"]["replicatedJobs"]
    return workers["template"]["spec"]["template"]["spec"]["containers"]


def test_slurm_gets_one_task_a_gpu():
    [line] = launch("slurm", *GIVEN["slurm"], "--dry-run", *COMMAND).stdout.splitlines()
    words = shlex.split(line)
    assert words[:6] == [
        *("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8"),
        "--time=1:00:00",
    ]
    assert words[6:8] == ["--partition=gpu", "--account=lab"]
    assert words[words.index(str(SBATCH)) + 1 :] == COMMAND[1:]


def test_a_lineage_becomes_arrays_that_wait_for_their_parents():
    sys.path.insert(0, str(ROOT))
    try:
        from launch.slurm.__main__ import arrays_of
    finally:
        sys.path.remove(str(ROOT))
    nodes = [
        {"key": "t@0", "seed": 0, "parents": [], "done": True},
        {"key": "c@0", "seed": 0, "parents": [], "done": False},
        {"key": "s@1", "seed": 0, "parents": ["t@0", "c@0"], "done": False},
        {"key": "s@1.s1", "seed": 1, "parents": ["t@0"], "done": False},
        {"key": "s@1.s2", "seed": 2, "parents": ["s@1"], "done": False},
        {"key": "p@2", "seed": 0, "parents": ["s@1", "s@1.s2"], "done": False},
    ]
    found = [(array.nodes, array.after) for array in arrays_of(nodes)]
    assert found == [
        (("c@0",), ()),
        (("s@1", "s@1.s1"), (0,)),
        (("s@1.s2",), (1,)),
        (("p@2",), (1, 2)),
    ]


def test_the_jobs_of_a_lineage_follow_from_its_own_graph_and_are_taken_back_when_one_is_refused(tmp_path):
    tiny.write_config(tmp_path)
    command = ["--", sys.executable, "-m", "epigone", "run", str(tmp_path / "tiny.py"), "--run", str(tmp_path / "run")]
    stand_in(tmp_path, "scancel", "")
    stand_in(tmp_path, "sbatch", f'number=$(grep -c ^sbatch "{tmp_path}/calls"); [ $number -lt 7 ] && echo $number')
    done = launch("slurm", "--lineage", *command, **on_path(tmp_path))
    assert done.returncode == 1
    jobs = [line for line in calls(tmp_path) if line.startswith("sbatch")]
    waits = {line.split("--job-name=")[1].split()[0]: line.partition("afterok:")[2].split(" ")[0] for line in jobs}
    numbers = {name: str(number) for number, name in enumerate(waits, 1)}
    assert waits["trigram@0"] == waits["teacher@0"] == ""
    assert waits["copy@1"] == numbers["trigram@0"]
    assert waits["copy@2"] == numbers["copy@1"]
    assert waits["student@1"] == waits["reader@1"] == numbers["teacher@0"]
    assert sorted(waits["report"].split(":")) == sorted(numbers[key] for key in ("copy@2", "student@1", "reader@1"))
    assert calls(tmp_path)[-1] == "scancel 1 2 3 4 5 6"


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [(0, "RUNNING", False), (2, "RUNNING", False), (143, "RUNNING", True), (143, "COMPLETING", False)],
)
def test_a_job_goes_back_into_the_queue_when_it_was_stopped_and_not_when_it_failed(code, state, requeued, tmp_path):
    for name, script in {"srun": f"exit {code}", "squeue": f"echo {state}", "scontrol": "", "scancel": ""}.items():
        stand_in(tmp_path, name, script)
    variables = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1", "EPIGONE_NODES": "a@0 b@0.s1"}
    environment = os.environ | on_path(tmp_path) | variables
    done = subprocess.run(["bash", SBATCH, "epigone", "run", "x.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert ("scontrol requeue 12" in calls(tmp_path)) == requeued
    assert calls(tmp_path)[0].endswith("epigone run x.py --node b@0.s1")


def test_the_script_passes_the_signal_on_to_the_tasks_and_waits_for_them(tmp_path):
    stand_in(tmp_path, "srun", f'trap "exit 143" USR1; echo $$ >"{tmp_path}/pid"; while :; do sleep 0.05; done')
    stand_in(tmp_path, "scancel", f'kill -USR1 "$(cat "{tmp_path}/pid")"')
    stand_in(tmp_path, "squeue", "echo RUNNING")
    stand_in(tmp_path, "scontrol", "")
    environment = os.environ | on_path(tmp_path) | {"SLURM_JOB_ID": "12"}
    job = subprocess.Popen(["bash", SBATCH, "epigone"], env=environment)
    until = time.monotonic() + 20
    while not (tmp_path / "pid").exists() and time.monotonic() < until:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 143
    assert {"scancel --signal=TERM 12", "scontrol requeue 12"} <= set(calls(tmp_path))


def test_a_tpu_that_is_taken_away_is_asked_for_again_and_all_are_deleted(tmp_path):
    states = "PROVISIONING ACTIVE SUSPENDED ACTIVE"
    stand_in(
        tmp_path,
        "gcloud",
        f"""case "$*" in
        *describe*) n=$(grep -c "resources describe" "{tmp_path}/calls"); echo {states} | cut -d' ' -f"$n" ;;
        *"cd epigone"*) [ "$(grep -c "cd epigone" "{tmp_path}/calls")" -gt 1 ] ;;
        esac""",
    )
    stand_in(tmp_path, "git", "echo 0123abc")
    done = launch("tpu_vm", *GIVEN["tpu_vm"], *COMMAND, **on_path(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    verbs = [line.split("queued-resources ")[-1].split()[0] for line in calls(tmp_path) if "queued-resources" in line]
    assert verbs == ["create", "describe", "describe", "describe", "delete", "create", "describe", "delete"]
    assert all("--project=p --zone=z" in line for line in calls(tmp_path) if line.startswith("gcloud"))


def test_what_could_not_be_made_is_not_deleted(tmp_path):
    stand_in(tmp_path, "kubectl", "exit 1")
    done = launch("gke_jobset", *GIVEN["gke_jobset"], *COMMAND, **on_path(tmp_path))
    assert done.returncode == 1
    assert calls(tmp_path) == ["kubectl create --filename=-"]


def test_a_launcher_that_is_stopped_deletes_what_it_made(tmp_path):
    stand_in(tmp_path, "kubectl", "")
    command = [sys.executable, "-m", "launch.gke_jobset", *GIVEN["gke_jobset"], *COMMAND]
    job = subprocess.Popen(command, cwd=ROOT, env=os.environ | on_path(tmp_path), stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "state: none yet\n"
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 143
    assert calls(tmp_path)[-1] == "kubectl delete jobset copies --namespace=default --ignore-not-found"


def test_a_jobset_that_failed_ends_the_launcher_with_1(tmp_path):
    stand_in(tmp_path, "kubectl", '[ "$1" = get ] && echo Failed; true')
    done = launch("gke_jobset", *GIVEN["gke_jobset"], *COMMAND, **on_path(tmp_path))
    assert done.returncode == 1
    assert "JobSet copies failed" in done.stderr
    assert calls(tmp_path)[-1].startswith("kubectl delete")


def test_a_tool_that_is_not_there_is_named(tmp_path):
    done = launch("xpk", *GIVEN["xpk"], *COMMAND, PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["'xpk' is not installed here, and this launcher needs it"]


def test_pods_with_gpus_get_a_coordinator_and_pods_with_tpus_leave_it_to_gke():
    def environment(*arguments: str) -> dict:
        shown = launch("gke_jobset", *GIVEN["gke_jobset"], *arguments, "--hosts=2", "--dry-run", *COMMAND).stdout
        [container] = containers(yaml.safe_load(shown.partition("<<'EOF'\n")[2].partition("EOF")[0]))
        return {variable["name"]: variable.get("value") for variable in container["env"]} | container["resources"]

    gpus, tpus = environment(), environment("--topology=4x4")
    assert gpus["JAX_COORDINATOR_ADDRESS"] == "copies-workers-0-0.copies:8476"
    assert gpus["JAX_NUM_PROCESSES"] == "2"
    assert "JAX_PROCESS_ID" in gpus
    assert gpus["limits"] == {"nvidia.com/gpu": "8"}
    assert tpus["EPIGONE_CLUSTER"] == "tpu"
    assert not any(name.startswith("JAX_") for name in tpus)
    assert tpus["limits"] == {"google.com/tpu": "8"}


def test_machines_of_skypilot_are_numbered_from_what_it_tells(tmp_path):
    shown = launch("skypilot", *GIVEN["skypilot"], "--dry-run", *COMMAND).stdout
    task = yaml.safe_load(shown.rpartition("sky jobs launch")[0])
    show = "import json, os, sys; print(json.dumps([sys.argv, dict(os.environ)]))"
    variables = {
        **task["envs"],
        "EPIGONE_COMMAND": shlex.join([sys.executable, "-c", show, "a b"]),
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    done = subprocess.run(["bash", "-c", task["run"]], env=os.environ | variables, capture_output=True, text=True)
    words, seen = json.loads(done.stdout)
    assert words == ["-c", "a b"]
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    assert [seen[name] for name in names] == ["10.0.0.1:8476", "2", "1"]


def scripts() -> dict[str, str]:
    """All shell that launchers bring with them or write."""
    task = yaml.safe_load((ROOT / "launch" / "skypilot" / "epigone.yaml").read_text())
    lines = launch("tpu_vm", *GIVEN["tpu_vm"], "--dry-run", *COMMAND).stdout.splitlines()
    hosts = [word[10:] for line in lines for word in shlex.split(line) if word.startswith("--command=")]
    shell = {"setup": task["setup"], "run": task["run"], "hosts, setup": hosts[0], "hosts, run": hosts[1]}
    return {"sbatch": SBATCH.read_text(), **{name: f"#!/bin/bash\n{text}\n" for name, text in shell.items()}}


def test_shellcheck_finds_nothing_in_any_shell():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, text in scripts().items():
        done = subprocess.run([shellcheck, "-"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stdout}"


def test_no_launcher_names_a_field_of_a_config():
    """Topology and environment alone: what follows `--` is the user's."""
    for path in (ROOT / "launch").glob("*/[!_]*"):
        if path.is_file():
            assert not {"--set", "learning_rate", "batch_size"} & set(path.read_text().split()), path
