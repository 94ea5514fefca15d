"""A model, a text and a training that take a second."""

from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from epigone.lessons.divergences import reverse_kl
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.models import decoder
from epigone.models.config import DecoderConfig
from epigone.teachers.in_memory import DecoderTeacher
from epigone.training.config import Training
from epigone.training.loop import train
from epigone.training.on_policy import OnPolicy
from epigone.training.optimizer import Optimizer

MODEL = DecoderConfig(vocab_size=64, layers=2, model_size=16, heads=2, kv_heads=2, max_length=16)
# With Adam's usual epsilon, a gradient that is nearly 0 turns rounding into a step of full size.
OPTIMIZER = Optimizer(learning_rate=0.01, warmup_steps=3, epsilon=1e-4)
TRAINING = Training(steps=12, batch_size=8, sequence_length=16, optimizer=OPTIMIZER, log_every=2)


class Batch(NamedTuple):
    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    weights_BT: np.ndarray
    positions_BT: np.ndarray
    segments_BT: np.ndarray


class Counting:
    """Texts that count upwards from anywhere: learnable. Rows end in padding of different lengths."""

    def __init__(self, batch_size=8, length=16, process_index=0, process_count=1):
        self.batch_size, self.length = batch_size, length
        share = batch_size // process_count
        self.part = slice(process_index * share, (process_index + 1) * share)

    def batch(self, step):
        random = np.random.default_rng([7, step])
        first = random.integers(0, 60, (self.batch_size, 1))
        tokens = ((first + np.arange(self.length + 1)) % 60 + 4).astype(np.int32)
        real = np.arange(self.length) < random.integers(self.length // 4, self.length + 1, (self.batch_size, 1))
        positions = np.where(real, np.arange(self.length), 0).astype(np.int32)
        whole = Batch(
            np.where(real, tokens[:, :-1], 0),
            np.where(real, tokens[:, 1:], 0),
            real.astype(np.float32),
            positions,
            real.astype(np.int32),
        )
        return Batch(*(array[self.part] for array in whole))

    def iterate(self, start_step):
        while True:
            yield self.batch(start_step)
            start_step += 1


def run(directory, *, model=MODEL, training=TRAINING, objective=TEXT_ALONE, batches=None, **given):
    batches = batches or Counting(training.batch_size, training.sequence_length)
    given = {"seed": 0, "identity": "0123456789abcdef", "key": "toy@0"} | given
    return train(model, training, objective, batches, directory=directory, **given)


def own_texts(**changes):
    """What makes a run one on its own texts, with a replay and a teacher that takes a hand in writing."""
    big = replace(MODEL, model_size=24)
    how = {"share": 0.7, "prompt_tokens": 2, "max_new": 6, "teacher_share": 0.3, "importance": True}
    how |= {"replay": 2, "reuse": 2} | changes
    # Seeds of no meaning: a teacher that is sure of something, so that there is much to learn.
    params = jax.tree.map(lambda w: 3 * w, decoder.init(big, 5))
    return {
        "objective": Objective(reverse_kl),
        "teacher": DecoderTeacher(big, params, "id"),
        "on_policy": OnPolicy(**how),
    }


def losses(trained):
    return [point["loss"] for point in trained.curve]


TIMES = {"seconds", "tokens_per_second", "flops_per_second", "mfu"}


def measures(trained):
    """The curve without what a clock says."""
    return [{name: value for name, value in point.items() if name not in TIMES} for point in trained.curve]


def weights(trained):
    """Parameters by path, as NumPy arrays."""
    leaves = jax.tree_util.tree_flatten_with_path(trained.params)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
