"""Watermarks of text, as pure functions of logits [B, V] and of the tokens before [B, H].

What a mark needs to know of a token is a hash of the secret, the H tokens before, and the token: of the context by
JAX's Threefry, which nobody inverts without the secret, and of the token by Murmur's finaliser, since V of them are
needed at every step. Hashes of different (context, token) are as good as independent: so is what a detector adds up,
as long as it counts each pair once.

Every mark gives the logits of a distribution from which the next token is drawn, and which is also what scores have
to be of where they are shown: one that marks its text alone is undone by drawing from its scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from epigone.errors import UserError


class Mark(Protocol):
    """What the sampling loop needs to know of a mark. It is hashable, since programs are compiled for it."""

    before_temperature: ClassVar[bool]
    """Whether it changes the model's own logits, also of greedy texts. If not, it stands in for the draw: it gets
    the logits after temperature, top-k and top-p, and has no say where the most probable token is taken."""

    @property
    def width(self) -> int:
        """Tokens before that it looks at; before a text has so many, bos stands in their place."""
        ...

    def __call__(self, logits_BV: jax.Array, context_BH: jax.Array) -> jax.Array:
        """The logits of the distribution with the mark, where these tokens come before."""
        ...


def widest(marks: Sequence[Mark]) -> int:
    """Tokens before that these marks look at together."""
    return max((mark.width for mark in marks), default=0)


def marked(marks: Sequence[Mark], logits_BV: jax.Array, context_BH: jax.Array) -> jax.Array:
    """Logits after these marks, one after the other; each sees the last `width` tokens of the context."""
    for mark in marks:
        logits_BV = mark(logits_BV, context_BH[:, context_BH.shape[1] - mark.width :])
    return logits_BV


BITS = 32
"""Bits of a hash; a tournament has one round for each at most."""


def seeds(secret: int, context_BH: jax.Array) -> jax.Array:
    """What a secret makes of the tokens before, in their order: uint32 [B, 2]."""
    key = jax.random.wrap_key_data(jnp.array([secret >> 32, secret & 0xFFFFFFFF], jnp.uint32), impl="threefry2x32")

    return jax.vmap(lambda context_H: jax.random.key_data(reduce(jax.random.fold_in, context_H, key)))(context_BH)


def hashes(seed_B2: jax.Array, tokens: jax.Array) -> jax.Array:
    """uint32 [B, N] of tokens [N], or [B, N], which may follow each context."""
    x = tokens.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) ^ seed_B2[:, :1]
    return _mixed(_mixed(x) ^ seed_B2[:, 1:])


def _mixed(x: jax.Array) -> jax.Array:
    """Murmur3's finaliser (Appleby): every bit of what comes in turns about half of those that go out."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def is_green(hashed: jax.Array, gamma: float) -> jax.Array:
    """Whether a token is on the list: true for each pair with probability gamma, up to 2^-32."""
    return hashed < jnp.uint32(min(round(gamma * 2**BITS), 2**BITS - 1))


def surprise(hashed: jax.Array) -> jax.Array:
    """-log(1 - r) of the uniform number r that belongs to a pair: exponential with mean 1."""
    return -jnp.log(_complement(hashed))


def _complement(hashed: jax.Array) -> jax.Array:
    """1 - r, above 0 and at most 1, exact where it is small: there the race is decided."""
    return (hashed.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-BITS)


def votes(hashed: jax.Array, rounds: int) -> jax.Array:
    """The bits g of each round of a tournament, 0 or 1, each with probability 1/2: bool [..., rounds]."""
    return (hashed[..., None] >> jnp.arange(rounds, dtype=jnp.uint32)) & 1 == 1


