"""Rotary frequencies and their scalings, against the functions of transformers."""

import math

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from epigone.errors import UserError
from epigone.models.rope import LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling, frequencies

SHORT, LONG = tuple(np.linspace(1.0, 3.0, 16)), tuple(np.geomspace(1.0, 40.0, 16))


def published(size, theta, kind, seq_len=None, **parameters):
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=1,
        head_dim=size,
        max_position_embeddings=parameters.pop("max_length", 131072),
        rope_parameters={"rope_type": kind, "rope_theta": theta, **parameters},
    )
    inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=seq_len)
    return inverse.numpy(), factor


@pytest.mark.parametrize(("size", "theta"), [(64, 10000.0), (128, 500000.0), (96, 1e6)])
def test_plain_frequencies(size, theta):
    expected = np.array([theta ** (-2 * i / size) for i in range(size // 2)])
    np.testing.assert_allclose(frequencies(size, theta), expected, rtol=2e-6)
    assert frequencies(size, theta).dtype == np.float32


@pytest.mark.parametrize(
    ("scaling", "kind", "parameters"),
    [
        (LinearScaling(4.0), "linear", {"factor": 4.0}),
        (
            Llama3Scaling(8.0, 1.0, 4.0, 8192),
            "llama3",
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (YarnScaling(4.0, 32768), "yarn", {"factor": 4.0, "original_max_position_embeddings": 32768}),
        (
            YarnScaling(40.0, 4096, beta_fast=16.0, beta_slow=2.0, mscale=1.0, mscale_all_dim=0.7),
            "yarn",
            {
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
            },
        ),
        (
            YarnScaling(2.0, 64, attention_factor=1.5, truncate=False),
            "yarn",
            {"factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 1.5, "truncate": False},
        ),
        (YarnScaling(1.0, 4096), "yarn", {"factor": 1.0, "original_max_position_embeddings": 4096}),
    ],
    ids=["linear", "llama3", "yarn", "yarn_mscale", "yarn_untruncated", "yarn_of_1"],
)
@pytest.mark.parametrize(("size", "theta"), [(64, 10000.0), (128, 500000.0)])
def test_scalings_are_those_of_transformers(scaling, kind, parameters, size, theta):
    inverse, factor = scaling.frequencies(size, theta)
    expected, expected_factor = published(size, theta, kind, **parameters)
    assert inverse.dtype == np.float32
    np.testing.assert_allclose(inverse, expected, rtol=5e-6)
    assert factor == pytest.approx(expected_factor, rel=1e-9)
    assert kind == "yarn" or not np.allclose(inverse, frequencies(size, theta))


@pytest.mark.parametrize("attention_factor", [None, 1.25])
@pytest.mark.parametrize("factor", [32.0, 1.0])
def test_longrope_is_that_of_transformers(factor, attention_factor):
    scaling = LongRopeScaling(SHORT, LONG, 4096, factor, attention_factor)
    parameters = {
        "short_factor": list(SHORT),
        "long_factor": list(LONG),
        "original_max_position_embeddings": 4096,
        "max_length": int(4096 * factor),
        "attention_factor": attention_factor,
    }
    for length, long in ((4096, False), (4097, True)):
        inverse, given = scaling.frequencies(32, 10000.0, long=long)
        expected, expected_factor = published(32, 10000.0, "longrope", seq_len=length, **parameters)
        np.testing.assert_allclose(inverse, expected, rtol=2e-6)
        assert given == pytest.approx(expected_factor, rel=1e-9)


def test_llama3_keeps_high_frequencies_and_divides_low_ones():
    plain, scaled = frequencies(128, 500000.0), Llama3Scaling(8.0, 1.0, 4.0, 8192).frequencies(128, 500000.0)[0]
    waves = 2 * math.pi / plain
    np.testing.assert_array_equal(scaled[waves < 8192 / 4.01], plain[waves < 8192 / 4.01])
    np.testing.assert_allclose(scaled[waves > 8192], plain[waves > 8192] / 8, rtol=1e-6)


def test_refusals():
    with pytest.raises(UserError, match="16 longrope factors for 64 rotated features: give 32"):
        LongRopeScaling(SHORT, LONG, 4096, 4.0).frequencies(64, 10000.0)
    with pytest.raises(UserError, match=r"high_frequency_factor 1.0 must be larger than low_frequency_factor 1.0"):
        Llama3Scaling(8.0, 1.0, 1.0, 8192)
