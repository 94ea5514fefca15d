"""SLURM for real, on this machine: `make test-slurm`. Needs Debian's slurm-wlm, and root for its daemons.

One node with eight CPUs that need not exist, everything in a temporary folder, free ports, and no other SLURM touched.
It shows that two tasks of the shipped script form one JAX program; that a job goes on where it was after the signal
that comes before its time is up (the script puts it back), and after `scontrol requeue` (SLURM does, as at a
preemption), to the same bits as without a stop; and that a lineage becomes jobs that wait for each other.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.common import ROOT, end

sys.path.insert(0, str(ROOT / "tests"))

CONFIGURATION = """
ClusterName=epigone
SlurmctldHost=localhost
SlurmUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=0
ReturnToService=2
KillWait=30
FirstJobId={first}
NodeName=localhost CPUs=8 State=UNKNOWN
PartitionName=test Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""
DAEMONS = ("slurmctld", "slurmd")
STEPS = 1000


def main() -> int:
    """Start SLURM, show everything, stop it."""
    if missing := [name for name in (*DAEMONS, "sbatch", "srun", "scontrol") if not shutil.which(name)]:
        end(f"{', '.join(missing)}: not installed; on Debian: apt-get install slurm-wlm")
    if os.geteuid():
        end("the daemons of SLURM need root")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="epigone-slurm-") as made:
        folder = Path(made)
        with cluster(folder):
            stopped_jobs_go_on(folder)
            a_lineage_is_grown(folder)
    print("SLURM: all well")
    return 0


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """One node, whose daemons are ended at the end, with whatever still runs in it."""
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in (one, two)]
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    configuration = folder / "slurm.conf"
    first = 1000 + os.getpid() % 3000  # JAX's port follows from the job's number
    configuration.write_text(CONFIGURATION.format(ports=ports, folder=folder, first=first))
    os.environ["SLURM_CONF"] = str(configuration)
    os.environ.update(JAX_PLATFORMS="cpu", PYTHONPATH=f"{ROOT}/src:{ROOT}/tests:{ROOT}")
    os.environ.pop("XLA_FLAGS", None)
    commands = (["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "localhost"])
    silent = subprocess.DEVNULL  # they also write to their logs, which are shown where something fails
    daemons = [subprocess.Popen(command, stdout=silent, stderr=silent) for command in commands]
    try:
        until("the node is idle", lambda: "idle" in ask("sinfo", "--noheader", "--format=%T"))
        yield
    finally:
        subprocess.run(["scancel", "--state=PENDING", "--user=root"])
        subprocess.run(["scancel", "--signal=KILL", "--user=root"])
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(60)


def stopped_jobs_go_on(folder: Path) -> None:
    """Two tasks, one program; stopped twice; the same bits as a run that nobody stops."""
    place = folder / "stopped"
    job = submit(place, "--tasks-per-node", "2", *command(place), "--node", "teacher@0", "--hardware.data", "2")
    until("it trains", lambda: state(job) != "COMPLETED" and steps(place))
    ask("scancel", "--signal=TERM", "--batch", job)  # what --signal=B:TERM@180 does
    until("the script has put it back", lambda: restarts(job) == 1)
    start_now(job)
    log = place / f"slurm-epigone-{job}.log"
    first = int(found(log, r"stopped at step (\d+) of")[-1])
    until("it goes on", lambda: state(job) != "COMPLETED" and steps(place) > first)
    ask("scontrol", "requeue", job)  # what a preemption does
    until("SLURM has put it back", lambda: restarts(job) == 2)
    start_now(job)
    until("it is done", lambda: state(job) == "COMPLETED")
    second = [int(step) for step in found(log, r"stopped at step (\d+) of")][-1]
    here = record(place, "teacher@0")
    check(0 < first < second < STEPS, f"stopped at steps {first} and {second} of {STEPS}")
    check(here["device"].startswith("2 x"), f"two tasks are one program: {here['device']}")
    check(here["job"] == f"slurm {job}", f"the record names its job: {here['job']}")
    other = folder / "whole"
    job = submit(other, "--tasks-per-node", "2", *command(other), "--node", "teacher@0", "--hardware.data", "2")
    until("the run without a stop is done", lambda: state(job) == "COMPLETED")
    whole = record(other, "teacher@0")
    shown = [(len(losses(told)), losses(told)[-1], told["metrics"]["nats_per_token"]) for told in (here, whole)]
    check(shown[0] == shown[1], f"the same bits as without a stop: logged losses, the last one, nats a token: {shown}")


def a_lineage_is_grown(folder: Path) -> None:
    """Each node in its own job, behind its parents."""
    place = folder / "lineage"
    shown = submit(place, "--lineage", *command(place, steps=8))
    jobs = [line.split()[0] for line in shown.splitlines()]
    waiting = ask("squeue", "--noheader", "--format=%F %E")
    check("afterok" in waiting, f"{len(jobs)} jobs wait for each other")
    until("its last job is done", lambda: state(jobs[-1]) == "COMPLETED")
    check((place / "run" / "report.html").exists(), "the report is written")
    check(len(list(place.glob("run/nodes/*/record.json"))) == 6, "all six nodes are done")
    again = submit(place, "--lineage", "--dry-run", *command(place, steps=8))
    check(len(again.splitlines()) == 1, "what is done is not submitted again")


def command(place: Path, steps: int = STEPS) -> list[str]:
    """The tiny lineage of the tests; one config for all runs, since a corpus at another place is another corpus."""
    import tiny

    place.mkdir(exist_ok=True)
    config = tiny.write_config(place.parent)
    epigone = [sys.executable, "-m", "epigone", "run", str(config), "--run", str(place / "run")]
    return ["--", *epigone, f"--steps={steps}", "--hardware.checkpoint-every-steps=100"]


def submit(place: Path, *arguments: str) -> str:
    """Through the launcher; the number of the job, or all lines of a lineage."""
    launcher = [sys.executable, "-m", "launch.slurm", f"--sbatch=--chdir={place}", *arguments]
    done = subprocess.run(launcher, cwd=ROOT, capture_output=True, text=True)
    check(done.returncode == 0, f"submitted: {done.stdout.split()[:1]} {done.stderr}")
    return done.stdout if "--lineage" in arguments else done.stdout.split()[0]


def ask(*command: str) -> str:
    """The output of one of SLURM's programs."""
    return subprocess.run(command, capture_output=True, text=True).stdout


def start_now(job: str) -> None:
    """Of a job that was put back, which SLURM itself starts again after two minutes.

    For some seconds a node still refuses it ("Job credential revoked"): times of revocation are whole seconds.
    """
    time.sleep(5)
    ask("scontrol", "update", f"JobId={job}", "StartTime=now")


def state(job: str) -> str:
    """Of a job; a run that failed ends the test with its log."""
    word = (re.findall(r"JobState=(\w+)", ask("scontrol", "show", "job", job)) or [""])[0]
    check(word not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), f"job {job} is {word}", quiet=True)
    return word


def restarts(job: str) -> int:
    """How often a job was put back, once it waits again."""
    told = ask("scontrol", "show", "job", job)
    waits = "JobState=PENDING" in told
    return int(re.findall(r"Restarts=(\d+)", told)[0]) if waits else 0


def steps(place: Path) -> int:
    """The newest checkpoint, or 0."""
    made = place.glob("run/nodes/*/training/checkpoints/step_*")
    return max((int(path.name.removeprefix("step_")) for path in made), default=0)


def record(place: Path, key: str) -> dict:
    return json.loads(next(place.glob(f"run/nodes/{key}-*/record.json")).read_text())


def losses(told: dict) -> list:
    return [point["loss"] for point in told["curve"]]


def found(path: Path, pattern: str) -> list[str]:
    return re.findall(pattern, path.read_text())


def until(what: str, holds: Callable[[], object], seconds: float = 150) -> None:
    """Wait; a time limit ends the test."""
    last = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > last:
            check(False, f"in {seconds:.0f} s: {what}")
        time.sleep(0.3)
    print(f"  {what}", flush=True)


def check(holds: bool, what: str, quiet: bool = False) -> None:
    """Say what holds; where it does not, show all logs and end."""
    if holds:
        if not quiet:
            print(f"  well: {what}", flush=True)
        return
    for log in Path(os.environ["SLURM_CONF"]).parent.rglob("*.log"):
        print(f"---- {log.name}\n{log.read_text()[-3000:]}", file=sys.stderr)
    end(f"NOT SO: {what}", 1)


if __name__ == "__main__":
    sys.exit(main())
