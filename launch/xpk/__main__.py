"""Run one command as a workload of a cluster that xpk made (TPU slices on GKE), and delete the workload at the end.

    python -m launch.xpk --name copies --cluster CLUSTER --project PROJECT --zone us-central2-b \\
        --tpu-type v5litepod-16 --image IMAGE -- epigone run configs/quickstart.py --run /runs/copies --hardware.data 16

The run directory must lie on a storage that was attached to the cluster (`xpk storage attach`). When a host is lost or
the program fails, all start again, as often as --restarts says, and go on from the last checkpoint.
"""

import shlex

from launch.common import Launch, Setting, count, identity, job_name, made, perform, read

SETTINGS = (
    Setting("name", "name of the workload", kind=job_name),
    Setting("cluster", "name of the cluster"),
    Setting("project", "Google Cloud project"),
    Setting("zone", "zone of the cluster"),
    Setting("tpu-type", "such as v5litepod-16"),
    Setting("image", "container image with epigone in it"),
    Setting("slices", "TPU slices", "1", count),
    Setting("restarts", "how often all start again before the workload fails", "10", count),
    Setting("grace-seconds", "time for a checkpoint between SIGTERM and the end", "180", count),
)


def main() -> None:
    """Create, wait for the end, delete."""
    given = read(__doc__ or "", SETTINGS)
    with made(create(given), delete(given), given.dry_run):
        perform(wait(given), given.dry_run)


def place(given: Launch) -> list[str]:
    return [f"--cluster={given['cluster']}", f"--project={given['project']}", f"--zone={given['zone']}"]


def create(given: Launch) -> list[str]:
    """`xpk workload create`: GKE tells JAX who belongs together, also over several slices."""
    environment = identity(f"xpk {given['name']}") | {"EPIGONE_CLUSTER": "tpu"}
    return [
        *("xpk", "workload", "create", *place(given)),
        f"--workload={given['name']}",
        f"--tpu-type={given['tpu-type']}",
        f"--num-slices={given['slices']}",
        f"--docker-image={given['image']}",
        f"--max-restarts={given['restarts']}",
        "--restart-on-user-code-failure",
        f"--termination-grace-period-seconds={given['grace-seconds']}",
        *(f"--env={name}={value}" for name, value in environment.items()),
        f"--command={shlex.join(given.command)}",
    ]


def wait(given: Launch) -> list[str]:
    return ["xpk", "workload", "list", *place(given), f"--wait-for-job-completion={given['name']}"]


def delete(given: Launch) -> list[str]:
    return ["xpk", "workload", "delete", *place(given), f"--workload={given['name']}", "--force"]


if __name__ == "__main__":
    main()
