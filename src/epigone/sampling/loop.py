"""The decoding loop: rows that read a token, draw the next, and make room for another text when one ends."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from epigone.errors import UserError
from epigone.models.config import DecoderConfig
from epigone.models.decoder import Weights, structure
from epigone.models.sharding import Sharding, in_mesh, placed
from epigone.sampling import processors
from epigone.sampling.cache import Ring, empty_rings, lay, read_all, read_one, ready
from epigone.sampling.draw import draw, token_keys
from epigone.sampling.watermark import Mark, marked

IDLE = -1
"""In the record of a step: this row drew nothing."""


class Knobs(NamedTuple):
    """How the next token is chosen, of all rows alike or of each row [B]; traced: other values compile nothing new."""

    temperature: Any = 1.0
    top_k: Any = 0
    top_p: Any = 1.0


class Switches(NamedTuple):
    """Which parts of the choice are compiled at all: `greedy` where all rows take the most probable token, `mixed`
    where only some do."""

    greedy: bool
    top_k: bool
    top_p: bool
    mixed: bool = False


class State(NamedTuple):
    """What the loop carries. B rows; a row's position is that of the token it reads next in its document.

    `seed_B` and the knobs, [B] each, are those of the row's text. `context_BH` are the H tokens that a watermark looks
    at, of which the last is `token_B`; H may be 0. `next_sample` is the index of the next document to start; `finished`
    counts the tokens of the finished ones, each with its eos.
    """

    step: jax.Array
    token_B: jax.Array
    context_BH: jax.Array
    position_B: jax.Array
    limit_B: jax.Array
    prompt_B: jax.Array
    sample_B: jax.Array
    seed_B: jax.Array
    knobs: Knobs
    live_B: jax.Array
    next_sample: jax.Array
    finished: jax.Array
    rings: list[Ring]


class Seen(NamedTuple):
    """Scores as they are shown: `own` [...] of the token at each place, `ids` and `log_probs` [..., K] of the highest.

    Best first; where less than K are shown, ids are -1 and log-probabilities NaN, as `own` is where it is not shown.
    """

    own: Any
    ids: Any
    log_probs: Any


class Show(Protocol):
    """Which scores are shown; compared and hashed by what it does, since it is compiled into the loop."""

    @property
    def best(self) -> int:
        """How many of the highest scores are shown at most: K."""
        ...

    @property
    def width(self) -> int:
        """Tokens before a place that it looks at."""
        ...

    def __call__(self, logits_NV: jax.Array, token_N: jax.Array, context_NH: jax.Array) -> Seen:
        """Scores of places with these logits, tokens, and tokens before."""
        ...


class Drawn(NamedTuple):
    """What was drawn in C steps: tokens, their natural-log probabilities, and the samples they belong to.

    `seen` are the scores that are shown, [C, B] and [C, B, K], or None.
    """

    tokens_CB: jax.Array
    log_probs_CB: jax.Array
    samples_CB: jax.Array
    seen: Seen | None = None


def switches(*knobs: Knobs) -> Switches:
    """What these values, of one text each, switch on. Raises UserError for values outside their range."""
    for temperature, top_k, top_p in knobs:
        if not 0 <= temperature <= 1000:
            raise UserError(f"temperature is {temperature}: from 0 (always the most probable token) to 1000")
        if not 0 <= top_k < 2**31:
            raise UserError(f"top_k is {top_k}: at least 1 and below {2**31}, or 0 for off")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p is {top_p}: above 0, up to 1 for off")
    greedy = [one.temperature == 0 for one in knobs]
    limits = (any(one.top_k > 0 for one in knobs), any(one.top_p < 1 for one in knobs))
    return Switches(all(greedy), *limits, any(greedy) and not all(greedy))


class Prepared(NamedTuple):
    """Parameters as the loop reads them: a copy of every layer of its own, matrices in the type of the computation.

    It costs as much memory as the layers, once a call, and spares a copy of them at every chunk of steps.
    """

    params: nnx.State
    layers: list[Weights]


def prepare(config: DecoderConfig, sharding: Sharding, params: nnx.State) -> Prepared:
    """Parameters, prepared for `decode` and `refill`. One layer is compiled, whatever their number is."""
    layers = [_layer(config, sharding, params, index) for index in range(config.layers)]
    model = nnx.merge(structure(config, sharding), params)
    model.outer = nnx.Dict({name: nnx.Param(w) for name, w in ready(config, model.outer).items()})
    return Prepared(nnx.split(model)[1], layers)


@partial(jax.jit, static_argnames=("config", "sharding"))
def _layer(config: DecoderConfig, sharding: Sharding, params: nnx.State, index: int | jax.Array) -> Weights:
    weights = ready(config, nnx.merge(structure(config, sharding), params).layers)
    return {name: jax.lax.dynamic_index_in_dim(w, index, keepdims=False) for name, w in weights.items()}


@partial(jax.jit, static_argnames=("config", "sharding", "rows", "columns", "width"))
def start_empty(
    config: DecoderConfig,
    sharding: Sharding,
    rows: int,
    columns: int,
    params: nnx.State,
    limit: jax.Array,
    width: int = 0,
    seed: Any = 0,
    knobs: Knobs = Knobs(),
) -> State:
    """Every row at the start of a document of its own, samples 0, 1, ... of prompt 0; with limit 0 no row is live."""
    model = nnx.merge(structure(config, sharding), params)
    token_B, sample_B = jnp.full((rows,), config.specials.bos, jnp.int32), jnp.arange(rows, dtype=jnp.int32)
    zero_B, zero = jnp.zeros_like(token_B), jnp.int32(0)
    context_BH = jnp.broadcast_to(token_B[:, None], (rows, width))
    known = {
        "token_B": token_B,
        "context_BH": context_BH,
        "position_B": zero_B,
        "limit_B": zero_B + limit,
        "prompt_B": zero_B,
        "sample_B": sample_B,
        "seed_B": jnp.full((rows,), seed, jnp.uint32),
        "live_B": zero_B + limit > 0,
    }
    # What is known about rows is small, and whole on every device.
    known = {name: placed(x, P()) for name, x in known.items()}
    rings = empty_rings(model, rows, columns)
    return State(
        step=zero, knobs=of_rows(knobs, rows), next_sample=jnp.int32(rows), finished=zero, rings=rings, **known
    )


def of_rows(knobs: Knobs, rows: int) -> Knobs:
    """The same knobs for each of so many rows."""
    kinds = (jnp.float32, jnp.int32, jnp.float32)
    filled = (jnp.full((rows,), value, kind) for value, kind in zip(knobs, kinds, strict=True))
    return Knobs(*(placed(value_B, P()) for value_B in filled))


class Texts(NamedTuple):
    """Texts to be continued. R rows of T tokens, bos included, which end in the last column; and where they go.

    `limit` is the length, without bos, at which a text ends; `knobs` are [R] each. A row may stand there twice, and
    counts once.
    """

    slot_R: Any
    tokens_RT: Any
    length_R: Any
    limit_R: Any
    prompt_R: Any
    sample_R: Any
    seed_R: Any
    knobs: Knobs


@partial(jax.jit, static_argnames=("config", "sharding"), donate_argnames=("state",))
def refill(config: DecoderConfig, sharding: Sharding, prepared: Prepared, state: State, texts: Texts) -> State:
    """The state with texts in the place of rows that have ended. All but each last token is read here."""
    model = nnx.merge(structure(config, sharding), prepared.params)
    slot_R, T = texts.slot_R, texts.tokens_RT.shape[1]
    rings = state.rings
    if T > 1:
        places_RT = jnp.arange(T)[None] - (T - texts.length_R[:, None])
        read = (texts.tokens_RT, jnp.maximum(places_RT, 0), (places_RT >= 0).astype(jnp.int32))
        kept = read_all(model, *(placed(x[:, :-1], sharding.activation("BT")) for x in read))
        rings = lay(model, rings, *kept, slot_R, state.step - (T - 1))
    H = state.context_BH.shape[1]
    places_RH = jnp.arange(T - H, T)[None] - (T - texts.length_R[:, None])
    last_RH = jnp.take(texts.tokens_RT, jnp.arange(T - H, T), axis=1, mode="clip")
    context_RH = jnp.where(places_RH > 0, last_RH, config.specials.bos)

    def put(old_B: jax.Array, new_R: jax.Array) -> jax.Array:
        return old_B.at[slot_R].set(new_R)

    return state._replace(
        rings=rings,
        token_B=put(state.token_B, texts.tokens_RT[:, -1]),
        context_BH=put(state.context_BH, context_RH),
        position_B=put(state.position_B, texts.length_R - 1),
        limit_B=put(state.limit_B, texts.limit_R),
        prompt_B=put(state.prompt_B, texts.prompt_R),
        sample_B=put(state.sample_B, texts.sample_R),
        seed_B=put(state.seed_B, texts.seed_R),
        knobs=Knobs(*map(put, state.knobs, texts.knobs)),
        live_B=put(state.live_B, texts.limit_R >= texts.length_R),
    )


class Until(NamedTuple):
    """When `decode` comes back, and what it starts by itself; traced, so that other values compile nothing new.

    `steps`: after so many at the latest. `free`: when so many rows have ended. `wanted`: a row that ends starts the
    next sample of an empty prompt at once, until the samples that have been started are sure to hold so many tokens.
    """

    steps: int
    free: int
    wanted: int = 0


@partial(
    jax.jit, static_argnames=("config", "sharding", "chunk", "switch", "marks", "show"), donate_argnames=("state",)
)
def decode(
    config: DecoderConfig,
    sharding: Sharding,
    chunk: int,
    switch: Switches,
    prepared: Prepared,
    state: State,
    until: Until,
    marks: tuple[Mark, ...] = (),
    show: Show | None = None,
) -> tuple[State, Drawn]:
    """At most `chunk` steps, for which the record has room; fewer as `until` says, or when every row has ended.

    The state's contexts are as long as the widest of the marks (`widest`) and what shows scores want them.
    """
    model = nnx.merge(structure(config, sharding), prepared.params)
    first, rows = state.step, state.token_B.shape[0]
    last = first + jnp.minimum(until.steps, chunk)
    nothing_CB = jnp.zeros((chunk, rows))
    drawn = Drawn(nothing_CB.astype(jnp.int32), nothing_CB, jnp.full((chunk, rows), IDLE, jnp.int32))
    if show is not None:
        none_CBK = jnp.zeros((chunk, rows, show.best))
        drawn = drawn._replace(seen=Seen(nothing_CB, none_CBK.astype(jnp.int32), none_CBK))

    next_token = partial(_next_token, switch, marks)

    def body(carry: tuple[State, Drawn]) -> tuple[State, Drawn]:
        state, drawn = carry
        logits_BV, rings = read_one(model, prepared.layers, state.rings, state.step, state.token_B, state.position_B)
        keys_B = jax.vmap(jax.random.key)(state.seed_B)
        keys_B = token_keys(keys_B, state.prompt_B, state.sample_B, state.position_B)
        given = (state.knobs, logits_BV, keys_B, state.context_BH)
        token_B, log_prob_B, seen = _choose(sharding, next_token, show, *given)
        step = Drawn(token_B, log_prob_B, jnp.where(state.live_B, state.sample_B, IDLE), seen)
        drawn = jax.tree.map(lambda all_, now: all_.at[state.step - first].set(now), drawn, step)
        return _advance(config, state._replace(rings=rings), token_B, until.wanted), drawn

    def going(carry: tuple[State, Drawn]) -> jax.Array:
        live = jnp.sum(carry[0].live_B)
        return (live > jnp.maximum(rows - until.free, 0)) & (carry[0].step < last)

    return jax.lax.while_loop(going, body, (state, drawn))


def _choose(
    sharding: Sharding,
    next_token: Callable[..., jax.Array],
    show: Show | None,
    knobs: Knobs,
    logits_BV: jax.Array,
    keys_B: jax.Array,
    context_BH: jax.Array,
) -> tuple[jax.Array, jax.Array, Seen | None]:
    """Tokens [B], their log-probabilities under softmax(logits), before marks and knobs; and what is shown."""

    def local(
        logits_BV: jax.Array, key_data_B: jax.Array, context_BH: jax.Array, knobs: Knobs
    ) -> tuple[jax.Array, jax.Array, Seen | None]:
        keys_B = jax.random.wrap_key_data(key_data_B)
        token_B = next_token(knobs, logits_BV, keys_B, context_BH)
        chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
        seen = None if show is None else show(logits_BV, token_B, context_BH)
        return token_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1), seen

    key_data_B = jax.random.key_data(keys_B)
    if not in_mesh():
        return local(logits_BV, key_data_B, context_BH, knobs)
    rows = sharding.activation("B")
    cut = jax.shard_map(local, in_specs=rows, out_specs=rows)
    given = (logits_BV, key_data_B, context_BH, knobs)
    found: tuple[jax.Array, jax.Array, Seen | None] = cut(*jax.tree.map(lambda x: placed(x, rows), given))
    return jax.tree.map(lambda x: placed(x, P()), found)


def _next_token(
    switch: Switches,
    marks: tuple[Mark, ...],
    knobs: Knobs,
    logits_BV: jax.Array,
    keys_B: jax.Array,
    context_BH: jax.Array,
) -> jax.Array:
    logits_BV = marked([mark for mark in marks if mark.before_temperature], logits_BV, context_BH)
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)  # computed where it is used alone
    if switch.greedy:
        return best_B
    logits_BV = limited(switch, knobs, logits_BV)
    logits_BV = marked([mark for mark in marks if not mark.before_temperature], logits_BV, context_BH)
    drawn_B = draw(logits_BV, keys_B)
    return jnp.where(knobs.temperature > 0, drawn_B, best_B) if switch.mixed else drawn_B


def limited(switch: Switches, knobs: Knobs, logits: jax.Array) -> jax.Array:
    """Logits [..., V] after temperature, top-k and top-p, where they are switched on; rows that are greedy are left."""
    temperature = jnp.asarray(knobs.temperature, jnp.float32)
    temperature = jnp.where(temperature > 0, temperature, 1.0) if switch.mixed else temperature
    logits = processors.temperature(logits, temperature[..., None])
    if switch.top_k:
        logits = processors.top_k(logits, jnp.where(knobs.top_k > 0, knobs.top_k, logits.shape[-1]))
    if switch.top_p:
        # Where the limit is 1, rounding may not cut what is most improbable.
        is_limited = jnp.asarray(knobs.top_p)[..., None] < 1
        logits = jnp.where(is_limited, processors.top_p(logits, knobs.top_p), logits)
    return logits


def _advance(config: DecoderConfig, state: State, token_B: jax.Array, wanted: int | jax.Array) -> State:
    """End rows at an end of text or at their limit, and start new samples in them while tokens are wanted.

    A document with n tokens counts n + 1. The unfinished ones count what they have at least, so that no
    more documents are started than may be needed.
    """
    length_B = state.position_B + 1  # tokens, without bos and with the one just drawn
    ends = (config.specials.eos, *config.specials.stops)
    ended_B = state.live_B & reduce(jnp.logical_or, [token_B == end for end in ends])
    done_B = ended_B | (state.live_B & (length_B == state.limit_B))
    finished = state.finished + jnp.sum(jnp.where(done_B, length_B + ~ended_B, 0))
    going_B = state.live_B & ~done_B
    missing = wanted - finished - jnp.sum(jnp.where(going_B, length_B + 1, 0))
    rank_B = jnp.cumsum(done_B) - 1
    fresh_B = done_B & (rank_B < missing)
    token_B = jnp.where(done_B, config.specials.bos, token_B)
    shifted_BH = jnp.concatenate([state.context_BH, token_B[:, None]], axis=1)[:, 1:]
    return state._replace(
        step=state.step + 1,
        token_B=token_B,
        context_BH=jnp.where(done_B[:, None], config.specials.bos, shifted_BH),
        position_B=jnp.where(done_B, 0, length_B),
        sample_B=jnp.where(fresh_B, state.next_sample + rank_B, state.sample_B),
        live_B=going_B | fresh_B,
        next_sample=state.next_sample + jnp.sum(fresh_B),
        finished=finished,
    )
