"""Mixtures of experts: the sorted, blocked products against a loop over tokens, and their gradients."""

import dataclasses

import decoder_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_variants import LLAMA, rows

from epigone.models.decoder import apply, init, structure
from epigone.models.experts import block_rows, blocked_product, mixture, permuted, route
from epigone.models.sharding import Sharding, make_mesh

RNG = np.random.default_rng(0)
CONFIG = dataclasses.replace(LLAMA, experts=6, experts_per_token=3)


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def mixture_weights(config):
    s = config.sizes
    return {
        "router_LDE": floats(s.D, s.E),
        "up_LEDF": floats(s.E, s.D, s.F),
        "gate_LEDF": floats(s.E, s.D, s.F),
        "down_LEFD": floats(s.E, s.F, s.D),
    }


@pytest.mark.parametrize(
    "sizes", [[40], [0, 17, 23, 0], [7, 0, 0], [1, 299], [8, 8, 8], [0, 0, 5]], ids=lambda sizes: str(sizes)
)
def test_products_and_gradients_are_those_of_each_group_alone(sizes):
    M, E = sum(sizes), len(sizes)
    x_MD, w_EDF, probe_MF = floats(M, 6), floats(E, 6, 5), floats(M, 5)

    def summed(x_MD, w_EDF):
        y_MF = blocked_product(x_MD, w_EDF, jnp.array(sizes))
        return (y_MF * probe_MF).sum(), y_MF

    (_, y_MF), (x_gradient, w_gradient) = jax.jit(jax.value_and_grad(summed, argnums=(0, 1), has_aux=True))(x_MD, w_EDF)
    start = 0
    for e, size in enumerate(sizes):
        rows = slice(start, start := start + size)
        x, w, probe = (a.astype(np.float64) for a in (x_MD[rows], w_EDF[e], probe_MF[rows]))
        np.testing.assert_allclose(y_MF[rows], x @ w, atol=1e-5)
        np.testing.assert_allclose(x_gradient[rows], probe @ w.T, atol=1e-5)
        np.testing.assert_allclose(w_gradient[e], x.T @ probe, atol=1e-4)