@dataclass(frozen=True)
class GreenList:
    """Add delta to the logits of the green tokens (Kirchenbauer et al. 2023, arXiv:2301.10226).

    A text of n distinct pairs without the mark has Binomial(n, gamma) green ones, exactly: a token is green by its own
    hash, not by being in a part of the vocabulary that is cut to a whole number.

    Attributes:
        secret: whoever has it can find and forge the mark; 0 to 2^63 - 1.
        width: tokens before that decide the list.
        gamma: expected share of green tokens, above 0 and below 1.
        delta: added to their logits, nats; above 0.
    """

    before_temperature: ClassVar[bool] = True

    secret: int
    width: int = 2
    gamma: float = 0.5
    delta: float = 2.0

    def __post_init__(self) -> None:
        _check(self.secret, self.width)
        if not 0 < self.gamma < 1 or not self.delta > 0:
            raise UserError(f"gamma is {self.gamma} and delta {self.delta}: give 0 < gamma < 1 and delta > 0")

    def __call__(self, logits_BV: jax.Array, context_BH: jax.Array) -> jax.Array:
        hashed_BV = hashes(seeds(self.secret, context_BH), jnp.arange(logits_BV.shape[1]))
        return logits_BV + self.delta * is_green(hashed_BV, self.gamma)


@dataclass(frozen=True)
class Gumbel:
    """Let the hashes draw: the token with the greatest r^(1/p) (Aaronson 2022).

    Over all secrets a token is drawn with its probability p; with one secret the same context has one answer, so its
    distribution, and the scores that may be shown, are all on that token. A text without the mark has sum of
    `surprise` over n distinct pairs ~ Gamma(n, 1).
    """

    before_temperature: ClassVar[bool] = False

    secret: int
    width: int = 4

    def __post_init__(self) -> None:
        _check(self.secret, self.width)

    def __call__(self, logits_BV: jax.Array, context_BH: jax.Array) -> jax.Array:
        hashed_BV = hashes(seeds(self.secret, context_BH), jnp.arange(logits_BV.shape[1]))
        wait_BV = -jnp.log1p(-jnp.minimum(_complement(hashed_BV), 1 - 2.0**-24))
        race_BV = jax.nn.log_softmax(logits_BV) - jnp.log(wait_BV)
        first_B1 = jnp.argmax(race_BV, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits_BV.shape[1]) == first_B1, 0.0, -jnp.inf)


@dataclass(frozen=True)
class Tournament:
    """SynthID-Text's tournament of two (Dathathri et al. 2024, Nature 634, 818-823), as the distribution of its winner.

    Each round changes p to p (1 + g - sum of g p), for the bits g of that round. Over all secrets a token is drawn
    with its probability. A text without the mark has mean g 1/2; one round alone gives 1/2 + (1 - sum of p^2) / 4.
    """

    before_temperature: ClassVar[bool] = False

    secret: int
    width: int = 4
    rounds: int = 30

    def __post_init__(self) -> None:
        _check(self.secret, self.width)
        if not 1 <= self.rounds <= BITS:
            raise UserError(f"rounds is {self.rounds}: from 1 to {BITS}, one for each bit of a hash")

    def __call__(self, logits_BV: jax.Array, context_BH: jax.Array) -> jax.Array:
        hashed_BV = hashes(seeds(self.secret, context_BH), jnp.arange(logits_BV.shape[1]))

        def play(round: jax.Array | int, log_p_BV: jax.Array) -> jax.Array:
            g_BV = (hashed_BV >> jnp.uint32(round)) & 1 == 1
            lost_B1 = jnp.sum(jnp.where(g_BV, 0.0, jnp.exp(log_p_BV)), axis=-1, keepdims=True)
            # 1 + g - sum of g p, where that sum is 1 - lost. What rounding adds would grow with each round.
            return jax.nn.log_softmax(log_p_BV + jnp.log(jnp.where(g_BV, 1 + lost_B1, lost_B1)))

        return jax.lax.fori_loop(0, self.rounds, play, jax.nn.log_softmax(logits_BV))


def _check(secret: int, width: int) -> None:
    if not 0 <= secret < 2**63:
        raise UserError("the secret of a watermark is a whole number from 0 to 2^63 - 1")
    if width < 1:
        raise UserError(f"width is {width}: a watermark hashes at least 1 token before")
