"""Small configs that together switch every field of DecoderConfig away from its default."""

import dataclasses

import jax
import numpy as np

from epigone.models.config import DecoderConfig
from epigone.models.decoder import init
from epigone.models.layers import exact_gelu, gelu, layer_norm, learned, save_nothing

LLAMA = DecoderConfig(
    vocab_size=37, layers=2, model_size=16, heads=4, kv_heads=2, ff_size=24, max_length=16, vocab_multiple=8
)
VARIANTS = {
    "llama": LLAMA,
    "gpt2": dataclasses.replace(
        LLAMA,
        kv_heads=None,
        norm=layer_norm,
        norm_epsilon=1e-5,
        positions=learned,
        activation=gelu,
        gated=False,
        qkv_bias=True,
        mix_bias=True,
        ff_bias=True,
        norm_bias=True,
    ),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, head_size=6, rope_theta=1e6, tied=False, kv_heads=1),
    "gemma2": dataclasses.replace(
        LLAMA, activation=gelu, window=3, attention_softcap=2.0, logit_softcap=3.0, embedding_scale=4.0
    ),
    "mixed": dataclasses.replace(
        LLAMA,
        activation=exact_gelu,
        norm=layer_norm,
        qk_norm=True,
        qkv_bias=True,
        mix_bias=True,
        ff_bias=True,
        norm_bias=True,
        remat=save_nothing,
        vocab_size=40,
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
