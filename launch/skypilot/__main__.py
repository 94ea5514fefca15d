"""Run one command as a managed job of SkyPilot, which finds the machines, replaces those that are lost, and ends them.

    python -m launch.skypilot --name copies --infra gcp --accelerators H100:8 --nodes 2 --spot \\
        -- epigone run configs/quickstart.py --run gs://BUCKET/runs/copies --hardware.data 16

The run directory lies in a bucket, or on a file system that all machines see. After a preemption the same command
starts on new machines and goes on from the last checkpoint. SkyPilot ends the machines when the job ends, also when it
fails or is cancelled.
"""

import shlex
import tempfile
from pathlib import Path

from launch.common import ROOT, Launch, Setting, count, fill, identity, job_name, perform, read

TEMPLATE = Path(__file__).parent / "epigone.yaml"
SETTINGS = (
    Setting("name", "name of the job", kind=job_name),
    Setting("infra", "where, as SkyPilot says it: gcp, aws/us-east-1, k8s"),
    Setting("accelerators", "of each machine, such as H100:8"),
    Setting("nodes", "machines", "1", count),
    Setting("extra", "extras of epigone that are installed", "cuda,stores"),
)


def main() -> None:
    """Write the task, launch it and follow it."""
    given = read(__doc__ or "", SETTINGS, flags=("spot",))
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / f"{given['name']}.yaml"
        task.write_text(filled(given))
        if given.dry_run:
            print(task.read_text())
        perform(["sky", "jobs", "launch", "--yes", f"--workdir={ROOT}", str(task)], given.dry_run)


def filled(given: Launch) -> str:
    """The task as YAML."""
    names = {"EPIGONE_COMMAND": shlex.join(given.command), "EPIGONE_EXTRA": given["extra"]}
    values = {
        "NAME": given["name"],
        "NODES": int(given["nodes"]),
        "INFRA": given["infra"],
        "ACCELERATORS": given["accelerators"],
        "SPOT": bool(given["spot"]),
        "ENVIRONMENT": identity(f"skypilot {given['name']}") | names,
    }
    return fill(TEMPLATE, values)


if __name__ == "__main__":
    main()
