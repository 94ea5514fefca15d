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
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

LOGITS_BYTES = 450_000_000
"""Bytes of the logits of a chunk, in float32, for each of the two models."""

ROWS_BYTES = 2**22
"""On a CPU, bytes of the rows whose losses are taken at once: what is made of them stays in the cache."""

SUM_BYTES = 2**25
"""On a CPU, bytes of the head's gradient that are added to at once, for the same reason."""

NEVER = -1e9
"""The logit of what is never predicted."""

Loss = Callable[..., Any]
"""`(student_logits_BTV, teacher_logits_BTV or None, targets_BT, vocab_axis=...)` -> [B, T], as `Objective.loss`."""


@dataclass(frozen=True)
class Head:
    """How hidden states become logits, but for the weights: cap(scale (hidden @ weight.T + bias)).

    Attributes:
        vocab_size: tokens that can be predicted; rows behind them are padding and get no probability. None: all rows.
        scale: factor on the logits.
        soft_cap: bound c of c tanh(logits / c); None for none.
        never: ids that are never predicted.
    """

    vocab_size: int | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    never: tuple[int, ...] = ()


class Hidden(NamedTuple):
    """Hidden states [B, T, D], and the weights of a head, [V, D] and [V] or None."""

    hidden_BTD: jax.Array
    weight_VD: jax.Array
    bias_V: jax.Array | None = None


class Mesh(NamedTuple):
    """Mesh axes over which the batch and the vocabulary are cut; none where no mesh is set."""

    batch: tuple[str, ...] = ()
    vocab: str | None = None


class Fused(NamedTuple):
    """What is compiled for: the loss, the heads of student and teacher, the mesh, and tokens of a chunk."""

    loss: Loss
    student: Head
    teacher: Head
    mesh: Mesh
    chunk: int | None


