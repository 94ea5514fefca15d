"""The command under test: `epigone run CONFIG`, started as a user would, in one process or in several."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

LAUNCHER = Path(__file__).resolve().parent.parent.parent / "launch" / "local_processes.py"
LONGEST_WAIT = 240.0
"""Seconds without any progress after which the harness gives up on a command: no promise takes that long."""

CONFIG = '''
"""A teacher, a student of it with averaged weights, and a reader of what the teacher writes."""

from epigone.data.corpora import TextFiles
from epigone.data.tokenizers import Words
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer, Written
from epigone.models.config import DecoderConfig
from epigone.training.loop import Training
from epigone.training.optimizer import Optimizer

CORPUS = TextFiles("{corpus}")
WORDS = TrainedTokenizer(Words(), Text(CORPUS))
MODEL = DecoderConfig(layers=1, model_size=16, heads=2, max_length=32)


def lineage(steps: int = 60, nodes: int = 3) -> Lineage:
    """A lineage to be disturbed.

    Args:
        steps: training steps of every node.
        nodes: how many of the three.
    """
    training = Training(steps=steps, batch_size=4, sequence_length=16, optimizer=Optimizer(), log_every=5)
    averaged = Training(
        steps=steps, batch_size=4, sequence_length=16, optimizer=Optimizer(), log_every=5, ema_decay=0.9
    )
    teacher = Node("teacher", 0, MODEL, WORDS, Lesson((Text(CORPUS),), objective=TEXT_ALONE, training=training))
    told = Lesson((Text(CORPUS),), teacher="teacher@0", objective=Objective(temperature=2.0), training=averaged)
    student = Node("student", 1, MODEL, WORDS, told)
    text = (Written("teacher@0", tokens=200, max_length=16),)
    reader = Node("reader", 1, MODEL, WORDS, Lesson(text, objective=TEXT_ALONE, training=training))
    evaluation = Evaluation(Text(CORPUS, "test", tokens=100), Text(CORPUS), write_tokens=50, contexts=5)
    return Lineage("disturbed", (teacher, student, reader)[:nodes], evaluation)
'''


@dataclass(frozen=True)
class Command:
    """What is run again and again.

    Attributes:
        config: the config file.
        run: the run directory.
        processes: how many form one program.
        steps: of each node.
        nodes: of the lineage.
    """

    config: Path
    run: Path
    processes: int
    steps: int
    nodes: int

    def line(self) -> list[str]:
        """The words of the command line."""
        words = [sys.executable, "-m", "epigone", "run", str(self.config), "--run", str(self.run)]
        words += ["--data", str(self.config.parent / "data")]
        words += ["--steps", str(self.steps), "--nodes", str(self.nodes)]
        words += ["--hardware.checkpoint-every-steps", "2"]
        if self.processes == 1:
            return words
        launcher = [sys.executable, str(LAUNCHER), "--processes", str(self.processes), "--"]
        return [*launcher, *words, "--hardware.data", str(self.processes)]


class Running:
    """The command, started once.

    Args:
        command: what.
        log: where its output goes.
        variables: of its environment.
    """

    def __init__(self, command: Command, log: Path, variables: Mapping[str, str]) -> None:
        self.command, self.log = command, log
        self._before = checkpoints(command.run)
        self._seen = set(self._before)
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {"JAX_PLATFORMS": "cpu", "COLUMNS": "300", **variables}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command.line(), stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    @property
    def output(self) -> str:
        """All that it said."""
        return self.log.read_text(errors="replace")

    @property
    def last_line(self) -> str:
        """The end of what it said, without the launcher's number of the process."""
        lines = self.output.strip().splitlines()
        return re.sub(r"^\[\d+\] ", "", lines[-1]) if lines else ""

    def workers(self) -> list[int]:
        """Process ids by number in the program."""
        if self.command.processes == 1:
            return [self.process.pid]
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return sorted(map(int, children), key=_rank)

    def progress(self) -> int:
        """How many checkpoints were seen to appear since it was started; `until` looks often."""
        self._seen |= checkpoints(self.command.run)
        return len(self._seen - self._before)

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for the condition; False where the command ended before. Raises: TimeoutError if nothing moves."""
        moved, seen = time.monotonic(), self.progress()
        while not condition():
            if self.process.poll() is not None:
                return condition()
            if (now := self.progress()) != seen:
                moved, seen = time.monotonic(), now
            if time.monotonic() - moved > LONGEST_WAIT:
                raise TimeoutError(f"nothing moved for {LONGEST_WAIT:.0f} s")
            time.sleep(0.01)
        return True

    def end(self) -> int:
        """Wait for its end; the exit code."""
        self.until(lambda: self.process.poll() is not None)
        return self.process.wait()

    def kill(self) -> None:
        """SIGKILL to all of its processes, as when the machine dies."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGSTOP)  # so that a launcher starts no more
            workers = self.workers()
            for process in [*workers, self.process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self.process.wait()
            while any(_is_alive(worker) for worker in workers):
                time.sleep(0.01)


def checkpoints(run: Path) -> set[tuple[Path, int]]:
    """All that are visible, each with what tells it from one of the same name before: the time of its last rename."""
    found = set()
    for path in run.glob("nodes/*/training/checkpoints/step_*"):
        with contextlib.suppress(OSError):
            if path.name.removeprefix("step_").isdigit():
                found.add((path, path.stat().st_ctime_ns))
    return found


def steps(run: Path) -> dict[str, list[int]]:
    """Steps of the checkpoints of each node that has some, by its key, in order."""
    by_node: dict[str, list[int]] = {}
    for path, _ in sorted(checkpoints(run)):
        by_node.setdefault(key_of(path), []).append(int(path.name.removeprefix("step_")))
    return by_node


def key_of(checkpoint: Path) -> str:
    """Of the node whose checkpoint it is."""
    return checkpoint.parts[-4].rpartition("-")[0]


def _rank(process: int) -> int:
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    found = [value for value in variables if value.startswith(b"JAX_PROCESS_ID=")]
    return int(found[0].partition(b"=")[2]) if found else -1


def _is_alive(process: int) -> bool:
    """Not when nobody has asked yet how it ended (a zombie), which holds no lock."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
