"""The schedule: a command is disturbed, started again, and held to what is promised, until enough has happened."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import tiny
from compiler_flags import QUICK
from faults.command import CONFIG, Command, Running, steps
from faults.kinds import HANG_SECONDS, KINDS, Fault, Kind
from faults.place import Ground
from faults.promises import Promise, broken_by, promised

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT / "src"),
    "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": QUICK,
    "EPIGONE_HANG_SECONDS": str(HANG_SECONDS),
}


@dataclass
class Harness:
    """One harness run.

    Args:
        ground: where its files lie.
        random: draws kinds, moments and places.
        faults: how many.
        steps: of each node of a run.
        nodes: of a run.
        processes: of the runs, in turn: a run that is done is followed by one with the next number.
        kinds: what may happen, each equally often.
        more: behind the config of the runs that are disturbed: how a test breaks the product on purpose.
        tell: hears one line after each fault and each run.
    """

    ground: Ground
    random: Random
    faults: int
    steps: int = 60
    nodes: int = 3
    processes: tuple[int, ...] = (1, 2)
    kinds: tuple[Kind, ...] = KINDS
    more: str = ""
    tell: Callable[[str], None] = print
    done: list[Fault] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began, self._starts = time.monotonic(), 0
        corpus = self.ground.folder / "corpus.txt"
        corpus.write_text("\n\n".join(tiny.sentences(300)))
        self._config, self._left_alone = (self.ground.folder / f"{name}.py" for name in ("disturbed", "undisturbed"))
        self._left_alone.write_text(CONFIG.replace("{corpus}", str(corpus)))
        self._config.write_text(self._left_alone.read_text() + self.more)
        (self.ground.folder / "logs").mkdir(exist_ok=True)

    def go(self) -> None:
        """Disturb runs until all faults have happened and the last run is done."""
        possible = [k for k in self.kinds if k.needs(self.ground) and k.processes <= max(self.processes)]
        rounds = -(-self.faults // len(possible))
        kinds = [kind for _ in range(rounds) for kind in self.random.sample(possible, len(possible))][: self.faults]
        while kinds and not self.broken:
            processes, before = self.processes[len(self.runs) % len(self.processes)], len(self.done)
            run = self.ground.folder / f"run-{self.random.getrandbits(32):08x}"
            command = Command(self._config, run, processes, self.steps, self.nodes)
            self._undisturbed(command)
            promise: Promise | None = Promise()
            while promise is not None:
                promise = self._start(command, kinds, promise)
            self.runs.append({"processes": processes, "faults": len(self.done) - before})
            self._compare(command)

    def result(self) -> dict[str, Any]:
        """What happened, for a file."""
        counts = {kind.name: sum(fault.kind == kind.name for fault in self.done) for kind in self.kinds}
        faults = [asdict(fault) | {"damaged": [str(path) for path in fault.damaged]} for fault in self.done]
        impossible = [kind.name for kind in self.kinds if not kind.needs(self.ground)]
        about = {"runs": self.runs, "starts": self._starts, "seconds": time.monotonic() - self._began}
        return {"counts": counts, "impossible": impossible, **about, "broken": self.broken, "faults": faults}

    def _start(self, command: Command, kinds: list[Kind], promise: Promise) -> Promise | None:
        """Start the command once, disturb it until it ends; what is promised to the next start, None if all is done."""

        def following() -> Kind | None:
            return next((kind for kind in kinds if kind.processes <= command.processes), None)

        kind, fault = following(), Fault("none")
        slow = self.ground.slowly(self.random.randrange(500, 10_000)) if kind and kind.slow else {}
        self._starts += 1
        running = Running(command, self.ground.folder / "logs" / f"{self._starts:03}", ENVIRONMENT | slow)
        while kind is not None and self._reached(running, kind, promise):
            kinds.remove(kind)
            kind.inflict(running, fault := Fault(kind.name), self.ground, self.random)
            self.done.append(fault)
            self._tell(fault, command)
            kind = following()
            if running.process.poll() is None and kind and kind.slow:
                running.kill()
            if running.process.poll() is not None:
                break
        code = running.end()
        disturbed = fault.kind != "none"
        wrong = [*fault.broken, *broken_by(running, promise)]
        if code and not disturbed:
            wrong.append(f"left alone, it ended with {code}: '{running.last_line}'")
        if wrong:
            self.broken += [f"start {self._starts}, fault {len(self.done)} ({fault.kind}): {text}" for text in wrong]
            self.tell(f"     BROKEN: {'; '.join(wrong)}")
        return None if code == 0 or (code and not disturbed) else promised(command.run, fault)

    def _reached(self, running: Running, kind: Kind, promise: Promise) -> bool:
        """Wait for the moment of the fault; False where the command ended first."""
        if kind.early and not promise.fault.damaged and running.progress() == 0 and self.random.random() < 0.3:
            moment = time.monotonic() + self.random.uniform(0.0, 6.0)
        else:
            wanted = running.progress() + self.random.randint(1, 4)
            running.until(lambda: running.progress() >= wanted)
            moment = time.monotonic() + self.random.uniform(0.0, 0.3)
        running.until(lambda: time.monotonic() > moment)
        return running.process.poll() is None

    def _undisturbed(self, command: Command) -> Path:
        """The run of the same command on the same mesh, if nothing happens; made once."""
        run = self.ground.folder / f"undisturbed-{command.processes}-{command.steps}-{command.nodes}"
        alone = Command(self._left_alone, run, command.processes, command.steps, command.nodes)
        if not (run / "report.html").exists():
            running = Running(alone, self.ground.folder / "logs" / run.name, ENVIRONMENT)
            if code := running.end():
                raise RuntimeError(f"the undisturbed run ended with {code}: {running.output}")
        return run

    def _compare(self, command: Command) -> None:
        """The end of a disturbed run, held against that of the undisturbed one."""
        if not (command.run / "report.html").exists():
            self.broken.append(f"{command.run.name} did not come to its end")
            return
        found, wanted = digests(command.run, self._undisturbed(command))
        parts = [(key, name) for key, those in wanted.items() for name in those]
        wrong = [f"{key} {name}" for key, name in parts if found[key].get(name) != wanted[key][name]]
        if wrong:
            self.broken.append(f"{command.run.name}: {', '.join(wrong)} differ from those of an undisturbed run")
        state = f"{len(wrong)} of {len(parts)} parts differ" if wrong else f"all {len(parts)} parts equal to the bit"
        about = f"{command.processes} process{'es' if command.processes > 1 else ''}"
        self.tell(f"run {len(self.runs)} ({about}, {self.runs[-1]['faults']} faults) is done: {state}")

    def _tell(self, fault: Fault, command: Command) -> None:
        gone = time.monotonic() - self._began
        left = gone / len(self.done) * (self.faults - len(self.done))
        at = ", ".join(f"{key} {found[-1]}" for key, found in steps(command.run).items()) or "no checkpoint"
        what = f"{fault.kind} {fault.told}".strip()
        count = f"{len(self.done):>3}/{self.faults}"
        self.tell(f"{count}  {what} [{command.processes} p, {at}]  {gone:.0f} s, {left:.0f} s left")


def digests(*runs: Path) -> list[dict[str, dict[str, str]]]:
    """What came of runs, node by node."""
    script = Path(__file__).with_name("digest.py")
    environment = os.environ | ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(script), *map(str, runs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{', '.join(map(str, runs))} cannot be read: {done.stderr}")
    return json.loads(done.stdout)
