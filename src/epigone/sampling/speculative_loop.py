"""The loop of speculative decoding: the draft proposes, the target reads, and every row moves at its own speed.

A token at position p of its row lies in column p of the row's rings. What was refused is overwritten by the next pass
before anything can see it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from epigone.models.config import DecoderConfig
from epigone.models.decoder import Decoder, Weights, structure
from epigone.models.sharding import Sharding, placed
from epigone.sampling.acceptance import NUMBERS, Found, accept, propose
from epigone.sampling.cache import Ring, prefill, unstacked
from epigone.sampling.draw import token_keys, uniforms
from epigone.sampling.loop import Knobs, Switches
from epigone.sampling.own_columns import read_many


class Pair(NamedTuple):
    """What is compiled for: two configs, where arrays lie, and sizes. Texts grow by at most `steps` tokens."""

    target: DecoderConfig
    draft: DecoderConfig
    sharding: Sharding
    switch: Switches
    draft_length: int
    steps: int


class Tally(NamedTuple):
    """Counts for a report; see SpeculationReport."""

    passes: jax.Array
    row_passes: jax.Array
    proposed: jax.Array
    judged: jax.Array
    accepted: jax.Array


class Rows(NamedTuple):
    """What the loop carries. `token` is at `position`, and the target has not read it; `before` is in front of it.

    `tokens` and `log_probs` hold what each row wrote, followed by what means nothing.
    """

    before_B: jax.Array
    token_B: jax.Array
    position_B: jax.Array
    live_B: jax.Array
    tokens_BS: jax.Array
    log_probs_BS: jax.Array
    tally: Tally


class Reader(NamedTuple):
    """A model in the loop, with the weights of each layer."""

    model: Decoder
    layers: list[Weights]


@partial(jax.jit, static_argnames=("pair",))
def speculate(
    pair: Pair,
    target_params: nnx.State,
    draft_params: nnx.State,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    limit_B: jax.Array,
    prompt_B: jax.Array,
    sample_B: jax.Array,
    seed_key: jax.Array,
    knobs: Knobs,
) -> tuple[jax.Array, jax.Array, jax.Array, Tally]:
    """Tokens and log-probabilities [B, S], how many of them each row wrote [B], and the tally.

    Prompts [B, T] begin at the left, with bos; `lengths` count it. `limit` is the longest text without bos.
    """
    limit_B, prompt_B, sample_B = (placed(x, P()) for x in (limit_B, prompt_B, sample_B))
    rows = _start(pair, tokens_BT, lengths_B, limit_B)
    first_B, ends = rows.position_B, (pair.target.specials.eos, *pair.target.specials.stops)
    target, target_rings = _begin(pair, pair.target, target_params, tokens_BT, lengths_B)
    draft, draft_rings = _begin(pair, pair.draft, draft_params, tokens_BT, lengths_B)

    def one_pass(carry: tuple[Rows, list[Ring], list[Ring]]) -> tuple[Rows, list[Ring], list[Ring]]:
        rows, target_rings, draft_rings = carry
        places_BT = rows.position_B[:, None] + jnp.arange(pair.draft_length + 1)
        uniform_BT5 = uniforms(_keys(seed_key, prompt_B, sample_B, places_BT), NUMBERS)
        proposed_BC, q_BCV, draft_rings = _proposals(pair, draft, draft_rings, knobs, uniform_BT5, rows)
        read_BT = jnp.concatenate([rows.token_B[:, None], proposed_BC], axis=1)
        hidden_BTD, target_rings = read_many(*target, target_rings, read_BT, rows.position_B)
        logits_BTV = target.model.logits(hidden_BTD)
        found = accept(pair.sharding, pair.switch, knobs, logits_BTV, q_BCV, proposed_BC, uniform_BT5)
        return _advance(ends, rows, found, first_B, limit_B), target_rings, draft_rings

    carry = (rows, target_rings, draft_rings)
    rows, *_ = jax.lax.while_loop(lambda carry: jnp.any(carry[0].live_B), one_pass, carry)
    return rows.tokens_BS, rows.log_probs_BS, rows.position_B - first_B, rows.tally


def _start(pair: Pair, tokens_BT: jax.Array, lengths_B: jax.Array, limit_B: jax.Array) -> Rows:
    tokens_BT, lengths_B = placed(tokens_BT, P()), placed(lengths_B, P())
    last_B2 = jnp.stack([jnp.maximum(lengths_B - 2, 0), lengths_B - 1], axis=1)
    before_B, token_B = jnp.take_along_axis(tokens_BT, last_B2, axis=1).T
    written_BS = jnp.zeros((tokens_BT.shape[0], pair.steps + pair.draft_length + 1), jnp.int32)
    tally = Tally(*[jnp.int32(0)] * len(Tally._fields))
    scores_BS = written_BS.astype(jnp.float32)
    return Rows(before_B, token_B, lengths_B - 1, limit_B >= lengths_B, written_BS, scores_BS, tally)


def _begin(
    pair: Pair, config: DecoderConfig, params: nnx.State, tokens_BT: jax.Array, lengths_B: jax.Array
) -> tuple[Reader, list[Ring]]:
    """A model that has read all but the last token of the prompts, and rings with room for what may come."""
    model = nnx.merge(structure(config, pair.sharding), params)
    places_T = jnp.arange(tokens_BT.shape[1])
    read_BT = places_T < lengths_B[:, None] - 1
    read = (tokens_BT, jnp.where(read_BT, places_T, 0), read_BT.astype(jnp.int32))
    columns = len(places_T) + pair.steps + pair.draft_length + 1
    rings = prefill(model, columns, *(placed(x, pair.sharding.activation("BT")) for x in read))
    return Reader(model, unstacked(model)), rings


def _keys(seed_key: jax.Array, prompt_B: jax.Array, sample_B: jax.Array, places_BT: jax.Array) -> jax.Array:
    """Keys [B, T] of the tokens that follow these places."""
    return jax.vmap(lambda place_B: token_keys(seed_key, prompt_B, sample_B, place_B), 1, 1)(places_BT)


def _proposals(
    pair: Pair, draft: Reader, rings: list[Ring], knobs: Knobs, uniform_BT5: jax.Array, rows: Rows
) -> tuple[jax.Array, jax.Array, list[Ring]]:
    """C tokens [B, C], and the probabilities [B, C, V] by which they were drawn.

    The draft reads two tokens first: where its proposals were all kept it has never read the last of them.
    """
    back_B = jnp.maximum(rows.position_B - 1, 0)
    two_B2 = jnp.stack([jnp.where(rows.position_B > 0, rows.before_B, rows.token_B), rows.token_B], axis=1)
    hidden_B2D, rings = read_many(*draft, rings, two_B2, back_B)
    is_last_B2 = placed(jnp.arange(2) == (rows.position_B - back_B)[:, None], pair.sharding.activation("BT"))
    hidden_B1D = jnp.sum(jnp.where(is_last_B2[..., None], hidden_B2D, 0), axis=1, keepdims=True)

    def choose(i: jax.Array | int, hidden_B1D: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BV = draft.model.logits(hidden_B1D)[:, 0]
        return propose(pair.sharding, pair.switch, knobs, logits_BV, uniform_BT5[:, i])

    token_B, q_BV = choose(0, hidden_B1D)
    proposed_BC = jnp.repeat(token_B[:, None], pair.draft_length, axis=1)
    q_BCV = jnp.repeat(q_BV[:, None], pair.draft_length, axis=1)

    def more(i: jax.Array, carry: tuple[jax.Array, jax.Array, list[Ring]]) -> tuple[jax.Array, jax.Array, list[Ring]]:
        proposed_BC, q_BCV, rings = carry
        hidden_B1D, rings = read_many(*draft, rings, proposed_BC[:, i - 1][:, None], rows.position_B + i)
        token_B, q_BV = choose(i, hidden_B1D)
        return proposed_BC.at[:, i].set(token_B), q_BCV.at[:, i].set(q_BV), rings

    return jax.lax.fori_loop(1, pair.draft_length, more, (proposed_BC, q_BCV, rings))


def _advance(ends: tuple[int, ...], rows: Rows, found: Found, first_B: jax.Array, limit_B: jax.Array) -> Rows:
    """Write what was found: up to the target's own token, to the row's limit, and to the first end of a text."""
    places_T = jnp.arange(found.tokens_BT.shape[1])
    room_B = limit_B - rows.position_B
    is_end_BT = jnp.isin(found.tokens_BT, jnp.array(ends))
    end_B = jnp.where(jnp.any(is_end_BT, axis=1), jnp.argmax(is_end_BT, axis=1) + 1, len(places_T) + 1)
    size_B = jnp.minimum(jnp.minimum(found.kept_B + 1, room_B), end_B)
    done_B = (size_B == room_B) | (size_B == end_B)
    size_B = jnp.where(rows.live_B, size_B, 0)

    def write(all_S: jax.Array, new_T: jax.Array, count: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(all_S, new_T, (count,))

    chain = jnp.concatenate([rows.before_B[:, None], rows.token_B[:, None], found.tokens_BT], axis=1)
    before_B, token_B = jnp.take_along_axis(chain, jnp.stack([size_B, size_B + 1], axis=1), axis=1).T
    count_B = rows.position_B - first_B
    return Rows(
        before_B,
        token_B,
        rows.position_B + size_B,
        rows.live_B & ~done_B,
        jax.vmap(write)(rows.tokens_BS, found.tokens_BT, count_B),
        jax.vmap(write)(rows.log_probs_BS, found.log_probs_BT, count_B),
        _tallied(rows, found, size_B, room_B, done_B),
    )


def _tallied(rows: Rows, found: Found, size_B: jax.Array, room_B: jax.Array, done_B: jax.Array) -> Tally:
    """Proposals behind the end of a text are not counted: they were never going to be judged."""
    C = found.tokens_BT.shape[1] - 1
    judged_B = jnp.minimum(size_B, C)
    proposed_B = jnp.where(rows.live_B, jnp.where(done_B, judged_B, jnp.minimum(room_B, C)), 0)
    accepted_B = jnp.minimum(size_B, found.kept_B)
    counts = (rows.live_B, proposed_B, judged_B, accepted_B)
    now = (jnp.int32(1), *(jnp.sum(count, dtype=jnp.int32) for count in counts))
    return Tally(*(total + new for total, new in zip(rows.tally, now, strict=True)))
