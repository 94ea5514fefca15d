"""`epigone plan CONFIG --topology v5e:16x16`: what a training step takes on devices that are not here."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from epigone.cli import Place
from epigone.errors import UserError
from epigone.lineage import Lineage, Node
from epigone.storage.places import write_whole
from epigone.store import Store
from epigone.verbs.plan_tables import flags, markdown, ranking, show
from epigone.verbs.progress import progress
from epigone.verbs.run import OfConfig, amount, made_for, read_config

COMPILED = 3
"""Ways of a search that are compiled, where that can be done here."""


@dataclass(frozen=True)
class Plan(OfConfig):
    """Say what a training step takes on devices that are not here: memory, time, exchange, money.

    Attributes:
        topology: the devices, such as v5e:16x16, v5p-256, h100:64; by default the config's TOPOLOGY.
        price: of one chip for one hour, in any currency; adds what the run costs.
        search: try meshes, rules and micro-batches, and rank those that fit.
        compile: compile the step for TPUs, through libtpu; --no-compile plans by formula, in seconds.
        markdown: print a table of one row, for documents, instead of all of it.
        out: where the JSON is written; by default plans/NODE-TOPOLOGY.json in the run directory.
    """

    topology: str | None = None
    price: float | None = None
    search: bool = False
    compile: bool = True
    markdown: bool = False
    out: Place | None = None


def plan_config(arguments: Sequence[str]) -> None:
    """Plan one node of a config, print it, and write it as JSON."""
    given = read_config(arguments, "plan", Plan)
    if given is None:
        return
    lineage, directory, options = given
    if options.price is not None and not options.price >= 0:
        raise UserError(f"--price {options.price} is no price of a chip for an hour")
    from epigone.materials import Materials
    from epigone.planning.steps import step_of
    from epigone.planning.topologies import topology

    config = Path(arguments[0])
    where = topology(options.topology or made_for(config, "TOPOLOGY") or _no_topology())
    materials = Materials(Store(directory, lineage, options.data))
    step = step_of(lineage[options.node] if options.node else _largest(lineage, materials), materials)
    best, ranked = (_searched if options.search else _planned)(step, where, options)
    told = best.as_json() | {"lineage": lineage.name}
    if options.search:
        told["search"] = [one.as_json() for one in ranked]
    out = options.out or directory / "plans" / f"{step.node.key}-{where.name.replace(':', '-')}.json"
    write_whole(out, (json.dumps(told, indent=1) + "\n").encode())
    if options.markdown:
        print(markdown(best, told))
    else:
        console = Console()
        if options.search:
            console.print(ranking(ranked))
        show(console, best, told, f"epigone run {arguments[0]} {flags(best.hardware, made_for(config, 'HARDWARE'))}")
        console.print(f"plan: {out}", highlight=False, soft_wrap=True)
    if not best.fits:
        raise UserError(_lacking(best, options.search))


def _no_topology() -> str:
    raise UserError("say on which devices: --topology v5e:16x16, v5p-256, h100:64")


def _largest(lineage: Lineage, materials: Any) -> Node:
    """The node whose training takes the most operations."""
    from epigone.plan import plan

    rows = [row for row in plan(lineage, materials.store) if row.kind == "decoder" and row.flops]
    if not rows:
        raise UserError(f"no node of {lineage.name} is trained step by step: there is nothing to plan")
    return lineage[max(rows, key=lambda row: row.flops or 0).key]


def _planned(step: Any, where: Any, options: Any) -> tuple[Any, list[Any]]:
    """The plan of the given mesh; of all devices along fsdp where none is given."""
    from epigone.models.sharding import in_words
    from epigone.planning.estimate import Plan as Planned
    from epigone.planning.steps import counted

    hardware = options.hardware
    if math.prod(hardware.sizes) == 1:
        hardware = dataclasses.replace(hardware, fsdp=where.devices)
    devices = math.prod(hardware.sizes)
    if devices != where.devices:
        raise UserError(
            f"a mesh of {in_words(hardware.sizes)} has {devices} devices, and {where.name} has {where.devices}: change "
            "--hardware, or let --search choose"
        )
    plan = Planned(step, where, hardware, counted(step, where, hardware), price=options.price)
    return _with_compiler(plan, options), [plan]


def _searched(step: Any, where: Any, options: Any) -> tuple[Any, list[Any]]:
    """The fastest that fits. What the compiler says of TPUs counts: the first ones of the ranking are compiled."""
    from epigone.planning.search import rank, search

    with progress("counting ways", 1.0) as advance:
        ranked = search(step, where, options.hardware, options.price, lambda share: advance(share))
    if not (options.compile and where.platform == "tpu"):
        return ranked[0], ranked
    for place in range(min(COMPILED, len(ranked))):
        if ranked[place].fits:
            ranked[place] = _with_compiler(ranked[place], options)
    ranked.sort(key=lambda plan: (plan.compiled is None, *rank(plan)))
    return ranked[0], ranked


def _with_compiler(plan: Any, options: Any) -> Any:
    from epigone.planning.steps import compiled

    if not options.compile or plan.where.platform != "tpu":
        return plan
    mesh = " x ".join(map(str, plan.sizes))
    print(f"  compiling for {plan.where.name}, mesh {mesh}: minutes, for large models", file=sys.stderr, flush=True)
    return dataclasses.replace(plan, compiled=compiled(plan.step, plan.where, plan.hardware))


def _lacking(plan: Any, searched: bool) -> str:
    more = plan.used - plan.limit
    advice = "take more or larger devices" if searched else "raise --hardware.microbatches, or let --search choose"
    return (
        f"node '{plan.step.node.key}' does not fit {plan.where.name}: {amount(plan.used, 'B')} of "
        f"{amount(plan.limit, 'B')} a device, {amount(more, 'B')} too many: {advice}"
    )
