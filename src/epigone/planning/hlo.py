"""What devices exchange in a program that the compiler has made, read from its text."""

import re
from collections import Counter
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\((.*)$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")


class Group(NamedTuple):
    """A kind of exchange, and how many devices take part together."""

    kind: str
    devices: int


class Exchanged(NamedTuple):
    """Bytes on one device (the result of an all-gather, the operand of the others), and how often."""

    size: Counter[Group]
    times: Counter[Group]


class _Line(NamedTuple):
    name: str
    type: str
    kind: str
    rest: str


def exchanges(text: str) -> Exchanged:
    """Those of one run of a compiled program, loops counted as often as they run.

    A TPU's compiler writes parts of one exchange into several fusions; what has one channel is one exchange.
    """
    computations = _computations(text)
    found: dict[tuple[str, Group], tuple[int, int]] = {}
    for name, times in _runs(computations).items():
        for line in computations[name]:
            kind = line.kind.removesuffix("-start")
            if kind not in KINDS:
                continue
            # A TPU's compiler fuses a sum with the cutting of its result.
            fused = kind == "all-reduce" and "all-reduce-scatter" in name
            group = Group("reduce-scatter" if fused else kind, _devices(line.rest))
            channel = re.search(r"channel_id=(\d+)", line.rest)
            # One channel may serve several exchanges of a manual region: these differ in their operation.
            operation = re.search(r'op_name="([^"]*)"', line.rest)
            key = (channel.group(1) if channel else "") + "|" + _once(operation, line)
            size = _size(line, 1 if fused or kind != "reduce-scatter" else group.devices)
            before = found.get((key, group), (0, 0))
            found[key, group] = max(before, (times * size, times))
    volume, often = Counter[Group](), Counter[Group]()
    for (_, group), (size, times) in found.items():
        if group.devices > 1:
            volume[group] += size
            often[group] += times
    return Exchanged(volume, often)


def _once(operation: re.Match[str] | None, line: _Line) -> str:
    """What tells two exchanges of one channel apart: the operation; copies within fusions have the same one."""
    return f"{operation.group(1) if operation else line.name}|{_plain(line.type)}"


def _plain(type_: str) -> str:
    return ",".join(f"{kind}[{shape}]" for kind, shape in ARRAY.findall(type_)[-1:])


def _computations(text: str) -> dict[str, list[_Line]]:
    computations: dict[str, list[_Line]] = {}
    lines: list[_Line] = []
    for row in text.splitlines():
        if header := HEADER.match(row):
            lines = computations.setdefault("ENTRY" if header.group(1) else header.group(2), [])
        elif found := INSTRUCTION.match(row):
            lines.append(_Line(*found.groups()))
    return computations


def _runs(computations: dict[str, list[_Line]]) -> Counter[str]:
    """How often each computation runs."""
    runs: Counter[str] = Counter()
    waiting = [("ENTRY", 1)]
    while waiting:
        name, times = waiting.pop()
        if name not in computations:
            continue
        runs[name] += times
        for line in computations[name]:
            waiting += [(called, times * often) for called, often in _calls(line, computations)]
    return runs


def _calls(line: _Line, computations: dict[str, list[_Line]]) -> Iterator[tuple[str, int]]:
    often = _trips(line, computations) if line.kind == "while" else 1
    for called in CALLED.findall(line.rest):
        yield called, often
    for branches in BRANCHES.findall(line.rest):
        yield from ((branch.strip().lstrip("%"), 1) for branch in branches.split(","))


def _trips(line: _Line, computations: dict[str, list[_Line]]) -> int:
    """How often a loop runs: the compiler says it, or its condition compares with a constant; 1 for unknown."""
    if known := TRIPS.search(line.rest):
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", line.rest)
    lines = computations.get(condition.group(1), []) if condition else []
    constants = [re.match(r"(\d+)\)", one.rest) for one in lines if one.kind == "constant"]
    return max((int(found.group(1)) for found in constants if found), default=1)


def _devices(rest: str) -> int:
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return listed.group(1).count(",") + 1
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(counted.group(2))
    if meshed := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\S*\))? \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", meshed.group(1)))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", meshed.group(2))
        return prod(int(part or sizes[name]) for name, part in parts)
    return 2 if "source_target_pairs" in rest else 1


def _size(line: _Line, parts: int) -> int:
    """Bytes on one device, of all arrays of a combined exchange; `parts` of which the result is one."""
    arrays = [_bytes(kind, shape) for kind, shape in ARRAY.findall(line.type)]
    if line.kind.endswith("-start") and line.kind != "all-reduce-start":
        # (operands, results, flags): the results alone.
        arrays = arrays[len(arrays) // 2 :] if line.type.startswith("((") else arrays[1:2]
    return sum(arrays) * parts


def _bytes(kind: str, shape: str) -> int:
    bits = 8 if kind == "pred" else int(re.search(r"\d+", kind).group(0))  # type: ignore[union-attr]
    return prod(int(n) for n in shape.split(",") if n) * bits // 8
