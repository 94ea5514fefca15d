"""A traced program as a list of operations on one device: calls are inlined, and every array has its place on the mesh.

JAX's explicit shardings say where each array lies. Inside the optimizer, where the compiler places what lies between
(`jax.sharding.auto_axes`), an array lies as those do from which it is made, or as what it becomes is wanted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

Spec = tuple[tuple[str, ...], ...]
"""For each dimension of an array the mesh axes over which it is cut."""

CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint")
"""Primitives that only call what they hold."""

COUNTED = ("_rows_times_matrices", "_rows_times_rows")
"""Functions that stay calls: of a loop inside them nobody knows before how long it is (`models/experts.py`)."""

SAME = ("stop_gradient", "optimization_barrier", "pvary", "copy_p")
"""Primitives whose results are their operands."""


@dataclass
class Operation:
    """One primitive. Variables are those of the jaxpr, or what was put in their place when a call was inlined."""

    name: str
    inputs: list[Any]
    outputs: list[Any]
    params: dict[str, Any]
    result: Any = None

    @property
    def bodies(self) -> list[Any]:
        """The jaxprs that it holds."""
        held = [x for value in self.params.values() for x in (value if isinstance(value, list | tuple) else [value])]
        return [getattr(x, "jaxpr", x) for x in held if hasattr(getattr(x, "jaxpr", x), "eqns")]


@dataclass
class Program:
    """A jaxpr without calls, and where its arrays lie.

    Attributes:
        jaxpr: what was traced.
        sizes: devices along each axis of the mesh.
        manual: whether shapes are those of one device, as in a `shard_map`.
        operations: in order.
        outputs: what it gives.
    """

    jaxpr: Any
    sizes: Mapping[str, int]
    manual: bool = False
    operations: list[Operation] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    _places: dict[Any, Spec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named: dict[Any, Any] = {}
        self.operations = list(_flat(self.jaxpr, named))
        self.outputs = [_named(named, v) for v in self.jaxpr.outvars]
        if not self.manual:
            self._settle()

    def inside(self, body: Any, manual: bool | None = None) -> "Program":
        """The program of a body of one of its operations."""
        return Program(body, self.sizes, self.manual if manual is None else manual)

    def spec(self, variable: Any) -> Spec:
        """Where an array lies, by axes of more than one device; nothing is cut of what nobody placed."""
        if self.manual or not _hashable(variable):
            return ((),) * len(getattr(variable.aval, "shape", ()))
        spec = self._places.get(variable, _explicit(variable.aval))
        return tuple(tuple(axis for axis in axes if self.sizes.get(axis, 1) > 1) for axes in spec)

    def elements(self, variable: Any) -> float:
        """Numbers of an array on one device."""
        cut = prod(self.parts(axes) for axes in self.spec(variable))
        return prod(getattr(variable.aval, "shape", ())) / cut

    def bytes(self, variable: Any) -> float:
        """Bytes of an array on one device."""
        dtype = getattr(variable.aval, "dtype", None)
        return self.elements(variable) * getattr(dtype, "itemsize", 0)

    def parts(self, axes: tuple[str, ...]) -> int:
        """Devices along mesh axes together."""
        return prod(self.sizes.get(axis, 1) for axis in axes)

    def _settle(self) -> None:
        """Places inside `auto_axes`: from what comes in, to what goes out, and from operand to result of one shape."""
        for operation in self.operations:
            if operation.name == "reshard":
                (source,), (target,) = operation.inputs, operation.outputs
                if _auto(target.aval) and not _auto(source.aval):
                    self._places[target] = _explicit(source.aval)
                elif _auto(source.aval) and not _auto(target.aval) and _hashable(source):
                    self._places[source] = _explicit(target.aval)
        for operation in self.operations:
            known = [v for v in operation.inputs if _hashable(v) and v in self._places]
            for target in operation.outputs:
                if _auto(target.aval) and target not in self._places:
                    alike = [v for v in known if v.aval.shape == target.aval.shape]
                    if alike:
                        self._places[target] = self._places[alike[0]]


def _flat(jaxpr: Any, named: dict[Any, Any]) -> Iterator[Operation]:
    """The operations of a jaxpr, calls replaced by what they call."""
    for equation in jaxpr.eqns:
        inputs = [_named(named, v) for v in equation.invars]
        operation = Operation(equation.primitive.name, inputs, list(equation.outvars), equation.params)
        if operation.name in SAME:
            named |= dict(zip(equation.outvars, inputs, strict=True))
            continue
        if equation.params.get("name") in COUNTED and len(inputs) >= 3:  # a call of fewer makes a constant of it
            operation.name = equation.params["name"]
        bodies = operation.bodies[:1] if operation.name in CALLS else []
        if not bodies:
            # A body that is called twice has the same variables twice: each call gives new ones.
            yield _renamed(operation, named)
            continue
        inner = dict(zip(bodies[0].invars, inputs, strict=True))
        inner |= {v: v for v in bodies[0].constvars}
        yield from _flat(bodies[0], inner)
        named |= {outer: _named(inner, v) for outer, v in zip(equation.outvars, bodies[0].outvars, strict=True)}


@dataclass(eq=False)
class Variable:
    """An array of the flat program."""

    aval: Any


def _renamed(operation: Operation, named: dict[Any, Any]) -> Operation:
    fresh = [Variable(v.aval) for v in operation.outputs]
    named |= dict(zip(operation.outputs, fresh, strict=True))
    operation.outputs = list(fresh)
    return operation


def _named(named: dict[Any, Any], variable: Any) -> Any:
    return named.get(variable, variable) if _hashable(variable) else variable


def _hashable(variable: Any) -> bool:
    """Literals are no variables: they are not looked up."""
    return not hasattr(variable, "val")


def _auto(aval: Any) -> bool:
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    return mesh is not None and bool(mesh.axis_types) and all(kind.name == "Auto" for kind in mesh.axis_types)


def _explicit(aval: Any) -> Spec:
    shape = getattr(aval, "shape", ())
    spec = tuple(getattr(getattr(aval, "sharding", None), "spec", ()) or ())
    spec += (None,) * (len(shape) - len(spec))
    return tuple(() if axes is None else (axes,) if isinstance(axes, str) else tuple(axes) for axes in spec)
