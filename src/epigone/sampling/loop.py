"""The decoding loop: rows that read a token, draw the next, and start a new document when one ends."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from epigone.errors import UserError
from epigone.models.config import DecoderConfig
from epigone.models.decoder import structure
from epigone.models.language_model import BOS, EOS
from epigone.models.sharding import Sharding, in_mesh, placed
from epigone.sampling import processors
from epigone.sampling.cache import Ring, empty_rings, prefill, read_one, unstacked
from epigone.sampling.draw import draw, token_keys

IDLE = -1
"""In the record of a step: this row drew nothing."""


class Knobs(NamedTuple):
    """How the next token is chosen; traced, so that other values compile nothing new."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Switches(NamedTuple):
    """Which parts of the choice are compiled at all."""

    greedy: bool
    top_k: bool
    top_p: bool


class State(NamedTuple):
    """What the loop carries. B rows; a row's position is that of the token it reads next in its document.

    `next_sample` is the index of the next document to start; `finished` counts the tokens of the finished ones,
    each with its eos.
    """

    step: jax.Array
    token_B: jax.Array
    position_B: jax.Array
    limit_B: jax.Array
    prompt_B: jax.Array
    sample_B: jax.Array
    live_B: jax.Array
    next_sample: jax.Array
    finished: jax.Array
    rings: list[Ring]


class Drawn(NamedTuple):
    """What was drawn in C steps: tokens, their natural-log probabilities, and the samples they belong to."""

    tokens_CB: jax.Array
    log_probs_CB: jax.Array
    samples_CB: jax.Array


def switches(knobs: Knobs) -> Switches:
    """What these values switch on. Raises UserError for values outside their range."""
    temperature, top_k, top_p = knobs
    if not 0 <= temperature <= 1000:
        raise UserError(f"temperature is {temperature}: from 0 (always the most probable token) to 1000")
    if top_k < 0:
        raise UserError(f"top_k is {top_k}: at least 1, or 0 for off")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: above 0, up to 1 for off")
    return Switches(temperature == 0, top_k > 0, top_p < 1)


@partial(jax.jit, static_argnames=("config", "sharding", "rows", "columns"))
def start_empty(
    config: DecoderConfig, sharding: Sharding, rows: int, columns: int, params: nnx.State, limit: jax.Array
) -> State:
    """Every row at the start of a document of its own, samples 0, 1, ... of prompt 0."""
    model = nnx.merge(structure(config, sharding), params)
    token_B, sample_B = jnp.full((rows,), BOS, jnp.int32), jnp.arange(rows, dtype=jnp.int32)
    zero_B = jnp.zeros_like(token_B)
    rings = empty_rings(model, rows, columns)
    state = _state(rings, token_B, zero_B, zero_B + limit, zero_B, sample_B, token_B == BOS)
    return state._replace(next_sample=jnp.int32(rows))


@partial(jax.jit, static_argnames=("config", "sharding", "columns"))
def start_prompts(
    config: DecoderConfig,
    sharding: Sharding,
    columns: int,
    params: nnx.State,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    limit_B: jax.Array,
    prompt_B: jax.Array,
    sample_B: jax.Array,
) -> State:
    """Rows that have read their prompts but for the last token. Prompts, bos included, end in the last column."""
    model = nnx.merge(structure(config, sharding), params)
    T = tokens_BT.shape[1]
    positions_BT = jnp.arange(T)[None] - (T - lengths_B[:, None])
    before = (tokens_BT, jnp.maximum(positions_BT, 0), (positions_BT >= 0).astype(jnp.int32))
    rings = prefill(model, columns, *(placed(x[:, :-1], sharding.activation("BT")) for x in before))
    live_B = limit_B >= lengths_B
    state = _state(rings, tokens_BT[:, -1], lengths_B - 1, limit_B, prompt_B, sample_B, live_B)
    return state._replace(step=jnp.int32(T - 1))


def _state(rings: list[Ring], *vectors_B: jax.Array) -> State:
    """The state in which rows begin. What is known about rows is small, and whole on every device."""
    zero = jnp.int32(0)
    token_B, position_B, limit_B, prompt_B, sample_B, live_B = (placed(x, P()) for x in vectors_B)
    return State(zero, token_B, position_B, limit_B, prompt_B, sample_B, live_B, zero, zero, rings)


