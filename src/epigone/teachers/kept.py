"""What is kept of a teacher's scores for each token: the k best, the best that hold a probability, or random draws.

Each is a frozen dataclass, the value of `Lesson.scores`: it chooses from a row of logits, on the device. `Shown` leaves
the choice to a prompt box, for a student outside. How what was chosen is stored is told in `score_records`. M is the
number of entries that a token can have.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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


class Places(NamedTuple):
    """What is known of C tokens beside their logits.

    Attributes:
        keys_C: for what is drawn; that of a token follows from its segment and its place in it alone.
        target_C: the token that stands there.
        context_CH: the H tokens before it; before a segment has so many, its first one: bos, where a text begins.
    """

    keys_C: Any
    target_C: Any
    context_CH: Any


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

    def keep(self, logits_CV: jax.Array, _: Places) -> Kept:
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

    def keep(self, logits_CV: jax.Array, _: Places) -> Kept:
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

    def keep(self, logits_CV: jax.Array, places: Places) -> Kept:
        """Draw, with one key a token, from logits that are divided by the temperature."""
        log_p_CV = jax.nn.log_softmax(logits_CV)
        p_CV = jnp.exp(log_p_CV)
        entropy_C = -jnp.sum(jnp.where(p_CV > 0, p_CV * log_p_CV, 0.0), axis=1)
        log_sum_C = jax.nn.logsumexp(self.power * log_p_CV, axis=1)
        weights_CV = jnp.exp(self.power * (logits_CV - jnp.max(logits_CV, axis=1, keepdims=True)))
        uniform_C2N = uniforms(places.keys_C, 2 * self.draws).reshape(-1, 2, self.draws)
        ids_CN = jax.vmap(drawn, in_axes=(None, 2), out_axes=1)(weights_CV, uniform_C2N)
        ids_CN = jnp.sort(ids_CN, axis=1)
        return Kept(ids_CN, jnp.take_along_axis(log_p_CV, ids_CN, axis=1), jnp.stack([entropy_C, log_sum_C], axis=1))


class Box(Protocol):
    """A prompt box, as `epigone.arena.policies.Policy` is one; hashable, since a program is compiled for it."""

    @property
    def width(self) -> int:
        """Tokens before a place that it looks at."""
        ...

    @property
    def shows(self) -> bool:
        """Whether it shows any score."""
        ...

    def __call__(self, logits_NV: jax.Array, token_N: jax.Array, context_NH: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities [N, V] as they are shown, and which are: of places with these tokens, and these before."""
        ...


@dataclass(frozen=True)
class Shown:
    """What a prompt box shows: the best scores of a place, and that of the token that stands there, by its own rules.

    All that a student outside can learn from, whether its text was answered or is scored with `echo`. A score above 0,
    which noise may make, counts as 0.

    Attributes:
        policy: of the box, such as `epigone.arena.policies.POLICIES["best5"]`.
        best: how many of the highest scores are asked for, beside that of the token that stands there.
        rest: what becomes of the others: bucket, zero or left_out, as `lessons.sparse` tells. What is shown may hold
            less or more than it says, so a bucket has what is left of 1, and 1e-7 at least.
        times: what is shown is multiplied by it, and made a distribution again in which the others share evenly what
            is left: 2 undoes a box that divides its logits by 2.
    """

    policy: Box
    best: int = 20
    rest: str = Rest.BUCKET
    times: float = 1.0

    def __post_init__(self) -> None:
        if self.best < 0 or not 0 < self.times <= 1000:
            raise UserError(f"Shown: best={self.best} is at least 0, and times={self.times} above 0, up to 1000")
        _check_rest(self)
        if not self.policy.shows:
            raise UserError("Shown: the box shows no scores: learn from its text (hard_weight=1, and no scores)")

    def entries(self, vocab_size: int) -> int:
        """Entries of a token (M) at most."""
        return min(self.best + 1, vocab_size)

    def keep(self, logits_CV: jax.Array, places: Places) -> Kept:
        """What is shown of these logits, which are of temperature 1."""
        H, M = self.policy.width, self.entries(logits_CV.shape[1])
        context_CH = places.context_CH[:, places.context_CH.shape[1] - H :]
        log_probs_CV, is_shown_CV = self.policy(logits_CV, places.target_C, context_CH)
        shown_CV = jnp.where(is_shown_CV & jnp.isfinite(log_probs_CV), log_probs_CV, -jnp.inf)
        best_CK, ids_CK = jax.lax.top_k(shown_CV, min(self.best, logits_CV.shape[1]))
        own_C1 = jnp.take_along_axis(shown_CV, places.target_C[:, None], axis=1)
        is_among_C1 = jnp.any(ids_CK == places.target_C[:, None], axis=1, keepdims=True)
        values_CN = jnp.concatenate([best_CK, jnp.where(is_among_C1, -jnp.inf, own_C1)], axis=1)
        ids_CN = jnp.concatenate([ids_CK, places.target_C[:, None]], axis=1)
        values_CM, order_CM = jax.lax.top_k(values_CN, M)
        left_C = jnp.log(jnp.maximum(1.0 - jnp.sum(jnp.exp(values_CM), axis=1), LEAST_LEFT))
        if self.times != 1:
            # The others share evenly what is left: of all that they may be, it is what makes them the least sure.
            others_C = jnp.log(jnp.maximum(logits_CV.shape[1] - jnp.sum(jnp.isfinite(values_CM), axis=1), 1))
            left_C = self.times * (left_C - others_C) + others_C
            values_CM = self.times * values_CM
            total_C = jnp.logaddexp(jax.nn.logsumexp(values_CM, axis=1), left_C)
            values_CM, left_C = values_CM - total_C[:, None], left_C - total_C
        log_probs_CM = jnp.where(jnp.isfinite(values_CM), values_CM, FLOOR)
        ids_CM = jnp.take_along_axis(ids_CN, order_CM, axis=1)
        return Kept(ids_CM, log_probs_CM, jnp.stack([left_C, jnp.zeros_like(left_C)], axis=1))


LEAST_LEFT = 1e-7
"""What the tokens hold together whose scores are not shown, at least."""

Scores = TopK | TopP | RandomDraws | Shown


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
