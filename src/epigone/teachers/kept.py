"""What is kept of a teacher's scores for each token: the k best, the best that hold a probability, or random draws.

Each is a frozen dataclass, the value of `Lesson.scores`: it chooses from a row of logits, on the device. How what was
chosen is stored is told in `score_records`. M is the number of entries that a token can have.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from epigone.errors import UserError
from epigone.lessons.divergences import MASKED
from epigone.lessons.sparse import Rest
from epigone.lessons.terms import FLOOR
from epigone.sampling.draw import drawn, uniforms


class Kept(NamedTuple):
    """What was kept of C tokens, on its way to the disk.

    Attributes:
        ids_CM: the tokens, the most probable first, or the draws, in rising order and with repetitions.
        log_probs_CM: their log-probabilities, -1e9 where fewer were kept.
        rest_C2: log-probability of all others and 0; or, of draws, the teacher's entropy in nats and log sum_v p^power.
    """

    ids_CM: Any
    log_probs_CM: Any
    rest_C2: Any


@dataclass(frozen=True)
class TopK:
    """The k most probable tokens.

    Attributes:
        k: how many.
        rest: what becomes of the others: bucket, zero or left_out, as `lessons.sparse` tells.
    """

    k: int = 128
    rest: str = Rest.BUCKET

    def __post_init__(self) -> None:
        _check(self, "k", self.k)
        _check_rest(self)

    def entries(self, vocab_size: int) -> int:
        """Entries of a token (M)."""
        return min(self.k, vocab_size)

    def keep(self, logits_CV: jax.Array, _: jax.Array) -> Kept:
        """Choose from logits that are divided by the temperature."""
        return _best(logits_CV, self.entries(logits_CV.shape[1]), 2.0)


@dataclass(frozen=True)
class TopP:
    """The fewest most probable tokens that hold a probability.

    Attributes:
        p: the probability that they hold.
        most: no more than this many tokens, even if they hold less.
        rest: what becomes of the others: bucket, zero or left_out, as `lessons.sparse` tells.
    """

    p: float = 0.95
    most: int = 128
    rest: str = Rest.BUCKET

    def __post_init__(self) -> None:
        _check(self, "most", self.most)
        _check_rest(self)
        if not 0.0 < self.p <= 1.0:
            raise UserError(f"TopP: p={self.p} is a probability, above 0 and at most 1")

    def entries(self, vocab_size: int) -> int:
        """Entries of a token (M) at most."""
        return min(self.most, vocab_size)

    def keep(self, logits_CV: jax.Array, _: jax.Array) -> Kept:
        """Choose from logits that are divided by the temperature."""
        return _best(logits_CV, self.entries(logits_CV.shape[1]), self.p)


@dataclass(frozen=True)
class RandomDraws:
    """Draws with replacement from q, which is p^power normalised; the weight of a draw is p / (n q). Unbiased.

    About a quarter as many different tokens as draws are kept (Anshumann et al. 2025: 12 of 50).

    Attributes:
        draws: how many (n).
        power: below 1 rare tokens are drawn more often, each with less weight; 1 draws from the teacher itself.
    """

    draws: int = 50
    power: float = 1.0

    rest = Rest.SAMPLED

    def __post_init__(self) -> None:
        _check(self, "draws", self.draws)
        if not 0.0 < self.power <= 1.0:
            raise UserError(f"RandomDraws: power={self.power} is above 0 and at most 1")

    def entries(self, vocab_size: int) -> int:
        """Entries of a token (M) at most: different tokens of all draws."""
        return min(self.draws, vocab_size)

    def keep(self, logits_CV: jax.Array, keys_C: jax.Array) -> Kept:
        """Draw, with one key a token, from logits that are divided by the temperature."""
        log_p_CV = jax.nn.log_softmax(logits_CV)
        p_CV = jnp.exp(log_p_CV)
        entropy_C = -jnp.sum(jnp.where(p_CV > 0, p_CV * log_p_CV, 0.0), axis=1)
        log_sum_C = jax.nn.logsumexp(self.power * log_p_CV, axis=1)
        weights_CV = jnp.exp(self.power * (logits_CV - jnp.max(logits_CV, axis=1, keepdims=True)))
        uniform_C2N = uniforms(keys_C, 2 * self.draws).reshape(-1, 2, self.draws)
        ids_CN = jax.vmap(drawn, in_axes=(None, 2), out_axes=1)(weights_CV, uniform_C2N)
        ids_CN = jnp.sort(ids_CN, axis=1)
        return Kept(ids_CN, jnp.take_along_axis(log_p_CV, ids_CN, axis=1), jnp.stack([entropy_C, log_sum_C], axis=1))


Scores = TopK | TopP | RandomDraws


@dataclass(frozen=True)
class HiddenStates:
    """No scores, but the teacher's last hidden states, to which its head is applied beside the student: all scores.

    Attributes:
        dtype: in which they are stored, bfloat16 or float32.
    """

    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float32"):
            raise UserError(f"HiddenStates: dtype='{self.dtype}' is neither bfloat16 nor float32")


def _best(logits_CV: jax.Array, M: int, p: float) -> Kept:
    """The M best, or as many of them as first hold the probability p."""
    total_C1 = jax.nn.logsumexp(logits_CV, axis=1, keepdims=True)
    values_CM, ids_CM = jax.lax.top_k(logits_CV, M)
    log_probs_CM = values_CM - total_C1
    held_CM = jnp.cumsum(jnp.exp(log_probs_CM), axis=1)
    kept_CM = jnp.concatenate([jnp.ones_like(held_CM[:, :1], bool), held_CM[:, :-1] < p], axis=1)
    kept_CM &= log_probs_CM > MASKED
    others_CV = jnp.put_along_axis(
        logits_CV, jnp.where(kept_CM, ids_CM, logits_CV.shape[1]), -jnp.inf, axis=1, inplace=False, mode="drop"
    )
    rest_C = jnp.maximum(jax.nn.logsumexp(others_CV, axis=1) - total_C1[:, 0], FLOOR)
    return Kept(ids_CM, jnp.where(kept_CM, log_probs_CM, FLOOR), jnp.stack([rest_C, jnp.zeros_like(rest_C)], axis=1))


def _check(config: Any, name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{type(config).__name__}: {name}={value} must be at least 1")


def _check_rest(config: Any) -> None:
    known = (Rest.BUCKET, Rest.ZERO, Rest.LEFT_OUT)
    if config.rest not in known:
        raise UserError(f"{type(config).__name__}: rest='{config.rest}' is none of {', '.join(known)}")
