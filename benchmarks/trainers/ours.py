"""Epigone's training step, with the runtime settings that its command line makes."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from epigone.runtime import prepare
from trainers.work import HARD_WEIGHT, LEARNING_RATE, TEMPERATURE, WEIGHT_DECAY, Answers, Work, fastest_product

prepare()  # before JAX is imported, which reads some of these settings then

# ruff: noqa: E402
import jax
import jax.numpy as jnp
import numpy as np

from epigone.data.pipeline import Batch, Batches, as_batch, pack
from epigone.interchange.huggingface import read_config
from epigone.interchange.safetensors_files import SafetensorsFolder
from epigone.interchange.streaming import load_weights
from epigone.lessons.objective import Objective
from epigone.models.sharding import make_mesh
from epigone.teachers.in_memory import DecoderTeacher
from epigone.training.config import Training
from epigone.training.optimizer import Optimizer, constant
from epigone.training.sharding import to_mesh
from epigone.training.step import programs
from epigone.training.student import Student

OBJECTIVE = Objective(temperature=TEMPERATURE, hard_weight=HARD_WEIGHT)
OPTIMIZER = Optimizer(
    learning_rate=LEARNING_RATE,
    schedule=constant,
    warmup_steps=0,
    weight_decay=WEIGHT_DECAY,
    beta2=0.999,
    clip_norm=None,
)


def serve(work: Work, answers: Answers) -> None:
    """Steps on one constant batch, and `data`: steps on batches of the trainer's own pipeline."""
    files = {role: SafetensorsFolder(work.folder / role) for role in ("teacher", "student")}
    configs = {role: read_config(one.config_json) for role, one in files.items()}
    training = Training(steps=10**6, batch_size=work.batch_size, sequence_length=work.length, optimizer=OPTIMIZER)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        theirs, state = (load_weights(files[role], configs[role]) for role in ("teacher", "student"))
        teacher = DecoderTeacher(configs["teacher"], theirs, "same")
        program = programs(Student(configs["student"]), training, OBJECTIVE, teacher, mesh)
        state = program.begin(state, {})
        constant_batch = to_mesh(whole_rows(work, configs["student"].vocab_size or 0), 1, mesh)
        stream = packed_batches(work, configs["student"].vocab_size or 0)

        def step(batch: Any) -> float:
            nonlocal state
            state, metrics = jax.block_until_ready(program.step(state, {}, theirs, batch, {}))
            total, count = jax.device_get(metrics["loss"])
            return float(total / count)

        def forward_kl() -> float:
            found = program.compare(state["params"], {}, theirs, constant_batch, {})["forward_kl"]
            return float(found[0] / found[1])

        answers.serve(
            step=lambda: step(constant_batch),
            data=lambda: step(to_mesh(next(stream), 1, mesh)),
            forward_kl=forward_kl,
        )


def whole_rows(work: Work, vocab_size: int) -> Batch:
    """A batch of whole rows, without padding, each one segment."""
    rows = work.rows(vocab_size)
    return as_batch(np.stack([rows[:, :-1], rows[:, 1:], np.ones_like(rows[:, 1:])], axis=1))


def packed_batches(work: Work, vocab_size: int) -> Iterator[Batch]:
    """The pipeline of the trainer: documents of many lengths packed into rows on a disk, shuffled, made in threads."""
    draw = np.random.default_rng(1)
    documents = [draw.integers(4, vocab_size, 1 + int(draw.exponential(work.length))) for _ in range(20_000)]
    folder = Path(tempfile.mkdtemp(dir=work.folder)) / "rows"
    rows = pack([document.astype(np.int32) for document in documents], work.length)
    rows.save(folder)
    return Batches([type(rows).open(folder)], None, work.batch_size, seed=0).iterate()


def serve_products(work: Work, answers: Answers) -> None:
    """Matrix products through XLA."""

    def make(rows: int, depth: int, columns: int) -> Callable[[], Any]:
        a, b = jnp.ones((rows, depth)), jnp.ones((depth, columns))
        product = jax.jit(jnp.matmul)
        return lambda: jax.block_until_ready(product(a, b))

    answers.serve(step=fastest_product(make))
