"""How near a student is to its teacher and to the text, while it learns: sums over tokens, at temperature 1.

    sums = compare(student, teacher, targets_BT, weights_BT)      # add those of other parts
    pairs = as_pairs(sums)                                        # {"agreement_top1": (sum, count), ...}

With S the student, P the teacher, w the weights of the tokens, every measure is a mean sum_bt w m / sum_bt w of

| name                                         | m, per token                                            | unit  |
|----------------------------------------------|---------------------------------------------------------|-------|
| student_cross_entropy, teacher_cross_entropy | -log S(target), -log P(target)                          | nats  |
| student_entropy, teacher_entropy             | -sum_v S log S, -sum_v P log P                          | nats  |
| student_ece, teacher_ece                     | see `compare`; Guo et al. 2017, section 2, 15 bins      | share |
| agreement_top1                               | 1 where both have the same most probable token, else 0  | share |
| agreement_top5                               | tokens that both have among their five best, over five  | share |
| forward_kl, reverse_kl                       | KL(P, S), KL(S, P)                                      | nats  |

Without a teacher there are only the student's. Among equally probable tokens the lowest id comes first, and a token
that is never predicted is nobody's best: where a model can say fewer than five, the longer of both lists divides. These
are the definitions of `epigone.evaluate.agreement` and `.calibration`. A token that one model can say and the other
never (a logit of -1e9, or -inf) counts in a KL by about 1e9 times its probability.

No array [tokens, vocabulary] is made, and tokens and vocabulary may be cut over a mesh, as in `epigone.lessons.fused`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epigone.lessons.chunks import Mesh
from epigone.lessons.divergences import MASKED
from epigone.lessons.ensemble import Several, combined
from epigone.lessons.fused import per_token
from epigone.lessons.heads import Head, Hidden
from epigone.lessons.terms import FORWARD_KL, REVERSE_KL, chosen_log_prob, floored, log_softmax, normaliser, summed

BINS = 15
"""Bins of equal width of the confidence, as in `epigone.evaluate.calibration`."""

BEST = 5
"""Tokens of a model's list of best ones."""

Sums = dict[str, tuple[jax.Array, jax.Array]]
"""Of each measure a sum and a count, which add up over parts of a batch; the sum of an ECE is one number a bin."""


def compare(
    student: Hidden,
    teacher: Hidden | Float[Array, "B T V"] | Several | None,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    heads: tuple[Head | None, ...] = (Head(),),
    mesh: Mesh = Mesh(),
    chunk: int | None = None,
) -> Sums:
    """The sums and counts of all measures of the table above.

    The ECE is sum_b |sum_{bt in bin b} w (correct - confidence)| / sum_bt w: confidence is the probability of the most
    probable token, correct says whether it is the target, and bin b holds confidences in (b / 15, (b + 1) / 15]. Its
    sum here is the inner one, [15].

    Args: those of `fused_loss`. Returns: float32 arrays, the same on all devices.
    """
    values = per_token(_measures, student, teacher, targets_BT, heads=heads, mesh=mesh, chunk=chunk)
    weights_BT = weights_BT.astype(jnp.float32)
    sums = {}
    for who in ("student", "teacher") if teacher is not None else ("student",):
        confidence_BT, correct_BT = values.pop(f"{who}_confidence"), values.pop(f"{who}_correct")
        sums[f"{who}_ece"] = _gaps(confidence_BT, correct_BT, weights_BT)
    sums |= {name: jnp.sum(value_BT * weights_BT) for name, value_BT in values.items()}
    return {name: (total, jnp.sum(weights_BT)) for name, total in sums.items()}


def as_pairs(sums: Sums) -> Sums:
    """Sums as plain pairs whose quotient is the measure: of an ECE the gaps of all bins, once all parts are added."""
    return {name: (jnp.sum(jnp.abs(total)) if total.ndim else total, count) for name, (total, count) in sums.items()}


