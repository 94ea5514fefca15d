"""Rows to train on that a model writes itself: the beginnings of given rows, continued column by column.

A row holds texts one after the other, as packed rows do. Each begins as a segment of the given row does; when it ends,
the next one begins in the next column, as the next segment does, and as the first again when all have been used. So
rows are full, whatever is drawn, and one compiled program of T steps writes them all.
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from epigone.models.config import DecoderConfig
from epigone.models.decoder import structure
from epigone.models.sharding import Sharding, in_mesh, placed
from epigone.sampling import processors
from epigone.sampling.cache import empty_rings, read_one
from epigone.sampling.draw import draw, token_keys
from epigone.sampling.loop import Knobs, prepare, switches


class Writing(NamedTuple):
    """What the program is compiled for.

    `teacher`: the config of a second model, or None; its share m makes the mixture m P + (1 - m) S, token by token, of
    both distributions at the temperature. top_k and top_p then limit the mixture. Of a text, its first token (bos, but
    for a document that goes on from another row) and up to `prompt_tokens` more are given; up to `max_new` are drawn.
    `importance`: the weight of a drawn token y is S(y) / probability with which it was drawn, S at temperature 1, and
    otherwise 1. `tokens`: ids from there on are padding to one of the models and never drawn; None: there are none.
    """

    student: DecoderConfig
    teacher: DecoderConfig | None
    teacher_share: float
    prompt_tokens: int
    max_new: int
    knobs: Knobs
    importance: bool
    tokens: int | None = None


class Given(NamedTuple):
    """The rows whose beginnings are continued."""

    tokens_BT: jax.Array
    targets_BT: jax.Array
    segments_BT: jax.Array


class Cursor(NamedTuple):
    """Where each row is: the token it reads next, its place in its text, which text it is, how much of it is drawn."""

    token_B: jax.Array
    position_B: jax.Array
    text_B: jax.Array
    drawn_B: jax.Array


class Source(NamedTuple):
    """The given rows, and in them the columns at which segments begin, their number, and which targets lie inside."""

    given: Given
    first_BM: jax.Array
    count_B: jax.Array
    inside_BT: jax.Array


@partial(jax.jit, static_argnames="how")
def write_rows(
    how: Writing, params: Any, teacher_params: Any, given: Given, seed: Any, step: Any
) -> tuple[jax.Array, ...]:
    """Tokens, targets, weights, positions and segments [B, T] of rows as long as the given ones.

    Weights are 0 where the target was given. A text that is cut, after `max_new` tokens or at the row's end, has no
    end that was not drawn. A row without segments stays without. What is drawn depends on (seed, step), on the row's
    number, on the text's number in it and on the place in the text alone, up to float32 rounding.
    """
    B, T = given.tokens_BT.shape
    # What is known about rows is small, and whole on every device.
    source = _source(Given(*(placed(x, P()) for x in given)))
    key, row_B = jax.random.fold_in(jax.random.key(seed), step), jnp.arange(B)
    configs = (how.student,) if how.teacher is None else (how.student, how.teacher)
    readers = [_reader(*pair) for pair in zip(configs, (params, teacher_params), strict=False)]

    def write(carry: tuple[Cursor, list[Any]], column: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
        at, rings = carry
        read = [read_one(*r, ring, column, *at[:2]) for r, ring in zip(readers, rings, strict=True)]
        keys_B = token_keys(key, row_B, at.text_B, at.position_B)
        token_B, ratio_B = _choose(how, tuple(logits_BV for logits_BV, _ in read), keys_B)
        given_B, known_B = _known(how, source, at)
        target_B = jnp.where(given_B, known_B, token_B)
        row = (at.token_B, target_B, jnp.where(given_B, 0.0, ratio_B), at.position_B, at.text_B + 1)
        return (_advance(how, source, at, given_B, target_B), [rings for _, rings in read]), row

    nothing_B = jnp.zeros((B,), jnp.int32)
    start = Cursor(_begun(source, nothing_B), nothing_B, nothing_B, nothing_B)
    rings = [empty_rings(model, B, T) for model, _ in readers]
    rows = [x.T for x in jax.lax.scan(write, (start, rings), jnp.arange(T))[1]]
    fill = (how.student.specials.pad, how.student.specials.pad, 0.0, 0, 0)
    return tuple(jnp.where(source.count_B[:, None] > 0, x, empty) for x, empty in zip(rows, fill, strict=True))


def _reader(config: DecoderConfig, params: Any) -> tuple[Any, list[Any]]:
    """A model and its layers, as `read_one` takes them."""
    prepared = prepare(config, Sharding(), params)
    return nnx.merge(structure(config), prepared.params), prepared.layers


def _source(given: Given) -> Source:
    segments_BT = given.segments_BT
    same_BT = segments_BT[:, 1:] == segments_BT[:, :-1]
    edge_B1 = jnp.zeros_like(same_BT[:, :1])
    begins_BT = (segments_BT > 0) & ~jnp.concatenate([edge_B1, same_BT], axis=1)
    first_BM = jnp.argsort(~begins_BT, axis=1, stable=True)
    return Source(given, first_BM, jnp.sum(begins_BT, axis=1), jnp.concatenate([same_BT, edge_B1], axis=1))


def _at(x_BT: jax.Array, column_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BT, column_B[:, None], axis=1)[:, 0]


def _first(source: Source, text_B: jax.Array) -> jax.Array:
    """The column at which the segment begins as which this text begins."""
    return _at(source.first_BM, text_B % jnp.maximum(source.count_B, 1))


def _begun(source: Source, text_B: jax.Array) -> jax.Array:
    """The first token of a text."""
    return _at(source.given.tokens_BT, _first(source, text_B))


def _known(how: Writing, source: Source, at: Cursor) -> tuple[jax.Array, jax.Array]:
    """Whether the target is given, and which it is then. All of a segment that is short is given, but not its end."""
    column_B = jnp.minimum(_first(source, at.text_B) + at.position_B, source.inside_BT.shape[1] - 1)
    prompt_B = (at.drawn_B == 0) & (at.position_B < how.prompt_tokens)
    return prompt_B & _at(source.inside_BT, column_B), _at(source.given.targets_BT, column_B)


def _advance(how: Writing, source: Source, at: Cursor, given_B: jax.Array, target_B: jax.Array) -> Cursor:
    """Go on with the text, or begin the next one."""
    specials = how.student.specials
    drawn_B = at.drawn_B + ~given_B
    ended_B = reduce(jnp.logical_or, [target_B == end for end in (specials.eos, *specials.stops)])
    done_B = ~given_B & (ended_B | (drawn_B >= how.max_new))
    text_B = at.text_B + done_B
    token_B = jnp.where(done_B, _begun(source, text_B), target_B)
    return Cursor(token_B, jnp.where(done_B, 0, at.position_B + 1), text_B, jnp.where(done_B, 0, drawn_B))


def _choose(how: Writing, logits: tuple[jax.Array, ...], keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens [B], and their weights."""
    key_data_B = jax.random.key_data(keys_B)
    if not in_mesh():
        return _chosen(how, logits, key_data_B)
    rows = Sharding().activation("B")
    cut = jax.shard_map(partial(_chosen, how), in_specs=(rows, rows), out_specs=rows)
    token_B, ratio_B = cut(tuple(placed(x, rows) for x in logits), placed(key_data_B, rows))
    return placed(token_B, P()), placed(ratio_B, P())


