"""A plan beside the truth: the step of a config's node, planned for the devices that are here, and then run on them.

    python benchmarks/planned_step.py configs/planned/smollm2_1_7b_to_135m.py --batch 16

Weights are random and tokens too: a step takes the same time whatever they say. Prints bytes, operations and seconds
as planned and as measured (medians of steps, each waited for), with the attention and the share of the peak.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from epigone import runtime

runtime.prepare()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from epigone.devices import CHIPS  # noqa: E402
from epigone.materials import Materials  # noqa: E402
from epigone.models import decoder  # noqa: E402
from epigone.models.sharding import make_mesh  # noqa: E402
from epigone.planning.estimate import Plan  # noqa: E402
from epigone.planning.steps import Step, counted, model_flops, step_of, teacher_of  # noqa: E402
from epigone.planning.topologies import topology  # noqa: E402
from epigone.store import Store  # noqa: E402
from epigone.teachers import Batch  # noqa: E402
from epigone.training.config import Hardware  # noqa: E402
from epigone.training.sharding import to_mesh  # noqa: E402
from epigone.training.step import programs  # noqa: E402
from epigone.training.student import Student  # noqa: E402
from epigone.verbs.run import load_config  # noqa: E402


def main() -> None:
    """Plan, run, compare."""
    given = _arguments()
    lineage = load_config(Path(given.config))()
    with tempfile.TemporaryDirectory() as folder:
        step = step_of(lineage[given.node], Materials(Store(Path(folder) / "run", lineage)))
    step = _resized(step, given)
    devices = jax.devices()
    hardware = Hardware(fsdp=len(devices), microbatches=given.microbatches)
    chip = CHIPS.get(devices[0].device_kind)
    told = {"device": f"{len(devices)} x {devices[0].device_kind}", "jax": jax.__version__, "node": given.node}
    if chip is not None:
        where = topology(f"{chip.name}:{len(devices)}")
        plan = Plan(step, where, hardware, counted(step, where, hardware))
        told["planned"] = {"bytes": plan.used, **plan.as_json()["seconds"], "mfu": plan.mfu}
    seconds, compiling, used = measured(step, hardware, given.steps)
    told["measured"] = {"seconds": statistics.median(seconds), "all": seconds, "compiling": compiling, "bytes": used}
    if chip is not None:
        told["measured"]["mfu"] = model_flops(step) / (told["measured"]["seconds"] * chip.flops * len(devices))
    print(json.dumps(told, indent=1))


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config")
    parser.add_argument("--node", default="student@1")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--teacher-layers", type=int, default=0, help="of the teacher that are kept; 0 for all")
    parser.add_argument("--steps", type=int, default=10)
    return parser.parse_args()


def _resized(step: Step, given: Any) -> Step:
    training = replace(step.node.lesson.training, batch_size=given.batch, sequence_length=given.length)
    lesson = replace(step.node.lesson, training=training)
    teachers = tuple(replace(one, layers=given.teacher_layers or one.layers) for one in step.teachers)
    return replace(step, node=replace(step.node, lesson=lesson), teachers=teachers)


def measured(step: Step, hardware: Hardware, steps: int) -> tuple[list[float], float, int]:
    """Seconds of each step, seconds until the first one was done, and the most bytes in use on a device."""
    training, objective = step.node.lesson.training, step.node.lesson.objective
    mesh = make_mesh(*hardware.sizes)
    student = Student(step.student, step.node.lesson.adapters, hardware.student)
    with jax.set_mesh(mesh):
        teacher = teacher_of(step, hardware)
        program = programs(student, training, objective, teacher, mesh)
        theirs = decoder.init(step.teachers[0], 1, hardware.teacher) if step.teachers else {}
        state = program.begin(decoder.init(step.student, 0, hardware.student), {})
        batch = to_mesh(_tokens(step), hardware.microbatches, mesh)
        times = []
        for _ in range(steps + 1):
            began = time.perf_counter()
            state, metrics = program.step(state, {}, theirs, batch, {})
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - began)
    stats = jax.devices()[0].memory_stats() or {}
    return times[1:], times[0], stats.get("peak_bytes_in_use", 0)


def _tokens(step: Step) -> Batch:
    """One full batch of random tokens, a document a row."""
    training = step.node.lesson.training
    shape = (training.batch_size, training.sequence_length)
    tokens = np.random.default_rng(0).integers(10, step.student.vocab_size, shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return Batch(tokens, np.roll(tokens, -1, 1), np.ones(shape, np.float32), positions, np.ones(shape, np.int32))


if __name__ == "__main__":
    sys.exit(main())
