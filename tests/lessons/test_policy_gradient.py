"""The policy gradient of the reverse KL, over every token of a small vocabulary and by draws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from epigone.errors import UserError
from epigone.lessons.divergences import reverse_kl
from epigone.lessons.fused import Hidden, Mesh, fused_loss
from epigone.lessons.objective import Objective
from epigone.lessons.policy_gradient import reads_targets, sampled_reverse_kl
from epigone.models.sharding import make_mesh

V = 7
STUDENT, TEACHER = (jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).normal(0, 1.5, (2, 1, 3, V)))


def gradient(token, temperature=1.0):
    """By the student's logits, [T, V], where every place drew this token."""
    targets = jnp.full((1, 3), token)

    def loss(logits):
        return jnp.sum(sampled_reverse_kl(logits, TEACHER, targets_BT=targets, temperature=temperature))

    return np.asarray(jax.grad(loss)(STUDENT))[0]


def exact(temperature=1.0):
    return np.asarray(jax.grad(lambda s: jnp.sum(reverse_kl(s, TEACHER, temperature=temperature)))(STUDENT))[0]


def expected(probabilities_TV, temperature=1.0):
    """Over y drawn with these probabilities."""
    return sum(np.asarray(probabilities_TV)[:, y, None] * gradient(y, temperature) for y in range(V))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_its_expectation_is_the_gradient_of_the_reverse_kl(temperature):
    drawn_from = jax.nn.softmax(STUDENT / temperature)[0]
    np.testing.assert_allclose(expected(drawn_from, temperature), exact(temperature), atol=1e-6)


def test_another_sign_or_another_sampler_is_another_gradient_and_weights_put_the_sampler_right():
    own, theirs = jax.nn.softmax(STUDENT)[0], jax.nn.softmax(TEACHER)[0]
    assert np.abs(exact()).max() > 0.1
    assert np.abs(expected(own) + exact()).max() > 0.1
    mixed = 0.4 * theirs + 0.6 * own
    assert np.abs(expected(mixed) - exact()).max() > 0.05
    np.testing.assert_allclose(expected(mixed * (own / mixed)), exact(), atol=1e-6)


def largest_z(tokens_N, weights_N):
    """The largest deviation of a mean gradient from the exact one, in its own standard errors; at the first place."""
    each_VV = np.stack([gradient(y)[0] for y in range(V)])
    draws_NV = each_VV[tokens_N] * weights_N[:, None]
    return np.max(np.abs(draws_NV.mean(0) - exact()[0]) / (draws_NV.std(0) / np.sqrt(len(draws_NV))))


def test_draws_agree_and_those_of_a_mixture_need_their_weights():
    random = np.random.default_rng(1)
    own, theirs = (np.asarray(jax.nn.softmax(x)[0, 0], np.float64) for x in (STUDENT, TEACHER))
    own, mixed = own / own.sum(), (0.5 * own + 0.5 * theirs) / (0.5 * own + 0.5 * theirs).sum()
    student, mixture = (random.choice(V, 40_000, p=p) for p in (own, mixed))
    assert largest_z(student, np.ones(len(student))) < 4
    assert largest_z(mixture, (own / mixed)[mixture]) < 4
    assert largest_z(mixture, np.ones(len(mixture))) > 10
    assert largest_z(student, -np.ones(len(student))) > 10


def test_its_value_is_the_estimate_of_the_kl_whose_mean_is_the_kl():
    own = jax.nn.softmax(STUDENT)
    values_V = [sampled_reverse_kl(STUDENT, TEACHER, targets_BT=jnp.full((1, 3), y)) for y in range(V)]
    mean = sum(own[..., y] * values_V[y] for y in range(V))
    np.testing.assert_allclose(mean, reverse_kl(STUDENT, TEACHER), atol=1e-6)
    wanted = jax.nn.log_softmax(STUDENT)[..., 2] - jax.nn.log_softmax(TEACHER)[..., 2]
    np.testing.assert_allclose(values_V[2], wanted, atol=1e-6)
    squared = sampled_reverse_kl(STUDENT, TEACHER, targets_BT=jnp.full((1, 3), 2), temperature=2.0)
    plain = sampled_reverse_kl(
        STUDENT, TEACHER, targets_BT=jnp.full((1, 3), 2), temperature=2.0, temperature_squared=False
    )
    np.testing.assert_allclose(squared, 4 * plain, rtol=1e-6)


def test_equal_models_have_no_gradient_whatever_is_drawn():
    def loss(logits):
        return jnp.sum(sampled_reverse_kl(logits, STUDENT, targets_BT=jnp.array([[1, 4, 6]])))

    np.testing.assert_array_equal(jax.grad(loss)(STUDENT), jnp.zeros_like(STUDENT))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 2), (1, 2, 4)], ids=str)
def test_as_an_objective_it_is_fused_and_cut_over_a_mesh(shape):
    random = np.random.default_rng(3)
    B, T, D, rows = 4, 6, 5, 16
    hidden, known = (jnp.asarray(random.normal(size=(B, T, D)), jnp.float32) for _ in range(2))
    weight, head = (jnp.asarray(random.normal(size=(rows, D)), jnp.float32) for _ in range(2))
    targets = jnp.asarray(random.integers(0, rows, (B, T)), jnp.int32)
    weights = jnp.asarray(random.random((B, T)), jnp.float32)
    objective = Objective(sampled_reverse_kl)

    def dense(student):
        logits = (jnp.einsum("btd,vd->btv", *pair) for pair in (student, (known, head)))
        return jnp.sum(objective.loss(*logits, targets) * weights)

    def fused(student):
        mesh = Mesh(("data", "fsdp"), "tensor" if shape[2] > 1 else None)
        args = (Hidden(*student), Hidden(known, head), targets, weights)
        return fused_loss(objective.loss, *args, mesh=mesh, chunk=5)[0]

    wanted = jax.value_and_grad(dense)((hidden, weight))
    with jax.set_mesh(make_mesh(*shape)):
        student = (jax.device_put(hidden, P()), jax.device_put(weight, P()))
        found = jax.jit(jax.value_and_grad(fused))(student)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-5), found, wanted)


def test_only_what_reads_targets_gets_them_and_a_bad_temperature_is_refused():
    assert reads_targets(sampled_reverse_kl)
    assert reads_targets(partial(sampled_reverse_kl, temperature_squared=False))
    assert not reads_targets(reverse_kl)
    with pytest.raises(UserError, match="temperature=0"):
        sampled_reverse_kl(STUDENT, TEACHER, targets_BT=jnp.zeros((1, 3), jnp.int32), temperature=0)