@partial(jax.jit, static_argnames=("config", "sharding", "steps", "switch"), donate_argnames=("state",))
def decode(
    config: DecoderConfig,
    sharding: Sharding,
    steps: int,
    switch: Switches,
    params: nnx.State,
    state: State,
    seed_key: jax.Array,
    knobs: Knobs,
    wanted: jax.Array,
) -> tuple[State, Drawn]:
    """At most `steps` steps; fewer when every row has ended.

    A row that ends starts the next sample at once, until the samples that have been started are sure to hold
    `wanted` tokens; with 0 wanted none is started.
    """
    model = nnx.merge(structure(config, sharding), params)
    layers = unstacked(model)
    first, rows = state.step, state.token_B.shape[0]
    drawn = Drawn(
        jnp.zeros((steps, rows), jnp.int32), jnp.zeros((steps, rows)), jnp.full((steps, rows), IDLE, jnp.int32)
    )

    def body(carry: tuple[State, Drawn]) -> tuple[State, Drawn]:
        state, drawn = carry
        logits_BV, rings = read_one(model, layers, state.rings, state.step, state.token_B, state.position_B)
        keys_B = token_keys(seed_key, state.prompt_B, state.sample_B, state.position_B)
        token_B, log_prob_B = _choose(sharding, switch, knobs, logits_BV, keys_B)
        step = (token_B, log_prob_B, jnp.where(state.live_B, state.sample_B, IDLE))
        drawn = Drawn(*(all_.at[state.step - first].set(now) for all_, now in zip(drawn, step, strict=True)))
        return _advance(state._replace(rings=rings), token_B, wanted), drawn

    def going(carry: tuple[State, Drawn]) -> jax.Array:
        return jnp.any(carry[0].live_B) & (carry[0].step - first < steps)

    return jax.lax.while_loop(going, body, (state, drawn))


def _choose(
    sharding: Sharding, switch: Switches, knobs: Knobs, logits_BV: jax.Array, keys_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Tokens [B] and their log-probabilities under softmax(logits), before temperature and limits."""

    def local(logits_BV: jax.Array, key_data_B: jax.Array, knobs: Knobs) -> tuple[jax.Array, jax.Array]:
        keys_B = jax.random.wrap_key_data(key_data_B)
        token_B = _next_token(switch, knobs, logits_BV, keys_B)
        chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
        return token_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)

    key_data_B = jax.random.key_data(keys_B)
    if not in_mesh():
        return local(logits_BV, key_data_B, knobs)
    rows = sharding.activation("B")
    cut = jax.shard_map(local, in_specs=(rows, rows, P()), out_specs=rows)
    token_B, log_prob_B = cut(placed(logits_BV, rows), placed(key_data_B, rows), knobs)
    return placed(token_B, P()), placed(log_prob_B, P())


def _next_token(switch: Switches, knobs: Knobs, logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    if switch.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = processors.temperature(logits_BV, knobs.temperature)
    if switch.top_k:
        logits_BV = processors.top_k(logits_BV, knobs.top_k)
    if switch.top_p:
        logits_BV = processors.top_p(logits_BV, knobs.top_p)
    return draw(logits_BV, keys_B)


def _advance(state: State, token_B: jax.Array, wanted: jax.Array) -> State:
    """End rows at eos or at their limit, and start new samples in them while tokens are wanted.

    A document with n tokens counts n + 1. The unfinished ones count what they have at least, so that no
    more documents are started than may be needed.
    """
    length_B = state.position_B + 1  # tokens, without bos and with the one just drawn
    ended_B = state.live_B & (token_B == EOS)
    done_B = ended_B | (state.live_B & (length_B == state.limit_B))
    finished = state.finished + jnp.sum(jnp.where(done_B, length_B + ~ended_B, 0))
    going_B = state.live_B & ~done_B
    missing = wanted - finished - jnp.sum(jnp.where(going_B, length_B + 1, 0))
    rank_B = jnp.cumsum(done_B) - 1
    fresh_B = done_B & (rank_B < missing)
    return state._replace(
        step=state.step + 1,
        token_B=jnp.where(done_B, BOS, token_B),
        position_B=jnp.where(done_B, 0, length_B),
        sample_B=jnp.where(fresh_B, state.next_sample + rank_B, state.sample_B),
        live_B=going_B | fresh_B,
        next_sample=state.next_sample + jnp.sum(fresh_B),
        finished=finished,
    )
