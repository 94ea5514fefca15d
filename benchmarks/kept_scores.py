"""What is kept of a teacher's scores: bytes a token, how fast it is read, and where its gradient points.

A teacher and a student are trained on the Bible in Basic English for a minute. Then one batch after the other: the
gradient of the student's weights from what was kept, beside that from all scores of the same batch. Printed are means
over the batches and their standard deviation: the angle between the two gradients, and the ratio of their lengths
(Anshumann et al. 2025, table 1: the best 12 58 degrees and 2.4, the best 300 30 degrees and 1.3, draws of 12 different
tokens 4 degrees and 1.0; a larger batch makes the angle of draws smaller, and not that of the best). Reading is timed
from the files to the arrays of a batch, beside a training step of the student on the same batch.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from epigone.runtime import prepare

prepare()  # before JAX is imported, which reads some of these settings then

# ruff: noqa: E402
import jax
import jax.numpy as jnp
import numpy as np

from epigone.data.corpora import Embedded
from epigone.data.pipeline import Batches, Rows, pack
from epigone.data.tokenizers import Words
from epigone.lessons.divergences import forward_kl
from epigone.lessons.fused import fused_loss
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.models.config import DecoderConfig
from epigone.models.sharding import make_mesh
from epigone.teachers.cached import CachedTeacher
from epigone.teachers.in_memory import DecoderStates, DecoderTeacher
from epigone.teachers.kept import RandomDraws, Scores, TopK, TopP
from epigone.training import loop
from epigone.training.config import Training
from epigone.training.labelling import label
from epigone.training.optimizer import Optimizer
from epigone.training.sharding import to_mesh
from epigone.training.step import programs
from epigone.training.student import Student

T = 128
TEACHER = DecoderConfig(layers=2, model_size=128, heads=4, max_length=T)
STUDENT = DecoderConfig(layers=2, model_size=96, heads=4, max_length=T)
KEPT: dict[str, Scores] = {
    "12 best alone": TopK(12, rest="zero"),
    "12 best, bucket": TopK(12),
    "50 best alone": TopK(50, rest="zero"),
    "128 best, bucket": TopK(128),
    "0.9 held, bucket": TopP(0.9),
    "16 draws": RandomDraws(16),
    "50 draws": RandomDraws(50),
    "50 draws of p^0.8": RandomDraws(50, power=0.8),
}


def trained(config: DecoderConfig, rows: Rows, steps: int, batch_size: int) -> Any:
    """Weights after some steps on the text."""
    optimizer = Optimizer(learning_rate=4e-3, warmup_steps=20)
    training = Training(steps, batch_size, sequence_length=T, optimizer=optimizer)
    with tempfile.TemporaryDirectory() as folder:
        batches = Batches([rows], None, batch_size, seed=0)
        how = {"seed": 0, "identity": "benchmark", "directory": Path(folder)}
        params = jax.device_get(loop.train(config, training, TEXT_ALONE, batches, **how).params)
    return jax.tree.map(jnp.asarray, params)  # on no mesh


def gradient(student: DecoderStates, head: Any, params: Any, batch: Any, given: Any) -> np.ndarray:
    """Of the mean forward KL by all weights, as one vector."""

    @jax.jit
    def by_weights(params: Any, batch: Any, given: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            heads, how = (student.head, head), Objective(forward_kl).loss
            states, weights = student(params, batch), batch.weights_BT / jnp.sum(batch.weights_BT)
            return fused_loss(how, states, given, batch.targets_BT, weights, heads=heads)[0]

        return jax.grad(loss)(params)

    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(by_weights(params, batch, given))])


def angle(one: np.ndarray, other: np.ndarray) -> float:
    """Between two vectors, in degrees."""
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def speed(work: Any, tokens: int, rounds: int) -> float:
    """Median tokens a second."""
    seconds = []
    for number in range(rounds):
        begun = time.perf_counter()
        work(number)
        seconds.append(time.perf_counter() - begun)
    return tokens / float(np.median(seconds[1:]))


def train_speed(config: DecoderConfig, cached: CachedTeacher, batches: Batches, rounds: int) -> float:
    """Tokens a second of a training step with what was kept, reading left out."""
    mesh = make_mesh(1, 1, tensor=1)
    with jax.set_mesh(mesh):
        training = Training(steps=100, batch_size=batches.batch_size, sequence_length=T)
        program = programs(Student(config), training, Objective(forward_kl), cached, mesh)
        from epigone.models import decoder

        state = program.begin(decoder.init(config, 0))
        batch = batches.batch(0)
        arrays = to_mesh((batch, cached.fetch(batch)), 1, mesh)

        def step(_: int) -> None:
            nonlocal state
            state, metrics = program.step(state, {}, {}, *arrays)
            jax.block_until_ready(metrics)

        return speed(step, int(batch.weights_BT.sum()), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"steps": 300, "rows": 32, "batches": 8, "labelled": 100_000}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Embedded("bbe", unit="verse").prepare(Path(folder))
        tokenizer = Words(lowercase=True).build(list(text["train"]))
        rows = pack(tokenizer.encode_batch(list(text["train"])), T, tokenizer.specials)
        sizes = {"vocab_size": tokenizer.size, "specials": tokenizer.specials}
        teacher_config, config = (type(c)(**{**vars(c), **sizes}) for c in (TEACHER, STUDENT))
        teacher = DecoderTeacher(teacher_config, trained(teacher_config, rows, given.steps, 8), "words")
        beside = jax.jit(teacher.scores)
        params, student = trained(config, rows, max(1, given.steps // 3), 4), DecoderStates(config)
        some = Rows(rows.planes_R3T[: given.labelled // T], 0)
        batches = Batches([some], None, given.rows, seed=1)
        print(f"{tokenizer.size:,} tokens, batches of {given.rows} x {T}, {given.batches} of them")
        print(f"{'kept':<20}{'entries':>8}{'bytes/token':>13}{'angle':>8}{'':>7}{'ratio':>7}{'':>7}"
              f"{'read, tokens/s':>16}{'trained, tokens/s':>19}")  # fmt: skip
        for name, kept in KEPT.items():
            cached = CachedTeacher(kept, Path(folder) / name, vocab_size=tokenizer.size)
            done = label(cached, lambda: teacher, [some], 16)
            angles, ratios, entries = [], [], []
            for step in range(given.batches):
                batch = batches.batch(step)
                fetched = cached.fetch(batch)
                whole = gradient(student, teacher.head, params, batch, beside(teacher.params, batch))
                mine = gradient(student, None, params, batch, cached.scores({}, batch, fetched))
                angles.append(angle(mine, whole))
                ratios.append(float(np.linalg.norm(mine) / np.linalg.norm(whole)))
                entries.append((fetched["log_probs_BTM"] > -1e8).sum() / batch.weights_BT.sum())
            tokens = int(batches.batch(0).weights_BT.sum())
            reading = speed(lambda n, c=cached: c.fetch(batches.batch(n)), tokens, 12)
            training = train_speed(config, cached, batches, 6)
            print(f"{name:<20}{np.mean(entries):>8.1f}{done.size / done.tokens:>13.1f}{np.mean(angles):>8.1f}"
                  f"{f'+-{np.std(angles):.1f}':>7}{np.mean(ratios):>7.2f}{f'+-{np.std(ratios):.2f}':>7}"
                  f"{reading:>16,.0f}{training:>19,.0f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
