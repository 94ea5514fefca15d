"""Beam search with a decoder: the rows of a prompt share what they have read, and go on from one another."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from epigone.errors import UserError
from epigone.models.beam import Beams, Next, search
from epigone.models.config import DecoderConfig
from epigone.models.decoder import structure
from epigone.models.language_model import Document
from epigone.models.sharding import Sharding, in_mesh
from epigone.sampling.cache import Ring, read_one
from epigone.sampling.loop import Knobs, Prepared, State, Texts, refill, start_empty
from epigone.sampling.scores import bucket

ROWS = 128
"""Rows that are read side by side: prompts times beams."""


class _Rows(NamedTuple):
    """What the rows have read, and how far they are."""

    rings: list[Ring]
    position_R: Any
    step: int


def beam_search(
    config: DecoderConfig, params: Any, prepared: Prepared, prompts: list[Document], beams: int, length: int
) -> list[Document]:
    """A likely continuation of bos + each prompt (`epigone.models.beam`), on one device.

    Raises UserError on a mesh, and for a prompt that leaves no room for `length` tokens.
    """
    if in_mesh():
        raise UserError("beam search runs on one device: let another process write, without a mesh")
    longest = max(map(len, prompts), default=0)
    if longest + length >= config.max_length:
        raise UserError(f"a prompt of {longest} tokens and {length} more: the model reads {config.max_length} at most")
    T = min(bucket(longest + 1), config.max_length)
    found: list[Document] = []
    each = max(1, ROWS // beams)
    for start in range(0, len(prompts), each):
        part = prompts[start : start + each]
        # A last part is filled up, so that nothing is compiled for it alone.
        filled = [*part, *[np.zeros(0, np.int32)] * (each - len(part))] if len(prompts) > each else part
        found += _search(config, params, prepared, filled, beams, length, T)[: len(part)]
    return found


def _search(
    config: DecoderConfig, params: Any, prepared: Prepared, prompts: list[Document], beams: int, length: int, T: int
) -> list[Document]:
    specials, top = config.specials, min(2 * beams, config.vocab_size or 2 * beams)
    state = _read(config, params, prepared, [prompt for prompt in prompts for _ in range(beams)], T, length)
    rows = _Rows(state.rings, state.position_B, int(state.step))

    def step(parents_R: np.ndarray, tokens_R: np.ndarray) -> Next:
        nonlocal rows
        found, rings = _expand(config, top, prepared, rows.rings, rows.step, parents_R, tokens_R, rows.position_R)
        rows = _Rows(rings, rows.position_R + 1, rows.step + 1)
        return Next(*(np.asarray(x) for x in found))

    first = step(np.arange(len(prompts) * beams, dtype=np.int32), np.asarray(state.token_B))
    return search(step, first, Beams(len(prompts), beams, length, (specials.eos, *specials.stops)))


def _read(
    config: DecoderConfig, params: Any, prepared: Prepared, prompts: list[Document], T: int, length: int
) -> State:
    """All rows with their prompts read, but for the last token of each."""
    rows = np.arange(len(prompts), dtype=np.int32)
    tokens_RT = np.full((len(prompts), T), config.specials.pad, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_RT[row, T - len(prompt) - 1] = config.specials.bos
        tokens_RT[row, T - len(prompt) :] = prompt
    lengths = np.array([len(prompt) + 1 for prompt in prompts], np.int32)
    nobody = (np.uint32(rows), Knobs(np.float32(rows * 0), rows * 0, np.float32(rows * 0)))  # a beam draws nothing
    texts = Texts(rows, tokens_RT, lengths, lengths + length, rows, rows, *nobody)
    state = start_empty(config, Sharding(), len(prompts), bucket(T + length), params, np.int32(0))
    return refill(config, Sharding(), prepared, state, texts)


@partial(jax.jit, static_argnames=("config", "top"), donate_argnames=("rings",))
def _expand(
    config: DecoderConfig, top: int, prepared: Prepared, rings: list[Ring], step: Any, parents_R, token_R, position_R
) -> tuple[tuple[jax.Array, jax.Array], list[Ring]]:
    """The `top` most probable tokens of each row, after it goes on from its parent and reads a token."""
    model = nnx.merge(structure(config, Sharding()), prepared.params)
    rows = parents_R.shape[0]

    def of_parents(x: jax.Array) -> jax.Array:
        return x.reshape(rows, -1, *x.shape[1:])[parents_R].reshape(x.shape)

    moved = [(of_parents(keys), of_parents(values)) for keys, values in rings]
    logits_RV, rings = read_one(model, prepared.layers, moved, jnp.asarray(step), token_R, position_R)
    log_probs_RM, tokens_RM = jax.lax.top_k(jax.nn.log_softmax(logits_RV.astype(jnp.float32)), top)
    return (tokens_RM, log_probs_RM), rings
