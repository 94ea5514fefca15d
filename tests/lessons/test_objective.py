"""The mix of teacher and text, and what must never change a loss: padding, packing, splitting in time or space."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from epigone.errors import UserError
from epigone.lessons.divergences import (
    adaptive_kl,
    alpha_beta,
    cross_entropy,
    forward_kl,
    jsd,
    logit_mse,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.models import decoder
from epigone.models.config import DecoderConfig
from epigone.models.sharding import make_mesh
from epigone.training.sharding import BATCH_AXES

OBJECTIVES = {
    "forward_kl": Objective(forward_kl, temperature=2.0),
    "reverse_kl": Objective(reverse_kl),
    "jsd_half": Objective(jsd),
    "jsd_0.2": Objective(partial(jsd, beta=0.2), temperature=0.5, temperature_squared=False),
    "text": TEXT_ALONE,
    "mixed": Objective(forward_kl, temperature=3.0, hard_weight=0.4),
    "symmetric_kl": Objective(symmetric_kl),
    "skew_forward_kl": Objective(skew_forward_kl, temperature=0.7),
    "skew_reverse_kl": Objective(skew_reverse_kl),
    "adaptive_kl": Objective(adaptive_kl, temperature=2.0),
    "total_variation": Objective(total_variation),
    "alpha_beta": Objective(alpha_beta),
    "logit_mse": Objective(logit_mse, hard_weight=0.1),
}
MODEL = DecoderConfig(vocab_size=32, layers=1, model_size=8, heads=2, max_length=16, vocab_multiple=32)
LENGTHS = (8, 3, 5, 8, 2, 6)
"""Targets of each document."""


class Batch(NamedTuple):
    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    weights_BT: np.ndarray
    positions_BT: np.ndarray
    segments_BT: np.ndarray


def layout(rows, length, batch_size):
    """Documents by number in rows, one after the other; what is left over is padding, filled with noise."""
    random = np.random.default_rng(0)
    documents = [random.integers(4, 32, n) for n in LENGTHS]
    noise = np.random.default_rng(1)
    batch = Batch(*(noise.integers(4, 32, (batch_size, length)).astype(np.int32) for _ in range(5)))
    batch = batch._replace(
        weights_BT=np.zeros((batch_size, length), np.float32),
        segments_BT=np.zeros((batch_size, length), np.int32),
        positions_BT=np.zeros((batch_size, length), np.int32),
    )
    for row, members in enumerate(rows):
        at = 0
        for segment, member in enumerate(members, 1):
            document, here = documents[member], slice(at, at + LENGTHS[member])
            batch.tokens_BT[row, here] = [1, *document[:-1]]
            batch.targets_BT[row, here] = document
            batch.weights_BT[row, here] = 1.0
            batch.positions_BT[row, here] = np.arange(LENGTHS[member])
            batch.segments_BT[row, here] = segment
            at += LENGTHS[member]
    return batch


@jax.jit
def sums(student, teacher, batch):
    """Sum of loss * weight for every objective, and its gradient by the student's parameters."""

    def total(params, objective):
        inputs = (batch.tokens_BT, batch.positions_BT, batch.segments_BT)
        student_BTV, teacher_BTV = (decoder.apply(MODEL, weights, *inputs) for weights in (params, teacher))
        loss_BT = objective.loss(student_BTV, teacher_BTV, batch.targets_BT)
        return jnp.sum(loss_BT * batch.weights_BT)

    return {name: jax.value_and_grad(total)(student, objective) for name, objective in OBJECTIVES.items()}


def sure(seed):
    """Parameters of a model that is sure of itself: fresh ones give nearly the same probability to all tokens."""
    return jax.tree.map(lambda p: p * (40.0 if p.shape == (32, 8) else 1.0), decoder.init(MODEL, seed))


def mean_over(*batches):
    """Sums over batches, divided by all their weights together."""
    count = sum(batch.weights_BT.sum() for batch in batches)
    models = sure(0), sure(1)
    parts = [jax.tree.map(np.asarray, sums(*models, batch)) for batch in batches]
    return jax.tree.map(lambda *leaves: sum(leaves) / count, *parts)


@pytest.fixture(scope="module")
def alone():
    """One document a row."""
    return mean_over(layout([[i] for i in range(6)], 8, 6))


def same(got, wanted):
    for name in got:
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(wanted[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=name)


def test_padding_changes_nothing(alone):
    same(mean_over(layout([[i] for i in range(6)], 13, 8)), alone)


def test_packing_changes_nothing(alone):
    same(mean_over(layout([[0], [1, 2], [3], [4, 5]], 8, 6)), alone)


def micro_batches():
    """Two documents each, and empty rows: of the shape of `alone`, since another would be compiled for as long."""
    return [layout([[i], [i + 1]], 8, 6) for i in (0, 2, 4)]


def test_splitting_into_micro_batches_changes_nothing(alone):
    same(mean_over(*micro_batches()), alone)


def test_an_average_of_averages_would_change_them(alone):
    parts = [mean_over(batch) for batch in micro_batches()]
    for name in OBJECTIVES:
        naive = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *(part[name] for part in parts))
        with pytest.raises(AssertionError):
            same({name: naive}, alone)


def test_splitting_over_devices_changes_nothing(alone):
    batch = layout([[i] for i in range(6)], 8, 8)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        models = sure(0), sure(1)
        cut = Batch(*(jax.device_put(array, P(BATCH_AXES, None)) for array in batch))
        totals = jax.tree.map(np.asarray, sums(*models, cut))
    same(jax.tree.map(lambda total: total / batch.weights_BT.sum(), totals), alone)


def logits():
    student, teacher = np.random.default_rng(2).normal(size=(2, 2, 3, 11)).astype(np.float32)
    return student, teacher, np.array([[1, 2, 3], [4, 5, 6]], np.int32)


def test_hard_weight_mixes():
    student, teacher, targets = logits()
    mixed = Objective(temperature=2.0, hard_weight=0.25).loss(student, teacher, targets)
    expected = 0.75 * forward_kl(student, teacher, temperature=2.0) + 0.25 * cross_entropy(student, targets)
    np.testing.assert_allclose(mixed, expected, rtol=1e-6)
    assert mixed.shape == targets.shape
    assert mixed.dtype == jnp.float32


def test_text_alone_needs_no_teacher_and_everything_else_does():
    student, _, targets = logits()
    assert not TEXT_ALONE.needs_teacher
    assert TEXT_ALONE.loss(student, None, targets).shape == targets.shape
    with pytest.raises(UserError, match="there is none: name a teacher, or set hard_weight=1"):
        Objective(hard_weight=0.5).loss(student, None, targets)


@pytest.mark.parametrize(("field", "value"), [("hard_weight", 1.2), ("hard_weight", -0.1), ("temperature", 0.0)])
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(UserError, match=f"{field}={value}"):
        Objective(**{field: value})