def fused_loss(
    loss: Loss,
    student: Hidden,
    teacher: Hidden | Float[Array, "B T V"] | None,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    heads: tuple[Head, Head | None] = (Head(), None),
    mesh: Mesh = Mesh(),
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """sum_bt weights_bt loss_bt, and loss_bt itself, which carries no gradient.

    Args:
        loss: of logits, per token.
        student: gets a gradient in all its parts.
        teacher: hidden states and head, or logits [B, T, V] that are at hand, or None; a constant.
        targets_BT: the next tokens, for losses that read them.
        weights_BT: of the tokens.
        heads: the heads of both; a teacher without one has the student's.
        mesh: the axes of the mesh that is set.
        chunk: tokens whose logits are made at once, on each device; by default as LOGITS_BYTES allow.

    Returns: float32 numbers, in the units of the loss.
    """
    mesh, arguments = _placed(mesh, student, teacher, targets_BT, weights_BT)
    return _fused(Fused(loss, heads[0], heads[1] or heads[0], mesh, chunk), *arguments)


def per_token(
    measure: Loss,
    student: Hidden,
    teacher: Hidden | Float[Array, "B T V"] | None,
    targets_BT: Int[Array, "B T"],
    *,
    heads: tuple[Head, Head | None] = (Head(), None),
    mesh: Mesh = Mesh(),
    chunk: int | None = None,
) -> Any:
    """What `measure` says of each token: any tree of [B, T] that it makes of logits, and no gradient.

    Args: those of `fused_loss`. `measure` is called as a loss is, with the logits of some tokens at a time.
    """
    mesh, arguments = _placed(mesh, student, teacher, targets_BT, jnp.zeros(targets_BT.shape))
    return _forward(Fused(measure, heads[0], heads[1] or heads[0], mesh, chunk), *arguments[:3])


def _placed(mesh: Mesh, student: Hidden, teacher: Any, targets: jax.Array, weights: jax.Array) -> tuple[Mesh, Any]:
    """The arguments over one vocabulary and where the mesh, if one is set, wants them; a teacher is a constant."""
    if isinstance(teacher, Hidden):
        teacher = _as_many_rows(jax.lax.stop_gradient(teacher), student.weight_VD.shape[0])
    elif teacher is not None:
        more = student.weight_VD.shape[0] - teacher.shape[-1]
        teacher = jax.lax.stop_gradient(teacher)
        teacher = jnp.pad(teacher, ((0, 0), (0, 0), (0, more)), constant_values=NEVER) if more else teacher
    arguments = (student, teacher, targets, weights)
    if jax.sharding.get_abstract_mesh().empty:
        return Mesh(), arguments
    return mesh, jax.tree.map(jax.reshard, arguments, _specs(mesh, student, teacher))


def _specs(mesh: Mesh, student: Hidden, teacher: Any) -> tuple[Any, ...]:
    """Where the arguments lie."""
    rows: Any = P(mesh.batch or None)
    vocab: Any = P(mesh.vocab)

    def hidden(given: Hidden) -> Hidden:
        return Hidden(rows, vocab, None if given.bias_V is None else vocab)

    logits = None if teacher is None else P(mesh.batch or None, None, mesh.vocab)
    return hidden(student), hidden(teacher) if isinstance(teacher, Hidden) else logits, rows, rows


def _as_many_rows(hidden: Hidden, rows: int) -> Hidden:
    """Vocabularies that differ in their padding alone: rows of the head are added or taken away at its end."""
    have = hidden.weight_VD.shape[0]
    if have == rows:
        return hidden
    more = max(0, rows - have)
    weight, bias = jnp.pad(hidden.weight_VD, ((0, more), (0, 0)))[:rows], hidden.bias_V
    return hidden._replace(weight_VD=weight, bias_V=None if bias is None else jnp.pad(bias, (0, more))[:rows])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(how: Fused, student: Hidden, teacher: Any, targets_BT: jax.Array, weights_BT: jax.Array) -> Any:
    loss_BT = _forward(how, student, teacher, targets_BT)
    return jnp.sum(loss_BT * weights_BT), loss_BT


def _fused_fwd(how: Fused, student: Hidden, teacher: Any, targets_BT: jax.Array, weights_BT: jax.Array) -> Any:
    out = (P(), P(how.mesh.batch or None), _specs(how.mesh, student, teacher)[0])
    total, loss_BT, gradients = _mapped(how, partial(_local, how), out, student, teacher, targets_BT, weights_BT)
    return (total, loss_BT), (gradients, loss_BT)


def _fused_bwd(how: Fused, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    gradients, loss_BT = kept
    student = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients)
    return student, None, None, loss_BT * cotangents[0]


_fused.defvjp(_fused_fwd, _fused_bwd)


def _forward(how: Fused, student: Hidden, teacher: Any, targets_BT: jax.Array) -> Any:
    """What the loss says of each token, [B, T], without gradients."""
    return _mapped(how, partial(_local_values, how), P(how.mesh.batch or None), student, teacher, targets_BT)


def _mapped(how: Fused, local: Callable[..., Any], out: Any, student: Hidden, teacher: Any, *rows: jax.Array) -> Any:
    """`local` on every device of the mesh, with its own part of all arguments."""
    if how.mesh == Mesh():
        return local(student, teacher, *rows)
    specs = _specs(how.mesh, student, teacher)[: 2 + len(rows)]
    return jax.shard_map(local, in_specs=specs, out_specs=out)(student, teacher, *rows)


class _Heads(NamedTuple):
    """The weights of both heads in the type of their hidden states; those of a teacher with logits are None."""

    student_VD: jax.Array
    student_bias_V: jax.Array | None
    teacher_VD: jax.Array | None
    teacher_bias_V: jax.Array | None


def _pieces(how: Fused, student: Hidden, teacher: Any, *rows: jax.Array) -> tuple[_Heads, int, Any]:
    """Both heads, the rows whose losses are taken at once, and all that is given for a token as [pieces, C, ...]."""
    pieces, C, R = _sizes(rows[0].size, student.weight_VD.shape[0], how.chunk)
    known = teacher if isinstance(teacher, Hidden) else Hidden(teacher, *[None] * 2)  # type: ignore[arg-type]
    # A bias counts as one that differs between devices: else its gradient would be summed over them at every chunk.
    bias_V = None if student.bias_V is None else _varying(student.bias_V, how.mesh.batch)
    types = (student.hidden_BTD.dtype, getattr(known.hidden_BTD, "dtype", None))
    weights = [w if w is None else w.astype(t) for w, t in zip((student[1], known[1]), types, strict=True)]
    heads = _Heads(weights[0], bias_V, weights[1], known.bias_V)
    return heads, R, jax.tree.map(partial(_cut, pieces, C), (student.hidden_BTD, known.hidden_BTD, *rows))


def _local_values(how: Fused, student: Hidden, teacher: Any, targets_BT: jax.Array) -> Any:
    """What the loss says of the tokens that are on this device."""
    heads, R, parts = _pieces(how, student, teacher, targets_BT)

    def chunk(_: None, part: Any) -> tuple[None, Any]:
        blocks = jax.tree.map(lambda x: x.reshape(-1, R, *x.shape[1:]), (*_both_logits(heads, *part[:2]), part[2]))
        return None, jax.lax.map(lambda block: _values(how, heads, block[0], heads.student_bias_V, *block[1:]), blocks)

    values = jax.lax.scan(chunk, None, parts)[1]
    return jax.tree.map(lambda x: _whole(x.reshape(-1, x.shape[-1]), targets_BT.shape), values)


def _local(
    how: Fused, student: Hidden, teacher: Any, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array, Hidden]:
    """Sum, losses and gradients of the tokens that are on this device."""
    batch, vocab = how.mesh
    heads, R, parts = _pieces(how, student, teacher, targets_BT, weights_BT)
    shapes = (student.weight_VD, student.bias_V)
    everywhere = (*batch, vocab) if vocab else batch
    sums = jax.tree.map(lambda x: _varying(jnp.zeros(x.shape, jnp.float32), everywhere), shapes)
    begin = (_varying(jnp.zeros(()), batch), sums)
    (total, sums), (loss_PC, hidden_PCD) = jax.lax.scan(partial(_chunk, how, heads, R), begin, parts)
    if batch:
        total, sums = jax.lax.psum((total, sums), batch)
    by_head = jax.tree.map(lambda g, x: g.astype(x.dtype), sums, shapes)
    return total, _whole(loss_PC, targets_BT.shape), Hidden(_whole(hidden_PCD, targets_BT.shape), *by_head)


def _cut(pieces: int, C: int, x_BT: jax.Array) -> jax.Array:
    """[B, T, ...] as [pieces, C, ...], with zeros at the end."""
    flat = x_BT.reshape(-1, *x_BT.shape[2:])
    more = ((0, pieces * C - len(flat)), *((0, 0),) * (flat.ndim - 1))
    return jnp.pad(flat, more).reshape(pieces, C, *flat.shape[1:])


def _whole(x_PC: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """And back."""
    flat = x_PC.reshape(-1, *x_PC.shape[2:])
    return flat[: shape[0] * shape[1]].reshape(*shape, *flat.shape[1:])


def _both_logits(heads: _Heads, hidden_CD: jax.Array, known_C: Any) -> tuple[jax.Array, Any]:
    """Products [C, V] of states and heads; a teacher's logits as they are."""
    known_CV = known_C if heads.teacher_VD is None else _product(known_C, heads.teacher_VD)
    return _product(hidden_CD, heads.student_VD), known_CV


def _chunk(how: Fused, heads: _Heads, R: int, carry: Any, part: Any) -> tuple[Any, Any]:
    """The loss of C tokens: adds to its sum and to the head's gradient; gives losses and the gradient by the states."""
    hidden_CD, known_C, *rest = part
    raw_CV, known_CV = _both_logits(heads, hidden_CD, known_C)
    blocks = jax.tree.map(lambda x: x.reshape(-1, R, *x.shape[1:]), (known_CV, *rest))
    first = jnp.arange(0, len(hidden_CD), R)
    begin = (carry[0], carry[1][1], raw_CV)
    (total, by_bias_V, by_raw_CV), loss_PR = jax.lax.scan(partial(_rows, how, heads, R), begin, (first, *blocks))
    by_raw_CV = by_raw_CV.astype(hidden_CD.dtype)
    wide = partial(jnp.einsum, preferred_element_type=jnp.float32)
    by_hidden_CD = wide("cv,vd->cd", by_raw_CV, heads.student_VD)
    if how.mesh.vocab is not None:
        by_hidden_CD = jax.lax.psum(by_hidden_CD, how.mesh.vocab)
    by_weight_VD = _add_product(carry[1][0], by_raw_CV, hidden_CD)
    return (total, (by_weight_VD, by_bias_V)), (loss_PR.reshape(-1), by_hidden_CD.astype(hidden_CD.dtype))


def _add_product(sum_VD: jax.Array, by_raw_CV: jax.Array, hidden_CD: jax.Array) -> jax.Array:
    """sum + by_raw.T @ hidden. On a CPU a few rows at a time: XLA would write the whole product, and read it again."""

    def product(by_raw: jax.Array) -> jax.Array:
        return jnp.einsum("cv,cd->vd", by_raw, hidden_CD, preferred_element_type=jnp.float32)

    V, D = sum_VD.shape
    size = min(V, max(1, SUM_BYTES // (4 * D)))
    if jax.default_backend() != "cpu" or size == V:
        return sum_VD + product(by_raw_CV)

    def add(first: Any, size: int, sum_VD: jax.Array) -> jax.Array:
        more = product(jax.lax.dynamic_slice_in_dim(by_raw_CV, first, size, 1))
        rows = jax.lax.dynamic_slice_in_dim(sum_VD, first, size)
        return jax.lax.dynamic_update_slice_in_dim(sum_VD, rows + more, first, 0)

    sum_VD = jax.lax.fori_loop(0, V // size, lambda i, x: add(i * size, size, x), sum_VD)
    return add(V - V % size, V % size, sum_VD) if V % size else sum_VD


def _rows(how: Fused, heads: _Heads, R: int, carry: Any, part: Any) -> tuple[Any, jax.Array]:
    """The losses of R tokens; in the carry their logits make room for the gradient by them."""
    total, by_bias_V, raw_CV = carry
    first, *rest = part

    def loss(raw_RV: jax.Array, bias_V: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        return _weighted(how, heads, raw_RV, bias_V, *rest)

    raw_RV = jax.lax.dynamic_slice_in_dim(raw_CV, first, R)
    more, pull, loss_R = jax.vjp(loss, raw_RV, heads.student_bias_V, has_aux=True)
    by_raw_RV, more_V = pull(jnp.ones_like(more))
    raw_CV = jax.lax.dynamic_update_slice_in_dim(raw_CV, by_raw_RV, first, 0)
    return (total + more, jax.tree.map(jnp.add, by_bias_V, more_V), raw_CV), loss_R


def _weighted(
    how: Fused, heads: _Heads, raw_RV: jax.Array, bias_V: Any, known_RV: Any, targets_R: jax.Array, weights_R: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the losses of R tokens, and the losses."""
    loss_R = _values(how, heads, raw_RV, bias_V, known_RV, targets_R)
    return jnp.sum(loss_R * weights_R), loss_R


def _values(how: Fused, heads: _Heads, raw_RV: jax.Array, bias_V: Any, known_RV: Any, targets_R: jax.Array) -> Any:
    """What the loss says of R tokens."""
    vocab = how.mesh.vocab
    logits_RV = _logits(how.student, vocab, raw_RV, bias_V)
    if known_RV is not None:
        read = _masked if heads.teacher_VD is None else partial(_logits, bias_V=heads.teacher_bias_V)
        known_RV = read(how.teacher, vocab, known_RV)[None]
    more = {} if vocab is None else {"vocab_axis": vocab}
    return jax.tree.map(lambda x: x[0], how.loss(logits_RV[None], known_RV, targets_R[None], **more))


def _sizes(tokens: int, vocabulary: int, chunk: int | None) -> tuple[int, int, int]:
    """How many chunks, tokens of a chunk, and rows of it whose losses are taken at once, which divide it."""
    pieces, C = _parts(tokens, chunk or LOGITS_BYTES // (4 * vocabulary))
    if jax.default_backend() != "cpu":
        return pieces, C, C
    blocks, R = _parts(C, ROWS_BYTES // (4 * vocabulary))
    return pieces, blocks * R, R


def _parts(size: int, most: int) -> tuple[int, int]:
    """How many parts of one size, at most `most`, hold it, and that size."""
    count = -(-size // max(1, most))
    return count, -(-size // count)


def _varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """A constant as one that may differ from device to device, as what is added to it does."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _product(hidden_CD: jax.Array, weight_VD: jax.Array) -> jax.Array:
    return jnp.einsum("cd,vd->cv", hidden_CD, weight_VD, preferred_element_type=jnp.float32)


def _logits(head: Head, vocab: str | None, raw_CV: jax.Array, bias_V: jax.Array | None = None) -> jax.Array:
    logits_CV = raw_CV if bias_V is None else raw_CV + bias_V
    logits_CV = logits_CV if head.scale == 1.0 else logits_CV * head.scale
    if head.soft_cap is not None:
        logits_CV = head.soft_cap * jnp.tanh(logits_CV / head.soft_cap)
    return _masked(head, vocab, logits_CV)


def _masked(head: Head, vocab: str | None, logits_CV: jax.Array) -> jax.Array:
    """What is never predicted, and what is no token, at -1e9."""
    V = logits_CV.shape[-1]
    places_V = jnp.arange(V) + (0 if vocab is None else jax.lax.axis_index(vocab) * V)
    off = [places_V == token for token in head.never]
    if head.vocab_size is not None and (vocab is not None or head.vocab_size < V):
        off.append(places_V >= head.vocab_size)
    return jnp.where(reduce(jnp.logical_or, off), NEVER, logits_CV) if off else logits_CV
