"""`epigone run CONFIG`: a config file, its options and its fields; the plan; the growing; the report."""

import contextlib
import dataclasses
import importlib.util
import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import docstring_parser
import tyro
from rich.console import Console
from rich.table import Table

from epigone.cli import Place, parse
from epigone.errors import Fault, UserError
from epigone.lineage import Lineage
from epigone.overrides import documented_fields, kinds_of_node, override
from epigone.storage.places import on_store


@dataclass(frozen=True)
class OfConfig:
    """What all verbs of a config are told.

    Attributes:
        config: a Python file with a function `lineage` that returns the Lineage.
        run: the run directory; by default runs/NAME below the current one.
        data: where prepared corpora lie; by default `data` beside the run directory.
        node: this node alone. To be grown, its parents must be done; a plan takes the largest by default.
        set: change a field of some nodes, as in student.lesson.training.steps=200; give it again for more.
    """

    config: tyro.conf.Positional[Path]
    run: Place | None = None
    data: Place | None = None
    node: str | None = None
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Run(OfConfig):
    """Grow the lineage of a config: train, distil, self-train for generations.

    Attributes:
        dry_run: print the plan and grow nothing.
        json: print the plan as JSON, for schedulers: every node with its parents, costs, and whether it is done.
        jobs: processes on this machine that grow different nodes at once, each with its part of the processors. The
            same command on other hosts that see the run directory helps; give each process its own accelerator.
    """

    dry_run: bool = False
    json: bool = False
    jobs: int | None = None


def run(arguments: Sequence[str]) -> None:
    """Read the arguments, which depend on the config, and do what they ask."""
    given = read_config(arguments, "run")
    if given is None:
        return
    lineage, directory, options = given
    if options.dry_run:
        (print_plan if options.json else show_plan)(lineage, directory, options.data)
    else:
        grow_and_report(lineage, directory, options, arguments)


def read_config(arguments: Sequence[str], verb: str, base: type = Run) -> tuple[Lineage, Path, Any] | None:
    """The lineage of a config, its run directory and the options given with it; None where help was asked for."""
    if not arguments or arguments[0].startswith("-"):
        if {"-h", "--help"} & set(arguments):
            parse(base, ["--help"], f"epigone {verb}")
        raise UserError(f"say which config first, as in: epigone {verb} configs/quickstart.py")
    function = load_config(Path(arguments[0]))
    kind = _with_options(function, base, made_for(Path(arguments[0]), "HARDWARE"))
    if {"-h", "--help"} & set(arguments):
        _print_help(kind, function, arguments[0], verb)
        return None
    given = parse(kind, arguments, f"epigone {verb} {arguments[0]}")
    if base is Run and given.json and not (verb == "run" and given.dry_run):
        raise UserError("--json prints a plan: give it as epigone run CONFIG --dry-run --json")
    if base is Run and given.jobs is not None:
        _check_jobs(given, verb)
    options = {name: getattr(given, name) for name in inspect.signature(function).parameters}
    lineage = override(_called(function, options), given.set)
    directory = given.run or Path("runs") / lineage.name
    if not on_store(directory) and directory.exists() and not directory.is_dir():
        raise UserError(f"'{directory}' is no directory: name another with --run")
    return lineage, directory, given


def _check_jobs(given: Any, verb: str) -> None:
    from epigone.processes import several

    if verb != "run":
        raise UserError(
            f"--jobs {given.jobs} grows nodes: give it to epigone run, and start epigone {verb} several times"
        )
    if given.jobs < 1:
        raise UserError(f"--jobs {given.jobs}: at least one process has to grow nodes")
    if given.node is not None:
        raise UserError(
            f"--jobs {given.jobs} grows different nodes at once, and --node {given.node} is one: give either"
        )
    if given.hardware.together > 1:
        raise UserError(f"--jobs {given.jobs} and --hardware.together {given.hardware.together}: give either")
    if several():
        raise UserError(
            "--jobs is for processes that work alone, and a launcher made this one of several: leave it out"
        )


def load_config(path: Path) -> Callable[..., Lineage]:
    """The function `lineage` of a config file. Raises UserError for a file that is not one."""
    return load_function(path, "lineage", "that returns a Lineage")


