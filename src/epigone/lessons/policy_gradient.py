"""The reverse KL by its policy gradient: of the student's own token alone, as in reinforcement learning.

    E over y drawn from S of  (log S(y) - log P(y)) grad log S(y)  =  grad KL(S || P)

since the expectation of grad log S(y) is 0. On a text that the student wrote, the estimate of one token has the
expected gradient of `reverse_kl` at the same place. It is the single-step part of MiniLLM's gradient (Gu et al. 2024,
section 2.2; the reward is log P(y) - log S(y)) by one draw, where MiniLLM sums it over the vocabulary. What a token
does to the rewards after it is left out, as there is no term for it in any divergence here either. It needs two
numbers of the teacher a token, where `reverse_kl` needs the vocabulary, and its variance is the price.
"""

import inspect
from collections.abc import Callable
from functools import partial

import jax
from jaxtyping import Array, Float, Int

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
    -advantage log S(y). Williams 1992; Gu et al. 2024 (MiniLLM), eq. 3, without the rewards of later tokens.

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


def reads_targets(divergence: Callable[..., jax.Array]) -> bool:
    """Whether it is of the tokens that were drawn, and not of distributions alone."""
    return "targets_BT" in inspect.signature(divergence).parameters


def with_targets(divergence: Callable[..., jax.Array], targets_BT: Int[Array, "B T"]) -> Callable[..., jax.Array]:
    """The divergence, with the targets if it reads them."""
    return partial(divergence, targets_BT=targets_BT) if reads_targets(divergence) else divergence
