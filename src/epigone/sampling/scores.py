"""Log-probabilities of given documents, in batches of few shapes."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from epigone.models.config import DecoderConfig
from epigone.models.decoder import Decoder, structure
from epigone.models.language_model import Document, Specials
from epigone.models.sharding import Sharding, batch_parts, placed

SHORTEST = 32
"""Lengths are padded to this times a power of two, so that few shapes are compiled."""
LOGITS = 2**25
"""Logits that are held at once: 128 MiB."""
TOKENS = 2**13
"""Tokens that are scored at once, at most."""
FEW = 8
"""A short text has one in so many of the rows, and no other number, so that few shapes are compiled."""
CONTEXTS = 32
"""Contexts whose next token is scored at once, at most."""


class Window(NamedTuple):
    """A piece of a document: the inputs read, and the events scored, `first` to `first + scored` of the document."""

    document: int
    inputs: np.ndarray
    targets: np.ndarray
    first: int
    scored: int


def bucket(length: int) -> int:
    """The smallest 32 * 2^k that holds `length`."""
    return SHORTEST << max(0, (length - 1) // SHORTEST).bit_length()


def aligned(texts: Sequence[Document], T: int, right: bool, specials: Specials) -> tuple[np.ndarray, np.ndarray]:
    """bos + each text in a row of T padded tokens, at the left or right end; and the lengths with bos."""
    tokens_BT = np.full((len(texts), T), specials.pad, np.int32)
    for row, text in zip(tokens_BT, texts, strict=True):
        start = T - len(text) - 1 if right else 0
        row[start] = specials.bos
        row[start + 1 : start + 1 + len(text)] = text
    return tokens_BT, np.array([len(text) + 1 for text in texts], np.int32)


def windows_of(documents: Sequence[Document], max_length: int, specials: Specials) -> list[Window]:
    """Each document in one window, or in windows of max_length that overlap by half and score what is new."""
    windows = []
    for index, document in enumerate(documents):
        inputs, targets = np.r_[specials.bos, document].astype(np.int32), np.r_[document, specials.eos].astype(np.int32)
        first = 0
        for start in _starts(len(inputs), max_length):
            end = min(start + max_length, len(inputs))
            windows.append(Window(index, inputs[start:end], targets[start:end], first, end - first))
            first = end
    return windows


def _starts(length: int, max_length: int) -> range:
    stride = max(1, max_length // 2)
    return range(0, max(1, length - max_length + stride), stride)


def windows_scores(
    config: DecoderConfig, sharding: Sharding, params: Any, windows: Sequence[Window]
) -> Iterator[tuple[Window, np.ndarray]]:
    """The log-probabilities of each window's new events; short windows first."""
    return windows_answers(config, sharding, windows, partial(_score, config, sharding, params))


