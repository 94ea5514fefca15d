"""Run one command on all hosts of a TPU VM that is asked for as a queued resource, and delete it at the end.

    python -m launch.tpu_vm --name copies --project PROJECT --zone us-central2-b --accelerator-type v5litepod-16 \\
        --runtime-version v2-alpha-tpuv5-lite --repository https://example.com/epigone.git --spot \\
        -- epigone run configs/quickstart.py --run gs://BUCKET/runs/copies --hardware.data 16

Every host gets the commit of this checkout from the repository. --prepare is a command that each runs before, such as
the mount of a file system for the run directory, where that is in no bucket. When the TPU is taken away another one is
asked for, as often as --restarts says, and the run goes on from its last checkpoint. Needs gcloud.
"""

import shlex

from launch.common import (
    Launch,
    Setting,
    attempt,
    commit,
    count,
    end,
    identity,
    job_name,
    made,
    perform,
    read,
    wait_for,
)

SETTINGS = (
    Setting("name", "name of the queued resource and its TPU VM", kind=job_name),
    Setting("project", "Google Cloud project"),
    Setting("zone", "zone of the TPU"),
    Setting("accelerator-type", "such as v5litepod-16"),
    Setting("runtime-version", "software of the TPU VM, such as v2-alpha-tpuv5-lite"),
    Setting("repository", "address of the git repository, as the hosts can read it"),
    Setting("prepare", "shell command of every host before the run", ""),
    Setting("restarts", "how often another TPU is asked for", "10", count),
)
GONE = ("FAILED", "SUSPENDING", "SUSPENDED")


def main() -> None:
    """Ask, wait, run, delete; again when the TPU was taken away."""
    given = read(__doc__ or "", SETTINGS, flags=("spot",))
    if commit().endswith("-dirty") and not given.dry_run:
        end("files are changed here and not committed, and the hosts would not have them: commit and push them first")
    for _ in range(int(given["restarts"]) + 1):
        code = once(given)
        if code is not None:
            raise SystemExit(code)
        print("the TPU was taken away: asking for another one", flush=True)
    end(f"the TPU was taken away {given['restarts']} times and once more", 1)


def once(given: Launch) -> int | None:
    """One queued resource from its request to its end; the command's exit code, None where the TPU was taken away."""
    delete = resources(given, "delete", given["name"], "--force", "--quiet")
    with made(request(given), delete, given.dry_run):
        if given.dry_run:
            perform(on_all_hosts(given, setup(given)), given.dry_run)
            perform(on_all_hosts(given, start(given)), given.dry_run)
            return 0
        if (seen := wait_for(lambda: state(given), ("ACTIVE", *GONE))) != "ACTIVE":
            end(f"the request for a TPU is {seen}", 1)
        code = attempt(on_all_hosts(given, setup(given))).returncode
        code = code or attempt(on_all_hosts(given, start(given))).returncode
        return None if code and state(given) != "ACTIVE" else code


def resources(given: Launch, verb: str, *arguments: str) -> list[str]:
    where = [f"--project={given['project']}", f"--zone={given['zone']}"]
    return ["gcloud", "compute", "tpus", "queued-resources", verb, *arguments, *where]


def request(given: Launch) -> list[str]:
    """The command that asks for the TPU."""
    kind = [f"--accelerator-type={given['accelerator-type']}", f"--runtime-version={given['runtime-version']}"]
    spot = ["--spot"] if given["spot"] else []
    return resources(given, "create", given["name"], f"--node-id={given['name']}", *kind, *spot)


def state(given: Launch) -> str:
    """Of the queued resource."""
    return perform(resources(given, "describe", given["name"], "--format=value(state.state)"), capture=True).strip()


def on_all_hosts(given: Launch, script: str) -> list[str]:
    where = [f"--project={given['project']}", f"--zone={given['zone']}", "--worker=all"]
    return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", given["name"], *where, f"--command={script}"]


def setup(given: Launch) -> str:
    """Shell: this commit, a Python that is new enough, and epigone with its TPU extra."""
    lines = [
        f"git clone {shlex.quote(given['repository'])} epigone",
        f"git -C epigone checkout {commit().removesuffix('-dirty')}",
        "python3 -m pip install --quiet --user uv",
        "~/.local/bin/uv venv --python 3.12 epigone/.venv",
        "~/.local/bin/uv pip install --python epigone/.venv/bin/python --editable 'epigone[tpu,stores]'",
        *([given["prepare"]] if given["prepare"] else []),
    ]
    return " && ".join(lines)


def start(given: Launch) -> str:
    """Shell: the command, on each host as one process of one program."""
    environment = identity(f"tpu_vm {given['name']}") | {"EPIGONE_CLUSTER": "tpu"}
    words = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return f'cd epigone && env PATH="$PWD/.venv/bin:$PATH" {" ".join(words)} {shlex.join(given.command)}'


if __name__ == "__main__":
    main()
