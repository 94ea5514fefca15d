"""What a provider does to what leaves the prompt box: one small function a measure, and a policy of several.

There are two kinds. One changes the logits, and with them the text *and* the scores: watermarks and `Tempered`. They
are `Mark`s, which the sampling loop applies to each token and `shown_scores` to each place of a text. The other acts
on scores alone, just before they are shown: `Hidden`, `Best`, `Rounded`, `Noisy`. A policy applies the first kind to
both sides by itself, since a mark in the text alone is undone by drawing from the scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from epigone.errors import UserError
from epigone.models.config import DecoderConfig
from epigone.models.decoder import NEVER
from epigone.models.language_model import Document
from epigone.models.sharding import Sharding, in_mesh, placed
from epigone.sampling.loop import Seen
from epigone.sampling.scores import hidden_states, in_chunks, windows_answers, windows_of
from epigone.sampling.watermark import Mark, hashes, marked, seeds, widest

__all__ = [
    "POLICIES",
    "Best",
    "Hidden",
    "Measure",
    "Noisy",
    "Policy",
    "Rounded",
    "Scores",
    "Showing",
    "Tempered",
    "shown_scores",
]


class Scores(NamedTuple):
    """Scores of N places before they are shown: log-probabilities, the token that stands there, and what to show.

    `context_NH` are the tokens before each place; `is_shown_NV` is true for what may be seen.
    """

    log_probs_NV: jax.Array
    token_N: jax.Array
    context_NH: jax.Array
    is_shown_NV: jax.Array


class Measure(Protocol):
    """Something that is done to scores alone."""

    @property
    def width(self) -> int:
        """Tokens before that it looks at."""
        ...

    def __call__(self, scores: Scores) -> Scores:
        """The scores after it."""
        ...


@dataclass(frozen=True)
class Tempered:
    """Divide the logits by `temperature`, also those of greedy text, before what the user asks for.

    Above 1 the text is more varied than the model, and the scores are flatter; below 1 both are sharper. It hides
    nothing from one who knows it: scores times the temperature are the model's own, up to a constant.
    """

    before_temperature: ClassVar[bool] = True
    width: ClassVar[int] = 0

    temperature: float

    def __post_init__(self) -> None:
        if not 0 < self.temperature <= 1000:
            raise UserError(f"temperature is {self.temperature}: above 0, up to 1000")

    def __call__(self, logits_BV: jax.Array, context_BH: jax.Array) -> jax.Array:
        return logits_BV / self.temperature


@dataclass(frozen=True)
class Hidden:
    """Show no score."""

    width: ClassVar[int] = 0

    def __call__(self, scores: Scores) -> Scores:
        return scores._replace(is_shown_NV=jnp.zeros_like(scores.is_shown_NV))


@dataclass(frozen=True)
class Best:
    """Show the `count` highest scores of each place, of equal ones those of the lower ids.

    Attributes:
        count: how many, at least 1.
        own: whether the score of the token that was drawn is shown too where it is not among them. Public endpoints
            do so; who asks often enough then sees every score that is ever drawn.
    """

    width: ClassVar[int] = 0

    count: int
    own: bool = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"count is {self.count}: at least 1 score, or use Hidden()")

    def __call__(self, scores: Scores) -> Scores:
        V = scores.log_probs_NV.shape[-1]
        _, ids_NK = jax.lax.top_k(scores.log_probs_NV, min(self.count, V))
        is_best_NV = jnp.zeros_like(scores.is_shown_NV).at[jnp.arange(len(ids_NK))[:, None], ids_NK].set(True)
        if self.own:
            is_best_NV |= jnp.arange(V) == scores.token_N[:, None]
        return scores._replace(is_shown_NV=scores.is_shown_NV & is_best_NV)


@dataclass(frozen=True)
class Rounded:
    """Show scores to so many decimals, in nats: their order is lost where they are equal then."""

    width: ClassVar[int] = 0

    decimals: int

    def __post_init__(self) -> None:
        if not 0 <= self.decimals <= 6:
            raise UserError(f"decimals is {self.decimals}: from 0 to 6, of nats")

    def __call__(self, scores: Scores) -> Scores:
        return scores._replace(log_probs_NV=jnp.round(scores.log_probs_NV, self.decimals))


@dataclass(frozen=True)
class Noisy:
    """Add Gaussian noise to scores, the same for the same token after the same `width` tokens.

    So it does not average out, neither over questions that are asked again nor over prompts that differ further back.

    Attributes:
        secret: whoever has it can take the noise away; 0 to 2^63 - 1.
        spread: standard deviation, nats.
        width: tokens before that it depends on.
    """

    secret: int
    spread: float
    width: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.secret < 2**63:
            raise UserError("the secret of noise is a whole number from 0 to 2^63 - 1")
        if not self.spread > 0 or self.width < 1:
            raise UserError(f"spread is {self.spread} and width {self.width}: give more than 0, and at least 1")

    def __call__(self, scores: Scores) -> Scores:
        context_NH = scores.context_NH[:, scores.context_NH.shape[1] - self.width :]
        hashed_NV = hashes(seeds(self.secret, context_NH), jnp.arange(scores.log_probs_NV.shape[-1]))
        # 24 bits of 32, in the middle of their steps: what float32 holds without reaching 0 or 1.
        uniform_NV = ((hashed_NV >> 8).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-24)
        noise_NV = self.spread * jax.scipy.special.ndtri(uniform_NV)
        return scores._replace(log_probs_NV=scores.log_probs_NV + noise_NV)


@dataclass(frozen=True)
class Policy:
    """What leaves the box. Without anything, all that the model has.

    Attributes:
        marks: changes of the logits, in this order; the text and the scores have them.
        scores: what is done to scores, in this order.
    """

    marks: tuple[Mark, ...] = ()
    scores: tuple[Measure, ...] = ()

    @property
    def width(self) -> int:
        """Tokens before a place that any part looks at."""
        return max(widest(self.marks), max((measure.width for measure in self.scores), default=0))

    @property
    def shows(self) -> bool:
        """Whether any score is shown."""
        return not any(isinstance(measure, Hidden) for measure in self.scores)

    def __call__(self, logits_NV: jax.Array, token_N: jax.Array, context_NH: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities [N, V] as they are shown, and which are: of places with these tokens, and these before.

        Of what can never follow nothing is shown.
        Marks that stand in for the draw act on the distribution at temperature 1, whatever the text was drawn at.
        """
        before = sorted(self.marks, key=lambda mark: not mark.before_temperature)
        log_probs_NV = jax.nn.log_softmax(marked(before, logits_NV, context_NH))
        can_follow_NV = (logits_NV > NEVER / 2) & jnp.isfinite(log_probs_NV)
        scores = Scores(jnp.where(can_follow_NV, log_probs_NV, -jnp.inf), token_N, context_NH, can_follow_NV)
        for measure in self.scores:
            scores = measure(scores)
        return scores.log_probs_NV, scores.is_shown_NV