def load_function(path: Path, name: str, does: str) -> Callable[..., Any]:
    """A function of a Python file that a user wrote. Raises UserError where there is no such file or function."""
    if not path.is_file():
        near = get_close_matches(str(path), [str(p) for p in Path("configs").glob("**/*.py")], n=1, cutoff=0.3)
        raise UserError(f"no config '{path}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    spec = importlib.util.spec_from_file_location(_module_name(path), path)
    if spec is None or spec.loader is None:
        raise UserError(f"config '{path}' is no Python file (.py)")
    # As for a script: modules beside the config, and in the current directory, can be imported.
    sys.path[:0] = [folder for folder in (str(path.resolve().parent), os.getcwd()) if folder not in sys.path]
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    _guarded(path, lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    if not callable(found := getattr(module, name, None)):
        raise UserError(f"config '{path}' has no function '{name}' {does}")
    return found


def _module_name(path: Path) -> str:
    return f"epigone_config_{path.stem}"


def made_for(config: Path, name: str) -> Any:
    """The HARDWARE or the TOPOLOGY that a config, which is loaded, is made for; None where it names none."""
    return getattr(sys.modules[_module_name(config)], name, None)


def _called(function: Callable[..., Lineage], options: dict[str, Any]) -> Lineage:
    path = Path(inspect.getsourcefile(function) or "config")
    lineage = _guarded(path, lambda: function(**options))
    if not isinstance(lineage, Lineage):
        raise UserError(f"'lineage' of '{path}' returned {type(lineage).__name__}, not a Lineage")
    return lineage


def _guarded(path: Path, action: Callable[[], Any]) -> Any:
    """A config is the user's own code: what it raises is told with its line, as bad input."""
    try:
        return action()
    except (UserError, Fault):
        raise
    except SyntaxError as error:
        raise UserError(f"config '{path}', line {error.lineno}: {error.msg}") from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
        where = f", line {lines[-1]}" if lines else ""
        raise UserError(f"config '{path}'{where}: {type(error).__name__}: {error}") from None


def _with_options(function: Callable[..., Lineage], base: type, hardware: Any) -> type:
    """`base` with one more argument for each parameter of the config's function, and for the hardware.

    What is not given of the hardware is taken from that of the config.
    """
    from epigone.training.loop import Hardware

    texts = {p.arg_name: p.description or "" for p in docstring_parser.parse(function.__doc__ or "").params}
    hardware = Hardware() if hardware is None else hardware
    if not isinstance(hardware, Hardware):
        raise UserError(f"the config's HARDWARE is a {type(hardware).__name__}, and no epigone.training.loop.Hardware")
    extra: list[Any] = [("hardware", Hardware, field(default_factory=lambda: hardware))]
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is inspect.Parameter.empty:
            raise UserError(f"parameter '{name}' of the config's function needs a default value")
        if name in {f.name for f in dataclasses.fields(base)} | {"hardware"}:
            raise UserError(f"parameter '{name}' of the config's function is an argument of 'epigone run': rename it")
        annotation = parameter.annotation if parameter.annotation is not parameter.empty else type(parameter.default)
        extra.append(
            (name, Annotated[annotation, tyro.conf.arg(help=texts.get(name, ""))], field(default=parameter.default))
        )
    kind = dataclasses.make_dataclass(base.__name__, extra, bases=(base,), frozen=True)
    kind.__doc__ = base.__doc__
    return kind


def _print_help(kind: type, function: Callable[..., Lineage], config: str, verb: str) -> None:
    """The arguments, then every field that `--set` can change, with its present value and meaning."""
    lineage = _called(function, {})
    with contextlib.suppress(SystemExit):
        parse(kind, ["--help"], f"epigone {verb} {config}", description=(function.__doc__ or "").partition("\n\n")[0])
    console = Console()
    console.print("\nfields for --set, as NODE.FIELD=VALUE (a pattern such as 'self-*' takes several nodes):\n")
    evaluation = [("evaluation", lineage.evaluation)] if lineage.evaluation else []
    for name, value in [*kinds_of_node(lineage).items(), *evaluation]:
        table = Table(title=name, title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(no_wrap=True)
        for path, present, text in documented_fields(value):
            table.add_row(path, f"[dim]{_shown(present)}[/]", text)
        console.print(table)


def _shown(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value)


def show_plan(lineage: Lineage, directory: Path, data: Path | None) -> None:
    """Print what growing will take, and what is done already."""
    from epigone.plan import plan
    from epigone.store import Store

    rows = plan(lineage, Store(directory, lineage, data))
    table = Table("node", "kind", "learns from", "parameters", "tokens", "FLOPs", "memory", "", title=lineage.name)
    for row in rows:
        state = "[green]done[/]" if row.done else ""
        numbers = [amount(row.parameters), amount(row.tokens), amount(row.flops), amount(row.memory, "B")]
        table.add_row(row.key, row.kind, _few(row.parents), *numbers, state)
    console = Console()
    console.print(table)
    left = [row for row in rows if not row.done]
    flops, memory = sum(row.flops or 0 for row in left), max((row.memory or 0 for row in left), default=0)
    todo = f"{amount(flops)} FLOPs, at most {amount(memory, 'B')} at once"
    console.print(f"{len(rows)} nodes, {len(rows) - len(left)} done; to do: {todo}")


def print_plan(lineage: Lineage, directory: Path, data: Path | None) -> None:
    """Print the plan as JSON: what a scheduler needs to make one job of each node.

    `nodes` are in an order in which they can be grown, parents first. What is not known before is null.
    """
    from epigone.plan import plan
    from epigone.store import Store

    rows = [dataclasses.asdict(row) for row in plan(lineage, Store(directory, lineage, data))]
    nodes = [{**row, "name": lineage[row["key"]].name, "seed": lineage[row["key"]].seed} for row in rows]
    print(json.dumps({"lineage": lineage.name, "run": str(directory), "nodes": nodes}, indent=1))


def _few(keys: Sequence[str]) -> str:
    return ", ".join(keys) if len(keys) <= 2 else f"{keys[0]}, ... {keys[-1]} ({len(keys)})"


def amount(value: float | None, unit: str = "") -> str:
    """A number with three digits and a metric prefix; '?' for what is not known before."""
    if value is None:
        return "?"
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}{unit}".strip()
        value /= 1000
    return f"{value:.3g} E{unit}"


def grow_and_report(lineage: Lineage, directory: Path, given: Any, arguments: Sequence[str]) -> None:
    """Grow what is not done, write the report, say where it is."""
    from epigone import helpers
    from epigone.grow import grow, pending
    from epigone.plan import plan
    from epigone.processes import is_first
    from epigone.report import write_report
    from epigone.store import Store
    from epigone.view import Terminal, clock, work_of

    if helpers.HELPER in os.environ:
        helpers.watch_parent()
        helpers.grow_some(lineage, directory, hardware=given.hardware, data=given.data, view=helpers.Telling())
        return
    store = Store(directory, lineage, given.data)
    waiting = {node.key for node in pending(store) if given.node in (None, node.key)}
    rows = [row for row in (plan(lineage, store) if waiting else []) if row.key in waiting]
    work = {row.key: work_of(row.parameters, row.flops) for row in rows}
    began = time.monotonic()
    with Terminal(lineage.name, work, Console(quiet=not is_first())) as view:
        if given.jobs and waiting:
            grown = helpers.grow_with_helpers(arguments, given.jobs, store, view)
        else:
            grown = grow(lineage, directory, hardware=given.hardware, only=given.node, data=given.data, view=view)
    if not is_first():
        return
    if grown:
        print(f"{lineage.name}: {len(grown)} nodes grown in {clock(time.monotonic() - began)}")
    else:
        done = f"{given.node} is" if given.node else f"all {len(lineage.nodes)} nodes are"
        print(f"{lineage.name}: {done} done, nothing to grow")
    if given.node is None:
        page = directory / "report.html"
        print(f"report: {page if _is_current(page, store) else write_report(directory)}")


def _is_current(page: Path, store: Any) -> bool:
    """Whether a report is newer than everything that it shows; in a bucket, where times are coarse, nobody knows."""
    if on_store(page):
        return False
    shown = [store.run / "lineage.json", *(store.directory(n) / "record.json" for n in store.lineage.nodes)]
    shown += [store.run / "populations" / f"{population.key}.json" for population in store.lineage.populations]
    shown += [store.run / "watch.json"] if store.lineage.watch else []
    return page.exists() and all(page.stat().st_mtime_ns >= path.stat().st_mtime_ns for path in shown)
