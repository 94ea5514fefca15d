"""The command line: the verbs, their arguments as dataclasses, and every bad end as one line."""

import contextlib
import errno
import io
import os
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from epigone import __version__, runtime, watchdog
from epigone.errors import Fault, Stopped, UserError, did_you_mean
from epigone.processes import several
from epigone.storage.places import reached
from epigone.storage.reasons import explained

Place = Annotated[
    Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda given: reached(given[0]),
        is_instance=lambda value: isinstance(value, PurePath),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""An argument that is a folder on a disk, or gs://BUCKET/FOLDER or s3://BUCKET/FOLDER."""


@dataclass(frozen=True)
class Report:
    """Write the report of a run, or of several on one page: report.html, results.json, results.csv and plots.

    Attributes:
        run: the run directory.
        beside: other run directories, which are shown beside it.
        to: the folder where the report is written; by default the run directory.
    """

    run: tyro.conf.Positional[Place]
    beside: tuple[Place, ...] = ()
    to: Place | None = None


def _run(arguments: list[str]) -> None:
    from epigone.verbs.run import run

    run(arguments)


def _plan(arguments: list[str]) -> None:
    # A plan needs no device, and libtpu would look for its own.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from epigone.verbs.plan import plan_config

    plan_config(arguments)


def _label(arguments: list[str]) -> None:
    from epigone.verbs.label import label_texts

    label_texts(arguments)


def _import(arguments: list[str]) -> None:
    from epigone.verbs.importing import Import, import_node

    import_node(parse(Import, arguments, "epigone import"))


def _sample(arguments: list[str]) -> None:
    from epigone.verbs.sample import Sample, pieces

    for piece in pieces(parse(Sample, arguments, "epigone sample")):
        print(piece, end="", flush=True)


def _serve(arguments: list[str]) -> None:
    from epigone.verbs.serve import Serve, serve_node

    serve_node(parse(Serve, arguments, "epigone serve"))


def _keys(arguments: list[str]) -> None:
    from epigone.verbs.keys import Keys, change_keys

    change_keys(parse(Keys, arguments, "epigone keys"))


def _collect(arguments: list[str]) -> None:
    from epigone.verbs.collect import collect_answers

    collect_answers(arguments)


def _evaluate(arguments: list[str]) -> None:
    from epigone.verbs.evaluate import Evaluate, evaluate_node

    evaluate_node(parse(Evaluate, arguments, "epigone evaluate"))


def _export(arguments: list[str]) -> None:
    from epigone.verbs.export import Export, export_node

    export_node(parse(Export, arguments, "epigone export"))


def _report(arguments: list[str]) -> None:
    from epigone.report import write_report

    given = parse(Report, arguments, "epigone report")
    print(f"report: {write_report(given.run, given.beside, given.to)}")


VERBS: dict[str, tuple[str, Callable[[list[str]], None]]] = {
    "run": ("Grow the lineage of a config: train, distil, self-train for generations.", _run),
    "plan": ("Say what a step takes on devices that are not here: memory, time, money.", _plan),
    "label": ("Ask the teachers of a config once, and keep their scores on disk.", _label),
    "import": ("Make a node of a Hugging Face folder or a GGUF file.", _import),
    "sample": ("Let a node write.", _sample),
    "serve": ("Put a node behind the OpenAI interface, with a policy.", _serve),
    "keys": ("Who may ask a node that is served, and how much.", _keys),
    "collect": ("Ask an endpoint very many prompts, once, and keep its answers as a data set.", _collect),
    "evaluate": (
        "Measure a node on a text: perplexity, calibration, agreement with a teacher, tasks.",
        _evaluate,
    ),
    "export": ("Write a node as a Hugging Face folder, with a model card.", _export),
    "report": ("Write the report of runs: one page, plots, JSON and CSV.", _report),
}
"""Verb -> what it does, and the function that takes its arguments. What a verb needs is imported when it is called."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 well, 2 bad input, 1 a fault, 128 + n stopped by signal n."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    runtime.prepare()
    warnings.formatwarning = lambda message, *_, **__: f"epigone: {' '.join(str(message).split())}\n"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    again = "; the same command goes on from here" if arguments[:1] in (["run"], ["import"]) else ""
    try:
        with _stopped_by_signal(again):
            _dispatch(arguments)
    except UserError as error:
        return _say(error, 2)
    except (Fault, MemoryError) as error:
        return _say(
            watchdog.explained(error) or str(error) or "out of memory: use smaller batches, or more micro-batches", 1
        )
    except Stopped as stopped:
        return _say(stopped, 128 + signal.SIGTERM)
    except KeyboardInterrupt:
        return _say(f"interrupted{again}", 128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        return _say(explained(error) or _of_the_system(error), 1)
    except Exception as error:
        if (line := watchdog.explained(error) or explained(error)) is not None:
            return _say(line, 1)
        if several():
            # Others wait for this one, which would wait for them at a normal exit.
            traceback.print_exc()
            return _say(f"{type(error).__name__}: {error}", 1)
        raise
    return 0


def _say(error: object, code: int) -> int:
    """One line on standard error, whatever the message holds."""
    print(f"epigone: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if several():
        # At a normal exit JAX would wait for the other processes, which wait for this one.
        sys.stdout.flush()
        os._exit(code)
    return code


def _of_the_system(error: OSError) -> str:
    where = f" at {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"the disk is full{where}: free some space and give the same command; what is done is kept"
    return f"{error.strerror or error}{where}"


def _dispatch(arguments: list[str]) -> None:
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb in ("-h", "--help"):
        print(_help())
    elif verb == "--version":
        print(f"epigone {__version__}")
    elif verb in VERBS:
        VERBS[verb][1](rest)
    else:
        raise UserError(f"there is no verb '{verb}'{did_you_mean(verb, VERBS)}")


def _help() -> str:
    verbs = "\n".join(f"  {verb:<8} {line}" for verb, (line, _) in VERBS.items())
    return textwrap.dedent(
        """\
        usage: epigone VERB [ARGUMENTS]

        Language models that teach language models, generation after generation.

        {}

        'epigone VERB --help' tells the arguments; 'epigone run CONFIG --help' every field of a config too.
        Begin with: epigone run configs/quickstart.py"""
    ).format(verbs)


def parse(kind: type, arguments: Sequence[str], program: str, description: str | None = None) -> Any:
    """Read arguments into a dataclass; help ends the program, bad arguments are a UserError of one line."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(kind, args=list(arguments), prog=program, description=description)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise UserError(f"{_one_line(shown.getvalue())} (see '{program} --help')") from None


def _one_line(box: str) -> str:
    """What stands in an error box, up to the general advice, on one line."""
    lines = [line.strip("│| ") for line in box.splitlines()[1:] if line.strip("╭╮╰╯│─+|- ")]
    kept: list[str] = []
    for line in lines:
        if line.startswith(("For full helptext", "Argument helptext")):
            break
        kept.append(line)
    return "; ".join(kept).replace(":;", ":")


@contextlib.contextmanager
def _stopped_by_signal(again: str = "") -> Iterator[None]:
    """SIGTERM ends the work where it stands; the trainer handles it by itself and saves first."""

    def stop(*_: object) -> None:
        raise Stopped(f"stopped by SIGTERM{again}")

    def ignored(what: Any) -> None:
        """A signal that arrives in a callback of the garbage collector is lost there: send it again."""
        if isinstance(what.exc_value, Stopped):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            hook(what)

    try:
        before, hook = signal.signal(signal.SIGTERM, stop), sys.unraisablehook
    except ValueError:  # not in the main thread: whoever runs that one handles its signals
        yield
        return
    try:
        sys.unraisablehook = ignored
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)
