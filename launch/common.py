"""What the launchers share: settings of which all that are missing are named at once, the code's commit, and dry runs.

A launcher sets topology and environment. What stands after `--` is the command, which it passes on as it is.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent
SECONDS_BETWEEN_LOOKS = 15


@dataclass(frozen=True)
class Setting:
    """One setting of a launcher: an option, or the environment variable LAUNCH_NAME where it is not given.

    Attributes:
        name: of the option, with hyphens.
        text: what it is.
        default: used where neither is given; None: it must be given.
        kind: what reads it: int or str, or a function that raises ValueError.
    """

    name: str
    text: str
    default: str | None = None
    kind: Callable[[str], object] = str

    @property
    def variable(self) -> str:
        """The environment variable."""
        return "LAUNCH_" + self.name.upper().replace("-", "_")


@dataclass(frozen=True)
class Launch:
    """What was given: settings by name, the command, and whether to print alone."""

    settings: dict[str, str]
    command: list[str]
    dry_run: bool

    def __getitem__(self, name: str) -> str:
        return self.settings[name]


def count(text: str) -> int:
    """A whole number, at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise ValueError("a whole number, at least 1")
    return int(text)


def job_name(text: str) -> str:
    """A name that clouds take: 40 lower-case letters, digits and hyphens, from a letter on."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", text):
        raise ValueError("lower-case letters, digits and hyphens, at most 40, a letter first")
    return text


def read(text: str, settings: Sequence[Setting], flags: Sequence[str] = (), demands_run: bool = True) -> Launch:
    """Read the command line and the environment; end with 2 after naming everything that is missing or wrong.

    Args:
        text: what the launcher does, for --help.
        settings: what it takes.
        flags: further options without a value; in the result "yes" where given, else "".
        demands_run: whether the command must name its run directory: on machines that go away, the default would go
            with them, and a restart could not go on.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for setting in settings:
        default = "" if setting.default is None else f"; default: {setting.default or 'none'}"
        parser.add_argument(f"--{setting.name}", help=f"{setting.text} (or {setting.variable}{default})")
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_const", const="yes", default="")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command, after --")
    given = vars(parser.parse_args())
    command = given["command"][1:] if given["command"][:1] == ["--"] else given["command"]
    found = {s.name: given[s.name.replace("-", "_")] or os.environ.get(s.variable, s.default) for s in settings}
    wrong = [line for setting in settings if (line := _problem(setting, found[setting.name]))]
    if not command:
        wrong.append("the command, after --, as in: -- epigone run configs/quickstart.py --run /shared/runs/quickstart")
    elif demands_run and not any(word == "--run" or word.startswith("--run=") for word in command):
        wrong.append("--run in the command: a run directory that outlives the machines, so that a restart goes on")
    if wrong:
        end(f"{len(wrong)} missing or wrong:\n" + "\n".join(f"  {line}" for line in wrong))
    values = {name: value or "" for name, value in found.items()} | {
        flag: given[flag.replace("-", "_")] for flag in flags
    }
    return Launch(values, command, given["dry_run"])


def _problem(setting: Setting, value: str | None) -> str | None:
    if value is None:
        return f"--{setting.name} or {setting.variable}: {setting.text}"
    try:
        setting.kind(value)
    except ValueError as error:
        return f"--{setting.name} '{value}': {error}" if value else None
    return None


def end(message: str, code: int = 2) -> NoReturn:
    """Say why on standard error, and end."""
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(code)


def identity(job: str) -> dict[str, str]:
    """Environment by which records name the code and the job where there is no checkout: commit and job."""
    return {"EPIGONE_COMMIT": commit(), "EPIGONE_JOB": job}


def commit() -> str:
    """The commit of this checkout, with `-dirty` behind it where files were changed since; 'unknown' outside of one."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def fill(template: Path, values: dict[str, object]) -> str:
    """A YAML file with a value, as JSON, in place of each "@NAME@"; JSON is YAML too."""
    text = template.read_text()
    names = set(re.findall(r'"@([A-Z_]+)@"', text))
    if names != set(values):
        raise ValueError(f"{template.name} has {sorted(names)}, and was given {sorted(values)}")
    return re.sub(r'"@([A-Z_]+)@"', lambda found: json.dumps(values[found[1]]), text)


def perform(command: Sequence[str], dry_run: bool = False, text: str | None = None, capture: bool = False) -> str:
    """Run one program, `text` on its standard input; its output where it is captured. Ends with its code if it fails.

    A dry run prints it and gives "".
    """
    if dry_run:
        print(shlex.join(command) + (f" <<'EOF'\n{text}EOF" if text else ""))
        return ""
    done = attempt(command, text, capture)
    if done.returncode:
        end(f"failed with {done.returncode}: {shlex.join(command)}", done.returncode if done.returncode > 0 else 1)
    return done.stdout or ""


def attempt(command: Sequence[str], text: str | None = None, capture: bool = False) -> subprocess.CompletedProcess:
    """Run one program that may fail."""
    demand_program(command[0])
    return subprocess.run(command, input=text, text=True, stdout=subprocess.PIPE if capture else None)


def demand_program(name: str) -> None:
    """End where a program is not there."""
    if not shutil.which(name):
        end(f"'{name}' is not installed here, and this launcher needs it")


def wait_for(look: Callable[[], str], wanted: Sequence[str]) -> str:
    """Look until one of the wanted words is seen; it is returned."""
    seen: str | None = None
    while (now := look()) not in wanted:
        if now != seen:
            print(f"state: {now or 'none yet'}", flush=True)
            seen = now
        time.sleep(float(os.environ.get("LAUNCH_SECONDS_BETWEEN_LOOKS", SECONDS_BETWEEN_LOOKS)))
    print(f"state: {now}", flush=True)
    return now


@contextmanager
def made(create: Sequence[str], delete: Sequence[str], dry_run: bool, text: str | None = None) -> Iterator[None]:
    """Make something, and delete it whatever ends the body, SIGTERM, SIGINT and SIGHUP too.

    What could not be made is not deleted: under that name there may be somebody else's.
    """

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    if not dry_run:
        demand_program(create[0])
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in signals}
    refused = False
    try:
        if dry_run:
            perform(create, dry_run, text)
        elif code := attempt(create, text).returncode:
            refused = True
            end(f"failed with {code}: {shlex.join(create)}", 1)
        yield
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        if dry_run:
            perform(delete, dry_run)
        elif not refused and attempt(delete).returncode:
            print(f"NOT DELETED, delete it by hand: {shlex.join(delete)}", file=sys.stderr, flush=True)
        for number, handler in before.items():
            signal.signal(number, handler)
