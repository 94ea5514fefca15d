"""A decoder in plain numpy, float64, one token and one head at a time: written from the formulas, not from the code."""

import math

import numpy as np

from epigone.models.layers import exact_gelu, gelu, layer_norm, learned, silu


def norm(config, x, scale, bias):
    centre = x.mean() if config.norm is layer_norm else 0.0
    out = (x - centre) / math.sqrt(((x - centre) ** 2).mean() + config.norm_epsilon) * scale
    return out if bias is None else out + bias


def activation(config, x):
    if config.activation is silu:
        return x / (1 + np.exp(-x))
    if config.activation is gelu:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert config.activation is exact_gelu
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def rotated(config, x, position):
    if config.positions is learned:
        return x
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * config.rope_theta ** (-2 * i / len(x))
        turn = np.exp(1j * angle) * (x[i] + 1j * x[i + half])
        out[i], out[i + half] = turn.real, turn.imag
    return out


def capped(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def sees(config, t, s, segments):
    return s <= t and segments[s] == segments[t] and (config.window is None or t - s < config.window)


def attention(config, q_TNH, k_TKH, v_TKH, segments):
    T, N, H = q_TNH.shape
    group = N // k_TKH.shape[1]
    out = np.zeros((T, N, H))
    for t in range(T):
        for n in range(N):
            seen = [s for s in range(T) if sees(config, t, s, segments)]
            scores = [q_TNH[t, n] @ k_TKH[s, n // group] / math.sqrt(H) for s in seen]
            weights = np.exp(capped(np.array(scores), config.attention_softcap))
            out[t, n] = sum(w * v_TKH[s, n // group] for w, s in zip(weights / weights.sum(), seen, strict=True))
    return out


def logits(config, outer, layers, tokens, positions, segments):
    """Logits [T, vocab_size] of one row; `outer` and `layers` are dicts of float64 arrays."""
    x = np.stack([outer["embedding_VD"][token] for token in tokens]) * config.embedding_scale
    if config.positions is learned:
        x = x + np.stack([outer["position_TD"][p] for p in positions])

    def each(name, letters, rows, weights, *index):
        scale, bias = weights[f"{name}_scale_{letters}"], weights.get(f"{name}_bias_{letters}")
        scale, bias = scale[index], None if bias is None else bias[index]
        return np.apply_along_axis(lambda row: norm(config, row, scale, bias), -1, rows)

    def linear(rows, word, layer):
        (name,) = [n for n in layers if n.split("_")[0] == word and "bias" not in n and "norm" not in n]
        weight = layers[name][layer]
        taken = 2 if word == "mix" else 1
        out = np.tensordot(rows, weight, axes=taken)
        bias = layers.get(f"{word}_bias_L{name.split('_')[1][1 + taken :]}")
        return out if bias is None else out + bias[layer]

    for layer in range(config.layers):
        h = each("attention_norm", "LD", x, layers, layer)
        q, k, v = (linear(h, word, layer) for word in ("query", "key", "value"))
        if config.qk_norm:
            q, k = each("query_norm", "LH", q, layers, layer), each("key_norm", "LH", k, layers, layer)
        q, k = (
            np.stack([[rotated(config, head, p) for head in row] for row, p in zip(y, positions, strict=True)])
            for y in (q, k)
        )
        x = x + linear(attention(config, q, k, v, segments), "mix", layer)
        h = each("ff_norm", "LD", x, layers, layer)
        up = linear(h, "up", layer)
        up = activation(config, linear(h, "gate", layer)) * up if config.gated else activation(config, up)
        x = x + linear(up, "down", layer)
    head = outer["embedding_VD" if config.tied else "head_VD"][: config.vocab_size]
    out = capped(each("final_norm", "D", x, outer, ...) @ head.T, config.logit_softcap)
    out[:, :2] = -1e9
    return out
