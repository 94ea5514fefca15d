"""From hidden states to a loss and its gradient, a chunk of tokens at a time: no array [tokens, vocabulary] is made.

    total, loss_BT = fused_loss(objective.loss, student, teacher, targets_BT, weights_BT)

Where the dense form keeps the logits of all tokens, for both models, until the gradient is taken, here the logits of a
chunk are made, turned into their loss and at once into the gradients of hidden states and head, and forgotten. This is
possible because a loss is a weighted sum over tokens, and the weights are known before: only one number, the cotangent
of the sum, is missing, and the gradients are multiplied by it in the backward pass. So nothing is computed twice. (The
same idea is in Liger's fused losses, Hsu et al. 2024.)

On a mesh each device takes the tokens of its own part of the batch; where the vocabulary is cut, each has a part of
every row of logits, and sums over the vocabulary go over the devices. The head's gradient is summed over the devices
once, at the end.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from epigone.devices import platform_in_use
from epigone.lessons.chunks import Mesh, cut, placed, specs, whole, with_rows
from epigone.lessons.ensemble import Several
from epigone.lessons.heads import (
    Beside,
    Head,
    Hidden,
    Weights,
    alike,
    members,
    of_rows,
    product,
    read,
    rows_of,
    states_of,
    weights_of,
    with_members,
)
from epigone.lessons.policy_gradient import Drawn
from epigone.lessons.sparse import Sparse

SUM_BYTES = 2**25
"""On a CPU, bytes of the head's gradient that are added to at once, so that they stay in the cache."""

Loss = Callable[..., Any]
"""`(student's logits [B, T, V], what the teacher gives or None, targets_BT, vocab_axis=..., knobs=...)` -> [B, T], as
`Objective.loss`; the last two only where there are any."""

Given = Hidden | Float[Array, "B T V"] | Sparse | Several | Beside | None


class Fused(NamedTuple):
    """What is compiled for: the loss, the heads of student and teachers, the mesh, and tokens of a chunk."""

    loss: Loss
    student: Head
    teachers: tuple[Head, ...]
    mesh: Mesh
    chunk: int | None


