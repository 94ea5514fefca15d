"""The loss of an objective that asks what came after a drawn token: rewards first, then the fused loss.

A chunk of logits shows no later tokens. So the log-ratios of all drawn tokens are taken first, in one pass without
gradients that makes no array [tokens, vocabulary], and summed within their texts from the end; the fused loss then has
them as constants.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epigone.lessons.chunks import Mesh
from epigone.lessons.ensemble import Several, combined
from epigone.lessons.fused import Given, Loss, fused_loss, per_token
from epigone.lessons.heads import Head, Hidden
from epigone.lessons.policy_gradient import Drawn
from epigone.lessons.terms import chosen_log_prob, floored


def rewarded_loss(
    loss: Loss,
    student: Hidden,
    teacher: Given,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    segments_BT: Int[Array, "B T"],
    heads: tuple[Head | None, ...] = (Head(),),
    mesh: Mesh = Mesh(),
    chunk: int | None = None,
    knobs: Any = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """`fused_loss` of a loss that is given `Drawn`; a token counts as drawn where its weight is positive.

    Args: those of `fused_loss`, and the texts of each row.
    """
    how: dict[str, Any] = {"heads": heads, "mesh": mesh, "chunk": chunk}
    ratio_BT = per_token(_log_ratio, jax.lax.stop_gradient(student), teacher, targets_BT, **how)
    drawn = Drawn(targets_BT, *later_rewards(ratio_BT, weights_BT > 0, segments_BT))
    return fused_loss(loss, student, teacher, drawn, weights_BT, knobs=knobs, **how)


def later_rewards(
    reward_BT: Float[Array, "B T"], drawn_BT: Array, segments_BT: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Sum and number of the rewards of drawn tokens behind each place, in the same segment; neighbours differ in it."""
    one_BT = drawn_BT.astype(reward_BT.dtype)

    def back(carry: Any, part: Any) -> tuple[Any, Any]:
        *sums, next_B = carry
        *own, segment_B = part
        later = [jnp.where(segment_B == next_B, x, 0.0) for x in sums]
        return (*(x + y for x, y in zip(later, own, strict=True)), segment_B), tuple(later)

    columns = (jnp.where(drawn_BT, reward_BT, 0.0).T, one_BT.T, segments_BT.T)
    start = jax.tree.map(lambda x_TB: jnp.zeros_like(x_TB[0]), columns)
    later_TB, count_TB = jax.lax.scan(back, start, columns, reverse=True)[1]
    return later_TB.T, count_TB.T


def _log_ratio(
    student_logits_BTV: jax.Array, teacher: Any, targets_BT: jax.Array, vocab_axis: str | None = None
) -> jax.Array:
    """log P(y) - log S(y)."""
    if isinstance(teacher, Several):
        teacher = combined(teacher, targets_BT, 1.0, vocab_axis)
    log_p_BT, log_s_BT = (
        chosen_log_prob(vocab_axis, floored(x, 1.0), targets_BT) for x in (teacher, student_logits_BTV)
    )
    return log_p_BT - log_s_BT
