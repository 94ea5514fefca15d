"""Small configs, one for each family of published models, that together switch every field away from its default."""

import dataclasses

import jax
import numpy as np

from epigone.models.config import DecoderConfig
from epigone.models.decoder import init
from epigone.models.layers import exact_gelu, gelu, layer_norm, learned, offset_rms_norm, save_nothing
from epigone.models.rope import LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling

LLAMA = DecoderConfig(
    vocab_size=37, layers=2, model_size=16, heads=4, kv_heads=2, ff_size=24, max_length=16, vocab_multiple=8
)
BIASES = {"qkv_bias": True, "mix_bias": True, "ff_bias": True, "norm_bias": True}
VARIANTS = {
    "llama": LLAMA,
    "llama3": dataclasses.replace(LLAMA, rope_theta=30.0, rope_scaling=Llama3Scaling(4.0, 1.0, 4.0, 24)),
    "gpt2": dataclasses.replace(
        LLAMA,
        kv_heads=None,
        norm=layer_norm,
        norm_epsilon=1e-5,
        positions=learned,
        activation=gelu,
        gated=False,
        **BIASES,
    ),
    "qwen2": dataclasses.replace(
        LLAMA, head_size=8, qkv_bias=True, rope_theta=100.0, rope_scaling=YarnScaling(4.0, 20, beta_fast=3.0)
    ),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, head_size=6, rope_theta=1e6, tied=False, kv_heads=1),
    "qwen3_moe": dataclasses.replace(
        LLAMA,
        qk_norm=True,
        experts=5,
        experts_per_token=2,
        normalise_experts=False,
        tied=False,
    ),
    "gemma2": dataclasses.replace(
        LLAMA,
        norm=offset_rms_norm,
        post_norm=True,
        activation=gelu,
        window=3,
        window_pattern=(True, False),
        attention_scale=0.3,
        attention_softcap=2.0,
        logit_softcap=3.0,
        embedding_scale=4.0,
    ),
    "gemma3": dataclasses.replace(
        LLAMA,
        layers=3,
        norm=offset_rms_norm,
        post_norm=True,
        qk_norm=True,
        activation=gelu,
        window=4,
        window_pattern=(True, True, False),
        rope_theta=1000.0,
        rope_local_theta=10.0,
        rope_scaling=LinearScaling(2.0),
        attention_scale=0.4,
        embedding_scale=4.0,
    ),
    "olmo2": dataclasses.replace(LLAMA, pre_norm=False, post_norm=True, qk_norm_whole=True, tied=False),
    "phi3": dataclasses.replace(
        LLAMA,
        head_size=8,
        rope_fraction=0.75,
        rope_scaling=LongRopeScaling((1.0, 1.5, 2.0), (1.0, 4.0, 8.0), 64, 2.0),
        window=5,
    ),
    "mixed": dataclasses.replace(
        LLAMA, activation=exact_gelu, norm=layer_norm, qk_norm=True, **BIASES, remat=save_nothing, vocab_size=40
    ),
}


def spread_params(config, seed=0):
    """Parameters with every entry random, biases and norm scales too, and large enough that all of them matter."""
    leaves, tree = jax.tree.flatten(init(config, seed))
    rng = np.random.default_rng(seed)
    return tree.unflatten([x + 0.3 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves])


def rows(config, B=3, T=12, seed=0):
    """Tokens, positions and segments: a full row, one of two documents, one of two and padding."""
    tokens_BT = np.random.default_rng(seed).integers(2, config.vocab_size, (B, T)).astype(np.int32)
    segments_BT, positions_BT = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    for b, cut in ((1, 5), (2, 7)):
        segments_BT[b, cut:] = 2
        positions_BT[b, cut:] = np.arange(T - cut)
    segments_BT[2, 10:] = positions_BT[2, 10:] = 0
    return tokens_BT, positions_BT, segments_BT
