"""Objectives over other tokens against a reference in float64, their gradients, and meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epigone.lessons.aligned import UNREAD, Aligned, aligned_loss, aligned_sums
from epigone.lessons.alignment import NO_TEXT, aligns, common_tokens, likelihood_matching, name_of, uld
from epigone.lessons.chunks import Mesh
from epigone.lessons.divergences import forward_kl, reverse_kl
from epigone.lessons.fused import fused_loss
from epigone.lessons.heads import Head, Hidden
from epigone.lessons.objective import Objective
from epigone.lessons.schedules import Linear
from epigone.models.sharding import make_mesh

B, T, U, D, E, V, W = 4, 6, 9, 5, 7, 24, 32
HEADS = (Head(vocab_size=22, never=(0,)), Head(vocab_size=29, never=(1,)))
OBJECTIVES = {
    "uld": Objective(uld, temperature=1.5),
    "common": Objective(common_tokens, temperature=1.5, hard_weight=0.3),
    "common, reverse": Objective(partial(common_tokens, divergence=reverse_kl), temperature_squared=False),
    "alm": Objective(likelihood_matching),
    "alm, mixed": Objective(partial(likelihood_matching, tau=3.0), temperature=2.0, hard_weight=0.4),
    "scheduled": Objective(likelihood_matching, temperature=Linear(2.0, 4.0, 8), hard_weight=Linear(0.0, 1.0, 8)),
    "uld, scheduled": Objective(uld, hard_weight=Linear(0.0, 1.0, 8)),
}
STEP = 4


def inputs(seed=0):
    """A student, and a teacher in rows of its own; chunks of one or two tokens of each side, and some that are none."""
    draw = np.random.default_rng(seed)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)  # noqa: E731
    student = Hidden(normal(B, T, D), normal(V, D), normal(V))
    chunk_BT = np.tile(np.array([0, 0, 1, -1, 3, 4], np.int32), (B, 1))
    chunk_BU = np.tile(np.array([0, 1, 1, -1, -1, 3, 3, 4, -1], np.int32), (B, 1))
    chunk_BT[1], chunk_BU[1] = -1, -1
    match_BT = draw.integers(0, U, (B, T)).astype(np.int32)
    match_BT[draw.uniform(size=(B, T)) < 0.3] = -1
    match_BT[0, -1] = UNREAD
    ids_V = np.full(V - 2, -1, np.int32)
    ids_V[[2, 3, 5, 7, 11]] = [3, 2, 28, 6, 0]
    targets_BU = draw.integers(2, 29, (B, U)).astype(np.int32)
    given = Hidden(normal(B, U, E), normal(W, E))
    teacher = Aligned(given, targets_BU, match_BT, chunk_BT, chunk_BU, ids_V)
    weights = draw.uniform(size=(B, T)).astype(np.float32) * (draw.uniform(size=(B, T)) > 0.2)
    return student, teacher, draw.integers(1, 22, (B, T)).astype(np.int32), weights


def total(objective, student, teacher, targets, weights, **how):
    knobs = objective.knobs(jnp.array(STEP))
    return aligned_loss(objective, student, teacher, targets, weights, heads=HEADS, knobs=knobs, **how)[0]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def logits(head, given):
    raw = np.asarray(given.hidden_BTD, np.float64) @ np.asarray(given.weight_VD, np.float64).T
    raw = raw if given.bias_V is None else raw + np.asarray(given.bias_V, np.float64)
    off = np.arange(raw.shape[-1]) >= head.vocab_size
    off[list(head.never)] = True
    return np.where(off, -1e9, raw)


def reference(objective, student, teacher, targets, weights):
    """In float64, a token and a chunk at a time."""
    at = lambda x: float(x(STEP)) if callable(x) else x  # noqa: E731
    temperature, hard = at(objective.temperature), at(objective.hard_weight)
    s_all, p_all = logits(HEADS[0], student), logits(HEADS[1], teacher.given)
    log_s, log_p = log_softmax(s_all / temperature), log_softmax(p_all / temperature)
    soft = 0.0
    name, given = name_of(objective.divergence), getattr(objective.divergence, "keywords", {})
    for b in range(B):
        if name == "likelihood_matching":
            for chunk in range(T):
                ours, theirs = (np.flatnonzero(x[b] == chunk) for x in (teacher.chunk_BT, teacher.chunk_BU))
                if not len(ours):
                    continue
                tau = given.get("tau", 100.0)
                s = np.exp(sum(log_s[b, t, targets[b, t]] for t in ours) / tau)
                p = np.exp(sum(log_p[b, u, teacher.targets_BU[b, u]] for u in theirs) / tau)
                kl = p * np.log(p / s) + (1 - p) * np.log((1 - p) / (1 - s))
                soft += min(weights[b, t] for t in ours) * tau * kl
            continue
        for t in range(T):
            u = teacher.match_BT[b, t]
            if u < 0:
                continue
            s, p = np.exp(log_s[b, t]), np.exp(log_p[b, u])
            if name == "uld":
                value = np.abs(np.sort(np.append(s, np.zeros(W - V)))[::-1] - np.sort(p)[::-1]).sum()
            else:
                ids = np.append(teacher.ids_V, [-1] * (V - len(teacher.ids_V)))
                known = ids >= 0
                s = np.append(s[known], s[~known].sum())
                p = np.append(p[ids[known]], 1 - p[ids[known]].sum())
                if given.get("divergence") is reverse_kl:
                    s, p = p, s
                value = sum(a * np.log(a / b) for a, b in zip(p, s, strict=True) if a > 1e-300)
            soft += weights[b, t] * value
    plain = log_softmax(s_all)
    text = -sum(weights[b, t] * plain[b, t, targets[b, t]] for b in range(B) for t in range(T))
    square = temperature**2 if objective.temperature_squared else 1.0
    return (1 - hard) * square * soft + hard * text


@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_and_gradients_are_those_of_the_definition(name):
    objective, (student, *rest) = OBJECTIVES[name], inputs()
    value, slopes = jax.jit(jax.value_and_grad(partial(total, objective, chunk=5)))(student, *rest)
    assert value == pytest.approx(reference(objective, student, *rest), rel=2e-5)
    draw, h = np.random.default_rng(1), 1e-5
    for field in Hidden._fields:
        array = np.asarray(getattr(student, field), np.float64)
        for _ in range(3):
            way = draw.normal(size=array.shape)
            ends = [reference(objective, student._replace(**{field: array + k * h * way}), *rest) for k in (1, -1)]
            slope = float(np.sum(np.asarray(getattr(slopes, field), np.float64) * way))
            assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=2e-3, abs=2e-3), field


@pytest.mark.parametrize("name", ["common", "alm, mixed"])
def test_no_mesh_and_no_chunk_changes_anything(name):
    objective, given = OBJECTIVES[name], inputs(2)
    wanted = jax.jit(jax.value_and_grad(partial(total, objective)))(*given)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        mesh = Mesh(("data", "fsdp"), "tensor")
        cut = jax.tree.map(jnp.asarray, given)
        found = jax.jit(jax.value_and_grad(partial(total, objective, mesh=mesh, chunk=3)))(*cut)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, wanted)


def itself(seed=3):
    """A teacher that is the student: the same tokens, states and head."""
    student, _, targets, weights = inputs(seed)
    place = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    return student, Aligned(student, targets, place, place, place, np.arange(V, dtype=np.int32)), targets, weights


@pytest.mark.parametrize("divergence", [uld, common_tokens, likelihood_matching])
def test_the_same_model_over_the_same_tokens_has_nothing_to_learn(divergence):
    student, teacher, targets, weights = itself()

    def loss(student):
        given = (Objective(divergence), student, teacher, targets, weights)
        return aligned_loss(*given, heads=(HEADS[0], HEADS[0]))[0]

    value, slopes = jax.jit(jax.value_and_grad(loss))(student)
    assert abs(float(value)) < 1e-6
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slopes)) < 1e-6


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_of_one_vocabulary_it_is_the_divergence_itself(divergence):
    student, teacher, targets, weights = itself(4)
    other = inputs(5)[0]
    teacher = teacher._replace(given=other)
    objective = Objective(divergence, temperature=1.7, hard_weight=0.2)
    aligned = Objective(partial(common_tokens, divergence=divergence), temperature=1.7, hard_weight=0.2)
    heads = (HEADS[0], HEADS[0])
    wanted = jax.value_and_grad(lambda x: fused_loss(objective.loss, x, other, targets, weights, heads=heads)[0])
    found = jax.value_and_grad(lambda x: aligned_loss(aligned, x, teacher, targets, weights, heads=heads)[0])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found(student), wanted(student))


def test_where_one_side_has_no_rest_the_other_is_renormalised():
    draw = np.random.default_rng(8)
    s, p = draw.normal(size=(1, 3, 5)).astype(np.float32), draw.normal(size=(1, 3, 8)).astype(np.float32)
    all_common = np.array([2, 0, 7, 5, 1], np.int32)
    np.testing.assert_allclose(common_tokens(s, p, ids_V=all_common), forward_kl(s, p[..., all_common]), rtol=1e-5)
    # What is no text takes no part: it is not where the teacher's other tokens are put.
    unknown = np.array([2, 0, 7, 5, NO_TEXT], np.int32)
    wanted = forward_kl(s[..., :4], p[..., unknown[:4]])
    np.testing.assert_allclose(common_tokens(s, p, ids_V=unknown), wanted, rtol=1e-5)
    slope = jax.grad(lambda s: common_tokens(s, p, ids_V=unknown).sum())(s)
    np.testing.assert_array_equal(slope[..., 4], 0.0)
    inside = np.array([3, 0, -1, 1, -1], np.int32)
    short = p[..., :3]
    wanted = forward_kl(s[..., [1, 3]], short[..., [0, 1]])
    only = np.where(inside == 3, -1, inside)
    np.testing.assert_allclose(
        common_tokens(s, jnp.where(jnp.arange(3) == 2, -1e9, short), ids_V=only), wanted, rtol=1e-5
    )


def test_a_teacher_whose_logits_are_at_hand():
    for name in ("uld", "alm, mixed"):
        student, teacher, targets, weights = inputs(6)
        dense = teacher._replace(given=logits(HEADS[1], teacher.given).astype(np.float32))
        of = jax.jit(partial(total, OBJECTIVES[name]))
        wanted, found = (float(of(student, x, targets, weights)) for x in (teacher, dense))
        assert found == pytest.approx(wanted, rel=1e-5)


def test_a_large_tau_looks_at_log_likelihoods_and_nothing_is_lost_at_probability_1():
    log_s, log_p = jnp.array([-3.0, -8.0, -1e-9, 0.0]), jnp.array([-5.0, -2.0, 0.0, -4.0])
    found = likelihood_matching(log_s, log_p, tau=1e4)
    a, b = -np.asarray(log_p[:2]), -np.asarray(log_s[:2])
    np.testing.assert_allclose(found[:2], a * np.log(a / b) - a + b, rtol=1e-2)
    assert found[2] == 0.0
    slopes = jax.vmap(jax.grad(lambda s, p: likelihood_matching(s, p, tau=1.0)))(log_s, log_p)
    assert np.isfinite(slopes).all()
    assert slopes[2] == 0.0


def test_what_is_aligned_is_counted():
    _, teacher, _, weights = inputs(7)
    sums = aligned_sums(teacher, jnp.asarray(weights))
    for name, there in (("aligned_positions", teacher.match_BT >= 0), ("unread", teacher.match_BT == UNREAD)):
        assert sums[name][0] == pytest.approx((weights * there).sum())
        assert sums[name][1] == pytest.approx(weights.sum())


def test_they_are_known_by_what_they_take():
    assert all(map(aligns, (uld, common_tokens, likelihood_matching, partial(common_tokens, divergence=reverse_kl))))
    assert not any(map(aligns, (forward_kl, reverse_kl)))
