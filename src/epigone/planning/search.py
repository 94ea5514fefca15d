"""Meshes, rules and micro-batches for a step on a topology, ranked by how long it would take."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import product
from math import gcd, log

from epigone.errors import UserError
from epigone.models.rules import Sharding
from epigone.models.sharding import AXES
from epigone.planning.estimate import Plan
from epigone.planning.steps import Step, counted
from epigone.planning.topologies import Topology
from epigone.training.config import Hardware

MOST_CUT = 16
"""Devices over which heads are cut at most, and experts."""

MICROBATCHES = (1, 2, 4, 8, 16, 32)

WHOLE = Sharding(B=AXES, E=(), N=(), K=(), F=(), V=(), D=())
"""On every device a whole copy, the batch over all of them."""

ZERO = replace(WHOLE, D=AXES)
"""Cut over all devices, and gathered layer by layer."""

STUDENTS = (Sharding(), WHOLE, ZERO)
TEACHERS = (Sharding(), Sharding(D=("data", "fsdp")), ZERO)


def search(
    step: Step, where: Topology, base: Hardware, price: float | None, tried: Callable[[float], None]
) -> list[Plan]:
    """Plans by formula, those that fit first, the fastest of them first; those that do not by what they lack.

    Args:
        step: what is trained.
        where: the devices, all of which are used.
        base: fields beside mesh, rules and micro-batches.
        price: of a chip-hour.
        tried: called with each further share that is done.

    Raises: UserError where nothing divides.
    """
    ways, plans, refused = list(candidates(step, where, base)), [], ""
    for hardware in ways:
        try:
            plans.append(Plan(step, where, hardware, counted(step, where, hardware), price=price))
        except UserError as error:
            refused = str(error)
        tried(1 / len(ways))
    if not plans:
        raise UserError(f"nothing divides over {where.devices} devices of {where.name}; the last reason: {refused}")
    return sorted(plans, key=rank)


def rank(plan: Plan) -> tuple[float, ...]:
    """Those that fit first, by time; of those that differ by less than two per cent the simplest rules, then memory."""
    if not plan.fits:
        return 1.0, plan.used
    rules = (plan.hardware.student, plan.hardware.teacher)
    changed = sum(getattr(one, f.name) != getattr(Sharding(), f.name) for one in rules for f in fields(Sharding))
    return 0.0, round(log(plan.seconds.expected) / 0.02), changed, plan.used


def candidates(step: Step, where: Topology, base: Hardware) -> Iterator[Hardware]:
    """Meshes of all devices; rules that differ on them; micro-batches that divide the batch.

    `data` is left at 1: the rules of a whole student say the same. Experts are cut where there are some.
    """
    batch = step.node.lesson.training.batch_size
    rules = [(student, teacher) for student in STUDENTS for teacher in (TEACHERS if step.teachers else TEACHERS[:1])]
    experts = gcd(*(config.experts or 0 for config in (step.student, *step.teachers)))
    for tensor, expert in product(_powers(where.devices), _powers(gcd(experts, where.devices) if experts else 1)):
        if where.devices % (tensor * expert):
            continue
        mesh = replace(base, data=1, fsdp=where.devices // (tensor * expert), expert=expert, tensor=tensor)
        for microbatches, (student, teacher) in product(MICROBATCHES, rules):
            same = tensor * expert == 1 and (teacher == TEACHERS[1] or student == ZERO or teacher == ZERO)
            parts = microbatches * where.devices // (tensor if student == teacher == Sharding() else 1)
            if batch % parts == 0 and not same:
                yield replace(mesh, microbatches=microbatches, student=student, teacher=teacher)


def _powers(most: int) -> list[int]:
    """Powers of two that divide `most`, up to MOST_CUT."""
    return [n for n in (2**i for i in range(MOST_CUT.bit_length())) if n <= MOST_CUT and most % n == 0]
