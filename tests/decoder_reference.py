"""A decoder in plain numpy, float64, one token and one head at a time: written from the formulas, not from the code."""

import math

import numpy as np

from epigone.models.layers import exact_gelu, gelu, layer_norm, learned, offset_rms_norm, silu
from epigone.models.rope import LongRopeScaling


def norm(config, x, scale, bias):
    centre = x.mean() if config.norm is layer_norm else 0.0
    scale = 1 + scale if config.norm is offset_rms_norm else scale
    out = (x - centre) / math.sqrt(((x - centre) ** 2).mean() + config.norm_epsilon) * scale
    return out if bias is None else out + bias


def activation(config, x):
    if config.activation is silu:
        return x / (1 + np.exp(-x))
    if config.activation is gelu:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert config.activation is exact_gelu
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def rotated(config, x, position, bound, far):
    """One head's features; the frequencies of a scaling are held to transformers by their own tests."""
    if config.positions is learned:
        return x
    size = int(len(x) * config.rope_fraction)
    local = bound and config.rope_local_theta is not None
    theta, factor = config.rope_local_theta if local else config.rope_theta, 1.0
    inverse = [theta ** (-2 * i / size) for i in range(size // 2)]
    if config.rope_scaling is not None and not local:
        long = {"long": far} if isinstance(config.rope_scaling, LongRopeScaling) else {}
        inverse, factor = config.rope_scaling.frequencies(size, theta, **long)
    out = x.copy()
    for i in range(size // 2):
        turn = factor * np.exp(1j * position * float(inverse[i])) * (x[i] + 1j * x[i + size // 2])
        out[i], out[i + size // 2] = turn.real, turn.imag
    return out


def capped(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def sees(config, bound, t, s, segments):
    return s <= t and segments[s] == segments[t] and (not bound or t - s < config.window)


def attention(config, bound, q_TNH, k_TKH, v_TKH, segments):
    T, N, H = q_TNH.shape
    group = N // k_TKH.shape[1]
    scale = 1 / math.sqrt(H) if config.attention_scale is None else config.attention_scale
    out = np.zeros((T, N, H))
    for t in range(T):
        for n in range(N):
            seen = [s for s in range(T) if sees(config, bound, t, s, segments)]
            scores = [scale * q_TNH[t, n] @ k_TKH[s, n // group] for s in seen]
            weights = np.exp(capped(np.array(scores), config.attention_softcap))
            out[t, n] = sum(w * v_TKH[s, n // group] for w, s in zip(weights / weights.sum(), seen, strict=True))
    return out


def feed_forward(config, up, gate):
    return activation(config, gate) * up if config.gated else activation(config, up)


def mixture(config, weights, x_TD):
    """Every token by itself, through the experts with the largest probabilities."""
    out = np.zeros_like(x_TD)
    for t, x in enumerate(x_TD):
        p = np.exp(x @ weights["router_LDE"])
        p = p / p.sum()
        best = sorted(range(config.experts), key=lambda e: -p[e])[: config.experts_per_token]
        total = sum(p[e] for e in best) if config.normalise_experts else 1.0
        for e in best:
            gate = x @ weights["gate_LEDF"][e] if config.gated else None
            out[t] += p[e] / total * feed_forward(config, x @ weights["up_LEDF"][e], gate) @ weights["down_LEFD"][e]
    return out


def logits(config, outer, layers, tokens, positions, segments, inside=None):
    """Logits [T, vocab_size] of one row; `outer` and `layers` are dicts of float64 arrays.

    A list `inside` is given each layer's states, queries, keys and values.
    """
    x = np.stack([outer["embedding_VD"][token] for token in tokens]) * config.embedding_scale
    if config.positions is learned:
        x = x + np.stack([outer["position_TD"][p] for p in positions])
    far = isinstance(config.rope_scaling, LongRopeScaling) and max(positions) >= config.rope_scaling.original_max_length

    def each(name, letters, rows, weights):
        """Norm of each token, over all axes that the scale has behind its layers."""
        scale, bias = weights[f"{name}_scale_{letters}"], weights.get(f"{name}_bias_{letters}")
        flat = rows.reshape(-1, scale.size)
        bias = None if bias is None else bias.ravel()
        return np.stack([norm(config, row, scale.ravel(), bias) for row in flat]).reshape(rows.shape)

    def linear(rows, word, weights):
        (name,) = [n for n in weights if n.split("_")[0] == word and "bias" not in n and "norm" not in n]
        taken = 2 if word == "mix" else 1
        out = np.tensordot(rows, weights[name], axes=taken)
        bias = weights.get(f"{word}_bias_L{name.split('_')[1][1 + taken :]}")
        return out if bias is None else out + bias

    for layer in range(config.layers):
        weights = {name: stacked[layer] for name, stacked in layers.items()}
        bound = config.window is not None and config.window_pattern[layer % len(config.window_pattern)]
        h = each("attention_norm", "LD", x, weights) if config.pre_norm else x
        q, k, v = (linear(h, word, weights) for word in ("query", "key", "value"))
        if config.qk_norm:
            q, k = each("query_norm", "LH", q, weights), each("key_norm", "LH", k, weights)
        if config.qk_norm_whole:
            q, k = each("query_norm", "LNH", q, weights), each("key_norm", "LKH", k, weights)
        q, k = (
            np.stack(
                [[rotated(config, head, p, bound, far) for head in row] for row, p in zip(y, positions, strict=True)]
            )
            for y in (q, k)
        )
        h = linear(attention(config, bound, q, k, v, segments), "mix", weights)
        x = x + (each("attention_post_norm", "LD", h, weights) if config.post_norm else h)
        h = each("ff_norm", "LD", x, weights) if config.pre_norm else x
        if config.experts:
            h = mixture(config, weights, h)
        else:
            gate = linear(h, "gate", weights) if config.gated else None
            h = linear(feed_forward(config, linear(h, "up", weights), gate), "down", weights)
        x = x + (each("ff_post_norm", "LD", h, weights) if config.post_norm else h)
        if inside is not None:
            inside.append((x, q, k, v))
    head = outer["embedding_VD" if config.tied else "head_VD"][: config.vocab_size]
    out = capped(each("final_norm", "D", x, outer) @ head.T, config.logit_softcap)
    out[:, list(config.specials.never)] = -1e9
    return out