def fused_loss(
    loss: Loss,
    student: Hidden,
    teacher: Given,
    targets_BT: Int[Array, "B T"] | Drawn,
    weights_BT: Float[Array, "B T"],
    *,
    heads: tuple[Head | None, ...] = (Head(),),
    mesh: Mesh = Mesh(),
    chunk: int | None = None,
    knobs: Any = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """sum_bt weights_bt loss_bt, and loss_bt itself, which carries no gradient.

    Args:
        loss: of logits, per token.
        student: gets a gradient in all its parts.
        teacher: hidden states and head, or logits [B, T, V] or a few scores a token that are at hand, or several
            teachers, or None, or one `Beside` it with a vocabulary of its own; a constant.
        targets_BT: the next tokens, for losses that read them; or what is known of tokens that were drawn.
        weights_BT: of the tokens.
        heads: the student's head, then those of the teachers; a teacher without one has the student's. Where they
            differ in vocab_size, the least counts for all: what is padding to one is masked in all.
        mesh: the axes of the mesh that is set.
        chunk: tokens whose logits are made at once, on each device; by default as LOGITS_BYTES allow.
        knobs: numbers that change from step to step, for losses that read them; constants.

    Returns: float32 numbers, in the units of the loss.
    """
    mesh, arguments = _arguments(mesh, student, teacher, targets_BT, weights_BT)
    return _fused(_how(loss, heads, mesh, chunk, teacher), jax.lax.stop_gradient(knobs), *arguments)


def per_token(
    measure: Loss,
    student: Hidden,
    teacher: Given,
    targets_BT: Int[Array, "B T"],
    *,
    heads: tuple[Head | None, ...] = (Head(),),
    mesh: Mesh = Mesh(),
    chunk: int | None = None,
    knobs: Any = None,
) -> Any:
    """What `measure` says of each token: any tree of [B, T] that it makes of logits, and no gradient.

    Args: those of `fused_loss`. `measure` is called as a loss is, with the logits of some tokens at a time.
    """
    mesh, arguments = _arguments(mesh, student, teacher, targets_BT, jnp.zeros(targets_BT.shape))
    return _forward(_how(measure, heads, mesh, chunk, teacher), knobs, *arguments[:3])


def _how(loss: Loss, heads: tuple[Head | None, ...], mesh: Mesh, chunk: int | None, teacher: Given) -> Fused:
    apart = isinstance(teacher, Beside)
    own, *theirs = [head or Head() for head in heads] if apart else alike(heads)
    return Fused(loss, own, tuple(theirs) or (own,), mesh, chunk)


def _arguments(mesh: Mesh, student: Hidden, teacher: Any, targets: Any, weights: jax.Array) -> tuple[Mesh, Any]:
    """The arguments over one vocabulary and where the mesh, if one is set, wants them; a teacher is a constant."""
    V = student.weight_VD.shape[0]
    if not isinstance(teacher, Beside):
        teacher = with_members(teacher, [of_rows(one, V) for one in members(teacher)])
    teacher = jax.lax.stop_gradient(teacher)
    *own, rows, _ = _specs(mesh, student, teacher)
    where = (*own, jax.tree.map(lambda _: rows, targets), rows)
    return placed(mesh, (student, teacher, targets, weights), where)


def _specs(mesh: Mesh, student: Hidden, teacher: Any) -> tuple[Any, ...]:
    rows: Any = P(mesh.batch or None)
    return specs(mesh, student), specs(mesh, teacher), rows, rows


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(how: Fused, knobs: Any, student: Hidden, teacher: Any, targets: Any, weights: jax.Array) -> Any:
    loss_BT = _forward(how, knobs, student, teacher, targets)
    return jnp.sum(loss_BT * weights), loss_BT


def _fused_fwd(how: Fused, knobs: Any, student: Hidden, teacher: Any, targets: Any, weights: jax.Array) -> Any:
    out = (P(), P(how.mesh.batch or None), specs(how.mesh, student))
    total, loss_BT, gradients = _mapped(how, _local, out, knobs, student, teacher, targets, weights)
    return (total, loss_BT), (gradients, loss_BT)


def _fused_bwd(how: Fused, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    gradients, loss_BT = kept
    student = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients)
    return None, student, None, None, loss_BT * cotangents[0]


_fused.defvjp(_fused_fwd, _fused_bwd)


def _forward(how: Fused, knobs: Any, student: Hidden, teacher: Any, targets_BT: Any) -> Any:
    """What the loss says of each token, [B, T], without gradients."""
    return _mapped(how, _local_values, P(how.mesh.batch or None), knobs, student, teacher, targets_BT)


def _mapped(
    how: Fused, local: Callable[..., Any], out: Any, knobs: Any, student: Hidden, teacher: Any, *rows: Any
) -> Any:
    """`local` on every device of the mesh, with its own part of all arguments."""
    if how.mesh == Mesh():
        return local(how, knobs, student, teacher, *rows)
    where = (jax.tree.map(lambda _: P(), knobs), *_specs(how.mesh, student, teacher)[: 2 + len(rows)])
    return jax.shard_map(partial(local, how), in_specs=where, out_specs=out)(knobs, student, teacher, *rows)


class _Chunked(NamedTuple):
    """Heads, rows whose losses are taken at once, knobs; and what is given for each token, [pieces, C, ...]."""

    student: Weights
    teachers: tuple[Weights | None, ...]
    R: int
    knobs: Any
    parts: Any


def _chunked(how: Fused, knobs: Any, student: Hidden, teacher: Any, *rows: Any) -> _Chunked:
    most = max(student.weight_VD.shape[0], *map(rows_of, members(teacher)))
    pieces, C, R = with_rows(student.hidden_BTD[..., 0].size, most, how.chunk)
    # A bias counts as one that differs between devices: else its gradient would be summed over them at every chunk.
    bias_V = None if student.bias_V is None else _varying(student.bias_V, how.mesh.batch)
    weights = (student.weight_VD.astype(student.hidden_BTD.dtype), bias_V)
    states = with_members(teacher, [states_of(one) for one in members(teacher)])
    parts = cut(pieces, C, (student.hidden_BTD, states, *rows))
    return _Chunked(weights, tuple(weights_of(one) for one in members(teacher)), R, knobs, parts)


def _local_values(how: Fused, knobs: Any, student: Hidden, teacher: Any, targets_BT: Any) -> Any:
    """What the loss says of the tokens that are on this device."""
    work = _chunked(how, knobs, student, teacher, targets_BT)

    def chunk(part: Any) -> Any:
        blocks = _in_blocks(work.R, (*_products(work, *part[:2]), part[2]))
        return jax.lax.map(lambda block: _values(how, work, block[0], work.student[1], *block[1:]), blocks)

    values = jax.lax.map(chunk, work.parts)
    return whole(jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), values), student.hidden_BTD.shape[:2])


