"""Several teachers as one: means against numpy, weights by token, and the fused form on a mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from epigone.lessons.chunks import Mesh
from epigone.lessons.divergences import forward_kl, jsd
from epigone.lessons.ensemble import (
    Several,
    by_confidence,
    by_likelihood,
    combined,
    mean_of_logits,
    mean_of_probabilities,
)
from epigone.lessons.fused import fused_loss
from epigone.lessons.heads import Head, Hidden
from epigone.lessons.objective import Objective
from epigone.models.sharding import make_mesh

B, T, V = 8, 6, 48
NONE = -1e9


def draw(*shape, seed=0):
    return 2 * np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def teachers(combine, weigh=None, count=3):
    weights = np.random.default_rng(9).uniform(size=(B, T, count)).astype(np.float32)
    weights[0, 0] = [0, 1, 0]
    return Several(tuple(draw(B, T, V, seed=seed) for seed in range(count)), weights, combine, weigh)


def reference(several, targets, temperature):
    """The distribution of all together, in float64."""
    rows = [log_softmax(z.astype(np.float64) / temperature, axis=-1) for z in several.members]
    weights = several.weights_BTM.astype(np.float64)
    if several.weigh is by_confidence:
        weights = weights * np.exp(np.stack([(np.exp(x) * x).sum(-1) for x in rows], -1))
    if several.weigh is by_likelihood:
        weights = weights * np.stack([np.exp(np.take_along_axis(x, targets[..., None], -1)[..., 0]) for x in rows], -1)
    weights = weights / weights.sum(-1, keepdims=True)
    if several.combine is mean_of_probabilities:
        return sum(weights[..., i, None] * np.exp(x) for i, x in enumerate(rows))
    return softmax(sum(weights[..., i, None] * x for i, x in enumerate(rows)), axis=-1)


@pytest.mark.parametrize("weigh", [None, by_confidence, by_likelihood])
@pytest.mark.parametrize("combine", [mean_of_probabilities, mean_of_logits])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_mean_is_that_of_its_definition(combine, weigh, temperature):
    several, targets = teachers(combine, weigh), np.random.default_rng(1).integers(0, V, (B, T))
    found = softmax(np.asarray(combined(several, targets, temperature), np.float64) / temperature, axis=-1)
    np.testing.assert_allclose(found, reference(several, targets, temperature), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("combine", [mean_of_probabilities, mean_of_logits])
def test_equal_teachers_are_one_and_a_weight_of_0_is_none(combine):
    one, targets = draw(B, T, V), np.zeros((B, T), int)
    same = Several((one, one), np.full((B, T, 2), 0.5, np.float32), combine, by_confidence)
    assert np.asarray(forward_kl(one, combined(same, targets, 1.0))).max() < 1e-5
    first = Several((one, draw(B, T, V, seed=5)), np.tile(np.float32([2, 0]), (B, T, 1)), combine, None)
    assert np.asarray(forward_kl(one, combined(first, targets, 1.0))).max() < 1e-5


def test_what_one_teacher_rules_out_stays_in_one_mean_and_not_in_the_other():
    one, other = draw(B, T, V), draw(B, T, V, seed=1)
    one[..., 3] = NONE
    given = partial(Several, (one, other), np.full((B, T, 2), 0.5, np.float32), weigh=None)
    targets = np.zeros((B, T), int)
    kept = softmax(combined(given(combine=mean_of_probabilities), targets, 1.0), axis=-1)[..., 3]
    np.testing.assert_allclose(kept, softmax(other, axis=-1)[..., 3] / 2, rtol=1e-4)
    assert (softmax(combined(given(combine=mean_of_logits), targets, 1.0), axis=-1)[..., 3] == 0).all()


@pytest.mark.parametrize("weigh", [None, by_likelihood])
@pytest.mark.parametrize("combine", [mean_of_probabilities, mean_of_logits])
def test_fused_from_hidden_states_and_logits_is_the_dense_form_also_on_a_mesh(combine, weigh):
    hidden, weight = draw(B, T, 12), draw(V, 12, seed=1)
    first, second = Hidden(draw(B, T, 10, seed=2), draw(V, 10, seed=3)), draw(B, T, 41, seed=4)
    heads = (Head(41), Head(41, soft_cap=3.0), Head(41))
    weights = np.random.default_rng(9).uniform(size=(B, T, 2)).astype(np.float32)
    targets, counts = np.random.default_rng(1).integers(0, 41, (B, T)), draw(B, T, seed=6) ** 2
    objective = Objective(partial(jsd, beta=0.4), temperature=1.5, hard_weight=0.1)

    def dense(hidden, weight):
        mask = jnp.arange(V) < 41
        known = (3.0 * jnp.tanh(first.hidden_BTD @ first.weight_VD.T / 3.0), np.pad(second, ((0, 0), (0, 0), (0, 7))))
        several = Several(tuple(jnp.where(mask, x, NONE) for x in known), weights, combine, weigh)
        return jnp.sum(objective.loss(jnp.where(mask, hidden @ weight.T, NONE), several, targets) * counts)

    def fused(hidden, weight, several, mesh=Mesh()):
        how = {"heads": heads, "mesh": mesh, "chunk": 5}
        return fused_loss(objective.loss, Hidden(hidden, weight), several, targets, counts, **how)[0]

    wanted = jax.value_and_grad(dense, argnums=(0, 1))(hidden, weight)
    several = Several((first, second), weights, combine, weigh)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
    jax.tree.map(close, jax.jit(jax.value_and_grad(fused, argnums=(0, 1)))(hidden, weight, several), wanted)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        cut = jax.jit(jax.value_and_grad(partial(fused, mesh=Mesh(("data", "fsdp"), "tensor")), argnums=(0, 1)))
        jax.tree.map(close, cut(hidden, weight, several), wanted)