def test_products_equal_those_of_the_compiler():
    """What a TPU uses; elsewhere it makes E copies of all rows."""
    x_MD, w_EDF, sizes_E = floats(50, 4), floats(3, 4, 7), jnp.array([20, 0, 30])
    expected = jax.lax.ragged_dot(x_MD, w_EDF, sizes_E)
    np.testing.assert_allclose(jax.jit(blocked_product)(x_MD, w_EDF, sizes_E), expected, atol=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_a_mixture_is_the_sum_over_each_tokens_experts(gated, normalise):
    config = dataclasses.replace(CONFIG, gated=gated, normalise_experts=normalise)
    weights, x_BTD = mixture_weights(config), floats(2, 9, 16)
    mixed_BTD = jax.jit(lambda w, x: mixture(config, Sharding(), w, x))(weights, x_BTD)
    exact = {name: w.astype(np.float64) for name, w in weights.items()}
    for b in range(2):
        expected = decoder_reference.mixture(config, exact, x_BTD[b].astype(np.float64))
        np.testing.assert_allclose(mixed_BTD[b], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_gradients_are_those_of_all_experts_with_zeros_for_those_not_chosen():
    weights, x_BTD, probe_BTD = mixture_weights(CONFIG), floats(2, 9, 16), floats(2, 9, 16)

    def dense(weights, x_BTD):
        p_BTE = jax.nn.softmax(x_BTD @ weights["router_LDE"])
        least = jnp.sort(p_BTE, axis=-1)[..., -CONFIG.experts_per_token, None]
        p_BTE = jnp.where(p_BTE >= least, p_BTE, 0)
        p_BTE = p_BTE / p_BTE.sum(-1, keepdims=True)
        up = jnp.einsum("btd,edf->btef", x_BTD, weights["up_LEDF"])
        up = up * jax.nn.silu(jnp.einsum("btd,edf->btef", x_BTD, weights["gate_LEDF"]))
        return jnp.einsum("bte,btef,efd->btd", p_BTE, up, weights["down_LEFD"])

    def gradients(function):
        return jax.jit(jax.grad(lambda w, x: (function(w, x) * probe_BTD).sum(), argnums=(0, 1)))(weights, x_BTD)

    sparse, expected = gradients(lambda w, x: mixture(CONFIG, Sharding(), w, x)), gradients(dense)
    for a, b in zip(jax.tree.leaves(sparse), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


def test_no_array_has_tokens_and_experts_and_features():
    """Its size would be that of all experts' work; what lives at once is that of the chosen ones."""
    config = dataclasses.replace(CONFIG, experts=64, experts_per_token=2, model_size=32, ff_size=64)
    weights, x_BTD = mixture_weights(config), floats(4, 256, 32)
    loss = lambda w, x: mixture(config, Sharding(), w, x).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss)).lower(weights, x_BTD).compile()
    tokens, copies = 4 * 256, 64
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * tokens * copies * 64 * 4


def test_the_router_takes_the_largest_and_keeps_their_shares():
    x_TD, router_DE = floats(20, 16), floats(16, 6)
    scores = x_TD.astype(np.float64) @ router_DE
    p_TE = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    raw = dataclasses.replace(CONFIG, normalise_experts=False)
    weights, chosen = route(raw, jnp.asarray(x_TD), jnp.asarray(router_DE))
    np.testing.assert_array_equal(chosen, np.argsort(-p_TE, axis=-1)[:, :3])
    np.testing.assert_allclose(weights, np.take_along_axis(p_TE, np.asarray(chosen), -1), atol=1e-6)
    np.testing.assert_allclose(route(CONFIG, jnp.asarray(x_TD), jnp.asarray(router_DE))[0].sum(-1), 1.0, atol=1e-6)


def test_rows_return_to_their_places_and_gradients_too():
    x_MD, order_M = floats(9, 2), RNG.permutation(9)
    inverse_M = np.argsort(order_M)
    np.testing.assert_array_equal(permuted(permuted(x_MD, order_M, inverse_M), inverse_M, order_M), x_MD)
    probe_MD = floats(9, 2)
    gradient = jax.grad(lambda x: (permuted(x, order_M, inverse_M) * probe_MD).sum())(x_MD)
    np.testing.assert_array_equal(gradient, probe_MD[inverse_M])


def test_blocks_take_in_an_experts_mean_share():
    assert [block_rows(rows, 8) for rows in (8, 64, 65, 512, 100_000)] == [8, 8, 16, 64, 256]


WHOLE = Sharding(E=())
EIGHT = dataclasses.replace(LLAMA, layers=1, experts=8, experts_per_token=3, max_length=64)


@pytest.mark.parametrize(
    ("sizes", "rules", "held"),
    [
        ((1, 1, 1, 4), Sharding(), 2),
        ((1, 2, 2, 2), Sharding(), 4),
        ((1, 1, 1, 8), Sharding(), 1),
        ((2, 1, 1, 2), Sharding(B=("data",)), 4),
        ((1, 1, 1, 4), WHOLE, 8),
    ],
    ids=["experts", "experts, features and rows", "one each", "rows whole along the experts", "each has all experts"],
)
def test_wherever_experts_are_tokens_get_the_same(sizes, rules, held):
    """Values and all gradients, those of the router among them."""
    batch = rows(EIGHT, B=8)

    def both(params, batch, rules):
        def loss(params):
            logits = apply(structure(EIGHT, rules), params, *batch)
            return jax.nn.log_softmax(logits)[..., 5].mean(), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    alone = jax.jit(both, static_argnums=2)(init(EIGHT, 0), batch, Sharding())
    with jax.set_mesh(make_mesh(*sizes)):
        params = init(EIGHT, 0, rules)
        up = params["layers"]["up_LEDF"][...]
        assert up.addressable_shards[0].data.shape[1] == held
        cut = [jax.device_put(x, jax.P(rules.B)) for x in batch]
        on_mesh = jax.jit(both, static_argnums=2)(params, cut, rules)
    for value, expected in zip(jax.tree.leaves(on_mesh), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5)


def test_what_is_exchanged_is_tokens_and_only_where_experts_are_cut():
    def program(sizes):
        with jax.set_mesh(make_mesh(*sizes)):
            batch = [jax.device_put(x, jax.P(Sharding().B)) for x in rows(EIGHT, B=8)]
            return str(jax.make_jaxpr(lambda params, *batch: apply(EIGHT, params, *batch))(init(EIGHT, 0), *batch))

    cut, whole = program((1, 1, 1, 4)), program((4, 1, 1, 1))
    assert "reduce_scatter" in cut
    assert "all_gather[" in cut
    assert "reduce_scatter" not in whole
    assert "all_gather[" not in whole
