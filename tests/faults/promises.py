"""What a command that was disturbed promises to the next start, and whether that start kept it."""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from faults.command import Running, key_of, steps
from faults.kinds import Fault


@dataclass(frozen=True)
class Promise:
    """What lay on the disk before a start.

    Attributes:
        steps: of each node in training, the step of its newest checkpoint that nobody harmed: it goes on from there.
        done: when the nodes that are trained were finished; they stay as they are, and no checkpoint of them is read.
        fault: what had happened.
    """

    steps: dict[str, int] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)
    fault: Fault = field(default_factory=lambda: Fault("none"))


def promised(run: Path, fault: Fault) -> Promise:
    """Look at what lies there, when nothing runs."""
    harmed = {path.name for path in fault.damaged}
    whole = {key: [s for s in found if f"step_{s:08}" not in harmed] for key, found in steps(run).items()}
    done = finished(run)
    return Promise({key: max(found, default=0) for key, found in whole.items() if key not in done}, done, fault)


def finished(run: Path) -> dict[str, str]:
    """When the nodes that are trained were finished."""
    found = {}
    for path in run.glob("nodes/*/record.json"):
        with contextlib.suppress(FileNotFoundError):
            record = json.loads(path.read_text())
            found[record["key"]] = record["finished"]
    return found


def broken_by(running: Running, promise: Promise) -> Iterator[str]:
    """What a start did not keep, from its output and from what it left."""
    output, fault = running.output, promise.fault
    went_on: dict[str, int] = {}
    for key, step in re.findall(r"(\S+@\d+) train: goes on at step (\d+) of", output):
        went_on.setdefault(key, int(step))
    for key, step in promise.steps.items():
        if key in went_on and went_on[key] != step + 1:
            yield f"{key} went on at step {went_on[key]}, and its last whole checkpoint was of step {step}"
        if step and key not in went_on and running.progress():
            yield f"{key} did not go on from step {step}"
    for newest, before in fault.damaged.items():
        if key_of(newest) in promise.done:
            continue
        named = any(f"{newest} is damaged" in line and f"using {before}" in line for line in output.splitlines())
        if not named and (went_on or running.progress()):
            yield f"{fault.told} was damaged ({fault.kind}), and no warning names {newest.name} and {before.name}"
    now = finished(running.command.run)
    for key, when in promise.done.items():
        if now.get(key) != when:
            yield f"{key} was done, and was grown again"
    if "Traceback" in output:
        yield f"a traceback: '{running.last_line}'"
