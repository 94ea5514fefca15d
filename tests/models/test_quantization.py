"""Products in shorter types: the grid against NumPy, gradients that pass straight, the same wherever a model runs."""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from decoder_variants import LLAMA, VARIANTS
from flax import nnx

from epigone.errors import UserError
from epigone.models import decoder
from epigone.models.projections import MATRICES, input_sizes
from epigone.models.quantization import Quantization, check, rounded
from epigone.models.sharding import Sharding, make_mesh
from epigone.sampling.cache import empty_rings, prefill, read_one, unstacked
from epigone.sampling.own_columns import read_many

ROWS = np.random.default_rng(0).integers(4, 37, (2, 9)).astype(np.int32)
PLACES = (np.tile(np.arange(9, dtype=np.int32), (2, 1)), np.ones((2, 9), np.int32))
FOUR, EIGHT = Quantization("int4"), Quantization("int8", activations="int8")
LARGEST = {"int8": 127, "int4": 7, "fp8": 448}


def quantized(how, config=LLAMA):
    return replace(config, quantization=how)


def logits(config, params):
    return jax.jit(lambda params: decoder.apply(config, params, ROWS, *PLACES))(params)


def by_name(params):
    return {path[-2].key: np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def reference(flat, kind, axis):
    """Nearest numbers of a type times the scale, which is one for all along an axis."""
    scale = np.abs(flat).max(axis, keepdims=True) / np.float32(LARGEST[kind])
    if kind == "fp8":
        return (flat / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    return np.round(flat / scale) * scale


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_numbers_are_the_nearest_of_the_type_with_a_scale_of_each_output(kind):
    x = np.random.default_rng(1).normal(size=(3, 4, 6, 5)).astype(np.float32)
    flat = x.reshape(3, 24, 5)
    whole = np.asarray(rounded(x, kind, (1, 2)))
    np.testing.assert_allclose(whole, reference(flat, kind, 1).reshape(x.shape), rtol=1e-6, atol=1e-7)
    blocks = reference(flat.reshape(3, 3, 8, 5), kind, 2).reshape(x.shape)
    np.testing.assert_allclose(rounded(x, kind, (1, 2), 8), blocks, rtol=1e-6, atol=1e-7)
    assert np.abs(blocks - x).mean() < np.abs(whole - x).mean() < np.abs(x).mean() / 5
    np.testing.assert_allclose(rounded(whole, kind, (1, 2)), whole, rtol=1e-6)
    np.testing.assert_array_equal(rounded(0 * x, kind, (1, 2)), 0 * x)


def test_gradients_pass_straight():
    x, towards = (np.random.default_rng(seed).normal(size=(6, 5)).astype(np.float32) for seed in (1, 2))
    found = jax.grad(lambda x: jnp.sum(towards * rounded(x, "int4", (0,))))(x)
    np.testing.assert_array_equal(found, towards)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_quantised_model_is_one_with_rounded_matrices_and_all_else_as_it_is(family):
    config = quantized(replace(FOUR, block=8), VARIANTS[family])
    params = decoder.init(config, 0)
    grid = decoder.multiplied(config, params)
    np.testing.assert_array_equal(logits(config, params), logits(VARIANTS[family], grid))
    assert np.abs(logits(config, params) - logits(VARIANTS[family], params)).max() > 1e-3
    for name, before in by_name(params).items():
        same = np.array_equal(by_name(grid)[name], before)
        assert same == (name.rsplit("_", 1)[0] not in MATRICES), name
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_its_gradient_is_that_at_the_rounded_weights():
    config, towards = quantized(FOUR), jnp.cos(jnp.arange(2 * 9 * 37.0)).reshape(2, 9, 37)
    params = decoder.init(config, 0)

    def slope(config, params):
        return jax.jit(jax.grad(lambda p: jnp.sum(towards * decoder.apply(config, p, ROWS, *PLACES))))(params)

    mine, wanted = slope(config, params), slope(LLAMA, decoder.multiplied(config, params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), mine, wanted)


def test_activations_are_rounded_by_the_token():
    """One token's numbers do not depend on another's: also not on one that is a thousand times as large."""
    x = np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)
    x[0, 1] *= 1000
    both = rounded(x, "int8", (2,))
    np.testing.assert_array_equal(both[0, 2], rounded(x[:, 2:], "int8", (2,))[0, 0])
    with_them, without = (logits(quantized(how), decoder.init(LLAMA, 0)) for how in (EIGHT, Quantization("int8")))
    assert 1e-4 < np.abs(with_them - without).max() < 0.3


@pytest.mark.parametrize("how", [FOUR, replace(FOUR, activations="fp8")], ids=["int4", "int4, fp8"])
def test_read_token_by_token_it_is_the_same_model(how):
    config = quantized(how)
    params = decoder.init(config, 0)

    @jax.jit
    def one_by_one(params):
        model = nnx.merge(decoder.structure(config), params)
        layers, rings, found = unstacked(model), empty_rings(model, 2, 9), []
        for place in range(9):
            at = jnp.full((2,), place, jnp.int32)
            logits_BV, rings = read_one(model, layers, rings, jnp.int32(place), ROWS[:, place], at)
            found.append(logits_BV)
        begun = prefill(model, 9, ROWS[:, :4], PLACES[0][:, :4], PLACES[1][:, :4])
        hidden_BTD, _ = read_many(model, layers, begun, ROWS[:, 4:], jnp.full((2,), 4, jnp.int32))
        return jnp.stack(found, 1), model.logits(hidden_BTD)

    single, several = one_by_one(params)
    whole = logits(config, params)
    apart = np.abs(logits(LLAMA, params) - whole).max()
    # Rounding of activations turns a last bit into a step here and there.
    near = 1e-5 if how.activations is None else 0.1 * apart
    np.testing.assert_allclose(single, whole, atol=near)
    np.testing.assert_allclose(several, whole[:, 4:], atol=near)
    assert apart > 1e-2


@pytest.mark.parametrize("how", [replace(FOUR, block=4), EIGHT], ids=["int4 by blocks", "int8 both"])
def test_a_mesh_rounds_alike(how):
    config = quantized(how)
    alone = logits(config, decoder.init(config, 0))
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        params = decoder.init(config, 0)
        rows = [jax.device_put(np.tile(x, (2, 1)), jax.NamedSharding(make_mesh(2, 2, 2), Sharding().activation("BT")))
                for x in (ROWS, *PLACES)]  # fmt: skip
        found = jax.jit(lambda params, rows: decoder.apply(config, params, *rows))(params, rows)
    np.testing.assert_allclose(np.asarray(found)[:2], alone, atol=1e-5 if how.activations is None else 1e-2)


def test_blocks_must_divide_inputs_and_the_library_must_be_there(monkeypatch):
    check(FOUR, input_sizes(LLAMA))
    with pytest.raises(UserError, match="block=5 does not divide the 16 inputs of 'query'"):
        check(replace(FOUR, block=5), input_sizes(LLAMA))
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"quantization needs qwix: pip install 'epigone\[quantization\]'"):
        check(FOUR, {})


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Quantization("int3"), "weights='int3' is not one of int8, int4, fp8"),
        (lambda: Quantization("int8", "bf16"), "activations='bf16' is not one of"),
        (lambda: Quantization(None), "of neither weights nor activations"),
        (lambda: Quantization("int8", block=0), "block=0 must be at least 1"),
        (lambda: Quantization(None, "int8", 4), "block=4 must be at least 1 input of weights that are rounded"),
        (lambda: quantized(FOUR, VARIANTS["qwen3_moe"]), "quantization with experts 5"),
    ],
)
def test_what_does_not_fit_is_one_line(make, line):
    with pytest.raises(UserError, match=line):
        make()
