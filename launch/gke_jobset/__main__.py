"""Run one command as a JobSet of a Kubernetes cluster (GKE), with TPUs or GPUs, and delete the JobSet at the end.

    python -m launch.gke_jobset --name copies --image IMAGE --claim runs --hosts 4 --chips 4 \\
        --accelerator tpu-v5-lite-podslice --topology 4x4 \\
        -- epigone run configs/quickstart.py --run /runs/copies --hardware.data 16

With --topology these are TPUs, else GPUs. The claim, a PersistentVolumeClaim that all hosts can write, holds the run
directory. When a pod is lost all start again, and go on from the last checkpoint. Needs kubectl, and JobSet 0.7 or
newer in the cluster.
"""

from pathlib import Path

from launch.common import Launch, Setting, count, end, fill, identity, job_name, made, perform, read, wait_for

TEMPLATE = Path(__file__).parent / "jobset.yaml"
PORT = 8476
SETTINGS = (
    Setting("name", "name of the JobSet", kind=job_name),
    Setting("image", "container image with epigone in it"),
    Setting("claim", "PersistentVolumeClaim for run directories"),
    Setting("accelerator", "as in the label of its nodes: tpu-v5-lite-podslice, nvidia-h100-80gb, ..."),
    Setting("chips", "TPU chips or GPUs a host", kind=count),
    Setting("hosts", "pods, one a host", "1", count),
    Setting("topology", "of a TPU slice, as 4x4; left out for GPUs", ""),
    Setting("mount", "where the claim is seen", "/runs"),
    Setting("namespace", "of Kubernetes", "default"),
    Setting("restarts", "how often all start again before the JobSet fails", "10", count),
    Setting("grace-seconds", "time for a checkpoint between SIGTERM and the end", "180", count),
)


def main() -> None:
    """Apply, wait for the end, delete."""
    given = read(__doc__ or "", SETTINGS)
    place = [f"--namespace={given['namespace']}"]
    delete = ["kubectl", "delete", "jobset", given["name"], *place, "--ignore-not-found"]
    look = ["kubectl", "get", "jobset", given["name"], *place, "--output=jsonpath={.status.terminalState}"]
    # create, not apply, which would change a JobSet of this name that is there already
    with made(["kubectl", "create", "--filename=-"], delete, given.dry_run, manifest(given)):
        if given.dry_run:
            return
        if wait_for(lambda: perform(look, capture=True).strip(), ("Completed", "Failed")) == "Failed":
            perform(["kubectl", "logs", f"job/{given['name']}-workers-0", *place, "--tail=50"])
            end(f"JobSet {given['name']} failed", 1)


def manifest(given: Launch) -> str:
    """The JobSet as YAML."""
    resource = "google.com/tpu" if given["topology"] else "nvidia.com/gpu"
    kind = "cloud.google.com/gke-tpu-accelerator" if given["topology"] else "cloud.google.com/gke-accelerator"
    topology = {"cloud.google.com/gke-tpu-topology": given["topology"]} if given["topology"] else {}
    values = {
        "NAME": given["name"],
        "NAMESPACE": given["namespace"],
        "RESTARTS": int(given["restarts"]),
        "HOSTS": int(given["hosts"]),
        "GRACE_SECONDS": int(given["grace-seconds"]),
        "NODE_SELECTOR": {kind: given["accelerator"], **topology},
        "RESOURCE": resource,
        "IMAGE": given["image"],
        "COMMAND": given.command,
        "ENVIRONMENT": environment(given),
        "LIMITS": {resource: given["chips"]},
        "MOUNT": given["mount"],
        "CLAIM": given["claim"],
    }
    return fill(TEMPLATE, values)


def environment(given: Launch) -> list[dict]:
    """On TPUs GKE itself tells JAX who belongs together; on GPUs the names and numbers of the pods do."""
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    named = identity(f"jobset {given['name']}")
    if given["topology"]:
        named |= {"EPIGONE_CLUSTER": "tpu"}
    else:
        first = f"{given['name']}-workers-0-0.{given['name']}:{PORT}"
        named |= {"JAX_COORDINATOR_ADDRESS": first, "JAX_NUM_PROCESSES": given["hosts"]}
    own = [] if given["topology"] else [{"name": "JAX_PROCESS_ID", "valueFrom": index}]
    return [*({"name": name, "value": value} for name, value in named.items()), *own]


if __name__ == "__main__":
    main()
