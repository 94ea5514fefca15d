"""Losses of a few kept scores: against their definitions, the whole vocabulary, and the mean over many draws."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy.special import log_softmax, logsumexp

from epigone.lessons.chunks import Mesh
from epigone.lessons.divergences import forward_kl, jsd, reverse_kl
from epigone.lessons.fused import fused_loss
from epigone.lessons.heads import Head, Hidden
from epigone.lessons.objective import Objective
from epigone.lessons.sparse import Rest, Sparse, sparse_divergence
from epigone.models.sharding import make_mesh

B, T, V, M = 2, 3, 16, 4
NONE = -1e9


def logits(seed):
    return np.random.default_rng(seed).normal(size=(B, T, V)).astype(np.float32) * 2


def kept(teacher, kind, temperature=1.0, M=M, fewer=0):
    """The M best of a teacher, in numpy, float64."""
    log_p = log_softmax(teacher.astype(np.float64) / temperature, axis=-1)
    ids = np.argsort(-log_p, axis=-1)[..., :M]
    chosen = np.take_along_axis(log_p, ids, -1)
    if fewer:
        chosen[..., M - fewer :] = NONE
        ids[..., M - fewer :] = 0
    gone = log_p.copy()
    np.put_along_axis(gone, ids[..., : M - fewer], -np.inf, -1)
    rest = logsumexp(gone, axis=-1)
    return Sparse(ids.astype(np.int32), chosen.astype(np.float32), rest.astype(np.float32), kind)


def truncated_kl(student, teacher, ids, temperature, kind):
    """KL over the kept ids, or with one more outcome for all others; in float64."""
    log_s, log_p = (log_softmax(x.astype(np.float64) / temperature, axis=-1) for x in (student, teacher))
    s, p = (np.take_along_axis(np.exp(x), ids, -1) for x in (log_s, log_p))
    if kind is Rest.BUCKET:
        s, p = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (s, p))
    p = p / p.sum(-1, keepdims=True)
    s = s if kind is Rest.ZERO else s / s.sum(-1, keepdims=True)
    return (p * np.log(p / s)).sum(-1)


@pytest.mark.parametrize("fewer", [0, 2])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", [Rest.LEFT_OUT, Rest.ZERO, Rest.BUCKET])
def test_what_was_kept_is_a_divergence_of_fewer_outcomes(kind, temperature, fewer):
    student, teacher = logits(0), logits(1)
    given = kept(teacher, kind, temperature, fewer=fewer)
    found = sparse_divergence(forward_kl, student, given, temperature=temperature)
    ids = given.ids_BTM[..., : M - fewer]
    wanted = temperature**2 * truncated_kl(student, teacher, ids, temperature, kind)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jsd])
def test_a_bucket_over_all_but_nothing_is_the_whole_divergence_and_fewer_ids_tell_less(divergence):
    student, teacher = logits(0), logits(1)
    whole = divergence(student, teacher)
    all_kept = sparse_divergence(divergence, student, kept(teacher, Rest.BUCKET, M=V - 1))
    np.testing.assert_allclose(all_kept, whole, rtol=1e-4, atol=1e-5)
    few = sparse_divergence(divergence, student, kept(teacher, Rest.BUCKET))
    assert (np.asarray(few) <= np.asarray(whole) + 1e-6).all()


@pytest.mark.parametrize("kind", [Rest.LEFT_OUT, Rest.BUCKET])
def test_a_student_that_knows_the_teacher_is_told_nothing(kind):
    teacher = logits(1)
    value, gradient = jax.value_and_grad(lambda x: sparse_divergence(forward_kl, x, kept(teacher, kind)).sum())(teacher)
    assert abs(value) < 1e-6
    assert np.abs(gradient).max() < 1e-6


def test_gradients_are_those_of_finite_differences():
    with jax.enable_x64(True):
        student = logits(0).astype(np.float64)
        for kind in Rest:
            given = kept(logits(1), kind, fewer=1)
            loss = jax.jit(lambda x, given=given: sparse_divergence(forward_kl, x, given, temperature=1.3).sum())
            gradient = jax.grad(loss)(student)
            step = np.random.default_rng(2).normal(size=student.shape)
            numeric = (loss(student + 1e-5 * step) - loss(student - 1e-5 * step)) / 2e-5
            assert float((gradient * step).sum()) == pytest.approx(float(numeric), rel=1e-6)


def sampled(teacher, draws, seed):
    """Counts of draws with replacement, as weights of all V tokens."""
    p = np.exp(log_softmax(teacher.astype(np.float64), axis=-1))
    counts = np.random.default_rng(seed).multinomial(draws, p)
    with np.errstate(divide="ignore"):
        log_weights = np.maximum(np.log(counts / draws), NONE)
    entropy = -(p * np.log(p)).sum(-1)
    ids = np.broadcast_to(np.arange(V), (B, T, V))
    return Sparse(ids.astype(np.int32), log_weights.astype(np.float32), entropy.astype(np.float32), Rest.SAMPLED)


def gradient_of(student, given):
    return np.asarray(jax.grad(lambda x: sparse_divergence(forward_kl, x, given).sum())(student))


def asked(student, given, log_weights):
    """The loss of every token, and the gradient of their sum, with other weights of the tokens that are given."""

    def loss(x):
        values = sparse_divergence(forward_kl, x, dataclasses.replace(given, log_probs_BTM=log_weights))
        return values.sum(), values

    (_, values), slopes = jax.value_and_grad(loss, has_aux=True)(student)
    return values, slopes


def test_draws_give_the_whole_loss_and_gradient_on_average_and_the_best_few_do_not():
    student, teacher = logits(0), logits(1)
    whole = np.asarray(jax.grad(lambda x: forward_kl(x, teacher).sum())(student))
    many = [sampled(teacher, 8, seed) for seed in range(1500)]
    weights = np.stack([given.log_probs_BTM for given in many])
    values, slopes = map(np.asarray, jax.jit(jax.vmap(partial(asked, student, many[0])))(weights))
    error = values.std(0) / np.sqrt(len(many))
    assert (np.abs(values.mean(0) - np.asarray(forward_kl(student, teacher))) < 4.5 * error + 1e-5).all()
    error = slopes.std(0) / np.sqrt(len(many)) + 1e-5
    assert (np.abs(slopes.mean(0) - whole) < 4.5 * error).all()
    # The negative control: the best few are off by far more than chance.
    assert (np.abs(gradient_of(student, kept(teacher, Rest.ZERO)) - whole) > 4.5 * error).any()


@pytest.mark.parametrize("kind", list(Rest))
def test_fused_on_a_mesh_with_a_cut_vocabulary_is_the_dense_form(kind):
    draw = np.random.default_rng(3)
    hidden, weight = draw.normal(size=(8, 6, 12)).astype(np.float32), draw.normal(size=(48, 12)).astype(np.float32)
    teacher = draw.normal(size=(8, 6, 41)).astype(np.float32)
    given, objective = kept(teacher, kind, 1.7, M=5, fewer=1), Objective(forward_kl, temperature=1.7, hard_weight=0.2)
    targets, weights = draw.integers(0, 41, (8, 6)).astype(np.int32), draw.uniform(size=(8, 6)).astype(np.float32)
    head = Head(vocab_size=41)

    def dense(hidden, weight):
        logits = jnp.where(jnp.arange(48) < 41, hidden @ weight.T, NONE)
        return jnp.sum(objective.loss(logits, given, targets) * weights)

    def fused(hidden, weight, given, mesh=Mesh(), chunk=5):
        states = Hidden(hidden, weight)
        return fused_loss(objective.loss, states, given, targets, weights, heads=(head, None), mesh=mesh, chunk=chunk)[
            0
        ]

    wanted = jax.value_and_grad(dense, argnums=(0, 1))(hidden, weight)
    found = jax.jit(jax.value_and_grad(fused, argnums=(0, 1)))(hidden, weight, given)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, wanted)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        cut = partial(fused, mesh=Mesh(("data", "fsdp"), "tensor"))
        placed = jax.device_put(weight, P("tensor"))
        found = jax.jit(jax.value_and_grad(cut, argnums=(0, 1)))(hidden, placed, given)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, wanted)
