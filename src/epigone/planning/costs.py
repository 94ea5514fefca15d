"""What one device does in a traced program: operations of its products, bytes that they move, what devices exchange.

Counted from the traced program itself, forward and backward, recomputation included: matrix products and attention
kernels for operations; their operands and results for memory, on the assumption that what lies between is fused into
them; and every exchange that the placements of operands and results ask for. Loops are counted as often as they run.
How many rows an expert gets nobody knows before: they are counted as if all got the same.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from epigone.planning.program import COUNTED, Operation, Program

SEEN = 0.5
"""Share of the scores that a causal kernel computes."""

PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Products of queries' and keys' size in the splash kernel's passes, those that it computes again included."""

CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
"""The same in cuDNN's; with a mask of segments nothing is skipped."""

BETWEEN = ("convert_element_type", "transpose", "mul", "copy", "reshape", "squeeze")
"""What may stand between a sum over devices and the cutting of its result, which then are one reduce-scatter."""


class Exchange(NamedTuple):
    """A kind of exchange, and the axes of the mesh along which devices take part."""

    kind: str
    axes: tuple[str, ...]


@dataclass
class Costs:
    """Of one device, for one run of the program.

    Attributes:
        flops: of matrix products and attention.
        moved: bytes read and written by them.
        exchanged: bytes of each exchange: the result of an all-gather, the operand of the others.
        times: how often each is done.
    """

    flops: float = 0.0
    moved: float = 0.0
    exchanged: Counter[Exchange] = field(default_factory=Counter)
    times: Counter[Exchange] = field(default_factory=Counter)

    def add(self, other: "Costs", times: float = 1) -> None:
        """Another's, so many times."""
        self.flops += times * other.flops
        self.moved += times * other.moved
        for mine, theirs in ((self.exchanged, other.exchanged), (self.times, other.times)):
            for exchange, value in theirs.items():
                mine[exchange] += times * value  # type: ignore[assignment]

    def exchange(self, program: Program, kind: str, axes: tuple[str, ...], size: float) -> None:
        """One exchange; none along axes of one device."""
        axes = tuple(axis for axis in program.sizes if axis in axes and program.sizes[axis] > 1)
        if axes and size:
            self.exchanged[Exchange(kind, axes)] += size  # type: ignore[assignment]
            self.times[Exchange(kind, axes)] += 1


def costs(program: Program) -> Costs:
    """Those of a program, and of what is inside it."""
    total = Costs()
    used: dict[Any, list[Operation]] = {}
    for operation in program.operations:
        for variable in {id(v): v for v in operation.inputs}.values():
            used.setdefault(id(variable), []).append(operation)
    scattered: set[int] = set()
    for operation in program.operations:
        rule = RULES.get(operation.name)
        if rule is not None:
            rule(program, operation, total, used, scattered)
        for body, manual, times in _inside(program, operation):
            total.add(costs(program.inside(body, manual)), times)
    return total


def _inside(program: Program, operation: Operation) -> list[tuple[Any, bool, float]]:
    """Bodies of an operation, whether their shapes are one device's, and how often they run."""
    bodies, manual = operation.bodies, program.manual
    if operation.name == "shard_map":
        return [(bodies[0], True, 1)]
    if operation.name == "scan":
        return [(bodies[0], manual, operation.params["length"])]
    if operation.name == "while":
        return [(body, manual, 1) for body in bodies]
    if operation.name == "cond":
        counted = [(costs(program.inside(body, manual)), body) for body in bodies]
        return [(max(counted, key=lambda pair: pair[0].flops)[1], manual, 1)]
    return []


Used = dict[Any, list[Operation]]