POLICIES = {
    "all": Policy(),
    "best20": Policy(scores=(Best(20, own=True),)),
    "best5": Policy(scores=(Best(5, own=True),)),
    "rounded": Policy(scores=(Best(5, own=True), Rounded(1))),
    "text": Policy(scores=(Hidden(),)),
}
"""Policies that have a name: all scores, the 20 or 5 best as public endpoints show them, these in tenths, or none."""


@dataclass(frozen=True)
class Showing:
    """What a policy shows of the scores at a place, as the sampling loop asks for it (`epigone.sampling.loop.Show`).

    Attributes:
        policy: of the box.
        best: how many of the highest scores are asked for; the policy may show fewer.
    """

    policy: Policy
    best: int

    @property
    def width(self) -> int:
        """Tokens before a place that the policy looks at."""
        return self.policy.width

    def __call__(self, logits_NV: jax.Array, token_N: jax.Array, context_NH: jax.Array) -> Seen:
        """Scores of the tokens that stand there, and the `best` of each place."""
        log_probs_NV, is_shown_NV = self.policy(logits_NV, token_N, context_NH)
        seen_NV = jnp.where(is_shown_NV, log_probs_NV, -jnp.inf)
        own_N = jnp.take_along_axis(seen_NV, token_N[:, None], axis=1)[:, 0]
        log_probs_NK, ids_NK = jax.lax.top_k(seen_NV, self.best)
        return Seen(_or_nan(own_N), jnp.where(jnp.isfinite(log_probs_NK), ids_NK, -1), _or_nan(log_probs_NK))


def shown_scores(
    config: DecoderConfig,
    params: Any,
    policy: Policy,
    documents: Sequence[Document],
    best: int,
    sharding: Sharding = Sharding(),
) -> list[Seen]:
    """Scores of each document's tokens and of the end behind it as the policy shows them, and the `best` at each place.

    Of a document of n tokens there are n + 1 places. They are computed from the text as it stands, prompt and answer
    alike, so that it does not matter who wrote it.
    Raises UserError for a document that is longer than the model reads at once, and for `best` below 0.
    """
    if best < 0:
        raise UserError(f"best is {best}: at least 0 scores at each place")
    for document in documents:
        if len(document) >= config.max_length:
            raise UserError(f"a text has {len(document)} tokens, and the model's max_length is {config.max_length}")
    ask = partial(_shown, config, sharding, Showing(policy, min(best, config.sizes.V)), params)
    windows = windows_of(documents, config.max_length, config.specials)
    found = {window.document: Seen(*answer) for window, answer in windows_answers(config, sharding, windows, ask)}
    return [found[index] for index in range(len(documents))]


@partial(jax.jit, static_argnames=("config", "sharding", "show", "chunk"))
def _shown(
    config: DecoderConfig,
    sharding: Sharding,
    show: Showing,
    params: Any,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`Seen` of each place: own [B, T], ids and log-probabilities [B, T, best]."""
    model, hidden_BTD = hidden_states(config, sharding, params, tokens_BT, lengths_B)
    H, T = show.width, tokens_BT.shape[1]
    padded = jnp.pad(tokens_BT, [(0, 0), (H, 0)], constant_values=config.specials.bos)
    context_BTH = jnp.take(padded, jnp.arange(T)[:, None] + jnp.arange(1, H + 1), axis=1)

    def local(logits_BCV: jax.Array, targets_BC: jax.Array, context_BCH: jax.Array) -> tuple[jax.Array, ...]:
        B, C, V = logits_BCV.shape
        found = show(logits_BCV.reshape(-1, V), targets_BC.reshape(-1), context_BCH.reshape(B * C, H))
        return tuple(x.reshape(B, C, *x.shape[1:]) for x in found)

    def places(hidden_BCD: jax.Array, targets_BC: jax.Array, context_BCH: jax.Array) -> tuple[jax.Array, ...]:
        logits_BCV = model.logits(hidden_BCD)
        if not in_mesh():
            return local(logits_BCV, targets_BC, context_BCH)
        rows = sharding.activation("B")
        cut = jax.shard_map(local, in_specs=rows, out_specs=rows)
        return cut(placed(logits_BCV, rows), placed(targets_BC, rows), placed(context_BCH, rows))

    read = (placed(x, sharding.activation("B")) for x in (targets_BT, context_BTH))
    own_BT, ids_BTK, log_probs_BTK = in_chunks(chunk, places, hidden_BTD, *read)
    return own_BT, ids_BTK, log_probs_BTK


def _or_nan(shown: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(shown), shown, jnp.nan)