def _local(
    how: Fused, knobs: Any, student: Hidden, teacher: Any, targets_BT: Any, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array, Hidden]:
    """Sum, losses and gradients of the tokens that are on this device."""
    batch, vocab = how.mesh
    work = _chunked(how, knobs, student, teacher, targets_BT, weights_BT)
    shapes = (student.weight_VD, student.bias_V)
    everywhere = (*batch, vocab) if vocab else batch
    total, sums = _varying(jnp.zeros(()), batch), jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    if len(work.parts[0]) == 1:  # nothing is there yet to which the head's gradient is added
        begin = (total, (None, _varying(sums[1], everywhere)))
        (total, sums), rows = _chunk(how, work, begin, jax.tree.map(lambda x: x[0], work.parts))
        loss_PC, hidden_PCD = (x[None] for x in rows)
    else:
        begin = (total, _varying(sums, everywhere))
        (total, sums), (loss_PC, hidden_PCD) = jax.lax.scan(partial(_chunk, how, work), begin, work.parts)
    if batch:
        total, sums = jax.lax.psum((total, sums), batch)
    by_head = jax.tree.map(lambda g, x: g.astype(x.dtype), sums, shapes)
    shape = weights_BT.shape
    return total, whole(loss_PC, shape), Hidden(whole(hidden_PCD, shape), *by_head)


def _products(work: _Chunked, hidden_CD: jax.Array, known_C: Any) -> tuple[jax.Array, Any]:
    """Products [C, V] of states and heads; what has no head as it is."""
    pairs = zip(members(known_C), work.teachers, strict=True)
    return product(hidden_CD, work.student), with_members(known_C, [product(*pair) for pair in pairs])


def _in_blocks(R: int, tree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, R, *x.shape[1:]), tree)


def _chunk(how: Fused, work: _Chunked, carry: Any, part: Any) -> tuple[Any, Any]:
    """The loss of C tokens: adds to its sum and to the head's gradient; gives losses and the gradient by the states."""
    hidden_CD, known_C, *rest = part
    raw_CV, known_C = _products(work, hidden_CD, known_C)
    first = jnp.arange(0, len(hidden_CD), work.R)
    begin, blocks = (carry[0], carry[1][1], raw_CV), _in_blocks(work.R, (known_C, *rest))
    (total, by_bias_V, by_raw_CV), loss_PR = jax.lax.scan(partial(_rows, how, work), begin, (first, *blocks))
    by_raw_CV = by_raw_CV.astype(hidden_CD.dtype)
    by_hidden_CD = jnp.einsum("cv,vd->cd", by_raw_CV, work.student[0], preferred_element_type=jnp.float32)
    if how.mesh.vocab is not None:
        by_hidden_CD = jax.lax.psum(by_hidden_CD, how.mesh.vocab)
    by_weight_VD = _add_product(carry[1][0], by_raw_CV, hidden_CD)
    return (total, (by_weight_VD, by_bias_V)), (loss_PR.reshape(-1), by_hidden_CD.astype(hidden_CD.dtype))