def _product(program: Program, operation: Operation, total: Costs, used: Used, scattered: set[int]) -> None:
    left, right = operation.inputs[:2]
    (contracted, theirs), _ = operation.params["dimension_numbers"]
    (out,) = operation.outputs
    depth, axes = 1.0, set()
    for mine, other in zip(contracted, theirs, strict=True):
        over = program.spec(left)[mine] or program.spec(right)[other]
        depth *= left.aval.shape[mine] / program.parts(over)
        axes |= set(over)
    elements = program.elements(out) * program.parts(tuple(axes & _axes(program, out)))
    total.flops += 2 * elements * depth
    total.moved += program.bytes(left) + program.bytes(right) + program.bytes(out)
    _summed(program, out, axes, total, used, scattered)


def _axes(program: Program, variable: Any) -> set[str]:
    return {axis for axes in program.spec(variable) for axis in axes}


def _summed(program: Program, out: Any, axes: set[str], total: Costs, used: Used, scattered: set[int]) -> None:
    """Partial sums along mesh axes become the result: in parts where it is cut along them, else whole everywhere."""
    placed = _axes(program, out)
    own, rest = axes & placed, axes - placed
    whole = program.bytes(out) * program.parts(tuple(own))
    if rest and not own:
        # The compiler makes one exchange of a sum and the cutting of its result.
        cutting = _cut_next(program, out, used)
        if cutting is not None and (own := rest & (_axes(program, cutting.outputs[0]) - placed)):
            scattered.add(id(cutting))
            rest -= own
    if own:
        total.exchange(program, "reduce-scatter", tuple(own), whole)
    if rest and id(root := _added_next(out, used)) not in scattered:
        # Sums that are added to each other are exchanged once, added.
        scattered.add(id(root))
        total.exchange(program, "all-reduce", tuple(rest), whole / program.parts(tuple(own)))


def _added_next(out: Any, used: Used) -> Any:
    """What a partial sum is part of, where others are added to it at once."""
    while len(following := used.get(id(out), [])) == 1 and following[0].name in ("add_any", "convert_element_type"):
        out = following[0].outputs[0]
    return out


def _cut_next(program: Program, out: Any, used: Used) -> Operation | None:
    """The reshard that alone takes a result, through what changes no place."""
    while len(following := used.get(id(out), [])) == 1:
        (operation,) = following
        if operation.name == "reshard":
            if _axes(program, operation.outputs[0]) - _axes(program, out):
                return operation
        elif operation.name not in BETWEEN:
            return None
        out = operation.outputs[0]
    return None


def _resharded(program: Program, operation: Operation, total: Costs, used: Used, scattered: set[int]) -> None:
    (source,), (target,) = operation.inputs, operation.outputs
    before, after = program.spec(source), program.spec(target)
    earlier = used[id(source)][: used[id(source)].index(operation)]
    if any(one.name == "reshard" and program.spec(one.outputs[0]) == after for one in earlier):
        return  # the compiler does it once
    gone = _axes(program, source) - _axes(program, target)
    moved = {axis for one, other in zip(before, after, strict=True) for axis in set(one) - set(other) - gone}
    if moved:
        total.exchange(program, "all-to-all", tuple(moved), program.bytes(source))
    if gone:
        total.exchange(program, "all-gather", tuple(gone), program.bytes(source) * program.parts(tuple(gone)))


def _looked_up(program: Program, operation: Operation, total: Costs, used: Used, scattered: set[int]) -> None:
    """Rows of a table that is cut: each device gives those that it has, and their sum is exchanged."""
    table, (out,) = operation.inputs[0], operation.outputs
    total.moved += 2 * program.bytes(out)
    looked_up = {axis for axes in program.spec(table)[:1] for axis in axes}
    if not program.manual and looked_up - _axes(program, out):
        total.exchange(program, "all-reduce", tuple(looked_up - _axes(program, out)), program.bytes(out))


def _added(program: Program, operation: Operation, total: Costs, used: Used, scattered: set[int]) -> None:
    """Rows are added to a table, by each device those of its own tokens."""
    updates, (out,) = operation.inputs[2], operation.outputs
    total.moved += 2 * program.bytes(updates)
    if not program.manual:
        _summed(program, out, _axes(program, updates) - _axes(program, out), total, used, scattered)


