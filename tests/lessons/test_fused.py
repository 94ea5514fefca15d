"""Fused losses against the dense form: values, gradients, meshes, and the memory that they take."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from lessons.test_divergences import NAMED

from epigone.lessons.chunks import Mesh
from epigone.lessons.divergences import forward_kl
from epigone.lessons.fused import fused_loss
from epigone.lessons.heads import NEVER, Head, Hidden
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.lessons.sparse import Rest, Sparse
from epigone.models.sharding import make_mesh

B, T, D, E, V = 8, 6, 12, 20, 48
"""Batch, time, features of the student and of the teacher, rows of both heads."""
OBJECTIVES = {name: Objective(divergence, temperature=1.7) for name, (divergence, _) in NAMED.items()}
OBJECTIVES |= {"text": TEXT_ALONE, "mixed": Objective(forward_kl, temperature=0.6, hard_weight=0.3)}
HEADS = {
    "plain": (Head(), Head()),
    "padded": (Head(vocab_size=41), Head(vocab_size=41)),
    "capped": (Head(vocab_size=43, scale=0.7, soft_cap=2.5, never=(0, 3)), Head(vocab_size=43, never=(0, 3))),
}
MESH = Mesh(("data", "fsdp"), "tensor")


def inputs(seed=0, bias=True):
    """Hidden states and heads of a student and a teacher, targets, and weights with padding."""
    draw = np.random.default_rng(seed)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)  # noqa: E731
    student = Hidden(normal(B, T, D), normal(V, D), normal(V) if bias else None)
    teacher = Hidden(normal(B, T, E), normal(V, E), normal(V) if bias else None)
    weights = draw.uniform(size=(B, T)).astype(np.float32) * (draw.uniform(size=(B, T)) > 0.3)
    return student, teacher, draw.integers(4, 40, (B, T)).astype(np.int32), weights


def logits(head, hidden):
    """As the definition says."""
    raw = hidden.hidden_BTD @ hidden.weight_VD.T + (0 if hidden.bias_V is None else hidden.bias_V)
    raw = raw * head.scale
    if head.soft_cap is not None:
        raw = head.soft_cap * jnp.tanh(raw / head.soft_cap)
    places = jnp.arange(raw.shape[-1])
    return jnp.where((places >= (head.vocab_size or V)) | jnp.isin(places, jnp.array(head.never, int)), NEVER, raw)


def dense(objective, heads, student, teacher, targets, weights):
    loss = objective.loss(logits(heads[0], student), logits(heads[1], teacher), targets)
    return jnp.sum(loss * weights), loss


def fused(objective, heads, student, teacher, targets, weights, **given):
    return fused_loss(objective.loss, student, teacher, targets, weights, heads=heads, **given)


def both(function, *arguments):
    """Sum, losses, and the gradient by all parts of the student."""
    return jax.jit(jax.value_and_grad(function, has_aux=True))(*arguments)


def same(found, expected, atol=1e-5):
    for mine, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("heads", HEADS)
def test_values_and_gradients_are_those_of_the_dense_form(name, heads):
    given = inputs()
    expected = both(partial(dense, OBJECTIVES[name], HEADS[heads]), *given)
    same(both(partial(fused, OBJECTIVES[name], HEADS[heads], chunk=7), *given), expected)


@pytest.mark.parametrize("chunk", [1, 5, 48, 1000, None])
def test_no_chunk_changes_anything(chunk):
    given = inputs(1, bias=False)
    expected = both(partial(dense, OBJECTIVES["mixed"], HEADS["plain"]), *given)
    same(both(partial(fused, OBJECTIVES["mixed"], HEADS["plain"], chunk=chunk), *given), expected)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_no_mesh_changes_anything(name, sizes):
    given = inputs(2)
    expected = both(partial(dense, OBJECTIVES[name], HEADS["capped"]), *given)
    with jax.set_mesh(make_mesh(*sizes)):
        cut = jax.tree.map(jnp.asarray, given)
        found = both(partial(fused, OBJECTIVES[name], HEADS["capped"], mesh=MESH, chunk=5), *cut)
    same(found, expected)


def test_gradients_lie_where_the_weights_lie():
    student, *rest = inputs(3)
    expected = both(partial(dense, OBJECTIVES["mixed"], HEADS["padded"]), student, *rest)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        specs = Hidden(P(("data", "fsdp")), P("tensor", "fsdp"), P("tensor"))
        student = jax.tree.map(jax.device_put, student, specs)
        found = both(partial(fused, OBJECTIVES["mixed"], HEADS["padded"], mesh=MESH), student, *rest)
        for mine, spec in zip(found[1], specs, strict=True):
            assert mine.sharding.is_equivalent_to(jax.NamedSharding(jax.sharding.get_mesh(), spec), mine.ndim)
    same(found, expected)


def squared_hellinger(student_logits_BTV, teacher_logits_BTV, *, temperature=1.0, temperature_squared=True):
    """One that knows nothing of a vocabulary that is cut."""
    s, p = (jax.nn.log_softmax(x / temperature, axis=-1) for x in (student_logits_BTV, teacher_logits_BTV))
    return 1.0 - jnp.exp(0.5 * (s + p)).sum(-1)


def test_a_divergence_of_a_fork_sees_whole_rows():
    given, objective = inputs(4), Objective(squared_hellinger, hard_weight=0.2)
    expected = both(partial(dense, objective, HEADS["padded"]), *given)
    with jax.set_mesh(make_mesh(2, 1, 4)):
        cut = jax.tree.map(jnp.asarray, given)
        same(both(partial(fused, objective, HEADS["padded"], mesh=MESH, chunk=5), *cut), expected)


@pytest.mark.parametrize("rows", [44, 56])
def test_a_teacher_with_other_padding(rows):
    student, teacher, targets, weights = inputs(5)
    heads = HEADS["padded"]
    expected = both(partial(dense, OBJECTIVES["mixed"], heads), student, teacher, targets, weights)
    other = teacher._replace(
        weight_VD=np.resize(np.vstack([teacher.weight_VD, teacher.weight_VD]), (rows, E)),
        bias_V=np.resize(teacher.bias_V, rows),
    )
    same(both(partial(fused, OBJECTIVES["mixed"], heads), student, other, targets, weights), expected)


def test_a_teacher_whose_logits_are_at_hand_and_none_at_all():
    student, teacher, targets, weights = inputs(6)
    known = logits(Head(), teacher)
    expected = both(partial(dense, OBJECTIVES["mixed"], HEADS["plain"]), student, teacher, targets, weights)
    same(both(partial(fused, OBJECTIVES["mixed"], HEADS["plain"], chunk=9), student, known, targets, weights), expected)
    short = both(partial(fused, OBJECTIVES["mixed"], HEADS["padded"]), student, known[..., :41], targets, weights)
    expected = both(partial(dense, OBJECTIVES["mixed"], HEADS["padded"]), student, teacher, targets, weights)
    same(short, expected)
    expected = both(partial(dense, TEXT_ALONE, HEADS["plain"]), student, teacher, targets, weights)
    same(both(partial(fused, TEXT_ALONE, HEADS["plain"], chunk=9), student, None, targets, weights), expected)


def test_the_cotangent_of_the_sum_and_the_weights_count():
    student, teacher, targets, weights = inputs(7)

    def twice(function, student, weights):
        total, _ = function(OBJECTIVES["mixed"], HEADS["plain"], student, teacher, targets, weights)
        return total**2 / weights.sum()

    found, expected = (jax.grad(partial(twice, f), argnums=(0, 1))(student, weights) for f in (fused, dense))
    same(found, expected, atol=1e-4)


def test_bfloat16_states_are_rounded_where_the_dense_form_rounds_them():
    student, teacher, targets, weights = inputs(8, bias=False)
    low = lambda x: x._replace(hidden_BTD=jnp.asarray(x.hidden_BTD, jnp.bfloat16))  # noqa: E731
    given = (low(student), low(teacher), targets, weights)

    def reference(student, teacher, targets, weights):
        wide = partial(jnp.einsum, "btd,vd->btv", preferred_element_type=jnp.float32)
        made = [wide(x.hidden_BTD, x.weight_VD.astype(jnp.bfloat16)) for x in (student, teacher)]
        loss = OBJECTIVES["mixed"].loss(*made, targets)
        return jnp.sum(loss * weights), loss

    found, expected = (
        both(f, *given) for f in (partial(fused, OBJECTIVES["mixed"], HEADS["plain"], chunk=7), reference)
    )
    same(found[0], expected[0])
    assert found[1].hidden_BTD.dtype == jnp.bfloat16
    for mine, wanted in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(np.float32(mine), np.float32(wanted), rtol=0.02, atol=0.02)


def compiled(function, tokens, vocabulary, size=64, teacher=None):
    """A loss with its gradient, for teachers of the student's shape or for what is given instead."""
    kind = jax.ShapeDtypeStruct
    hidden = Hidden(kind((1, tokens, size), jnp.float32), kind((vocabulary, size), jnp.float32))
    rows = kind((1, tokens), jnp.int32), kind((1, tokens), jnp.float32)
    step = jax.jit(jax.value_and_grad(function, has_aux=True))
    return step.lower(hidden, teacher or hidden, *rows).compile()


