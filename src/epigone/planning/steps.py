"""The step of one node, traced and compiled for devices that are not here."""

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import requires, version
from math import prod
from typing import Any
from unittest import mock

import jax

from epigone.errors import UserError
from epigone.lessons.objective import TEXT_ALONE
from epigone.lineage import Node
from epigone.materials import Materials
from epigone.models import decoder
from epigone.models.config import DecoderConfig
from epigone.models.sharding import AXES
from epigone.plan import sized
from epigone.planning.alive import Alive, peak
from epigone.planning.costs import Costs, costs
from epigone.planning.hlo import Exchanged, exchanges
from epigone.planning.program import Program
from epigone.planning.topologies import Topology, tpu_mesh
from epigone.teachers.ensemble import Ensemble, EnsembleTeacher
from epigone.teachers.in_memory import DecoderTeacher
from epigone.teachers.mean_teacher import MeanTeacher
from epigone.training.ahead import abstract_batch, traced_step
from epigone.training.config import Hardware
from epigone.training.student import Student

TOO_LARGE = (
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
    re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
)
"""What a TPU's compiler says of a program that does not fit: of how much it has how much is used."""


@dataclass(frozen=True)
class Step:
    """What is trained: a node and the models beside it.

    Attributes:
        node: of the lineage.
        student: with its vocabulary's size.
        teachers: configs of the decoders that score its text.
    """

    node: Node
    student: DecoderConfig
    teachers: tuple[DecoderConfig, ...]


@dataclass(frozen=True)
class Counted:
    """What the traced step takes on one device.

    Attributes:
        costs: operations, memory traffic, exchange.
        alive: the most that it holds beside its arguments.
        arguments: bytes of what is there before: weights, optimizer, average, teacher, frozen, batch.
        kept: bytes that its forward pass keeps for the backward one.
        offloaded: bytes of the optimizer's moments that are in the host's memory instead.
        without: costs of the same step with no teacher.
        teaching: costs of the teachers alone.
    """

    costs: Costs
    alive: Alive
    arguments: dict[str, float]
    kept: float
    offloaded: float
    without: Costs
    teaching: Costs


@dataclass(frozen=True)
class Compiled:
    """What the compiler of a TPU says of the step.

    Attributes:
        temporaries: bytes beside the arguments.
        arguments: bytes of these, padded as they lie.
        exchanged: what devices exchange.
        seconds: how long it took to compile.
        used: bytes in all, where it does not fit.
        limit: bytes that there are, where it does not fit.
    """

    temporaries: float = 0.0
    arguments: float = 0.0
    exchanged: Exchanged | None = None
    seconds: float = 0.0
    used: float | None = None
    limit: float | None = None


def step_of(node: Node, materials: Materials) -> Step:
    """What is to be planned of a node. Raises UserError for what has no step, or one that reads more than decoders."""
    lesson = node.lesson
    if not isinstance(node.model, DecoderConfig) or lesson.training is None:
        raise UserError(f"node '{node.key}' is not trained step by step: plan a decoder that learns")
    models = [materials.store.lineage[key] for key in lesson.teachers]
    other = [parent.key for parent in models if not isinstance(parent.model, DecoderConfig)]
    if other:
        raise UserError(
            f"node '{node.key}' learns from '{other[0]}', which counts words on the host: plan another node"
        )
    if any(parent.tokenizer != node.tokenizer for parent in models):
        raise UserError(
            f"node '{node.key}' learns from a teacher with another tokenizer: only its run knows the tokens"
        )
    return Step(node, sized(node, materials), tuple(sized(parent, materials) for parent in models))


def counted(step: Step, where: Topology, hardware: Hardware) -> Counted:
    """The step, traced for a mesh of devices that need not be here, and counted. Raises UserError: does not divide."""
    sizes = dict(zip(AXES, hardware.sizes, strict=True))
    with jax.sharding.use_abstract_mesh(where.mesh(tuple(sizes.values()))), _kernels_of(where):
        traced = trace(step, hardware)
        program = Program(traced.jaxpr.jaxpr, sizes)
        alone = Program(trace(step, hardware, taught=False).jaxpr.jaxpr, sizes)
        forward = _teaching(step, hardware, sizes)
    arguments = _arguments(traced, program, hardware.offload_optimizer)
    return Counted(
        costs=costs(program),
        alive=peak(program, in_place=True),
        offloaded=arguments.pop("offloaded"),
        arguments=arguments,
        kept=kept(program),
        without=costs(alone),
        teaching=costs(forward) if forward else Costs(),
    )


@contextlib.contextmanager
def _kernels_of(where: Topology) -> Iterator[None]:
    """JAX asks the cuDNN of this machine for its version before it traces a call of it: here there may be none."""
    if where.platform != "cuda":
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo

    with mock.patch.object(fused_attention_stablehlo, "check_cudnn_version", return_value=91000):
        yield


