"""Schedules in closed form; rules against plain optax; which arrays decay and which are orthogonalised."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from epigone.errors import UserError
from epigone.models import decoder
from epigone.models.config import DecoderConfig
from epigone.models.layers import layer_norm, learned, rms_norm
from epigone.training.optimizer import (
    Optimizer,
    adafactor,
    adamw,
    constant,
    cosine,
    decayed,
    layer_matrices,
    learning_rate,
    linear,
    muon,
    transformation,
    warmup_stable_decay,
)

CONFIG = DecoderConfig(
    vocab_size=64,
    layers=2,
    model_size=16,
    heads=2,
    norm=layer_norm,
    positions=learned,
    qkv_bias=True,
    mix_bias=True,
    ff_bias=True,
    norm_bias=True,
    tied=False,
    qk_norm=True,
    max_length=8,
)


def rates(schedule, steps=101, warmup=0, **fields):
    rate = learning_rate(
        Optimizer(schedule=schedule, learning_rate=2.0, warmup_steps=warmup, **fields),
        steps,
    )
    return np.array([float(rate(step)) for step in range(steps)])


def test_constant():
    np.testing.assert_allclose(rates(constant), 2.0)


def test_cosine():
    expected = [2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 100))) for step in range(101)]
    np.testing.assert_allclose(rates(cosine), expected, rtol=1e-5)


def test_linear_ends_at_its_final_share():
    expected = [2.0 * (1 - 0.75 * step / 100) for step in range(101)]
    np.testing.assert_allclose(rates(linear, final_share=0.25), expected, rtol=1e-5)


def test_warmup_stable_decay():
    expected = [2.0 if step <= 80 else 2.0 * (1 - (step - 80) / 20) for step in range(101)]
    np.testing.assert_allclose(
        rates(warmup_stable_decay, final_share=0.0, decay_share=0.2), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("schedule", [constant, cosine, linear, warmup_stable_decay])
def test_warmup_rises_linearly_from_the_first_step_to_the_peak(schedule):
    values = rates(schedule, warmup=10)
    np.testing.assert_allclose(values[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    assert values[10] == pytest.approx(2.0)
    assert np.all(np.diff(values[10:]) <= 1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_fewer_steps_than_warmup_stay_finite(steps):
    assert np.all(np.isfinite(rates(cosine, steps=steps, warmup=20)))


def two_steps(update):
    random = np.random.default_rng(0)
    shapes = {"query_LDNH": (2, 8, 2, 4), "mix_LNHD": (2, 2, 4, 8), "ff_norm_scale_LD": (2, 8), "embedding_VD": (16, 8)}
    params = {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    state = update.init(params)
    for _ in range(2):
        gradients = jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape), jnp.float32), params)
        updates, state = jax.jit(update.update)(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def rate(step):
    return learning_rate(Optimizer(), 50)(step)


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        (adamw, lambda: optax.adamw(rate, 0.9, 0.95, weight_decay=0.1, mask=decayed)),
        (
            adafactor,
            lambda: optax.adafactor(rate, weight_decay_rate=lambda step: 0.1 * rate(step), weight_decay_mask=decayed),
        ),
        (
            muon,
            lambda: optax.contrib.muon(
                rate,
                weight_decay=0.1,
                adam_b2=0.95,
                consistent_rms=0.2,
                muon_weight_dimension_numbers=layer_matrices,
            ),
        ),
    ],
    ids=["adamw", "adafactor", "muon"],
)
def test_rules_are_plain_optax(rule, reference):
    ours = two_steps(transformation(Optimizer(rule=rule), 50))
    theirs = two_steps(optax.chain(optax.clip_by_global_norm(1.0), reference()))
    for mine, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-6, atol=1e-7)


def test_no_clipping_when_there_is_no_norm():
    ours = two_steps(transformation(Optimizer(clip_norm=None), 50))
    theirs = two_steps(optax.adamw(rate, 0.9, 0.95, weight_decay=0.1, mask=decayed))
    for mine, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-6, atol=1e-7)


def by_name(tree, is_leaf=None):
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return {next(k.key for k in reversed(path) if hasattr(k, "key")): leaf for path, leaf in leaves}


def test_only_matrices_decay():
    marks = by_name(decayed(decoder.abstract(CONFIG)))
    assert {name for name, mark in marks.items() if mark} == {
        "head_VD",
        "query_LDNH",
        "key_LDKH",
        "value_LDKH",
        "mix_LNHD",
        "up_LDF",
        "gate_LDF",
        "down_LFD",
    }


def test_muon_orthogonalises_each_layers_matrices():
    axes = by_name(layer_matrices(decoder.abstract(CONFIG)), lambda x: x is None or isinstance(x, tuple))
    found = {name: tuple(dims) for name, dims in axes.items() if dims is not None}
    inward, merge, square = ((1,), (2, 3)), ((1, 2), (3,)), ((1,), (2,))
    assert found == {
        "query_LDNH": inward,
        "key_LDKH": inward,
        "value_LDKH": inward,
        "mix_LNHD": merge,
        "up_LDF": square,
        "gate_LDF": square,
        "down_LFD": square,
    }


def test_muon_orthogonalises_each_expert_alone():
    mixture = dataclasses.replace(CONFIG, experts=4, ff_bias=False, norm_bias=False, norm=rms_norm)
    axes = by_name(layer_matrices(decoder.abstract(mixture)), lambda x: x is None or isinstance(x, tuple))
    for name, dims in axes.items():
        if "E" in name.rsplit("_", 1)[-1]:
            assert tuple(dims) == (((1,), (2,)) if name == "router_LDE" else ((2,), (3,))), name


@pytest.mark.parametrize(
    ("field", "value"), [("learning_rate", -1.0), ("beta1", 2.0), ("final_share", 1.5), ("clip_norm", 0.0)]
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(UserError, match=f"{field}={value}"):
        Optimizer(**{field: value})