def temporaries(function, tokens, vocabulary, size=64):
    """Bytes that a compiled loss needs beside its arguments and results."""
    return compiled(function, tokens, vocabulary, size).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", ["forward_kl", "logit_mse", "text", "mixed", "draws"])
def test_no_chunk_of_logits_is_copied(name):
    """Where a loss is written over its logits, XLA copies them if it wants to read them afterwards: at every block."""
    objective, teacher = OBJECTIVES.get(name, OBJECTIVES["forward_kl"]), None
    if name == "draws":
        kept = jax.ShapeDtypeStruct((1, 512, 4), jnp.int32), jax.ShapeDtypeStruct((1, 512, 4), jnp.float32)
        teacher = Sparse(*kept, jax.ShapeDtypeStruct((1, 512), jnp.float32), Rest.SAMPLED)
    program = compiled(partial(fused, objective, (Head(), Head()), chunk=512), 512, 8192, teacher=teacher).as_text()
    assert re.search(r"f32\[512,8192\]", program)
    assert not re.findall(r"f32\[512,8192\]\S* copy\(", program)


@pytest.mark.parametrize("name", ["forward_kl", "adaptive_kl", "jsd", "mixed"])
def test_memory_does_not_grow_with_tokens_times_vocabulary(name):
    heads = (Head(), Head())
    small, large = (temporaries(partial(fused, OBJECTIVES[name], heads, chunk=256), n, 8192) for n in (1024, 8192))
    assert large - small < 8192 * 64 * 4 * 4  # a few arrays [tokens, features]
    full = temporaries(partial(dense, OBJECTIVES[name], heads), 8192, 8192)
    assert full > 8192 * 8192 * 4


def test_a_large_vocabulary_takes_a_tenth_of_the_dense_form():
    heads, objective = (Head(), Head()), OBJECTIVES["forward_kl"]
    mine = temporaries(partial(fused, objective, heads), 4096, 128_256)
    full = temporaries(partial(dense, objective, heads), 4096, 128_256)
    assert mine <= full / 10
    assert mine <= 1.3e9