def teacher_of(step: Step, hardware: Hardware) -> Any:
    lesson = step.node.lesson
    if lesson.mean_teacher:
        return MeanTeacher(step.student, "planned")
    members: list[Any] = [DecoderTeacher(one, None, "planned", sharding=hardware.teacher) for one in step.teachers]
    if len(members) > 1 or lesson.ensemble:
        return EnsembleTeacher(members, lesson.ensemble or Ensemble())
    return members[0] if members else None


def trace(step: Step, hardware: Hardware, taught: bool = True) -> Any:
    lesson = step.node.lesson
    student = Student(step.student, lesson.adapters, hardware.student)
    teacher = teacher_of(step, hardware) if taught else None
    objective = lesson.objective if teacher else replace(TEXT_ALONE, inner=())
    return traced_step(student, lesson.training, objective, teacher, hardware)


def _teaching(step: Step, hardware: Hardware, sizes: dict[str, int]) -> Program | None:
    """The forward pass of the teachers over a batch, by itself."""
    if not step.teachers:
        return None
    teacher = teacher_of(step, hardware)
    members = getattr(teacher, "members", [teacher])
    batch = abstract_batch(step.node.lesson.training, hardware.microbatches)
    params = [decoder.abstract(one.scores.config, one.scores.sharding) for one in members]

    def forward(params: Any, batch: Any) -> Any:
        def one(part: Any) -> Any:
            return [member.scores(p, part) for member, p in zip(members, params, strict=True)]

        return jax.lax.map(one, batch)

    return Program(jax.jit(forward).trace(params, batch).jaxpr.jaxpr, sizes)


def _arguments(traced: Any, program: Program, offload: bool) -> dict[str, float]:
    """Bytes of each kind of argument on one device; those of moments that are on the host as `offloaded`."""
    (state, frozen, theirs, batch, _), _ = traced.in_tree.unflatten(program.jaxpr.invars)

    def held(tree: Any) -> float:
        return sum(program.bytes(v) for v in jax.tree.leaves(tree))

    kinds = {"weights": held(state["params"]) + held(state.get("projections", {}))}
    moments = held(state["optimizer"])
    kinds |= {"optimizer": 0.0 if offload else moments, "average": held(state.get("ema", {}))}
    kinds["offloaded"] = moments if offload else 0.0
    return kinds | {"frozen": held(frozen), "teacher": held(theirs), "batch": held(batch)}


def kept(program: Program) -> float:
    """Bytes that one loop over layers leaves for another: what a backward pass needs of the forward one."""
    scans = [operation for operation in program.operations if operation.name == "scan"]
    read = {id(v) for operation in scans for v in operation.inputs}
    own = sum(
        program.bytes(v)
        for operation in scans
        for v, one in zip(operation.outputs, operation.bodies[0].outvars, strict=True)
        if id(v) in read and v.aval.shape != one.aval.shape  # stacked, and no carry
    )
    inside = [
        kept(program.inside(body, True if operation.name == "shard_map" else None))
        for operation in program.operations
        if operation.name in ("scan", "shard_map")
        for body in operation.bodies
    ]
    return max([own, *inside])


def compiled(step: Step, where: Topology, hardware: Hardware) -> Compiled:
    """The step, compiled for a slice of TPUs that is not here, through libtpu.

    Raises: UserError where libtpu is not installed.
    """
    mesh = tpu_mesh(where, hardware.sizes)
    began = time.monotonic()
    with jax.set_mesh(mesh):
        lowered = trace(step, hardware).lower()
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            used = next(filter(None, (way.search(str(error)) for way in TOO_LARGE)), None)
            if used is None:
                raise
            wanted, limit = (float(used.group(n)) * 1024 ** " KMGT".index(used.group(n + 1) or " ") for n in (1, 3))
            return Compiled(seconds=time.monotonic() - began, used=wanted, limit=limit)
    said = program.memory_analysis()
    return Compiled(
        temporaries=float(said.temp_size_in_bytes),
        arguments=float(said.argument_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes),
        exchanged=exchanges(_text(program)),
        seconds=time.monotonic() - began,
    )


def _text(program: jax.stages.Compiled) -> str:
    """The compiled program. Raises: UserError where the compiler is newer than what reads it."""
    try:
        return program.as_text() or ""
    except jax.errors.JaxRuntimeError:
        wanted = next(
            (line.partition(";")[0] for line in requires("jax") or () if line.startswith("libtpu")), "libtpu"
        ).strip()
        raise UserError(
            f"libtpu {version('libtpu')} writes programs that JAX {jax.__version__} cannot read: "
            f"pip install '{wanted}', or plan by --no-compile"
        ) from None


def parameters(config: DecoderConfig) -> int:
    """Of a model, padded rows of the vocabulary included."""
    return decoder.parameter_count(config)


def model_flops(step: Step) -> int:
    """Operations of a step that the models ask for: no recomputation."""
    lesson = step.node.lesson
    length, batch = lesson.training.sequence_length, lesson.training.batch_size
    per_token = Student(step.student, lesson.adapters).flops_per_token(length)
    taught = [step.student] if lesson.mean_teacher else step.teachers
    per_token += sum(decoder.flops_per_token(one, length, training=False) for one in taught)
    return per_token * prod((length, batch))
