"""Attention against a float64 loop, and which implementation is chosen where."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epigone.models.attention import (
    SegmentsAndKind,
    causal_mask,
    choose_attention,
    cudnn_attention,
    splash_attention,
    xla_attention,
)


def arrays(B=2, T=9, N=4, K=2, H=6):
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((B, T, N, H), (B, T, K, H), (B, T, K, H)))


def naive(q, k, v, mask, cap, scale):
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    B, T, N = q.shape[:3]
    for b, t, n in np.ndindex(B, T, N):
        head = n * k.shape[2] // N
        scores = k[b, :, head] @ q[b, t, n] * scale
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores) * mask[b, t]
        out[b, t, n] = weights @ v[b, :, head] / weights.sum()
    return out


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_equals_a_loop_in_float64(window, cap):
    q, k, v = arrays()
    segments = np.array([[1] * 9, [1, 1, 1, 2, 2, 2, 2, 0, 0]])
    mask = np.array(
        [
            [[s <= t and row[s] == row[t] and t - s < (window or 99) for s in range(9)] for t in range(9)]
            for row in segments
        ]
    )
    np.testing.assert_array_equal(causal_mask(jnp.asarray(segments), window), mask)
    for scale in (6**-0.5, 1.7):
        expected = naive(q, k, v, mask, cap, scale)
        np.testing.assert_allclose(jax.jit(xla_attention)(q, k, v, mask, cap, scale), expected, atol=2e-6)


def test_equals_the_implementation_that_jax_ships():
    q, k, v = arrays(T=16)
    mask = causal_mask(jnp.ones((2, 16), jnp.int32), None)
    for scale in (6**-0.5, 0.2):
        expected = jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=scale)
        np.testing.assert_allclose(xla_attention(q, k, v, mask, None, scale), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "name", "reason"),
    [
        ((64, "float32", None, "cpu"), "xla", "cpu"),
        ((64, "bfloat16", None, "tpu"), "splash", "tpu"),
        ((64, "bfloat16", None, "gpu"), "cudnn", "bfloat16"),
        ((64, "float32", None, "gpu"), "xla", "float32"),
        ((60, "bfloat16", None, "gpu"), "xla", "head size 60"),
        ((64, "bfloat16", 50.0, "gpu"), "xla", "soft cap"),
    ],
)
def test_choice_says_what_and_why(arguments, name, reason):
    *arguments, platform = arguments
    choice = choose_attention(*arguments, platform=platform)
    assert choice.name == name
    assert reason in choice.reason
    functions = {"xla": xla_attention, "cudnn": cudnn_attention, "splash": splash_attention}
    assert getattr(choice.function, "func", choice.function) is functions[name]
    assert choose_attention(64, "float32", None).name == "xla"
    assert choose_attention(64, "bfloat16", None, length=64, platform="tpu").name == "xla"


@pytest.mark.parametrize(("window", "windowed", "cap"), [(None, False, None), (40, True, None), (40, "traced", 5.0)])
def test_the_kernel_for_tpus_gives_the_same_values_and_gradients(window, windowed, cap):
    """Interpreted on a CPU: packed segments, grouped heads, a length that is no multiple of 128."""
    q, k, v = arrays(B=2, T=150, N=4, K=2, H=16)
    segments = jnp.asarray(np.repeat([[1, 1, 2, 2, 0], [1, 2, 3, 3, 3]], 30, axis=1))
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)

    def result_and_gradient(attention, seen):
        def loss(q, k, v):
            out = attention(q, k, v, seen, cap, 0.3)
            return jnp.sum(out * weights), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return out, *gradients

    splash = partial(splash_attention, window, interpret=True)
    for bound in (True, False) if windowed == "traced" else (windowed,):
        mask = causal_mask(segments, window if bound else None)
        seen = SegmentsAndKind(segments, jnp.asarray(bound) if windowed == "traced" else bound)
        ours, theirs = result_and_gradient(splash, seen), result_and_gradient(xla_attention, mask)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=3e-5)
