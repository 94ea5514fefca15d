"""A plan: memory by kind, the roofline of a step, and what the whole run takes."""

from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from epigone.models.attention import Attention
from epigone.models.decoder import attention_of
from epigone.models.sharding import AXES
from epigone.planning.costs import Costs, Exchange
from epigone.planning.hlo import Group
from epigone.planning.steps import Compiled, Counted, Step, model_flops, parameters
from epigone.planning.topologies import Topology
from epigone.training.config import Hardware

ROOM = 0.9
"""Share of a device's memory that a plan by formula may fill: runtime and fragments need some, and formulas err."""

PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1, "collective-permute": 1}
"""How often the bytes of an exchange travel, in a ring."""

HOST = 25e9
"""Bytes/s between a device and the memory of its host: PCIe 4.0 x16, as far as programs reach it."""

LARGEST = 12
"""Arrays at the peak, of the traced program, that a plan names."""

REACHED = {"cuda": 0.42, "tpu": 0.6}
"""Share of the peak that products and attention are expected to reach together, for the step that is expected.

GPUs: measured, three steps on one H100 (`benchmarks/planned_step.py`: 0.38, 0.47, 0.40). TPUs: assumed, not measured.
"""


@dataclass(frozen=True)
class Seconds:
    """Of one step, on every device: what each takes alone, at its peak. Of them the longest bounds the step.

    Attributes:
        compute: operations of products and attention, recomputed ones too.
        memory: bytes that they move, at the memory's bandwidth.
        interconnect: bytes that are exchanged, at the links' bandwidth.
        reached: share of the peak that products are expected to reach.
    """

    compute: float
    memory: float
    interconnect: float
    reached: float

    @property
    def shortest(self) -> float:
        """All three at once: the roofline."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def longest(self) -> float:
        """Products as fast as is expected, and exchange that overlaps with nothing."""
        return self._busy + self.interconnect

    @property
    def expected(self) -> float:
        """Products as fast as is expected, and half of the exchange hidden behind them."""
        return max(self.interconnect, self._busy + self.interconnect / 2)

    @property
    def _busy(self) -> float:
        return max(self.compute / self.reached, self.memory)

    @property
    def bound(self) -> str:
        """What the step waits for."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Plan:
    """A step on a topology. Bytes are of one device.

    Attributes:
        step: what is trained.
        where: the devices.
        hardware: mesh, rules, micro-batches.
        counted: from the traced program.
        compiled: what the compiler says; None by formula.
        price: of one chip for one hour; None where none was given.
    """

    step: Step
    where: Topology
    hardware: Hardware
    counted: Counted
    compiled: Compiled | None = None
    price: float | None = None

    @property
    def sizes(self) -> list[int]:
        """Of the mesh."""
        return list(self.hardware.sizes)

    @property
    def memory(self) -> dict[str, float]:
        """Bytes by kind. Temporaries are what is left of the compiler's, or of the peak, beside the two before them."""
        counted, compiled = self.counted, self.compiled
        kinds = dict(counted.arguments)
        kinds["gradients"] = kinds["weights"]
        kinds["activations"] = counted.kept
        beside = compiled.temporaries if compiled and compiled.used is None else counted.alive.size
        if compiled and compiled.used is not None:
            beside = compiled.used - sum(counted.arguments.values())
        kinds["temporaries"] = max(0.0, beside - kinds["gradients"] - kinds["activations"])
        if compiled and compiled.used is None:
            kinds["padding"] = max(0.0, compiled.arguments - sum(counted.arguments.values()))
        return kinds

    @property
    def used(self) -> float:
        """Bytes of a device that are used at most."""
        return sum(self.memory.values())

    @property
    def limit(self) -> float:
        """Bytes that may be used."""
        if self.compiled:
            return self.compiled.limit or self.where.chip.memory
        return ROOM * self.where.chip.memory

    @property
    def fits(self) -> bool:
        """Whether the memory is enough."""
        return self.used <= self.limit and not (self.compiled and self.compiled.used is not None)

    @property
    def seconds(self) -> Seconds:
        """Of one step; exchange as the compiler makes it, where it says."""
        counted = seconds(self.counted.costs, self.where, self.sizes)
        counted = replace(counted, memory=counted.memory + 2 * self.counted.offloaded / HOST)
        if not self.compiled or self.compiled.exchanged is None:
            return counted
        between = sum(
            taken(group.kind, size, group.devices, self.where.among(group.devices))
            for group, size in self.compiled.exchanged.size.items()
        )
        return replace(counted, interconnect=between)

    @property
    def mfu(self) -> dict[str, float]:
        """Model FLOPs utilisation: operations that the models ask for, over the peak of all devices."""
        peak = self.where.chip.flops * self.where.devices
        times = {"expected": self.seconds.expected, "highest": self.seconds.shortest, "lowest": self.seconds.longest}
        return {name: model_flops(self.step) / (peak * time) for name, time in times.items()}

    @property
    def tokens(self) -> int:
        """Of one step."""
        training = self.step.node.lesson.training
        return training.batch_size * training.sequence_length

    def hours(self, seconds: float) -> float:
        """Chip-hours of so many seconds on all devices."""
        return seconds * self.where.devices / 3600

    @property
    def scores(self) -> dict[str, Any] | None:
        """Whether the teacher's scores are cheaper beside the student (streamed), or asked once and kept (cached).

        Streamed, the teacher reads every batch of every pass; cached, it reads each text once, and the student learns
        alone. None without a teacher.
        """
        if not self.step.teachers:
            return None
        alone = seconds(self.counted.without, self.where, self.sizes).expected
        teaching = seconds(self.counted.teaching, self.where, self.sizes).expected
        steps, sources = self.step.node.lesson.training.steps, self.step.node.lesson.text
        known = [source.size for source in sources if source.size is not None]
        whole = bool(known) and len(known) == len(sources)
        passes = max(1.0, steps * self.tokens / sum(known)) if whole else None
        streamed = steps * self.seconds.expected
        told: dict[str, Any] = {
            "streamed_chip_hours": self.hours(streamed),
            "teacher_share_of_step": min(1.0, teaching / self.seconds.expected),
            "passes_over_the_text": passes,
        }
        cached = steps * (alone + teaching / (passes or 1.0))
        told["cached_chip_hours"] = self.hours(cached)
        told["cheaper"] = "cached" if cached < 0.98 * streamed else "streamed"
        return told

    def as_json(self) -> dict[str, Any]:
        """All of it. Bytes, seconds, operations a step of one device, unless a name says other."""
        time, training = self.seconds, self.step.node.lesson.training
        run = self.hours(training.steps * time.expected)
        exchanged = self._exchanged()
        return {
            "node": self.step.node.key,
            "topology": {"name": self.where.name, "chip": asdict(self.where.chip), "devices": self.where.devices},
            "mesh": dict(zip(AXES, self.sizes, strict=True)) | {"microbatches": self.hardware.microbatches},
            "rules": {"student": asdict(self.hardware.student), "teacher": asdict(self.hardware.teacher)},
            "attention": {role: str(self._attention(one)) for role, one in self._models},
            "parameters": {
                "student": parameters(self.step.student),
                "teachers": [parameters(one) for one in self.step.teachers],
            },
            "memory": {
                "by": "compiler" if self.compiled else "formula",
                "kinds": self.memory,
                "used": self.used,
                "limit": self.limit,
                "on_host": self.counted.offloaded,
                "fits": self.fits,
                "largest": self.counted.alive.arrays[:LARGEST],
            },
            "flops": {"model": model_flops(self.step) / self.where.devices, "done": self.counted.costs.flops},
            "exchanged": exchanged,
            "seconds": asdict(time)
            | {"shortest": time.shortest, "expected": time.expected, "longest": time.longest, "bound": time.bound},
            "mfu": self.mfu,
            "tokens_per_step": self.tokens,
            "tokens_per_second": self.tokens / time.expected,
            "run": {
                "steps": training.steps,
                "tokens": training.steps * self.tokens,
                "hours": training.steps * time.expected / 3600,
                "chip_hours": run,
                "cost": None if self.price is None else run * self.price,
            },
            "scores": self.scores,
            "compile_seconds": self.compiled.seconds if self.compiled else None,
        }

    @property
    def _models(self) -> list[tuple[str, Any]]:
        return [("student", self.step.student), *(("teacher", one) for one in self.step.teachers)]

    def _attention(self, config: Any) -> Attention:
        return attention_of(config, self.step.node.lesson.training.sequence_length, self.where.platform)

    def _exchanged(self) -> list[dict[str, Any]]:
        """Each kind of exchange, along which axes, or of how many devices where the compiler says it."""
        rows: list[tuple[Exchange | Group, float, float]]
        if self.compiled and self.compiled.exchanged:
            found = self.compiled.exchanged
            rows = [(group, size, found.times[group]) for group, size in found.size.most_common()]
        else:
            costs = self.counted.costs
            rows = [(key, size, costs.times[key]) for key, size in costs.exchanged.most_common()]
        return [{**key._asdict(), "bytes": size, "times": times} for key, size, times in rows]


def seconds(costs: Costs, where: Topology, sizes: list[int]) -> Seconds:
    """What operations, memory and exchange take, each by itself and at its peak."""
    between = 0.0
    for (kind, axes), size in costs.exchanged.items():
        group = prod(count for axis, count in zip(AXES, sizes, strict=True) if axis in axes)
        between += taken(kind, size, group, where.bandwidth(sizes, axes))
    chip = where.chip
    return Seconds(costs.flops / chip.flops, costs.moved / chip.bandwidth, between, REACHED[where.platform])


def taken(kind: str, size: float, devices: int, bandwidth: float) -> float:
    """Seconds of an exchange in rings: passes x bytes x (n - 1) / n / bandwidth."""
    return PASSES.get(kind, 1) * size * (devices - 1) / devices / bandwidth