def _chosen(how: Writing, logits: tuple[jax.Array, ...], key_data_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = tuple(x[:, : how.tokens] for x in logits)
    logits_BV = limited(how, *logits)
    token_B = draw(logits_BV, jax.random.wrap_key_data(key_data_B))
    if not how.importance:
        return token_B, jnp.ones_like(logits_BV[:, 0])
    own_B, drawn_B = (_at(jax.nn.log_softmax(x), token_B) for x in (logits[0], logits_BV))
    return token_B, jnp.exp(own_B - drawn_B)


def limited(how: Writing, student_BV: jax.Array, teacher_BV: jax.Array | None = None) -> jax.Array:
    """Logits [B, V] of the distribution that is drawn from: mixed at the temperature, then cut to top_k and top_p."""
    switch = switches(how.knobs)
    heated = partial(processors.temperature, value=how.knobs.temperature)
    logits_BV = heated(student_BV)
    if teacher_BV is not None:
        own_BV, known_BV = jax.nn.log_softmax(logits_BV), jax.nn.log_softmax(heated(teacher_BV))
        shares = jnp.log(jnp.array([1.0 - how.teacher_share, how.teacher_share]))
        logits_BV = jnp.logaddexp(shares[0] + own_BV, shares[1] + known_BV)
    if switch.top_k:
        logits_BV = processors.top_k(logits_BV, how.knobs.top_k)
    return processors.top_p(logits_BV, how.knobs.top_p) if switch.top_p else logits_BV
