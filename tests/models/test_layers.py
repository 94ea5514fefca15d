"""Norms, rotations, caps and activations against their formulas in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from epigone.models.layers import (
    exact_gelu,
    gelu,
    layer_norm,
    learned,
    offset_rms_norm,
    rms_norm,
    rotary,
    rotate,
    silu,
    soft_cap,
)
from epigone.models.rope import LongRopeScaling, YarnScaling

RNG = np.random.default_rng(0)


def test_norms():
    x, scale, bias = (RNG.standard_normal(shape) for shape in ((3, 5, 8), 8, 8))
    x = x * 3 + 2
    floats = [jnp.asarray(a, jnp.float32) for a in (x, scale, bias)]
    rms = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3)
    centred = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(rms_norm(floats[0], floats[1], None, 1e-3), rms * scale, atol=1e-5)
    np.testing.assert_allclose(rms_norm(*floats, 1e-3), rms * scale + bias, atol=1e-5)
    np.testing.assert_allclose(layer_norm(*floats, 1e-3), centred * scale + bias, atol=1e-5)
    np.testing.assert_allclose(offset_rms_norm(floats[0], floats[1], None, 1e-3), rms * (1 + scale), atol=1e-5)


@pytest.mark.parametrize("norm", [rms_norm, offset_rms_norm, layer_norm])
def test_norms_run_over_the_axes_that_the_scale_has(norm):
    x, scale = (jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in ((3, 4, 5), (4, 5)))
    flat = norm(x.reshape(3, 20), scale.reshape(20), scale.reshape(20), 1e-6)
    np.testing.assert_allclose(norm(x, scale, scale, 1e-6).reshape(3, 20), flat, atol=1e-6)
    assert (
        np.abs(
            norm(x, scale[0], None, 1e-6).reshape(3, 20) - norm(x.reshape(3, 20), scale.reshape(20), None, 1e-6)
        ).max()
        > 0.01
    )


def test_norms_keep_a_low_precision_type_but_not_its_rounding():
    x = jnp.full((1, 512), 1e-4, jnp.bfloat16)
    normed = rms_norm(x, jnp.ones(512), None, 1e-12)
    assert normed.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(normed, np.float32), 1.0, atol=0.01)


def test_scores_after_rotation_depend_on_distance_alone():
    q, k = (jnp.asarray(RNG.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(t, s):
        turn = [rotate(x, rotary(jnp.array([[p]]), 8, 100.0)) for x, p in ((q, t), (k, s))]
        return float(jnp.sum(turn[0] * turn[1]))

    np.testing.assert_allclose([score(5, 2), score(103, 100)], score(3, 0), atol=1e-4)
    assert abs(score(3, 0) - score(4, 0)) > 1e-3
    np.testing.assert_allclose(score(7, 7), float(jnp.sum(q * k)), atol=1e-5)


def test_a_share_of_the_features_is_rotated():
    x = jnp.asarray(RNG.standard_normal((1, 2, 3, 8)), jnp.float32)
    angles = rotary(jnp.array([[4, 9]]), 6, 100.0)
    turned = rotate(x, angles)
    np.testing.assert_array_equal(turned[..., 6:], x[..., 6:])
    np.testing.assert_allclose(turned[..., :6], rotate(x[..., :6], angles), atol=1e-6)
    assert np.abs(turned[..., :6] - x[..., :6]).min() > 1e-4


def test_a_factor_on_cosines_and_sines_scales_what_is_rotated():
    x = jnp.asarray(RNG.standard_normal((1, 1, 1, 4)), jnp.float32)
    once, twice = (
        rotate(x, rotary(jnp.array([[3]]), 4, 100.0, YarnScaling(1.0, 64, attention_factor=f))) for f in (1.0, 2.0)
    )
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)


def test_each_row_takes_long_factors_when_its_own_positions_need_them():
    scaling = LongRopeScaling((1.0, 2.0), (4.0, 8.0), 8, 1.0)
    cos, _ = rotary(jnp.array([[5, 6, 7], [6, 7, 8]]), 4, 100.0, scaling)
    np.testing.assert_allclose(cos[0], np.cos(np.outer([5, 6, 7], [1.0, 0.1 / 2])), rtol=1e-5)
    np.testing.assert_allclose(cos[1], np.cos(np.outer([6, 7, 8], [1 / 4, 0.1 / 8])), rtol=1e-5)


def test_learned_positions_do_not_rotate():
    x = jnp.ones((1, 2, 1, 4))
    np.testing.assert_array_equal(rotate(x, learned(jnp.array([[3, 4]]), 4, 100.0)), x)


def test_soft_cap_bounds_and_keeps_small_values():
    x = jnp.linspace(-100, 100, 101)
    capped = np.asarray(soft_cap(x, 5.0))
    assert np.abs(capped).max() <= 5
    assert (np.diff(capped) >= 0).all()
    np.testing.assert_allclose(soft_cap(jnp.array([0.01]), 5.0), 0.01, rtol=1e-5)
    assert soft_cap(x, None) is x


def test_activations():
    x = np.linspace(-4, 4, 33)
    floats = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(exact_gelu(floats), x * scipy.stats.norm.cdf(x), atol=1e-6)
    np.testing.assert_allclose(gelu(floats), x * scipy.stats.norm.cdf(x), atol=5e-4)
    assert np.abs(np.asarray(gelu(floats)) - np.asarray(exact_gelu(floats))).max() > 1e-5
    np.testing.assert_allclose(silu(floats), x / (1 + np.exp(-x)), atol=1e-6)
