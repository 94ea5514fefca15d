"""The most bytes that a traced program holds at once on one device, beside its arguments."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from epigone.planning.program import COUNTED, Operation, Program

KEEPS = (
    *("dot_general", "ragged_dot_general", "scan", "while", "cond", "shard_map", "pallas_call", "sort", "top_k"),
    *("device_put", "gather", "scatter-add", "scatter", "cumsum", "argsort", "concatenate", "dynamic_update_slice"),
    *("dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"),
    *("psum", "psum_invariant", "all_gather", "all_to_all", "reduce_scatter"),
    *COUNTED,
)
"""Primitives that read arrays in memory and write some; all others are fused into what uses them."""

REDUCE = ("reduce_sum", "reduce_max", "reduce_min", "argmax")
"""Those that write one, and what they read is fused into them."""


@dataclass(frozen=True)
class Alive:
    """At the moment of the peak.

    Attributes:
        size: bytes.
        arrays: (bytes, the primitive that made it, its shape), the largest first.
    """

    size: float
    arrays: tuple[tuple[float, str, tuple[int, ...]], ...]


def peak(program: Program, in_place: bool = False) -> Alive:
    """The peak of a program: what its operations make, from where it is made to its last use.

    Elementwise operations are taken to be fused: what they make is an array only where a product, a loop, a kernel or
    an exchange reads it, or it is a result; until then what they read stays. `in_place`: results take the places of
    arguments that are given away, as those of a step of training do.
    """
    operations = program.operations
    results = [] if in_place else program.outputs
    sources = _sources(program, results)
    last: dict[int, int] = {}
    for place, operation in enumerate(operations):
        for variable in operation.inputs:
            for source in sources.get(id(variable), ()):
                last[source] = place
    for variable in results:
        for source in sources.get(id(variable), ()):
            last[source] = len(operations)
    live: dict[int, tuple[float, str, tuple[int, ...]]] = {}
    best = Alive(0.0, ())
    for place, operation in enumerate(operations):
        inner = max((peak(body) for body in _bodies(program, operation)), key=lambda one: one.size, default=best)
        made = {
            id(v): (program.bytes(v), operation.name, tuple(v.aval.shape))
            for v in operation.outputs
            if id(v) in sources.get(id(v), ())
        }
        inside = inner.size if operation.name in ("scan", "while", "shard_map", "cond") else 0.0
        if operation.name in COUNTED:  # loops over blocks of rows, of which there is a padded copy
            inside = sum(program.bytes(v) for v in operation.inputs if len(v.aval.shape) == 2)
        # What a call gives lies in its results already; a loop makes its carry anew in each turn.
        outside = sum(size for size, *_ in made.values())
        extra = max(0.0, inside - outside) if operation.name in ("shard_map", "cond") else inside
        size = sum(size for size, *_ in live.values()) + outside + extra
        if size > best.size:
            held = sorted([*live.values(), *made.values(), (extra, f"inside {operation.name}", ())], reverse=True)
            best = Alive(size, tuple(held))
        live |= made
        for key in [key for key in live if last.get(key, -1) <= place]:
            del live[key]
    return best


def _bodies(program: Program, operation: Operation) -> Iterator[Program]:
    if operation.name in ("scan", "while", "cond", "shard_map"):
        for body in operation.bodies:
            yield program.inside(body, True if operation.name == "shard_map" else program.manual)


def _sources(program: Program, results: list[Any]) -> dict[int, tuple[int, ...]]:
    """For each variable the arrays in memory of which it is made: itself where it is one."""
    read = {id(v) for operation in program.operations if operation.name in KEEPS for v in operation.inputs}
    read |= {id(v) for v in results}
    sources: dict[int, tuple[int, ...]] = {}
    for operation in program.operations:
        before = {source for v in operation.inputs for source in sources.get(id(v), ())}
        for variable in operation.outputs:
            array = operation.name in (*KEEPS, *REDUCE) or id(variable) in read or _exchanges(program, operation)
            sources[id(variable)] = (id(variable),) if array else tuple(before)
    return sources


def _exchanges(program: Program, operation: Operation) -> bool:
    """Whether a resharding gathers: cutting alone makes nothing new."""
    if operation.name != "reshard":
        return False
    return program.elements(operation.outputs[0]) > program.elements(operation.inputs[0])


__all__ = ["Alive", "peak"]
