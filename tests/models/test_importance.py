"""What units and layers do on text: against numpy in float64, blind to padding and batching, the same on any mesh."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from compiled_names import compiled_names
from decoder_variants import LLAMA, VARIANTS, rows, spread_params
from jax.sharding import PartitionSpec as P

from epigone.errors import UserError
from epigone.models import importance
from epigone.models.decoder import init
from epigone.models.importance import measure
from epigone.models.layers import gelu, layer_norm, learned
from epigone.models.sharding import make_mesh

THREE = dataclasses.replace(LLAMA, layers=3)
CONFIGS = {
    "gated": THREE,
    "biases": dataclasses.replace(VARIANTS["gpt2"], layers=3),
    "post": dataclasses.replace(THREE, pre_norm=False, post_norm=True),
    "both": dataclasses.replace(THREE, post_norm=True, window=3, window_pattern=(True, False), attention_scale=0.3),
    "experts": dataclasses.replace(THREE, experts=5, experts_per_token=2, normalise_experts=False),
}


def norm(config, x, weights, name, layer=...):
    found = {kind: [w for n, w in weights.items() if n.startswith(f"{name}_{kind}_")] for kind in ("scale", "bias")}
    x = x - x.mean(-1, keepdims=True) if config.norm is layer_norm else x
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * found["scale"][0][layer]
    return x + found["bias"][0][layer] if found["bias"] else x


def activation(config, x):
    if config.activation is gelu:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / (1 + np.exp(-x))


def turned(config, x_THead, positions):
    if config.positions is learned:
        return x_THead
    half = x_THead.shape[-1] // 2
    angle = positions[:, None, None] * config.rope_theta ** (-np.arange(half) / half)
    whole = (x_THead[..., :half] + 1j * x_THead[..., half:]) * np.exp(1j * angle)
    return np.concatenate([whole.real, whole.imag], -1)


def attention(config, w, layer, h, positions, segments):
    q, k, v = (
        np.einsum("td,dnh->tnh", h, w[name][layer]) + w.get(f"{name[:-5]}_bias_L{name[-2:]}", np.zeros(99))[layer]
        for name in ("query_LDNH", "key_LDKH", "value_LDKH")
    )
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (turned(config, k, positions), v))
    scale = config.attention_scale or q.shape[-1] ** -0.5
    scores = np.einsum("tnh,snh->nts", turned(config, q, positions), k) * scale
    far = np.subtract.outer(np.arange(len(h)), np.arange(len(h)))
    window = config.window if config.windowed_layers[layer] else 10**9
    sees = (far >= 0) & (far < window) & (segments[:, None] == segments[None])
    weights = np.exp(scores - scores.max()) * sees
    return np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)


def hidden(config, w, layer, h):
    """What `down` reads [T, F], and the shares [T, 0]; with experts [T, E, F] and [T, E]."""
    if config.experts:
        p = np.exp(h @ w["router_LDE"][layer])
        p = p / p.sum(-1, keepdims=True)
        shares = np.where(p >= np.sort(p, -1)[:, -config.experts_per_token, None], p, 0)
        up, gate = (np.einsum("td,edf->tef", h, w[f"{name}_LEDF"][layer]) for name in ("up", "gate"))
        return activation(config, gate) * up * shares[:, :, None], shares
    up, *gate = (
        h @ w[f"{n}_LDF"][layer] + w.get(f"{n}_bias_LF", np.zeros(99))[layer]
        for n in ("up", "gate")[: 1 + config.gated]
    )
    return (activation(config, gate[0]) * up if gate else activation(config, up)), np.zeros((len(h), 0))


def watched(config, params, tokens, positions, segments):
    """Of one row: of each layer (mixed, what both halves read, hidden, shares, x_in, x_out), and the end."""
    o, w = ({n: np.asarray(x[...], np.float64) for n, x in params[group].items()} for group in ("outer", "layers"))
    pre = lambda name, x: norm(config, x, w, f"{name}_norm", layer) if config.pre_norm else x  # noqa: E731
    post = lambda name, x: norm(config, x, w, f"{name}_post_norm", layer) if config.post_norm else x  # noqa: E731
    x = o["embedding_VD"][tokens] + (o["position_TD"][positions] if config.positions is learned else 0)
    seen = []
    for layer in range(config.layers):
        start, first = x, pre("attention", x)
        mixed = attention(config, w, layer, first, positions, segments)
        out = np.einsum("tnh,nhd->td", mixed, w["mix_LNHD"][layer]) + w.get("mix_bias_LD", np.zeros(99))[layer]
        x = x + post("attention", out)
        second = pre("ff", x)
        inner, shares = hidden(config, w, layer, second)
        down = w["down_LEFD" if config.experts else "down_LFD"][layer]
        out = np.einsum("tef,efd->td" if config.experts else "tf,fd->td", inner, down)
        x = x + post("ff", out + w.get("down_bias_LD", np.zeros(99))[layer])
        seen.append((mixed, first, second, inner, shares, start, x))
    return seen, norm(config, x, o, "final_norm")


def expected(config, params, batch):
    """Every score, from its definition."""
    squares, turns, count = {}, np.zeros(config.layers), 0

    def add(key, a_TU, real):
        if real.any():
            squares[key] = squares.get(key, 0) + np.abs(a_TU[real]).mean(0) ** 2

    for row in zip(*batch, strict=True):
        real = row[2] > 0
        seen, end = watched(config, params, *row)
        add("final", end, real)
        count += real.sum()
        for layer, (mixed, first, second, inner, shares, start, after) in enumerate(seen):
            add(("heads", layer), np.linalg.norm(mixed, axis=-1), real)
            for name, a in (("first", first), ("second", second), ("ff", inner), ("experts", shares)):
                add((name, layer), a, real)
            cos = (start * after).sum(-1) / np.linalg.norm(start, axis=-1) / np.linalg.norm(after, axis=-1)
            turns[layer] += (1 - cos)[real].sum()
    each = lambda name: np.stack([np.sqrt(squares[name, layer]) for layer in range(config.layers)])  # noqa: E731
    return importance.Activity(
        turns / count,
        each("first") + each("second"),
        np.sqrt(squares["final"]),
        each("heads"),
        each("experts"),
        each("ff"),
    )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_scores_are_those_of_their_definition(config):
    params, batches = spread_params(config), [rows(config, seed=0), rows(config, seed=1)]
    together = [np.concatenate(parts) for parts in zip(*batches, strict=True)]
    for found, right in zip(measure(config, params, batches), expected(config, params, together), strict=True):
        assert found.shape == right.shape
        np.testing.assert_allclose(found, right, rtol=2e-4, atol=1e-6)


def test_padding_and_empty_rows_count_nowhere():
    params, (tokens, positions, segments) = spread_params(LLAMA), rows(LLAMA)
    plain = measure(LLAMA, params, [(tokens, positions, segments)])
    other = tokens.copy()
    other[2, 10:] = 9
    empty = [np.concatenate([x, np.full_like(x[:1], fill)]) for x, fill in ((other, 7), (positions, 0), (segments, 0))]
    for a, b in zip(plain, measure(LLAMA, params, [empty]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    segments = segments.copy()
    segments[2, 10:] = 3
    counted = measure(LLAMA, params, [(other, positions, segments)])
    assert not np.allclose(plain.ff_LF, counted.ff_LF, rtol=1e-3)


def test_batches_of_one_shape_share_one_program():
    params = spread_params(LLAMA)
    importance._sums.clear_cache()
    with compiled_names() as names:
        measure(LLAMA, params, [rows(LLAMA, seed=seed) for seed in range(3)])
    assert names.count("_sums") == 1


@pytest.mark.parametrize("kind", ["biases", "experts"])
def test_every_mesh_gives_the_same(kind):
    config = dataclasses.replace(CONFIGS[kind], vocab_size=40, model_size=32, heads=4, kv_heads=2, head_size=4)
    batch = rows(config, B=4)
    without = measure(config, init(config, 0), [batch])
    with jax.set_mesh(make_mesh(2, 2, 2)):
        params = init(config, 0)
        assert params["layers"]["query_LDNH"][...].sharding.spec == P(None, "fsdp", "tensor", None)
        for found, right in zip(measure(config, params, [batch]), without, strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6)


def test_no_array_of_all_logits():
    config = dataclasses.replace(LLAMA, vocab_size=4096)
    text = importance._sums.lower(config, importance.Sharding(), init(config, 0), *rows(config)).as_text()
    assert "x4096xf32" not in text.replace("tensor<4096x16xf32>", "")


def test_no_text_is_refused():
    params, batch = spread_params(LLAMA), rows(LLAMA)
    for batches in ([], [(batch[0], batch[1], np.zeros_like(batch[2]))]):
        with pytest.raises(UserError, match="at least one token"):
            measure(LLAMA, params, batches)
