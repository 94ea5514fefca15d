"""`epigone evaluate NODE`: how well a node predicts a text, how honest it is, and how near it is to its teacher."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from epigone import __version__
from epigone.cli import Place
from epigone.errors import UserError
from epigone.opened import on_mesh, open_node
from epigone.store import write_json
from epigone.training.config import Hardware
from epigone.verbs.figures import tables
from epigone.verbs.held_out import part_of, read_held_out
from epigone.verbs.side_by_side import measure, named


@dataclass(frozen=True)
class Evaluate:
    """Measure a node on a text, alone or beside its teacher, and on tasks of lm-evaluation-harness.

    Attributes:
        node: the node: KEY as in teacher@0 or student@1.s2, NAME where one node has it, or RUN/KEY.
        on: the text: bbe, asv, tfds:NAME, or text files (a path, a glob pattern, a folder).
        split: which part of it: train, validation, test, or all.
        tokens: measure on so many tokens of it, counted by the node's tokenizer; by default on all.
        run: the run directory; by default the one below runs/ that has the node.
        teacher: another node to compare with; RUN/KEY where it is in another run.
        contexts: places at which calibration and agreement are measured.
        seed: chooses these places, and the answers that a task wants sampled.
        tasks: names of lm-evaluation-harness tasks, or task files; needs pip install .[harness].
        chat: put the prompts of tasks into the node's chat template.
        data: where prepared corpora lie; by default `data` beside the run directory.
        json: write everything to this file too.
        hardware: the mesh over which the weights are cut.
    """

    node: tyro.conf.Positional[str]
    on: str | None = None
    split: str = "test"
    tokens: int | None = None
    run: Place | None = None
    teacher: str | None = None
    contexts: int = 1000
    seed: int = 0
    tasks: tuple[str, ...] = ()
    chat: bool = False
    data: Place | None = None
    json: Path | None = None
    hardware: Hardware = field(default_factory=Hardware)


def evaluate_node(given: Evaluate) -> None:
    """Measure, print a table, and write the JSON file if one is asked for.

    Raises UserError for a node, text or task that is not there, and for numbers out of range.
    """
    _check(given)
    with on_mesh(given.hardware):
        found = examined(given)
    for table in tables(found):
        Console().print(table, soft_wrap=isinstance(table, str), highlight=False, markup=False)
    if given.json is not None:
        write_json(given.json, found)


def examined(given: Evaluate) -> dict[str, Any]:
    """Everything that the verb finds, as its JSON file has it; what has no value is absent."""
    opened = open_node(given.node, given.run)
    nodes = [opened]
    if given.teacher is not None:
        nodes.append(open_node(given.teacher, given.run if "/" not in given.teacher else None))
    found: dict[str, Any] = {"epigone": __version__, "seed": given.seed}
    if given.on is not None:
        data = given.data or opened.run.parent / "data"
        held_out = part_of(read_held_out(given.on, given.split, data), opened.tokenizer, given.tokens)
        found |= {"text": held_out.card, "documents": len(held_out.texts)}
        found |= measure(nodes, held_out, given.contexts, given.seed)
    if given.tasks:
        from epigone.verbs.harness_tasks import task_results

        found.setdefault("node", named(opened))
        found["tasks"] = task_results(opened, given.tasks, seed=given.seed, chat=given.chat)
    return found


def _check(given: Evaluate) -> None:
    if given.on is None and not given.tasks:
        raise UserError("say on which text with --on, or which tasks with --tasks (see 'epigone evaluate --help')")
    if given.teacher is not None and given.on is None:
        raise UserError(f"--teacher {given.teacher} is compared on a text: say which with --on")
    if given.contexts < 1 or (given.tokens is not None and given.tokens < 1):
        raise UserError(f"contexts={given.contexts}, tokens={given.tokens}: both must be at least 1")
    if not 0 <= given.seed < 2**31:
        raise UserError(f"seed={given.seed}: from 0 to {2**31 - 1}")
    if given.json is not None and not given.json.absolute().parent.is_dir():
        raise UserError(f"no folder '{given.json.parent}' to write '{given.json.name}' into: make it first")
    if given.json is not None and given.json.is_dir():
        raise UserError(f"--json {given.json} is a folder: name a file in it")
