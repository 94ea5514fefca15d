"""Objectives inside the teacher: against NumPy in float64, by finite differences, at their edges, and however split."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from scipy.special import log_softmax, rel_entr, softmax

from epigone.errors import UserError
from epigone.lessons import hidden
from epigone.lessons.hidden import hidden_cosine, hidden_mse, info_nce, relation_kl
from epigone.models.sharding import make_mesh

B, T, D, E, C = 4, 7, 6, 8, 5
SEGMENTS = np.array([[1] * 7, [1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 2, 0, 0], [1, 2, 3, 4, 4, 5, 5]], np.int32)


def arrays(seed, dtype=np.float32):
    """States, heads and projections of a student of 2 heads and a teacher of 4 with 2 keys."""
    draw = np.random.default_rng(seed).normal
    return {
        "s_BTD": draw(size=(B, T, D)).astype(dtype),
        "t_BTE": draw(size=(B, T, E)).astype(dtype),
        "w_DE": draw(size=(D, E)).astype(dtype),
        "w_DC": draw(size=(D, C)).astype(dtype),
        "w_EC": draw(size=(E, C)).astype(dtype),
        "s_q": draw(size=(B, T, 2, 4)).astype(dtype),
        "s_k": draw(size=(B, T, 2, 4)).astype(dtype),
        "t_q": draw(size=(B, T, 4, 3)).astype(dtype),
        "t_k": draw(size=(B, T, 2, 3)).astype(dtype),
    }


def mse(a, segments):
    return hidden_mse(a["s_BTD"], a["t_BTE"], a["w_DE"])


def cosine(a, segments):
    return hidden_cosine(a["s_BTD"], a["t_BTE"], a["w_DE"])


def queries(a, segments):
    return relation_kl((a["s_q"], a["s_q"]), (a["t_q"], a["t_q"]), segments, 4)


def attention(a, segments):
    return relation_kl((a["s_q"], a["s_k"]), (a["t_q"], a["t_k"]), segments, 2)


def contrast(a, segments, negatives=None):
    return info_nce(a["s_BTD"], a["t_BTE"], a["w_DC"], a["w_EC"], segments, 0.3, negatives)


def near_contrast(a, segments):
    return contrast(a, segments, 2)


KINDS = {f.__name__: f for f in (mse, cosine, queries, attention, contrast, near_contrast)}
LEARNED = ("s_BTD", "w_DE", "w_DC", "w_EC", "s_q", "s_k")
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def weighted(kind, a, segments):
    """The sum over all that is no padding."""
    return jnp.sum(kind(a, segments) * (segments > 0))


both = jax.jit(jax.value_and_grad(weighted, argnums=1), static_argnums=0)


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def relations(left, right, segments, heads):
    """Of every query, head and token, as in the papers, with loops."""
    right = np.repeat(right, left.shape[2] // right.shape[2], axis=2)
    left, right = (x.reshape(B, T, heads, -1) for x in (left, right))
    found = np.zeros((B, heads, T, T))
    for b, r, t in np.ndindex(B, heads, T):
        seen = [u for u in range(t + 1) if segments[b, u] == segments[b, t]]
        found[b, r, t, seen] = softmax(right[b, seen, r] @ left[b, t, r] / np.sqrt(left.shape[-1]))
    return found


def reference(name, a, segments):
    """In float64, as the papers write it."""
    a = {key: np.float64(x) for key, x in a.items()}
    if name == "mse":
        return ((a["s_BTD"] @ a["w_DE"] - a["t_BTE"]) ** 2).mean(-1)
    if name == "cosine":
        return 1 - (unit(a["s_BTD"] @ a["w_DE"]) * unit(a["t_BTE"])).sum(-1)
    if name in ("queries", "attention"):
        heads, key = (4, "q") if name == "queries" else (2, "k")
        s, t = (relations(a[f"{who}_q"], a[f"{who}_{key}"], segments, heads) for who in "st")
        return rel_entr(t, s).sum(-1).mean(1)
    found, reach = np.zeros((B, T)), T if name == "contrast" else 2
    u, v = unit(a["s_BTD"] @ a["w_DC"]), unit(a["t_BTE"] @ a["w_EC"])
    for b, t in np.ndindex(B, T):
        others = [j for j in range(T) if j == t or (segments[b, j] > 0 and abs(j - t) <= reach)]
        found[b, t] = -log_softmax(v[b, others] @ u[b, t] / 0.3)[others.index(t)]
    return found


@pytest.mark.parametrize("name", KINDS)
def test_agrees_with_numpy_in_float64_and_is_never_negative(name):
    found = jax.jit(KINDS[name])(arrays(0), SEGMENTS)
    assert found.dtype == jnp.float32
    assert found.shape == (B, T)
    assert np.all(found >= 0)
    np.testing.assert_allclose(found, reference(name, arrays(0), SEGMENTS), rtol=3e-5, atol=1e-6)
    with jax.enable_x64(True):
        exact = jax.jit(KINDS[name])(arrays(1, np.float64), SEGMENTS)
        np.testing.assert_allclose(exact, reference(name, arrays(1, np.float64), SEGMENTS), rtol=1e-9, atol=1e-12)
        assert exact.dtype == jnp.float64


@every_kind
def test_gradients_by_finite_differences_and_none_to_the_teacher(kind):
    with jax.enable_x64(True):
        a = jax.tree.map(jnp.asarray, arrays(2, np.float64))
        learned = {name: a[name] for name in LEARNED}
        loss = jax.jit(lambda learned: weighted(kind, a | learned, jnp.asarray(SEGMENTS)))
        check_grads(loss, (learned,), order=1, modes=("rev",))
        by = both(kind, a, SEGMENTS)[1]
    assert not any(np.any(by[name]) for name in ("t_BTE", "t_q", "t_k"))
    assert any(np.any(by[name]) for name in LEARNED)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_models_give_exactly_nothing(dtype):
    """Both sides are made in one program, of one input; the projection is the identity."""
    x = jnp.asarray(3 * np.random.default_rng(3).normal(size=(2, 33, 4, 16)), dtype)
    segments = jnp.asarray(np.repeat([[1, 2, 0]], 11, axis=1).repeat(2, 0), jnp.int32)

    def state(x):
        return jnp.tanh(x * jnp.asarray(1.7, dtype)).reshape(2, 33, 64)

    def losses(mine, theirs, projection):
        heads = [state(x).reshape(2, 33, 4, 16) for x in (mine, theirs)]
        yield hidden_mse(state(mine), state(theirs), projection)
        yield hidden_cosine(state(mine), state(theirs), projection)
        yield relation_kl((heads[0], heads[0]), (heads[1], heads[1]), segments, 8)
        yield relation_kl((heads[0], 2 * heads[0]), (heads[1], 2 * heads[1]), segments)

    def both(mine, theirs, projection):
        values, pull = jax.vjp(lambda mine, w: jnp.stack(list(losses(mine, theirs, w))), mine, projection)
        return values, pull(jnp.ones_like(values))

    values, gradients = jax.jit(both)(x, jnp.array(x), jnp.eye(64))
    assert not np.any(values)
    assert not any(np.any(gradient) for gradient in gradients)


@every_kind
def test_padding_changes_nothing(kind):
    """Longer rows of anything, in segment 0."""
    a = arrays(4)
    rest = arrays(5)
    longer = {n: x if n.startswith("w_") else np.concatenate([x, rest[n][:, :3]], 1) for n, x in a.items()}
    segments = np.pad(SEGMENTS, ((0, 0), (0, 3)))
    value, by = both(kind, a, SEGMENTS)
    padded, by_padded = both(kind, longer, segments)
    assert float(padded) == pytest.approx(float(value), rel=1e-6)
    for name, wanted in by.items():
        cut = by_padded[name] if name.startswith("w_") else by_padded[name][:, :T]
        np.testing.assert_allclose(cut, wanted, atol=2e-6)


@pytest.mark.parametrize("kind", [mse, cosine, queries, attention], ids=lambda f: f.__name__)
def test_packing_changes_nothing(kind):
    """Row 1 holds two texts: each alone gives the same numbers. The contrast looks at the whole row, and says so."""
    a = arrays(6)
    kind = jax.jit(kind)
    together = kind(a, SEGMENTS)[1]
    parts = []
    for piece in (slice(0, 3), slice(3, 7)):
        alone = {n: x if n.startswith("w_") else x[:, piece] for n, x in a.items()}
        parts.append(kind(alone, np.ones((B, piece.stop - piece.start), np.int32))[1])
    np.testing.assert_allclose(together, np.concatenate(parts), rtol=1e-5, atol=1e-6)


def test_only_what_is_before_in_the_same_text_counts_for_a_relation():
    def of_one(kind, row):
        return jax.jit(jax.grad(lambda a: kind(a, jnp.asarray(SEGMENTS))[row, 4]))(arrays(7))

    by = np.asarray(of_one(queries, 1)["s_q"])
    assert np.any(by[1, 3:5], axis=(-1, -2)).all()
    assert not np.any(by[1, [0, 1, 2, 5, 6]])
    assert not np.any(by[[0, 2, 3]])
    by = np.asarray(of_one(near_contrast, 0)["s_BTD"])
    assert np.any(by[0, 4])
    assert not np.any(np.delete(by[0], 4, axis=0))


def parted(a):
    """Arrays with rows, and weights."""
    weights = {name: x for name, x in a.items() if name.startswith("w_")}
    return {name: x for name, x in a.items() if name not in weights}, weights


@every_kind
def test_rows_alone_give_the_same(kind):
    a = arrays(8)
    rows, weights = parted(a)
    value, by = both(kind, a, SEGMENTS)
    each = [both(kind, {n: x[b : b + 1] for n, x in rows.items()} | weights, SEGMENTS[b : b + 1]) for b in range(B)]
    assert float(sum(v for v, _ in each)) == pytest.approx(float(value), rel=1e-6)
    for name in rows:
        np.testing.assert_allclose(np.concatenate([g[name] for _, g in each]), by[name], atol=2e-6)
    for name in weights:
        np.testing.assert_allclose(sum(g[name] for _, g in each), by[name], atol=5e-6)


@every_kind
def test_eight_devices_give_the_same(kind):
    a, mesh, batch = arrays(8), make_mesh(2, 2, 2), P(("data", "fsdp"))
    where = {name: P() if name.startswith("w_") else batch for name in a}
    with jax.set_mesh(mesh):
        local = jax.shard_map(kind, in_specs=(where, batch), out_specs=batch)
        cut = jax.device_put((a, SEGMENTS), jax.tree.map(lambda spec: NamedSharding(mesh, spec), (where, batch)))
        found = both(local, *cut)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), found, both(kind, a, SEGMENTS))


@pytest.mark.parametrize("kind", [queries, attention, contrast, near_contrast], ids=lambda f: f.__name__)
def test_a_few_queries_at_a_time_give_the_same(kind, monkeypatch):
    value, by = both(kind, arrays(9), SEGMENTS)
    monkeypatch.setattr(hidden, "SCORES_BYTES", 4 * B * 4 * T * 2)
    few, by_few = both(partial(kind), arrays(9), SEGMENTS)
    assert float(few) == pytest.approx(float(value), rel=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6), by_few, by)


def test_no_array_of_all_pairs_is_made_where_it_is_large(monkeypatch):
    """Temporaries of the compiled gradient, of 512 tokens and 8 heads; all scores of both models take 17 MB."""
    x = jnp.zeros((1, 512, 8, 2))

    def taken(size):
        monkeypatch.setattr(hidden, "SCORES_BYTES", size)
        loss = jax.grad(lambda q: relation_kl((q, q), (x, x), jnp.ones((1, 512), jnp.int32), 8).sum())
        return jax.jit(lambda q: loss(q)).lower(x).compile().memory_analysis().temp_size_in_bytes

    whole, few = taken(2**27), taken(2**19)
    assert whole > 16_000_000
    assert few < 5_000_000


@every_kind
def test_zero_states_have_finite_gradients(kind):
    zero = {name: np.zeros_like(x) if name[0] in "st" else x for name, x in arrays(0).items()}
    for a in (zero, arrays(0) | {name: zero[name] for name in ("s_BTD", "s_q")}, {n: 0 * x for n, x in zero.items()}):
        value, by = both(kind, a, SEGMENTS)
        assert np.isfinite(value)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(by))


def test_what_does_not_fit_is_named():
    a, segments = arrays(0), jnp.asarray(SEGMENTS)
    with pytest.raises(UserError, match="states of 6 and 8 features are compared: project"):
        hidden_mse(a["s_BTD"], a["t_BTE"])
    with pytest.raises(UserError, match="2 heads of the student and 4 of the teacher"):
        relation_kl((a["s_q"], a["s_q"]), (a["t_q"], a["t_q"]), segments)
    with pytest.raises(UserError, match="relation_heads=3 does not divide the 2 x 4 features"):
        relation_kl((a["s_q"], a["s_q"]), (a["t_q"], a["t_q"]), segments, 3)
    with pytest.raises(UserError, match="temperature=0: similarities"):
        info_nce(a["s_BTD"], a["t_BTE"], a["w_DC"], a["w_EC"], segments, 0)