def windows_answers(
    config: DecoderConfig, sharding: Sharding, windows: Sequence[Window], ask: Callable[..., Any]
) -> Iterator[tuple[Window, Any]]:
    """What `ask(inputs_BT, targets_BT, lengths_B, chunk=...)` finds at each window's new events; short windows first.

    It is asked in batches of few shapes, and gives arrays [B, T, ...]; `chunk` tokens of each row have logits that fit.
    """
    by_length: dict[int, list[Window]] = {}
    for window in windows:
        by_length.setdefault(min(bucket(len(window.inputs)), config.max_length), []).append(window)
    for T, group in sorted(by_length.items()):
        rows = fitting_rows(config, sharding, T, T)
        if len(group) <= rows // FEW:
            rows = fitting_rows(config, sharding, T, T, rows // FEW)
        chunk = fitting_chunk(config, rows)
        for start in range(0, len(group), rows):
            part = group[start : start + rows]
            numbers = np.full((2, rows, T), config.specials.pad, np.int32)
            lengths_B = np.zeros(rows, np.int32)
            for b, window in enumerate(part):
                lengths_B[b] = len(window.inputs)
                numbers[:, b, : lengths_B[b]] = window.inputs, window.targets
            answers = jax.device_get(ask(*numbers, lengths_B, chunk=chunk))
            for b, window in enumerate(part):
                new = slice(lengths_B[b] - window.scored, lengths_B[b])
                yield window, jax.tree.map(lambda x_BT, b=b, new=new: x_BT[b, new], answers)


def embeddings(config: DecoderConfig, sharding: Sharding, params: Any, documents: Sequence[Document]) -> np.ndarray:
    """Mean over bos + each document of the last layer's states, float32 [documents, D]; of a long one the beginning."""
    found = np.zeros((len(documents), config.model_size), np.float32)
    by_length: dict[int, list[int]] = {}
    for index, document in enumerate(documents):
        by_length.setdefault(min(bucket(len(document) + 1), config.max_length), []).append(index)
    for T, group in sorted(by_length.items()):
        rows = fitting_rows(config, sharding, T, 1)
        for start in range(0, len(group), rows):
            part = group[start : start + rows]
            tokens_BT, lengths_B = np.full((rows, T), config.specials.pad, np.int32), np.ones(rows, np.int32)
            for b, index in enumerate(part):
                read = np.r_[config.specials.bos, documents[index]][:T]
                tokens_BT[b, : len(read)], lengths_B[b] = read, len(read)
            found[part] = np.asarray(_mean_state(config, sharding, params, tokens_BT, lengths_B))[: len(part)]
    return found


def next_scores(config: DecoderConfig, sharding: Sharding, params: Any, contexts: Sequence[Document]) -> np.ndarray:
    """Log-probabilities [contexts, V] of the next token; of a long context the last max_length tokens are read."""
    out = np.zeros((len(contexts), config.vocab_size or 0), np.float32)
    longest = max((len(context) + 1 for context in contexts), default=1)
    T = min(bucket(longest), config.max_length)
    most = fitting_rows(config, sharding, T, 1, CONTEXTS)
    for start in range(0, len(contexts), most):
        part = contexts[start : start + most]
        rows = fitting_rows(config, sharding, T, 1, len(part))
        tokens_BT, lengths_B = np.full((rows, T), config.specials.pad, np.int32), np.ones(rows, np.int32)
        for b, context in enumerate(part):
            read = np.r_[config.specials.bos, context][-T:]
            tokens_BT[b, : len(read)], lengths_B[b] = read, len(read)
        out[start : start + most] = np.asarray(_next(config, sharding, params, tokens_BT, lengths_B))[: len(part)]
    return out


def fitting_rows(config: DecoderConfig, sharding: Sharding, T: int, C: int, wanted: int = TOKENS) -> int:
    """A power of two of rows, times the parts of the batch: no more than are wanted, and 1 where not even 2 fit.

    T tokens of each row are read, and the head is asked at C of them.
    """
    parts = batch_parts(sharding)
    fitting = max(1, min(LOGITS // (config.sizes.V * C), TOKENS // T) // parts)
    return parts << min(fitting.bit_length() - 1, max(0, -(-wanted // parts) - 1).bit_length())


def fitting_chunk(config: DecoderConfig, rows: int) -> int:
    """Tokens of each row whose logits fit."""
    return max(1, LOGITS // (config.sizes.V * rows))


def target_scores(
    model: Decoder, chunk: int, hidden_BTD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target [B, T], and whether it is the most probable token, the lowest id among equals.

    The head reads `chunk` tokens of each row at a time, so that a long row and a large vocabulary never have all of
    their logits at once. A target's logit is picked by comparison, so that V may be cut.
    """

    def scored(hidden_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BCV = model.logits(hidden_BCD)
        is_target_BCV = jnp.arange(logits_BCV.shape[-1]) == targets_BC[..., None]
        target_BC = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0.0), axis=-1)
        greedy_BC = jnp.argmax(logits_BCV, axis=-1) == targets_BC
        return target_BC - jax.nn.logsumexp(logits_BCV, axis=-1), greedy_BC

    return in_chunks(chunk, scored, hidden_BTD, targets_BT)


def in_chunks(chunk: int, ask: Callable[..., Any], *arrays_BT: jax.Array) -> Any:
    """What `ask` finds in arrays [B, T, ...], one array or several of [B, T, ...], with `chunk` of the T at a time."""
    B, T = arrays_BT[0].shape[:2]
    if chunk >= T:
        return ask(*arrays_BT)
    pieces = -(-T // chunk)
    C = -(-T // pieces)

    def cut(x_BT: jax.Array) -> jax.Array:
        padded = jnp.pad(x_BT, [(0, 0), (0, pieces * C - T), *[(0, 0)] * (x_BT.ndim - 2)])
        return jnp.moveaxis(padded.reshape(B, pieces, C, *x_BT.shape[2:]), 1, 0)

    found = jax.lax.map(lambda x: ask(*x), tuple(map(cut, arrays_BT)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, pieces * C, *x.shape[3:])[:, :T], found)


def hidden_states(config: DecoderConfig, sharding: Sharding, params: Any, tokens_BT: jax.Array, lengths_B: jax.Array):
    """The decoder, and its hidden states for rows that begin at the left."""
    model = nnx.merge(structure(config, sharding), params)
    T = tokens_BT.shape[1]
    positions_BT = jnp.broadcast_to(jnp.arange(T), tokens_BT.shape)
    segments_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
    rows = (placed(x, sharding.activation("BT")) for x in (tokens_BT, positions_BT, segments_BT))
    return model, model(*rows)


@partial(jax.jit, static_argnames=("config", "sharding", "chunk"))
def _score(
    config: DecoderConfig, sharding: Sharding, params: Any, tokens_BT, targets_BT, lengths_B, *, chunk: int
) -> jax.Array:
    """Log-probability of each target [B, T]."""
    model, hidden_BTD = hidden_states(config, sharding, params, tokens_BT, lengths_B)
    return target_scores(model, chunk, hidden_BTD, placed(targets_BT, sharding.activation("BT")))[0]


@partial(jax.jit, static_argnames=("config", "sharding"))
def _mean_state(config: DecoderConfig, sharding: Sharding, params: Any, tokens_BT, lengths_B) -> jax.Array:
    """Mean of the hidden states of each row's tokens [B, D]."""
    _, hidden_BTD = hidden_states(config, sharding, params, tokens_BT, lengths_B)
    read_BT = placed(jnp.arange(tokens_BT.shape[1]) < lengths_B[:, None], sharding.activation("BT"))
    sums_BD = jnp.sum(jnp.where(read_BT[..., None], hidden_BTD, 0), axis=1, dtype=jnp.float32)
    return sums_BD / lengths_B[:, None]


@partial(jax.jit, static_argnames=("config", "sharding"))
def _next(config: DecoderConfig, sharding: Sharding, params: Any, tokens_BT, lengths_B) -> jax.Array:
    """Log-softmax [B, V] after the last token of each row."""
    model, hidden_BTD = hidden_states(config, sharding, params, tokens_BT, lengths_B)
    is_last = placed(jnp.arange(tokens_BT.shape[1]) == lengths_B[:, None] - 1, sharding.activation("BT"))
    last_B1D = jnp.sum(jnp.where(is_last[..., None], hidden_BTD, 0), axis=1, keepdims=True)
    return jax.nn.log_softmax(model.logits(last_B1D)[:, 0])
