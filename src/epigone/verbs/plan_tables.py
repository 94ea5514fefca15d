"""A plan for the terminal: what one asks first, and a ranking of what was tried."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from epigone.models.rules import Sharding
from epigone.training.config import Hardware
from epigone.verbs.run import amount

SHOWN = 10
"""Rows of a search that are printed; all are in the JSON."""


def ranking(plans: Sequence[Any]) -> Table:
    columns = ("mesh", "student", "teacher", "parts", "memory", "step", "MFU", "")
    table = Table(*columns, title="ways that were tried")
    for plan in plans[:SHOWN]:
        rules = [_rules(one) for one in (plan.hardware.student, plan.hardware.teacher)]
        table.add_row(
            " x ".join(map(str, plan.sizes)),
            *rules,
            str(plan.hardware.microbatches),
            amount(plan.used, "B"),
            f"{plan.seconds.expected:.3g} s",
            f"{plan.mfu['expected']:.0%}",
            "[green]fits[/]" if plan.fits else "[red]too large[/]",
        )
    if len(plans) > SHOWN:
        table.caption = f"and {len(plans) - SHOWN} more, in the JSON"
    return table


def _rules(sharding: Any) -> str:
    """What differs from the rules by default, in the words of the flags."""
    changed = {f.name: getattr(sharding, f.name) for f in dataclasses.fields(sharding)}
    changed = {name: axes for name, axes in changed.items() if axes != getattr(Sharding(), name)}
    if not changed:
        return "default"
    cut = changed.get("D", Sharding().D)
    return ("whole" if not cut else "cut over all, gathered") if "N" in changed else f"D over {' '.join(cut)}"


def show(console: Console, plan: Any, told: dict[str, Any], command: str) -> None:
    """The plan as a table of what one asks first, and the command that runs it."""
    memory, times, run = told["memory"], told["seconds"], told["run"]
    chip, many = plan.where.chip, plan.where.devices
    title = f"{told['lineage']}: {plan.step.node.key} on {many} x {chip.name} ({plan.where.name})"
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column()
    sizes = told["parameters"]
    taught = f", taught by {' and '.join(amount(one) for one in sizes['teachers'])}" if sizes["teachers"] else ""
    table.add_row("parameters", amount(sizes["student"]) + taught)
    mesh = told["mesh"]
    table.add_row("mesh", ", ".join(f"{name} {size}" for name, size in mesh.items()))
    table.add_row("rules", f"student: {_rules(plan.hardware.student)}; teacher: {_rules(plan.hardware.teacher)}")
    kinds = [f"{name} {amount(size, 'B')}" for name, size in memory["kinds"].items() if size >= 1e6]
    word = "[green]fits[/]" if memory["fits"] else "[red]too large[/]"
    total = f"{amount(memory['used'], 'B')} of {amount(memory['limit'], 'B')} a device, {word} (by {memory['by']})"
    table.add_row("attention", "; ".join(f"{role}: {said}" for role, said in told["attention"].items()))
    table.add_row("memory", f"{total}\n" + ", ".join(kinds))
    table.add_row("a step", _step_line(told))
    alone = ", ".join(f"{name} {times[name]:.3g} s" for name in ("compute", "memory", "interconnect"))
    table.add_row("bound by", f"[bold]{times['bound']}[/]\n{alone}")
    mfu = told["mfu"]
    table.add_row("MFU", f"{mfu['expected']:.0%} (from {mfu['lowest']:.0%} to {mfu['highest']:.0%})")
    table.add_row("exchange", "\n".join(map(_exchange_line, told["exchanged"][:4])) or "none")
    cost = "" if run["cost"] is None else f", {run['cost']:,.0f} at {plan.price:g} an hour"
    hours = f"{run['hours']:.3g} hours, {amount(run['chip_hours'])} chip-hours{cost}"
    table.add_row("the run", f"{amount(run['tokens'])} tokens in {run['steps']:,} steps: {hours}")
    if told["scores"]:
        table.add_row("teacher", _scores_line(told["scores"]))
    console.print(table)
    console.print(command, highlight=False, soft_wrap=True)


def markdown(plan: Any, told: dict[str, Any]) -> str:
    """A table of one row."""
    memory, times, mesh = told["memory"], told["seconds"], told["mesh"]
    cells = {
        "config": told["lineage"],
        "devices": f"{plan.where.devices} x {plan.where.chip.name}",
        "mesh (data x fsdp x tensor), parts": f"{_mesh(mesh)}, {mesh['microbatches']}",
        "memory": f"{amount(memory['used'], 'B')} of {amount(memory['limit'], 'B')}, by {memory['by']}",
        "FLOPs a device": f"{amount(told['flops']['done'])}",
        "compute, memory, interconnect": ", ".join(
            f"{times[name]:.2g}" for name in ("compute", "memory", "interconnect")
        ),
        "a step": f"{times['expected']:.2g} s",
        "MFU": f"{told['mfu']['expected']:.0%}",
        "tokens/s": amount(told["tokens_per_second"]),
        "chip-hours a G tokens": f"{told['run']['chip_hours'] / told['run']['tokens'] * 1e9:.3g}",
    }
    rows = [list(cells), ["---"] * len(cells), list(cells.values())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mesh(sizes: dict[str, int]) -> str:
    """As `1 x 128 x 2`, and the experts' axis where they are cut."""
    usual = " x ".join(str(sizes[axis]) for axis in ("data", "fsdp", "tensor"))
    return usual + (f" x expert {sizes['expert']}" if sizes["expert"] > 1 else "")


def _step_line(told: dict[str, Any]) -> str:
    times = told["seconds"]
    flops = told["flops"]
    again = flops["done"] / flops["model"] - 1
    speed = f"{amount(told['tokens_per_second'])} tokens/s"
    between = f"{times['expected']:.3g} s (from {times['shortest']:.3g} to {times['longest']:.3g})"
    return f"{between}, {speed}, {amount(flops['done'])} FLOPs a device ({again:+.0%} beside the models' own)"


def _exchange_line(row: dict[str, Any]) -> str:
    who = f"along {' and '.join(row['axes'])}" if "axes" in row else f"of {row['devices']} devices"
    return f"{row['kind']} {who}: {amount(row['bytes'], 'B')} in {row['times']:,.0f}"


def _scores_line(scores: dict[str, Any]) -> str:
    passes = scores["passes_over_the_text"]
    read = "of a text of unknown length, read once" if passes is None else f"in {passes:.3g} passes over its text"
    streamed, cached = (amount(scores[f"{way}_chip_hours"]) for way in ("streamed", "cached"))
    share = f"{scores['teacher_share_of_step']:.0%} of a step"
    return (
        f"{share}; [bold]{scores['cheaper']}[/] scores are cheaper {read}: {streamed} chip-hours beside the student, "
        f"{cached} asked once and kept"
    )


def flags(hardware: Hardware, made_for: Hardware | None) -> str:
    """The mesh as flags of `epigone run`: what is not so in the config itself, or by default."""
    usual = made_for or Hardware()
    names = ("data", "fsdp", "tensor", "expert", "microbatches")
    changed = [name for name in names if getattr(hardware, name) != getattr(usual, name)]
    words = [f"--hardware.{name} {getattr(hardware, name)}" for name in changed]
    for role in ("student", "teacher"):
        rules, before = getattr(hardware, role), getattr(usual, role)
        for one in dataclasses.fields(rules):
            axes = getattr(rules, one.name)
            if axes != getattr(before, one.name):
                words.append(" ".join([f"--hardware.{role}.{one.name}", *axes]))
    return " ".join(words)