def _gaps(confidence_BT: jax.Array, correct_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """The weighted sum of correct - confidence in each bin."""
    inner = jnp.linspace(0.0, 1.0, BINS + 1)[1:-1]
    bin_BT = jnp.sum(confidence_BT[..., None] > inner, axis=-1)
    gap_BT = weights_BT * (correct_BT - confidence_BT)
    return jnp.sum(jnp.where(bin_BT[..., None] == jnp.arange(BINS), gap_BT[..., None], 0.0), axis=(0, 1))


def _measures(
    student_logits_BTV: jax.Array,
    teacher: jax.Array | Several | None,
    targets_BT: jax.Array,
    vocab_axis: str | None = None,
) -> dict[str, jax.Array]:
    """Every measure of each token; of the ECE, confidence and correctness."""
    if isinstance(teacher, Several):
        teacher = combined(teacher, targets_BT, 1.0, vocab_axis)
    s_BTV = floored(student_logits_BTV, 1.0)
    log_s_BTV, best_s, of_student = _alone(s_BTV, targets_BT, vocab_axis)
    found = {f"student_{name}": value_BT for name, value_BT in of_student.items()}
    if teacher is None:
        return found
    log_p_BTV, best_p, of_teacher = _alone(floored(teacher, 1.0), targets_BT, vocab_axis)
    found |= {f"teacher_{name}": value_BT for name, value_BT in of_teacher.items()}
    for name, terms in (("forward_kl", FORWARD_KL), ("reverse_kl", REVERSE_KL)):
        # Rounding may leave -1e-9.
        found[name] = jnp.maximum(summed(terms.value(log_s_BTV, log_p_BTV, None), vocab_axis), 0.0)
    found["agreement_top1"] = (best_s[1][..., 0] == best_p[1][..., 0]).astype(jnp.float32)
    found["agreement_top5"] = _overlap(best_s, best_p)
    return found


Best = tuple[jax.Array, jax.Array]
"""Logits and ids [B, T, M] of the M most probable tokens, best first."""


def _alone(
    logits_BTV: jax.Array, targets_BT: jax.Array, vocab_axis: str | None
) -> tuple[jax.Array, Best, dict[str, jax.Array]]:
    """The log-probabilities of one model, its best tokens, and what is measured of it alone."""
    normal = normaliser(logits_BTV, vocab_axis)
    log_BTV = log_softmax(logits_BTV, normal)
    best = _best(logits_BTV, vocab_axis)
    return (
        log_BTV,
        best,
        {
            "cross_entropy": -chosen_log_prob(vocab_axis, logits_BTV, targets_BT),
            "entropy": -summed(jnp.exp(log_BTV) * log_BTV, vocab_axis),
            # The most probable logit is the one that the normaliser takes away: what is left of it is e^0.
            "confidence": jnp.exp(-normal[1][..., 0]),
            "correct": (best[1][..., 0] == targets_BT).astype(jnp.float32),
        },
    )


def _best(logits_BTV: jax.Array, vocab_axis: str | None) -> Best:
    """The five most probable tokens. Of a vocabulary that is cut: the best of the best of its parts."""
    best = jax.lax.top_k(logits_BTV, min(BEST, logits_BTV.shape[-1]))
    # If the compiler sees that the first of a list is cut out of it, it sorts whole rows, at ten times the cost. (One
    # barrier for both arrays would end XLA's compiler for a CPU: it wants a top-k's results one by one.)
    values, ids = (jax.lax.optimization_barrier(x) for x in best)
    if vocab_axis is None:
        return values, ids
    ids += jax.lax.axis_index(vocab_axis) * logits_BTV.shape[-1]
    # Parts come in the order of their ids, so that among equals the lowest id stays first.
    values, ids = (jax.lax.all_gather(x, vocab_axis, axis=x.ndim - 1, tiled=True) for x in (values, ids))
    values, places = jax.lax.top_k(values, min(BEST, values.shape[-1]))
    ids = jnp.take_along_axis(ids, places, axis=-1)
    # All devices have the same; this tells JAX so.
    return jax.lax.pmax(values, vocab_axis), jax.lax.pmax(ids, vocab_axis)


def _overlap(one: Best, other: Best) -> jax.Array:
    """Tokens in both lists, over five, or over the longer list: the share [B, T]."""
    (in_one, ids_one), (in_other, ids_other) = ((values > MASKED, ids) for values, ids in (one, other))
    same = (ids_one[..., :, None] == ids_other[..., None, :]) & in_one[..., :, None] & in_other[..., None, :]
    longer_BT = jnp.maximum(jnp.sum(in_one, axis=-1), jnp.sum(in_other, axis=-1))
    return jnp.sum(same, axis=(-2, -1)) / jnp.maximum(longer_BT, 1)
