"""Faults, one after the other, on runs of the real command: `make test-faults`.

    python tests/faults --faults 50 --seed 7 --json faults.json

It ends with 1, and a list, if a promise was broken. The full disk is a tmpfs, which only root may mount.
"""

import argparse
import json
import random
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faults.harness import Harness
from faults.place import ground


def tell(line: str) -> None:
    """At once, also where the output is a file."""
    print(line, flush=True)


def main() -> int:
    """Parse, disturb, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=54, help="how many (default: 54)")
    parser.add_argument("--steps", type=int, default=60, help="training steps of each node of a run (default: 60)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the schedule; by default the clock's")
    parser.add_argument("--logs", type=Path, help="a folder for the command's output, where a promise was broken")
    parser.add_argument("--json", type=Path, help="a file for the result")
    given = parser.parse_args()
    print(f"{given.faults} faults, seed {given.seed}", flush=True)
    with ground() as place:
        harness = Harness(place, random.Random(given.seed), given.faults, given.steps, tell=tell)
        try:
            harness.go()
        except (TimeoutError, RuntimeError) as error:
            harness.broken.append(str(error))
        if harness.broken and given.logs:
            shutil.copytree(place.folder / "logs", given.logs, dirs_exist_ok=True)
        result = {"seed": given.seed, **harness.result()}
    for kind, count in result["counts"].items():
        print(f"{count:>4}  {kind}{' (not possible here)' if kind in result['impossible'] else ''}")
    print(f"{len(harness.done):>4}  faults in {len(harness.runs)} runs, {result['seconds']:.0f} s (seed {given.seed})")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))
    if harness.broken:
        print(f"{len(harness.broken)} promises broken:", *harness.broken, sep="\n  ")
    return 1 if harness.broken or len(harness.done) < given.faults else 0


if __name__ == "__main__":
    sys.exit(main())