def _add_product(sum_VD: jax.Array | None, by_raw_CV: jax.Array, hidden_CD: jax.Array) -> jax.Array:
    """sum + by_raw.T @ hidden. On a CPU a few rows at a time: XLA would write the whole product, and read it again."""

    def by_weight(by_raw: jax.Array) -> jax.Array:
        return jnp.einsum("cv,cd->vd", by_raw, hidden_CD, preferred_element_type=jnp.float32)

    if sum_VD is None:
        return by_weight(by_raw_CV)
    V, D = sum_VD.shape
    size = min(V, max(1, SUM_BYTES // (4 * D)))
    if platform_in_use() != "cpu" or size == V:
        return sum_VD + by_weight(by_raw_CV)

    def add(first: Any, size: int, sum_VD: jax.Array) -> jax.Array:
        more = by_weight(jax.lax.dynamic_slice_in_dim(by_raw_CV, first, size, 1))
        rows = jax.lax.dynamic_slice_in_dim(sum_VD, first, size)
        return jax.lax.dynamic_update_slice_in_dim(sum_VD, rows + more, first, 0)

    sum_VD = jax.lax.fori_loop(0, V // size, lambda i, x: add(i * size, size, x), sum_VD)
    return add(V - V % size, V % size, sum_VD) if V % size else sum_VD


def _rows(how: Fused, work: _Chunked, carry: Any, part: Any) -> tuple[Any, jax.Array]:
    """The losses of R tokens; in the carry their logits make room for the gradient by them."""
    total, by_bias_V, raw_CV = carry
    first, *rest, weights_R = part

    def loss(raw_RV: jax.Array, bias_V: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        loss_R = _values(how, work, raw_RV, bias_V, *rest)
        return jnp.sum(loss_R * weights_R), loss_R

    raw_RV = jax.lax.dynamic_slice_in_dim(raw_CV, first, work.R)
    more, pull, loss_R = jax.vjp(loss, raw_RV, work.student[1], has_aux=True)
    # A loss that is not a number has no gradient. What matters is that the gradient depends on the loss: else XLA may
    # want to read these rows after they are written over, and copies the whole chunk at every few rows of it.
    by_raw_RV, more_V = pull(jnp.where(jnp.isnan(more), jnp.nan, 1.0).astype(more.dtype))
    raw_CV = jax.lax.dynamic_update_slice_in_dim(raw_CV, by_raw_RV, first, 0)
    return (total + more, jax.tree.map(jnp.add, by_bias_V, more_V), raw_CV), loss_R


def _values(how: Fused, work: _Chunked, raw_RV: jax.Array, bias_V: Any, known_R: Any, targets_R: Any) -> Any:
    """What the loss says of R tokens."""
    vocab = how.mesh.vocab
    logits_RV = read(raw_RV, (work.student[0], bias_V), how.student, vocab)
    triples = zip(members(known_R), work.teachers, how.teachers, strict=True)
    known_R = with_members(known_R, [read(*triple, vocab) for triple in triples])
    one = jax.tree.map(lambda x: x[None], (logits_RV, known_R, targets_R))
    more = ({} if vocab is None else {"vocab_axis": vocab}) | ({} if work.knobs is None else {"knobs": work.knobs})
    return jax.tree.map(lambda x: x[0], how.loss(*one, **more))


def _varying(tree: Any, axes: tuple[str, ...]) -> Any:
    """Constants as such that may differ from device to device, as what is added to them does."""
    return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), tree) if axes else tree