def _reduced(program: Program, operation: Operation, total: Costs, used: Used, scattered: set[int]) -> None:
    source, (out,) = operation.inputs[0], operation.outputs
    total.moved += program.bytes(source)
    axes = {axis for dim in operation.params["axes"] for axis in program.spec(source)[dim]}
    if axes and not program.manual:
        _summed(program, out, axes, total, used, scattered)


def _collective(kind: str, of_result: bool) -> Callable[..., None]:
    def rule(program: Program, operation: Operation, total: Costs, used: Used, scattered: set[int]) -> None:
        names = operation.params.get("axes", operation.params.get("axis_name", ()))
        axes = (names,) if isinstance(names, str) else tuple(names)
        for variable in operation.outputs if of_result else operation.inputs:
            total.exchange(program, kind, axes, program.bytes(variable))

    return rule


def _ragged(program: Program, operation: Operation, total: Costs, used: Used, scattered: set[int]) -> None:
    """Rows of groups times a matrix of each: every row is in one group."""
    rows, matrices, (out,) = operation.inputs[0], operation.inputs[1], operation.outputs
    total.moved += sum(map(program.bytes, (rows, matrices, out)))
    grouped = len(rows.aval.shape) + len(matrices.aval.shape) - len(out.aval.shape) == 3
    depth = rows.aval.shape[-1] if grouped else rows.aval.shape[0] / out.aval.shape[0]
    total.flops += 2 * program.elements(out) * depth


def _grouped(program: Program, operation: Operation, total: Costs, used: Used, scattered: set[int]) -> None:
    """Rows of groups and a matrix of each, block by block: a share of the rows where groups are on other devices."""
    left, right, groups = operation.inputs[:3]
    arrays = (left, right, *operation.outputs)
    rows, (matrices,) = ([v for v in arrays if len(v.aval.shape) == n] for n in (2, 3))
    share = matrices.aval.shape[0] / groups.aval.shape[0]
    total.moved += share * sum(map(program.bytes, rows)) + program.bytes(matrices)
    total.flops += 2 * share * left.aval.shape[0] * prod(matrices.aval.shape[1:])


def _pallas(program: Program, operation: Operation, total: Costs, used: Used, scattered: set[int]) -> None:
    name = str(operation.params.get("name", ""))
    large = sorted((v for v in operation.inputs if len(v.aval.shape) == 4), key=program.elements)
    total.moved += sum(map(program.bytes, [*operation.inputs, *operation.outputs]))
    passes = [count for part, count in PRODUCTS.items() if f"_{part}_" in name]
    if large and passes:
        length = large[-1].aval.shape[-2]
        total.flops += passes[0] * 2 * SEEN * program.elements(large[-1]) * length


def _cudnn(program: Program, operation: Operation, total: Costs, used: Used, scattered: set[int]) -> None:
    queries, keys = operation.inputs[:2]
    total.moved += sum(map(program.bytes, [*operation.inputs, *operation.outputs]))
    total.flops += CUDNN_PRODUCTS[operation.name] * 2 * program.elements(queries) * keys.aval.shape[1]


RULES: dict[str, Callable[..., None]] = {
    "dot_general": _product,
    "ragged_dot_general": _ragged,
    "reshard": _resharded,
    "gather": _looked_up,
    "scatter-add": _added,
    "pallas_call": _pallas,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduced),
    **dict.fromkeys(CUDNN_PRODUCTS, _cudnn),
    **dict.fromkeys(COUNTED, _grouped),
    **dict.fromkeys(("psum", "psum_invariant", "pmax", "pmin"), _collective("all-reduce", False)),
    **dict.fromkeys(("all_gather", "all_gather_invariant", "all_gather_reduced"), _collective("all-gather", True)),
    "reduce_scatter": _collective("reduce-scatter", False),
    "all_to_all": _collective("all-to-all", False),
    "ppermute": _collective("collective-permute", False),
}
"""Primitive -> what it adds. All others are taken to be fused into these."""
