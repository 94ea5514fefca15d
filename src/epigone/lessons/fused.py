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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from epigone.lessons.ensemble import Several
from epigone.lessons.sparse import Sparse

LOGITS_BYTES = 450_000_000
"""Bytes of the logits of a chunk, in float32, for each of the two models."""

ROWS_BYTES = 2**22
"""On a CPU, bytes of the rows whose losses are taken at once: what is made of them stays in the cache."""

SUM_BYTES = 2**25
"""On a CPU, bytes of the head's gradient that are added to at once, for the same reason."""

NEVER = -1e9
"""The logit of what is never predicted."""

Loss = Callable[..., jax.Array]
"""`(student_logits_BTV, teacher's logits, Sparse or None, targets_BT, vocab_axis=...)` -> [B, T]: `Objective.loss`."""


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
    """What is compiled for: the loss, the heads of student and teachers, the mesh, and tokens of a chunk."""

    loss: Loss
    student: Head
    teachers: tuple[Head, ...]
    mesh: Mesh
    chunk: int | None


def fused_loss(
    loss: Loss,
    student: Hidden,
    teacher: Hidden | Float[Array, "B T V"] | Sparse | Several | None,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    heads: tuple[Head | None, ...] = (Head(),),
    mesh: Mesh = Mesh(),
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """sum_bt weights_bt loss_bt, and loss_bt itself, which carries no gradient.

    Args:
        loss: of logits, per token.
        student: gets a gradient in all its parts.
        teacher: hidden states and head, or logits [B, T, V] or a few scores a token that are at hand, or several
            teachers, or None; a constant.
        targets_BT: the next tokens, for losses that read them.
        weights_BT: of the tokens.
        heads: the student's head, then those of the teachers; a teacher without one has the student's.
        mesh: the axes of the mesh that is set.
        chunk: tokens whose logits are made at once, on each device; by default as LOGITS_BYTES allow.

    Returns: float32 numbers, in the units of the loss.
    """
    V = student.weight_VD.shape[0]
    teacher = _with_members(teacher, [_as_many_rows(member, V) for member in _members(teacher)])
    arguments = (student, jax.lax.stop_gradient(teacher), targets_BT, weights_BT)
    if jax.sharding.get_abstract_mesh().empty:
        mesh = Mesh()
    else:
        arguments = jax.tree.map(jax.reshard, arguments, _specs(mesh, student, teacher))
    own, *theirs = (head or heads[0] or Head() for head in heads)
    return _fused(Fused(loss, own, tuple(theirs) or (own,), mesh, chunk), *arguments)


def _members(teacher: Any) -> tuple[Any, ...]:
    """Of several teachers each; else the one."""
    return teacher.members if isinstance(teacher, Several) else (teacher,)


def _with_members(teacher: Any, members: Sequence[Any]) -> Any:
    """And back."""
    return replace(teacher, members=tuple(members)) if isinstance(teacher, Several) else members[0]


def map_logits(
    function: Callable[..., Any],
    head: Head,
    given: Hidden | Float[Array, "B T V"],
    *more_BT: Array,
    mesh: Mesh = Mesh(),
    chunk: int | None = None,
) -> Any:
    """function(logits [C, V], more [C, ...]...) of all tokens, a chunk at a time, each with its whole row of logits.

    Args:
        function: gives a tree of arrays [C, ...].
        head: of the hidden states, or what is never predicted of logits that are at hand.
        given: hidden states and head, or logits.
        more_BT: arrays [B, T, ...] that `function` gets beside the logits.
        mesh: the axes of the mesh that is set.
        chunk: tokens whose logits are made at once, on each device; by default as LOGITS_BYTES allow.

    Returns: the tree with arrays [B, T, ...].
    """

    hidden = given if isinstance(given, Hidden) else Hidden(given, None)  # type: ignore[arg-type]
    if jax.sharding.get_abstract_mesh().empty or mesh == Mesh():
        return _map_local(function, head, Mesh(), chunk, hidden, *more_BT)
    rows: Any = P(mesh.batch or None)
    whole = _specs(mesh, hidden, given)[1]
    specs = (whole if isinstance(whole, Hidden) else Hidden(whole, None), *[rows] * len(more_BT))  # type: ignore[arg-type]
    arguments = jax.tree.map(jax.reshard, (hidden, *more_BT), specs)
    # Rows are gathered, and so the same on the devices that share a vocabulary; the type system cannot know that.
    local = partial(_map_local, function, head, mesh, chunk)
    return jax.shard_map(local, in_specs=specs, out_specs=rows, check_vma=False)(*arguments)


def _map_local(
    function: Callable[..., Any], head: Head, mesh: Mesh, chunk: int | None, hidden: Hidden, *more_BT: Array
) -> Any:
    """`map_logits` of the tokens that are on this device."""
    vocab, weight_VD, shape = mesh.vocab, hidden.weight_VD, hidden.hidden_BTD.shape
    V = (shape[2] if weight_VD is None else len(weight_VD)) * (1 if vocab is None else jax.lax.axis_size(vocab))
    pieces, C = _parts(shape[0] * shape[1], chunk or LOGITS_BYTES // (4 * V))

    def piece(part: Any) -> Any:
        states_CD, *rest = part
        if weight_VD is None:
            logits_CV = _masked(head, vocab, states_CD)
        else:
            raw_CV = _product(states_CD, weight_VD.astype(states_CD.dtype))
            logits_CV = _logits(head, vocab, raw_CV, hidden.bias_V)
        if vocab is not None:
            logits_CV = jax.lax.all_gather(logits_CV, vocab, axis=1, tiled=True)
        return function(logits_CV, *rest)

    parts = jax.tree.map(partial(_cut, pieces, C), (hidden.hidden_BTD, *more_BT))
    return jax.tree.map(lambda x: _whole(x, shape[:2]), jax.lax.map(piece, parts))


def _specs(mesh: Mesh, student: Hidden, teacher: Any) -> tuple[Any, ...]:
    """Where the arguments lie."""
    rows: Any = P(mesh.batch or None)
    vocab: Any = P(mesh.vocab)

    def hidden(given: Hidden) -> Hidden:
        return Hidden(rows, vocab, None if given.bias_V is None else vocab)

    def known(given: Any) -> Any:
        if isinstance(given, Hidden):
            return hidden(given)
        return jax.tree.map(
            lambda _: rows if isinstance(given, Sparse) else P(mesh.batch or None, None, mesh.vocab), given
        )

    one = _with_members(teacher, [known(member) for member in _members(teacher)])
    return hidden(student), replace(one, weights_BTM=rows) if isinstance(one, Several) else one, rows, rows


def _as_many_rows(given: Any, rows: int) -> Any:
    """Vocabularies that differ in padding alone: rows of the head, or logits, are added or taken away at the end."""
    if given is None or isinstance(given, Sparse):
        return given
    have = given.weight_VD.shape[0] if isinstance(given, Hidden) else given.shape[-1]
    if have == rows:
        return given
    more = max(0, rows - have)
    if not isinstance(given, Hidden):
        return jnp.pad(given, ((0, 0), (0, 0), (0, more)), constant_values=NEVER)[..., :rows]
    weight, bias = jnp.pad(given.weight_VD, ((0, more), (0, 0)))[:rows], given.bias_V
    return given._replace(weight_VD=weight, bias_V=None if bias is None else jnp.pad(bias, (0, more))[:rows])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(how: Fused, student: Hidden, teacher: Any, targets_BT: jax.Array, weights_BT: jax.Array) -> Any:
    return _mapped(how, False, student, teacher, targets_BT, weights_BT)[:2]


def _fused_fwd(how: Fused, student: Hidden, teacher: Any, targets_BT: jax.Array, weights_BT: jax.Array) -> Any:
    total, loss_BT, gradients = _mapped(how, True, student, teacher, targets_BT, weights_BT)
    return (total, loss_BT), (gradients, loss_BT)


def _fused_bwd(how: Fused, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    gradients, loss_BT = kept
    student = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients)
    return student, None, None, loss_BT * cotangents[0]


_fused.defvjp(_fused_fwd, _fused_bwd)


def _mapped(how: Fused, gradients: bool, student: Hidden, teacher: Any, targets: jax.Array, weights: jax.Array) -> Any:
    """Sum, losses and gradients: `_local` on every device of the mesh."""
    local = partial(_local, how, gradients)
    if how.mesh == Mesh():
        return local(student, teacher, targets, weights)
    specs = _specs(how.mesh, student, teacher)
    out = (P(), specs[2], specs[0] if gradients else None)
    return jax.shard_map(local, in_specs=specs, out_specs=out)(student, teacher, targets, weights)


class _Heads(NamedTuple):
    """Weights and bias of each head, weights in the type of the hidden states; None of a teacher with scores."""

    student: tuple[jax.Array, jax.Array | None]
    teachers: tuple[tuple[jax.Array, jax.Array | None] | None, ...]


def _local(
    how: Fused, gradients: bool, student: Hidden, teacher: Any, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array, Hidden | None]:
    """Sum, losses and gradients of the tokens that are on this device."""
    batch, vocab = how.mesh
    pieces, C, R = _sizes(targets_BT.size, student.weight_VD.shape[0], how.chunk)
    # A bias counts as one that differs between devices: else its gradient would be summed over them at every chunk.
    bias_V = None if student.bias_V is None else _varying(student.bias_V, batch)
    members = _members(teacher)
    heads = _Heads(_weights(student._replace(bias_V=bias_V)), tuple(map(_weights, members)))  # type: ignore[arg-type]
    states = _with_members(teacher, [x.hidden_BTD if isinstance(x, Hidden) else x for x in members])
    parts = jax.tree.map(partial(_cut, pieces, C), (student.hidden_BTD, states, targets_BT, weights_BT))
    sums = None
    if gradients:
        shapes = (student.weight_VD, student.bias_V)
        everywhere = (*batch, vocab) if vocab else batch
        sums = jax.tree.map(lambda x: _varying(jnp.zeros(x.shape, jnp.float32), everywhere), shapes)
    begin = (_varying(jnp.zeros(()), batch), sums)
    (total, sums), (loss_PC, hidden_PCD) = jax.lax.scan(partial(_chunk, how, gradients, heads, R), begin, parts)
    if batch:
        total, sums = jax.lax.psum((total, sums), batch)
    loss_BT = _whole(loss_PC, targets_BT.shape)
    if not gradients:
        return total, loss_BT, None
    by_head = jax.tree.map(lambda g, x: g.astype(x.dtype), sums, (student.weight_VD, student.bias_V))
    return total, loss_BT, Hidden(_whole(hidden_PCD, targets_BT.shape), *by_head)


def _weights(given: Any) -> tuple[jax.Array, jax.Array | None] | None:
    """Of a head."""
    return (given.weight_VD.astype(given.hidden_BTD.dtype), given.bias_V) if isinstance(given, Hidden) else None


def _cut(pieces: int, C: int, x_BT: jax.Array) -> jax.Array:
    """[B, T, ...] as [pieces, C, ...], with zeros at the end."""
    flat = x_BT.reshape(-1, *x_BT.shape[2:])
    more = ((0, pieces * C - len(flat)), *((0, 0),) * (flat.ndim - 1))
    return jnp.pad(flat, more).reshape(pieces, C, *flat.shape[1:])


def _whole(x_PC: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """And back."""
    flat = x_PC.reshape(-1, *x_PC.shape[2:])
    return flat[: shape[0] * shape[1]].reshape(*shape, *flat.shape[1:])


def _chunk(how: Fused, gradients: bool, heads: _Heads, R: int, carry: Any, part: Any) -> tuple[Any, Any]:
    """The loss of C tokens: adds to its sum and to the head's gradient; gives losses and the gradient by the states."""
    hidden_CD, known_C, *rest = part
    raw_CV = _product(hidden_CD, heads.student[0])
    pairs = zip(_members(known_C), heads.teachers, strict=True)
    known_C = _with_members(known_C, [given if head is None else _product(given, head[0]) for given, head in pairs])
    if not gradients:
        total, loss_C = _weighted(how, heads, raw_CV, heads.student[1], known_C, *rest)
        return (carry[0] + total, None), (loss_C, None)
    blocks = jax.tree.map(lambda x: x.reshape(-1, R, *x.shape[1:]), (known_C, *rest))
    first = jnp.arange(0, len(hidden_CD), R)
    begin = (carry[0], carry[1][1], raw_CV)
    (total, by_bias_V, by_raw_CV), loss_PR = jax.lax.scan(partial(_rows, how, heads, R), begin, (first, *blocks))
    by_raw_CV = by_raw_CV.astype(hidden_CD.dtype)
    wide = partial(jnp.einsum, preferred_element_type=jnp.float32)
    by_hidden_CD = wide("cv,vd->cd", by_raw_CV, heads.student[0])
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
    more, pull, loss_R = jax.vjp(loss, raw_RV, heads.student[1], has_aux=True)
    by_raw_RV, more_V = pull(jnp.ones_like(more))
    raw_CV = jax.lax.dynamic_update_slice_in_dim(raw_CV, by_raw_RV, first, 0)
    return (total + more, jax.tree.map(jnp.add, by_bias_V, more_V), raw_CV), loss_R


def _weighted(
    how: Fused, heads: _Heads, raw_RV: jax.Array, bias_V: Any, known_R: Any, targets_R: jax.Array, weights_R: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the losses of R tokens, and the losses."""
    vocab = how.mesh.vocab
    logits_RV = _logits(how.student, vocab, raw_RV, bias_V)
    members = [_read(*each, vocab) for each in zip(_members(known_R), how.teachers, heads.teachers, strict=True)]
    known_R = jax.tree.map(lambda x: x[None], _with_members(known_R, members))
    more = {} if vocab is None else {"vocab_axis": vocab}
    loss_R = how.loss(logits_RV[None], known_R, targets_R[None], **more)[0]
    return jnp.sum(loss_R * weights_R), loss_R


def _read(given: Any, head: Head, weights: Any, vocab: str | None) -> Any:
    """A teacher's logits, where it gives logits."""
    if given is None or isinstance(given, Sparse):
        return given
    return _masked(head, vocab, given) if weights is None else _logits(head, vocab, given, weights[1])


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
