"""What is inside a decoder: against numpy, the same with remat and on a mesh, and no more kept than was asked for."""

from dataclasses import replace

import decoder_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_variants import LLAMA, VARIANTS, rows, spread_params
from flax import nnx
from jax.sharding import PartitionSpec as P

from epigone.models.decoder import abstract, structure
from epigone.models.inside import Asked
from epigone.models.layers import save_nothing, save_products
from epigone.models.sharding import make_mesh, spread

CONFIGS = {
    "gemma3": (VARIANTS["gemma3"], Asked((1, 3), (2,))),
    "olmo2": (replace(VARIANTS["olmo2"], layers=3), Asked((2,), (1, 3))),
    "mixed": (replace(VARIANTS["mixed"], layers=3), Asked((), (2,))),
}
FOUR = replace(LLAMA, layers=4)
ASKED = Asked((2,), (1, 2))


def looked(config, params, batch, asked):
    model = nnx.merge(structure(config), params)
    return model.look_inside(*batch, asked)


look = jax.jit(looked, static_argnums=(0, 3))


@pytest.mark.parametrize(("config", "asked"), CONFIGS.values(), ids=CONFIGS)
def test_equals_the_numpy_reference(config, asked):
    params, batch = spread_params(config), rows(config)
    hidden, inside = look(config, params, batch, asked)
    np.testing.assert_array_equal(hidden, look(config, params, batch, Asked())[0])
    assert tuple(inside.states) == asked.states
    assert tuple(inside.heads) == asked.heads
    pure = nnx.to_pure_dict(params)
    outer, layers = ({n: np.asarray(x, np.float64) for n, x in pure[group].items()} for group in ("outer", "layers"))
    for b, row in enumerate(zip(*batch, strict=True)):
        wanted = []
        decoder_reference.logits(config, outer, layers, *row, wanted)
        for layer, states_BTD in inside.states.items():
            np.testing.assert_allclose(states_BTD[b], wanted[layer - 1][0], atol=2e-4)
        for layer, heads in inside.heads.items():
            for mine, theirs in zip(heads, wanted[layer - 1][1:], strict=True):
                np.testing.assert_allclose(mine[b], theirs, atol=2e-4)


def loss(config, params, batch):
    hidden, inside = looked(config, params, batch, ASKED)
    q, k, v = inside.heads[1]
    return sum(jnp.sum(x**2) for x in (inside.states[2], inside.heads[2][0], q, 2 * k, 3 * v)) + jnp.sum(hidden)


both = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)


@pytest.mark.parametrize("policy", [save_nothing, save_products], ids=lambda policy: policy.__name__)
def test_what_the_backward_pass_keeps_changes_nothing(policy):
    params, batch = spread_params(FOUR), rows(FOUR)
    whole, kept = (both(config, params, batch) for config in (FOUR, replace(FOUR, remat=policy)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-4), kept, whole)


def test_layers_behind_what_was_asked_for_have_no_gradient_of_it():
    def of_states(params):
        return jnp.sum(looked(FOUR, params, rows(FOUR), Asked((2,)))[1].states[2] ** 2)

    gradients = nnx.to_pure_dict(jax.jit(jax.grad(of_states))(spread_params(FOUR)))["layers"]
    for gradient_L in gradients.values():
        assert all(np.any(layer) for layer in gradient_L[:2])
        assert not np.any(gradient_L[2:])


def test_a_mesh_changes_nothing():
    params, batch = spread_params(FOUR), rows(FOUR, B=4)
    value, by = both(FOUR, params, batch)
    with jax.set_mesh(mesh := make_mesh(2, 2, 2)):
        cut = spread(params, jax.tree.map(lambda leaf: leaf.sharding, abstract(FOUR)))
        found = both(FOUR, cut, jax.device_put(batch, jax.NamedSharding(mesh, P(("data", "fsdp")))))
    assert float(found[0]) == pytest.approx(float(value), rel=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3), found[1], by)


@pytest.mark.parametrize("remat", [None, save_nothing], ids=["whole", "remat"])
def test_only_what_was_asked_for_is_kept(remat):
    """Of 32 layers one: the states of all would take as much again 16 times, in the forward and the backward pass."""
    config = replace(LLAMA, layers=32, remat=remat)
    batch = jax.tree.map(jnp.asarray, rows(config, B=64))
    states = 64 * 12 * config.model_size * 4

    def taken(asked):
        def loss(params):
            hidden, inside = looked(config, params, batch, asked)
            return jnp.sum(hidden) + sum(jnp.sum(x**2) for x in inside.states.values())

        compiled = jax.jit(jax.grad(loss)).lower(abstract(config)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert taken(Asked((16,))) - taken(Asked()) < 8 * states
