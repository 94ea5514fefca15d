"""How hidden states become logits; and what a teacher may give: states with a head, logits, or a few scores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from epigone.lessons.ensemble import Several
from epigone.lessons.sparse import Sparse

NEVER = -1e9
"""The logit of what is never predicted."""


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


class Beside(NamedTuple):
    """What a teacher of other tokens gives at the student's positions, over a vocabulary of its own.

    Attributes:
        given: hidden states and its head, or logits [B, T, W].
        counts_BT: 1 where both have read the same text, and else 0.
    """

    given: Any
    counts_BT: jax.Array


Weights = tuple[jax.Array, jax.Array | None]
"""Weight [V, D], in the type of the hidden states, and bias."""


def weights_of(given: Any) -> Weights | None:
    """Of a head; None of what is no hidden states."""
    return (given.weight_VD.astype(given.hidden_BTD.dtype), given.bias_V) if isinstance(given, Hidden) else None


def states_of(given: Any) -> Any:
    """Hidden states without their head; what is no hidden states as it is."""
    return given.hidden_BTD if isinstance(given, Hidden) else given


def members(teacher: Any) -> tuple[Any, ...]:
    """Of several teachers each; else the one."""
    if isinstance(teacher, Beside):
        return (teacher.given,)
    return teacher.members if isinstance(teacher, Several) else (teacher,)


def with_members(teacher: Any, changed: Sequence[Any]) -> Any:
    """And back."""
    if isinstance(teacher, Beside):
        return teacher._replace(given=changed[0])
    return replace(teacher, members=tuple(changed)) if isinstance(teacher, Several) else changed[0]


def rows_of(given: Any) -> int:
    """Rows of the vocabulary of states with a head or of logits; 0 of what has none."""
    if given is None or isinstance(given, Sparse):
        return 0
    return given.weight_VD.shape[0] if isinstance(given, Hidden) else given.shape[-1]


def of_rows(given: Any, rows: int) -> Any:
    """Vocabularies that differ in padding alone: rows of the head, or logits, are added or taken away at the end."""
    have = rows_of(given)
    if have in (0, rows):
        return given
    more = max(0, rows - have)
    if not isinstance(given, Hidden):
        return jnp.pad(given, ((0, 0), (0, 0), (0, more)), constant_values=NEVER)[..., :rows]
    weight, bias = jnp.pad(given.weight_VD, ((0, more), (0, 0)))[:rows], given.bias_V
    return given._replace(weight_VD=weight, bias_V=None if bias is None else jnp.pad(bias, (0, more))[:rows])


def alike(heads: Sequence[Head | None]) -> list[Head]:
    """The student's head and those of its teachers over the ids that all of them can predict.

    A teacher without a head has the student's.
    """
    known = [head.vocab_size for head in heads if head is not None and head.vocab_size is not None]
    return [replace(head or heads[0] or Head(), vocab_size=min(known, default=None)) for head in heads]


def product(given: Any, weights: Weights | None) -> Any:
    """hidden @ weight.T [C, V] in float32; what has no head as it is."""
    if weights is None:
        return given
    return jnp.einsum("cd,vd->cv", given, weights[0], preferred_element_type=jnp.float32)


def read(given: Any, weights: Weights | None, head: Head, vocab: str | None) -> Any:
    """Logits, from `product`; scores that were kept as they are. `vocab` is the mesh axis over which V is cut."""
    if given is None or isinstance(given, Sparse):
        return given
    if weights is not None:
        given = given if weights[1] is None else given + weights[1]
        given = given if head.scale == 1.0 else given * head.scale
        if head.soft_cap is not None:
            given = head.soft_cap * jnp.tanh(given / head.soft_cap)
    return _masked(given, head, vocab)


def _masked(logits_CV: jax.Array, head: Head, vocab: str | None) -> jax.Array:
    """What is never predicted, and what is no token, at -1e9."""
    V = logits_CV.shape[-1]
    places_V = jnp.arange(V) + (0 if vocab is None else jax.lax.axis_index(vocab) * V)
    off = [places_V == token for token in head.never]
    if head.vocab_size is not None and (vocab is not None or head.vocab_size < V):
        off.append(places_V >= head.vocab_size)
    return jnp.where(reduce(jnp.logical_or, off), NEVER, logits_CV) if off else logits_CV
