"""Tokens in chunks, so that no array [tokens, vocabulary] is made, and in parts over a mesh."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from epigone.devices import platform_in_use
from epigone.lessons.ensemble import Several
from epigone.lessons.heads import Beside, Head, Hidden, members, product, read, weights_of, with_members
from epigone.lessons.sparse import Sparse

LOGITS_BYTES = {"cpu": 450_000_000, "accelerator": 2**29}
"""Bytes of the logits of a chunk, in float32, for each of two models; the second is 1,024 tokens of 128,256 scores."""

TILE = 128
"""An accelerator multiplies matrices in tiles of so many rows: the last one costs as much if it is half empty."""

ROWS_BYTES = 2**22
"""On a CPU, bytes of the rows whose losses are taken at once: what is made of them stays in the cache."""


class Mesh(NamedTuple):
    """Mesh axes over which the batch and the vocabulary are cut; none where no mesh is set."""

    batch: tuple[str, ...] = ()
    vocab: str | None = None


def specs(mesh: Mesh, given: Any) -> Any:
    """Where hidden states with a head, logits or scores lie, of one teacher or several."""
    rows: Any = P(mesh.batch or None)

    def spec(one: Any) -> Any:
        if isinstance(one, Hidden):
            return Hidden(rows, P(mesh.vocab), None if one.bias_V is None else P(mesh.vocab))  # type: ignore[arg-type]
        scores = rows if isinstance(one, Sparse) else P(mesh.batch or None, None, mesh.vocab)
        return jax.tree.map(lambda _: scores, one)

    if isinstance(given, Beside):
        return Beside(spec(given.given), rows)
    all_of_it = with_members(given, [spec(one) for one in members(given)])
    return Several(all_of_it.members, rows, given.combine, given.weigh) if isinstance(given, Several) else all_of_it


def placed(mesh: Mesh, arguments: Any, where: Any) -> tuple[Mesh, Any]:
    """Arguments where a mesh wants them, if one is set; and no mesh, if none is."""
    if jax.sharding.get_abstract_mesh().empty:
        return Mesh(), arguments
    return mesh, jax.tree.map(jax.reshard, arguments, where)


def sizes(tokens: int, vocabulary: int, chunk: int | None) -> tuple[int, int]:
    """How many chunks, and tokens of a chunk: at most `chunk`, by default as LOGITS_BYTES allow."""
    cut_up, kind = (parts, "cpu") if platform_in_use() == "cpu" else (tiled, "accelerator")
    return cut_up(tokens, chunk or LOGITS_BYTES[kind] // (4 * vocabulary))


def with_rows(tokens: int, vocabulary: int, chunk: int | None) -> tuple[int, int, int]:
    """The same, and rows of a chunk whose losses are taken at once, which divide it."""
    pieces, C = sizes(tokens, vocabulary, chunk)
    if platform_in_use() != "cpu":
        return pieces, C, C
    blocks, R = parts(C, ROWS_BYTES // (4 * vocabulary))
    return pieces, blocks * R, R


def parts(size: int, most: int) -> tuple[int, int]:
    """How many parts of one size, at most `most`, hold it, and that size."""
    count = -(-size // max(1, most))
    return count, -(-size // count)


def tiled(size: int, most: int) -> tuple[int, int]:
    """The same in whole tiles, with the least that is empty; what is less than two tiles a part is cut as it is."""
    count, length = parts(size, most)
    if count == 1 or most < 2 * TILE:
        return count, length

    def tiles(count: int) -> int:
        return -(-size // (count * TILE)) * TILE

    count = min(range(-(-size // (most // TILE * TILE)), 2 * count + 1), key=lambda count: count * tiles(count))
    return count, tiles(count)


def cut(pieces: int, C: int, tree: Any) -> Any:
    """Arrays [B, T, ...] as [pieces, C, ...], with zeros at the end."""

    def one(x_BT: jax.Array) -> jax.Array:
        flat = x_BT.reshape(-1, *x_BT.shape[2:])
        more = ((0, pieces * C - len(flat)), *((0, 0),) * (flat.ndim - 1))
        return jnp.pad(flat, more).reshape(pieces, C, *flat.shape[1:])

    return jax.tree.map(one, tree)


def whole(tree: Any, shape: tuple[int, ...]) -> Any:
    """And back."""

    def one(x_PC: jax.Array) -> jax.Array:
        flat = x_PC.reshape(-1, *x_PC.shape[2:])
        return flat[: shape[0] * shape[1]].reshape(*shape, *flat.shape[1:])

    return jax.tree.map(one, tree)


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
    rows: Any = P(mesh.batch or None)
    where = (specs(mesh, given), *[rows] * len(more_BT))
    mesh, arguments = placed(mesh, (given, *more_BT), where)
    local = partial(_map_local, function, head, mesh, chunk)
    if mesh == Mesh():
        return local(*arguments)
    # Rows are gathered, and so the same on the devices that share a vocabulary; the type system cannot know that.
    return jax.shard_map(local, in_specs=where, out_specs=rows, check_vma=False)(*arguments)


def _map_local(
    function: Callable[..., Any], head: Head, mesh: Mesh, chunk: int | None, given: Any, *more_BT: Array
) -> Any:
    """`map_logits` of the tokens that are on this device."""
    weights, vocab = weights_of(given), mesh.vocab
    states = given.hidden_BTD if isinstance(given, Hidden) else given
    V = states.shape[2] if weights is None else len(weights[0])
    V *= 1 if vocab is None else jax.lax.axis_size(vocab)
    pieces, C = sizes(states.shape[0] * states.shape[1], V, chunk)

    def piece(part: Any) -> Any:
        states_CD, *rest = part
        logits_CV = read(product(states_CD, weights), weights, head, vocab)
        if vocab is not None:
            logits_CV = jax.lax.all_gather(logits_CV, vocab, axis=1, tiled=True)
        return function(logits_CV, *rest)

    return whole(jax.lax.map(piece, cut(pieces, C, (states, *more_BT))), states.shape[:2])
