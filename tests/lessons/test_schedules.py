"""Schedules of temperature and hard weight: their values, and a trained student that is held to them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epigone.errors import UserError
from epigone.lessons.divergences import forward_kl, jsd
from epigone.lessons.fused import fused_loss
from epigone.lessons.heads import Hidden
from epigone.lessons.objective import Objective
from epigone.lessons.schedules import Cosine, Linear


def test_values_lie_on_a_line_or_half_a_cosine_and_stay_at_the_ends():
    line, curve = Linear(4.0, 1.0, steps=30, after=10), Cosine(4.0, 1.0, steps=30, after=10)
    assert [float(line(jnp.int32(s))) for s in (0, 10, 20, 25, 40, 99)] == [4.0, 4.0, 3.0, 2.5, 1.0, 1.0]
    found = [float(curve(jnp.int32(s))) for s in (0, 10, 20, 25, 30, 40, 99)]
    np.testing.assert_allclose(found, [4.0, 4.0, 3.25, 2.5, 1.75, 1.0, 1.0], atol=1e-6)


@pytest.mark.parametrize("divergence", [forward_kl, partial(jsd, beta=0.3)])
def test_a_step_of_a_schedule_is_the_constant_objective_of_that_step(divergence):
    draw = np.random.default_rng(0)
    states, head, known = (draw.normal(size=shape).astype(np.float32) for shape in ((4, 6, 8), (20, 8), (4, 6, 20)))
    targets, weights = draw.integers(0, 20, (4, 6)), draw.uniform(size=(4, 6)).astype(np.float32)
    moving = Objective(divergence, temperature=Linear(3.0, 1.0, 4), hard_weight=Cosine(0.0, 1.0, 4))

    @jax.jit
    def scheduled(states, step):
        def loss(x):
            given = (Hidden(x, head), known, targets, weights)
            return fused_loss(moving.loss, *given, knobs=moving.knobs(step), chunk=5)[0]

        return jax.value_and_grad(loss)(states)

    for step in range(6):
        share = min(1.0, step / 4)
        still = Objective(divergence, 3.0 - 2.0 * share, hard_weight=0.5 - 0.5 * float(np.cos(np.pi * share)))
        if step < 4:
            wanted = jax.value_and_grad(
                lambda x, still=still: fused_loss(still.loss, Hidden(x, head), known, targets, weights)[0]
            )(states)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), scheduled(states, step), wanted)
    text = fused_loss(Objective(hard_weight=1.0).loss, Hidden(states, head), None, targets, weights)[0]
    np.testing.assert_allclose(scheduled(states, 5)[0], text, rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(1.0, 2.0, 0),
        lambda: Cosine(1.0, 2.0, 5, after=-1),
        lambda: Objective(temperature=Linear(1.0, 0.0, 5)),
        lambda: Objective(hard_weight=Linear(0.5, 1.2, 5)),
        lambda: Objective(temperature=Linear(2.0, 1.0, 5)).loss(jnp.zeros((1, 1, 3)), jnp.zeros((1, 1, 3)), None),
    ],
)
def test_what_cannot_be_is_refused(make):
    with pytest.raises(UserError):
        make()
