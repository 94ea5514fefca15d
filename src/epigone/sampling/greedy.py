"""Log-probabilities of given continuations, and whether each is what greedy decoding would write: one pass a batch."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from epigone.models.config import DecoderConfig
from epigone.models.decoder import structure
from epigone.models.sharding import Sharding, placed
from epigone.sampling.scores import bucket, fitting_chunk, fitting_rows, target_scores

SHORTEST_END = 8
"""Continuations are padded to this times a power of two."""


def continuation_scores(
    config: DecoderConfig, sharding: Sharding, params: Any, pieces: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[tuple[float, bool]]:
    """Natural-log probability of each piece's targets together, and whether each of them was the most probable token.

    Rows end at the right, so that the head is asked only where a target stands: of a long context and a short answer
    that is a small part, and of a large vocabulary nearly all of the memory.

    Args:
        config: of the decoder.
        sharding: of its parameters.
        params: its parameters.
        pieces: inputs [T], at most max_length with bos, and targets [C], C <= T: each target follows the input at
            its place, counted from the end.
    """
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pieces)
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, (inputs_T, targets_C) in enumerate(pieces):
        T = min(bucket(len(inputs_T)), config.max_length)
        C = min(SHORTEST_END << max(0, (len(targets_C) - 1) // SHORTEST_END).bit_length(), T)
        by_shape.setdefault((T, C), []).append(index)
    for (T, C), members in sorted(by_shape.items()):
        B = fitting_rows(config, sharding, T, C, len(members))
        chunk = fitting_chunk(config, B)
        for start in range(0, len(members), B):
            part = members[start : start + B]
            rows = _right_aligned([pieces[index] for index in part], B, T, C, config.specials.pad)
            log_prob_B, greedy_B = jax.device_get(_score(config, sharding, params, *rows, chunk=chunk))
            for b, index in enumerate(part):
                found[index] = float(log_prob_B[b]), bool(greedy_B[b])
    return found


def _right_aligned(
    pieces: Sequence[tuple[np.ndarray, np.ndarray]], B: int, T: int, C: int, pad: int
) -> tuple[np.ndarray, ...]:
    """Tokens, targets and the lengths of both; rows beyond the pieces read one pad and have no target."""
    tokens_BT, targets_BC = np.full((B, T), pad, np.int32), np.full((B, C), pad, np.int32)
    lengths_B, ends_B = np.ones(B, np.int32), np.zeros(B, np.int32)
    for b, (inputs_T, targets_C) in enumerate(pieces):
        lengths_B[b], ends_B[b] = len(inputs_T), len(targets_C)
        tokens_BT[b, T - len(inputs_T) :] = inputs_T
        targets_BC[b, C - len(targets_C) :] = targets_C
    return tokens_BT, targets_BC, lengths_B, ends_B


@partial(jax.jit, static_argnames=("config", "sharding", "chunk"))
def _score(
    config: DecoderConfig, sharding: Sharding, params: Any, tokens_BT, targets_BC, lengths_B, ends_B, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Sum of the targets' log-probabilities, and whether all are the most probable, the lowest id among equals [B]."""
    model = nnx.merge(structure(config, sharding), params)
    T, C = tokens_BT.shape[1], targets_BC.shape[1]
    positions_BT = jnp.arange(T) - (T - lengths_B[:, None])
    segments_BT = (positions_BT >= 0).astype(jnp.int32)
    inputs = (tokens_BT, jnp.maximum(positions_BT, 0), segments_BT)
    hidden_BTD = model(*(placed(x, sharding.activation("BT")) for x in inputs))
    targets_BC, asked_BC = (
        placed(x, sharding.activation("BT")) for x in (targets_BC, jnp.arange(C) >= C - ends_B[:, None])
    )
    log_prob_BC, greedy_BC = target_scores(model, chunk, hidden_BTD[:, T - C :], targets_BC)
    return jnp.sum(jnp.where(asked_BC, log_prob_BC, 0.0), axis=1), jnp.all(greedy_BC | ~asked_BC, axis=1)
