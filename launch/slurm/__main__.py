"""Hand one command to SLURM: as one job, or, with --lineage, as one job a node that waits for the jobs of its parents.

    python -m launch.slurm --nodes 2 --tasks-per-node 8 --gpus-per-node 8 --time 24:00:00 \\
        -- epigone run configs/quickstart.py --hardware.data 16
    python -m launch.slurm --lineage --gpus-per-node 1 -- epigone run configs/quickstart.py

Nodes that differ in nothing but their seed become one array. A job starts when those of all parents have ended well
(afterok), and is cancelled when one of them has not; the last job writes the report. What is done is left out. Further
options of sbatch: --sbatch '--partition=gpu --account=lab'. Jobs that reach their time limit, or are preempted, go back
into the queue and go on from their last checkpoint.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.common import Launch, Setting, commit, count, end, perform, read

SCRIPT = Path(__file__).parent / "epigone.sbatch"
SETTINGS = (
    Setting("nodes", "machines of a job", "1", count),
    Setting("tasks-per-node", "processes a machine; by default one a GPU", "", count),
    Setting("gpus-per-node", "GPUs a machine", "", count),
    Setting("time", "time limit of a job, as sbatch takes it", ""),
    Setting("sbatch", "further options of sbatch, in one string", ""),
)


def main() -> None:
    """Read, then submit."""
    given = read(__doc__ or "", SETTINGS, flags=("lineage",), demands_run=False)
    if not given["lineage"]:
        if job := submit(given):
            print(f"{job}  {' '.join(given.command)}")
        return
    if any(word == "--node" or word.startswith("--node=") for word in given.command):
        end("--lineage makes a job of every node: leave --node out of the command")
    submit_lineage(given, arrays_of(planned(given.command)))


def submit(given: Launch, *chosen: str, nodes: Sequence[str] = ()) -> str:
    """Submit one job, or an array with a job for each of some nodes; its number, "" in a dry run."""
    tasks = given["tasks-per-node"] or given["gpus-per-node"] or "1"
    named = {"ntasks-per-node": tasks, "gpus-per-node": given["gpus-per-node"], "time": given["time"]}
    topology = [f"--nodes={given['nodes']}", *(f"--{name}={value}" for name, value in named.items() if value)]
    export = f"--export=ALL,EPIGONE_COMMIT={commit()},EPIGONE_NODES={' '.join(nodes)}"
    options = [*topology, *shlex.split(given["sbatch"]), *chosen, export]
    command = ["sbatch", "--parsable", *options, str(SCRIPT), *given.command]
    return perform(command, given.dry_run, capture=True).strip().partition(";")[0]


def planned(command: list[str]) -> list[dict]:
    """The nodes of the lineage, parents first, as `epigone run --dry-run --json` tells them."""
    return json.loads(perform([*command, "--dry-run", "--json"], capture=True))["nodes"]


@dataclass(frozen=True)
class Array:
    """Nodes that differ in their seed alone, and the numbers of the arrays that must have ended well before them."""

    name: str
    nodes: tuple[str, ...]
    after: tuple[int, ...]


def arrays_of(nodes: list[dict]) -> list[Array]:
    """The arrays of a lineage, each behind those that it waits for. What is done is in none.

    Nodes of one array also have one distance from the beginning, so that none of them waits for another.
    """
    depth: dict[str, int] = {}
    found: dict[tuple[int, str], list[dict]] = {}
    for node in nodes:
        depth[node["key"]] = 1 + max((depth[parent] for parent in node["parents"]), default=-1)
        if not node["done"]:
            name = node["key"].removesuffix(f".s{node['seed']}")
            found.setdefault((depth[node["key"]], name), []).append(node)
    ordered = sorted(found.items(), key=lambda item: item[0][0])
    where = {node["key"]: number for number, (_, array) in enumerate(ordered) for node in array}
    return [
        Array(
            name,
            tuple(node["key"] for node in array),
            tuple(sorted({where[parent] for node in array for parent in node["parents"] if parent in where})),
        )
        for (_, name), array in ordered
    ]


def submit_lineage(given: Launch, arrays: list[Array]) -> None:
    """Submit all arrays and the job that writes the report; take back what is submitted where one is refused."""
    jobs: list[str] = []
    last = set(range(len(arrays))) - {number for array in arrays for number in array.after}
    try:
        for array in [*arrays, Array("report", (), tuple(sorted(last)))]:
            chosen = [f"--job-name={array.name}"]
            if array.nodes:
                chosen.append(f"--array=0-{len(array.nodes) - 1}")
            if array.after:
                before = ":".join(jobs[number] for number in array.after)
                chosen += [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"]
            job = submit(given, *chosen, nodes=array.nodes)
            jobs.append(job or f"JOB_OF_{array.name}")
            if job:
                print(f"{job}  {' '.join(array.nodes) or array.name}")
    except SystemExit:
        if jobs and not given.dry_run:
            perform(["scancel", *jobs])
        raise


if __name__ == "__main__":
    main()
