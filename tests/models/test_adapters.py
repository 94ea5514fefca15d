"""Low-rank adapters: they begin as nothing, compute what merged weights compute, and have the chain rule's gradient."""

from dataclasses import replace
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_variants import LLAMA, VARIANTS

from epigone.errors import UserError
from epigone.models import adapters, decoder
from epigone.models.adapters import LowRank
from epigone.models.config import layer_weights
from epigone.training.optimizer import decayed, layer_matrices

HOW = LowRank(rank=2, alpha=3.0)
ROWS = np.random.default_rng(0).integers(4, 37, (2, 9)).astype(np.int32)
PLACES = (np.tile(np.arange(9, dtype=np.int32), (2, 1)), np.ones((2, 9), np.int32))
SIDES = {"query": 1, "key": 1, "value": 1, "mix": 2, "gate": 1, "up": 1, "down": 1}
"""Axes of each matrix, behind that of the layers, over which its inputs go."""


def drawn(how, config, seed=1):
    """Adapters in which B is not zero."""
    begun = adapters.init(how, config, seed)
    keys = jax.random.split(jax.random.key(7), len(begun))
    return {name: a + 0.3 * jax.random.normal(k, a.shape) for k, (name, a) in zip(keys, begun.items(), strict=True)}


def by_name(params):
    return {path[-2].key: np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@jax.jit
def plain(params):
    return decoder.apply(LLAMA, params, ROWS, *PLACES)


def forward(how, config):
    def logits(params, trained):
        model = adapters.adapted(how, config, params, trained)
        return model.logits(model(ROWS, *PLACES))

    return jax.jit(logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_model_with_new_adapters_is_as_it_was_to_the_bit_and_merged_it_computes_the_same(family):
    config = VARIANTS[family]
    params, run = decoder.init(config, 0), forward(HOW, config)
    before = jax.jit(lambda params: decoder.apply(config, params, ROWS, *PLACES))
    begun, learned = adapters.init(HOW, config, 1), drawn(HOW, config)
    np.testing.assert_array_equal(run(params, begun), before(params))
    np.testing.assert_allclose(
        run(params, learned), before(adapters.merge(HOW, config, params, learned)), atol=1e-5, rtol=0
    )
    assert np.abs(run(params, learned) - before(params)).max() > 1e-2


def test_new_adapters_merge_into_the_same_bits():
    params = decoder.init(LLAMA, 0)
    merged = by_name(adapters.merge(HOW, LLAMA, params, adapters.init(HOW, LLAMA, 1)))
    assert merged.keys() == by_name(params).keys()
    for name, wanted in by_name(params).items():
        np.testing.assert_array_equal(merged[name], wanted, err_msg=name)


def flat(name, weight):
    """One matrix a layer, inputs first."""
    side = SIDES[name.split("_")[0]]
    return weight.reshape(len(weight), prod(weight.shape[1 : 1 + side]), -1)


def test_what_is_added_is_alpha_over_rank_times_a_b_on_the_targets_alone():
    how = replace(HOW, targets=("query", "mix", "down"))
    params, learned = decoder.init(LLAMA, 0), drawn(how, LLAMA)
    merged = by_name(adapters.merge(how, LLAMA, params, learned))
    for name, before in by_name(params).items():
        word = name.split("_")[0]
        if word not in how.targets or "norm" in name:
            np.testing.assert_array_equal(merged[name], before)
            continue
        a, b = (next(np.float64(w) for n, w in learned.items() if n.startswith(f"{word}_lora_{x}")) for x in "ab")
        a, b = a.reshape(len(a), -1, 2), b.reshape(len(b), 2, -1)
        np.testing.assert_allclose(flat(name, merged[name]), flat(name, before) + 1.5 * a @ b, atol=1e-6)


def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule():
    params, learned = decoder.init(LLAMA, 0), drawn(HOW, LLAMA)
    run = forward(HOW, LLAMA)
    towards = jnp.cos(jnp.arange(2 * 9 * 37.0)).reshape(2, 9, 37)
    mine = jax.grad(lambda trained: jnp.sum(towards * run(params, trained)))(learned)
    merged = adapters.merge(HOW, LLAMA, params, learned)
    whole = by_name(jax.grad(lambda params: jnp.sum(towards * plain(params)))(merged))
    for name in layer_weights(LLAMA):
        word = name.split("_")[0]
        if word not in SIDES or "norm" in name:
            continue
        (a_name, a), (b_name, b) = (
            next((n, np.asarray(w)) for n, w in learned.items() if n.startswith(f"{word}_lora_{x}")) for x in "ab"
        )
        by_weight = flat(name, whole[name])
        a_flat, b_flat = a.reshape(len(a), -1, 2), b.reshape(len(b), 2, -1)
        by_a, by_b = 1.5 * by_weight @ b_flat.transpose(0, 2, 1), 1.5 * a_flat.transpose(0, 2, 1) @ by_weight
        np.testing.assert_allclose(mine[a_name].reshape(a_flat.shape), by_a, atol=2e-4, rtol=1e-3)
        np.testing.assert_allclose(mine[b_name].reshape(b_flat.shape), by_b, atol=2e-4, rtol=1e-3)


def test_short_weights_are_rounded_once_when_merged():
    config = replace(LLAMA, weights_dtype="bfloat16")
    params, learned = decoder.init(config, 0), drawn(HOW, config)
    assert {w.dtype for w in learned.values()} == {jnp.dtype("float32")}
    exact = adapters.merge(HOW, LLAMA, jax.tree.map(lambda w: w.astype(jnp.float32), params), learned)
    for name, weight in by_name(adapters.merge(HOW, config, params, learned)).items():
        np.testing.assert_array_equal(weight, by_name(exact)[name].astype(jnp.bfloat16), err_msg=name)


def test_sizes_and_operations_are_counted():
    s = LLAMA.sizes
    sides = {"query": (16, s.N * s.H), "key": (16, s.K * s.H), "value": (16, s.K * s.H), "mix": (s.N * s.H, 16)}
    sides |= {"gate": (16, 24), "up": (16, 24), "down": (24, 16)}
    for targets in (None, ("query", "value")):
        how = LowRank(rank=3, targets=targets)
        wanted = 2 * 3 * sum(sum(sides[target]) for target in targets or sides)
        trained = adapters.init(how, LLAMA, 0)
        assert adapters.parameter_count(how, LLAMA) == wanted == sum(w.size for w in trained.values())
        forward = decoder.flops_per_token(LLAMA, 8, training=False)
        attention = 2 * 4 * s.N * s.H * 4.5
        assert adapters.flops_per_token(how, LLAMA, 8) == 2 * forward + attention + 6 * wanted
        assert all(np.any(w) == ("_a_" in name) for name, w in trained.items())


def test_an_adapter_begins_alike_whatever_others_there_are():
    alone, all_of_them = (adapters.init(LowRank(2, 1.0, t), LLAMA, 5) for t in (("up",), None))
    np.testing.assert_array_equal(alone["up_lora_a_LDR"], all_of_them["up_lora_a_LDR"])
    assert np.std(adapters.init(LowRank(8), LLAMA, 5)["up_lora_a_LDR"]) == pytest.approx(0.25, rel=0.15)


def test_an_optimizer_takes_them_as_the_matrices_that_they_are():
    trained = adapters.init(HOW, LLAMA, 0)
    assert all(decayed(trained).values())
    axes = {name: (tuple(how.reduction_axis), tuple(how.output_axis)) for name, how in layer_matrices(trained).items()}
    assert axes["query_lora_a_LDR"] == ((1,), (2,))
    assert axes["query_lora_b_LRNH"] == ((1,), (2, 3))
    assert axes["mix_lora_a_LNHR"] == ((1, 2), (3,))
    assert axes["down_lora_b_LRD"] == ((1,), (2,))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: LowRank(rank=0), "adapters: rank=0 must be at least 1"),
        (lambda: LowRank(alpha=-1.0), "alpha=-1 above 0"),
        (lambda: LowRank(targets=("quary",)), "no target 'quary'; did you mean 'query'"),
        (lambda: LowRank(targets=("xyz",)), "no target 'xyz'; known: query, key"),
        (lambda: LowRank(targets=()), "must name each matrix once"),
        (lambda: LowRank(targets=("up", "up")), "must name each matrix once"),
        (lambda: adapters.init(LowRank(rank=9), LLAMA, 0), "rank=9 is more than that of 'key', 16 x 8: at most 8"),
        (lambda: adapters.init(LowRank(targets=("gate",)), VARIANTS["gpt2"], 0), "'gate' is not in this model: choose"),
        (lambda: adapters.init(LowRank(targets=("up",)), VARIANTS["qwen3_moe"], 0), "'up' is one of experts"),
    ],
)
def test_what_does_not_fit_is_one_line(make, line):
    with pytest.raises(UserError, match=line):
        make()


def test_of_a_mixture_of_experts_the_attention_has_adapters():
    config = VARIANTS["qwen3_moe"]
    names = {name.split("_")[0] for name in adapters.init(HOW, config, 0)}
    assert names == {"query", "key", "value", "mix"}
