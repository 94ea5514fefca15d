"""The reverse KL by its policy gradient: of the student's own tokens, as in reinforcement learning.

    E over y drawn from S of  (log S(y) - log P(y)) grad log S(y)  =  grad KL(S || P)

since the expectation of grad log S(y) is 0. On a text that the student wrote, the estimate of one token has the
expected gradient of `reverse_kl` at the same place: the part of MiniLLM's gradient (Gu et al. 2024, section 2.2; the
reward is log P(y) - log S(y)) that is of a single step, by one draw, where MiniLLM sums it over the vocabulary. It
needs two numbers of the teacher a token, where `reverse_kl` needs the vocabulary, and its variance is the price.

What a token does to the rewards of those after it is the long part. With both, the gradient is that of the KL of whole
texts: grad KL(S || P) = E over y drawn from S of the sum over t of
grad KL(S_t || P_t) - R_(t+1) grad log S(y_t), R_(t+1) = the sum over u > t of log P(y_u) - log S(y_u).
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epigone.errors import UserError
from epigone.lessons.divergences import reverse_kl
from epigone.lessons.terms import check, chosen_log_prob, floored


def sampled_reverse_kl(
    student_logits_BTV: Float[Array, "B T V"],
    teacher_logits_BTV: Float[Array, "B T V"],
    *,
    targets_BT: Int[Array, "B T"],
    temperature: float = 1.0,
    temperature_squared: bool = True,
    vocab_axis: str | None = None,
) -> Float[Array, "B T"]:
    """-advantage (1 + log S(y) - c), with advantage = -(log S(y) - log P(y)) and c = log S(y) constants, times T^2.

    So its value is log S(y) - log P(y), the estimate of KL(S || P) from one token, and its gradient that of
    -advantage log S(y). Williams 1992; Gu et al. 2024 (MiniLLM), eq. 3, without the rewards of later tokens, which
    `sequence_reverse_kl` has.

    Args: logits [B, T, V]; targets_BT: the tokens y, drawn from S at the same temperature. Returns: [B, T] in nats; a
    value may be negative. Raises UserError for a temperature that is not positive.
    """
    check(student_logits_BTV, teacher_logits_BTV, temperature)
    log_s_BT, log_p_BT = (
        chosen_log_prob(vocab_axis, floored(logits, temperature), targets_BT)
        for logits in (student_logits_BTV, teacher_logits_BTV)
    )
    constant_BT = jax.lax.stop_gradient(log_s_BT)
    advantage_BT = -(constant_BT - jax.lax.stop_gradient(log_p_BT))
    loss_BT = -advantage_BT * (1.0 + log_s_BT - constant_BT)
    return loss_BT * temperature**2 if temperature_squared else loss_BT


class Drawn(NamedTuple):
    """What is known of tokens that the student drew, in one text each, [B, T].

    Attributes:
        targets_BT: the tokens y.
        later_BT: R_(t+1), the sum of log P(y) - log S(y) over the drawn tokens behind each in the same text.
        count_BT: how many these are, float32.
    """

    targets_BT: jax.Array
    later_BT: jax.Array
    count_BT: jax.Array


def sequence_reverse_kl(
    student_logits_BTV: Float[Array, "B T V"],
    teacher_logits_BTV: Float[Array, "B T V"],
    *,
    drawn: Drawn,
    length_normalised: bool = True,
    temperature: float = 1.0,
    temperature_squared: bool = True,
    vocab_axis: str | None = None,
) -> Float[Array, "B T"]:
    """KL(S || P) at each place, and the gradient of KL(S || P) of whole texts; times T^2.

    The gradient is grad KL(S_t || P_t), exactly, minus R grad log S(y_t), of the token that was drawn: Gu et al. 2024
    (MiniLLM), section 2.2. R is R_(t+1), or with `length_normalised` that divided by the number of later tokens, so
    that long texts are not preferred or shunned for their length (there: 1 / (T - t - 1)); 0 behind the last token.
    Only without it the gradient is, over texts drawn from S, that of the KL of whole texts.

    Args: logits [B, T, V]; what is known of the tokens, which were drawn from S at the same temperature; R is constant.
    Returns: [B, T] in nats. Raises UserError for a temperature that is not positive.
    """
    single_BT = reverse_kl(
        student_logits_BTV,
        teacher_logits_BTV,
        temperature=temperature,
        temperature_squared=temperature_squared,
        vocab_axis=vocab_axis,
    )
    log_s_BT = chosen_log_prob(vocab_axis, floored(student_logits_BTV, temperature), drawn.targets_BT)
    scale_BT = 1.0 / jnp.maximum(drawn.count_BT, 1.0) if length_normalised else 1.0
    reward_BT = jax.lax.stop_gradient(scale_BT * drawn.later_BT)
    long_BT = -reward_BT * (log_s_BT - jax.lax.stop_gradient(log_s_BT))
    return single_BT + (long_BT * temperature**2 if temperature_squared else long_BT)


def reads_targets(divergence: Callable[..., jax.Array]) -> bool:
    """Whether it is of the tokens that were drawn, and not of distributions alone."""
    return not inspect.signature(divergence).parameters.keys().isdisjoint(("targets_BT", "drawn"))


def reads_later(divergence: Callable[..., jax.Array]) -> bool:
    """Whether it is of what came after a drawn token, too."""
    return "drawn" in inspect.signature(divergence).parameters


def tokens_of(targets_BT: Int[Array, "B T"] | Drawn) -> Int[Array, "B T"]:
    """The tokens alone."""
    return targets_BT.targets_BT if isinstance(targets_BT, Drawn) else targets_BT


def with_targets(
    divergence: Callable[..., jax.Array], targets_BT: Int[Array, "B T"] | Drawn
) -> Callable[..., jax.Array]:
    """The divergence, with the targets if it reads them. Raises UserError where it needs to know what came later."""
    if not reads_targets(divergence):
        return divergence
    if not reads_later(divergence):
        return partial(divergence, targets_BT=tokens_of(targets_BT))
    if not isinstance(targets_BT, Drawn):
        raise UserError(f"{getattr(divergence, '__name__', divergence)} needs to know what came later: give it Drawn")
    return partial(divergence, drawn=targets_BT)
