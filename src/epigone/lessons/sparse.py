"""Learning from what was kept of a teacher's scores: a few entries a token instead of the whole vocabulary.

Four things may have become of the rest of the vocabulary, and the same ids mean another loss in each:

- BUCKET: one more outcome, "any other", holds the rest of the probability on both sides. Exact for what was kept, and
  any divergence of the outcomes is at most that of the whole vocabulary. How the rest is shared out is not taught.
- ZERO: the teacher is renormalised over the kept ids, and gives the others nothing; the student is whole. It learns
  to be surer than the teacher (Anshumann et al. 2025: "top-K").
- LEFT_OUT: teacher and student are both renormalised over the kept ids. What the student gives to the others is not
  taught at all: of use with many ids, or beside hard labels.
- SAMPLED: the ids were drawn, and their weights w estimate the teacher's probabilities without bias. Forward KL alone:
  -sum_m w_m log S(id_m) - H(P), whose expected value and gradient are those of the whole (Anshumann et al. 2025,
  "Sparse Logit Sampling", ACL). For one token it may be negative.

Scores are kept at the temperature at which they are learned. M is the number of kept entries.
"""

from dataclasses import dataclass, field
from enum import StrEnum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epigone.lessons.divergences import Divergence, Temperature
from epigone.lessons.terms import FLOOR, floored, summed


class Rest(StrEnum):
    """What became of the entries that were not kept."""

    BUCKET = "bucket"
    ZERO = "zero"
    LEFT_OUT = "left_out"
    SAMPLED = "sampled"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sparse:
    """What was kept of a teacher's distribution for each token.

    Attributes:
        ids_BTM: the kept tokens; anything where fewer than M were kept.
        log_probs_BTM: their log-probabilities, or log-weights where they were drawn; -1e9 where fewer were kept.
        rest_BT: log-probability of all others (BUCKET), the teacher's entropy in nats (SAMPLED), else unused.
        kind: what became of the others.
    """

    ids_BTM: Int[Array, "B T M"]
    log_probs_BTM: Float[Array, "B T M"]
    rest_BT: Float[Array, "B T"]
    kind: Rest = field(metadata={"static": True})


def sparse_divergence(
    divergence: Divergence,
    student_logits_BTV: Float[Array, "B T V"],
    teacher: Sparse,
    *,
    temperature: Temperature = 1.0,
    temperature_squared: bool = True,
    vocab_axis: str | None = None,
) -> Float[Array, "B T"]:
    """The divergence [B, T] of a student from what was kept at this temperature, times T^2 if asked.

    For SAMPLED it is forward KL, whatever `divergence` is; `teachers.check_compatible` refuses another.
    `vocab_axis`: inside shard_map, the mesh axis over which V is cut.
    """
    logits_BTV = floored(student_logits_BTV, temperature)
    kept_BTM = teacher.log_probs_BTM > FLOOR
    places_BTM = _places(teacher.ids_BTM, kept_BTM, logits_BTV.shape[-1], vocab_axis)
    chosen_BTM = _chosen(logits_BTV, places_BTM, vocab_axis)
    if teacher.kind is Rest.SAMPLED:
        log_s_BTM = chosen_BTM - _log_sum_exp(logits_BTV, vocab_axis)[..., None]
        weighted_BTM = jnp.where(kept_BTM, jnp.exp(teacher.log_probs_BTM) * log_s_BTM, 0.0)
        loss_BT = -jnp.sum(weighted_BTM, axis=-1) - teacher.rest_BT
    else:
        student, known = jnp.where(kept_BTM, chosen_BTM, FLOOR), teacher.log_probs_BTM
        if teacher.kind is not Rest.LEFT_OUT:
            others_BTV = jnp.put_along_axis(logits_BTV, places_BTM, FLOOR, axis=-1, inplace=False, mode="drop")
            others_BT = _log_sum_exp(others_BTV, vocab_axis)
            student = jnp.concatenate([student, others_BT[..., None]], axis=-1)
            rest_BT = teacher.rest_BT if teacher.kind is Rest.BUCKET else jnp.full_like(teacher.rest_BT, FLOOR)
            known = jnp.concatenate([known, rest_BT[..., None]], axis=-1)
        loss_BT = divergence(student, known, temperature=1.0, temperature_squared=False)
    return loss_BT * temperature**2 if temperature_squared else loss_BT


def _places(ids_BTM: jax.Array, kept_BTM: jax.Array, V: int, vocab_axis: str | None) -> jax.Array:
    """Where the kept ids are in this part of the vocabulary; V for those that are not in it."""
    places_BTM = ids_BTM if vocab_axis is None else ids_BTM - jax.lax.axis_index(vocab_axis) * V
    return jnp.where(kept_BTM & (places_BTM >= 0) & (places_BTM < V), places_BTM, V)


def _chosen(logits_BTV: jax.Array, places_BTM: jax.Array, vocab_axis: str | None) -> jax.Array:
    """The logits of the kept ids [B, T, M]; 0 where none is."""
    chosen_BTM = jnp.take_along_axis(logits_BTV, places_BTM, axis=-1, mode="fill", fill_value=0.0)
    return chosen_BTM if vocab_axis is None else jax.lax.psum(chosen_BTM, vocab_axis)


def _log_sum_exp(logits_BTV: jax.Array, vocab_axis: str | None) -> jax.Array:
    """log sum_v exp(logit_v) [B, T], differentiable."""
    top_BT = jax.lax.stop_gradient(jnp.max(logits_BTV, axis=-1))
    top_BT = top_BT if vocab_axis is None else jax.lax.pmax(top_BT, vocab_axis)
    return top_BT + jnp.log(summed(jnp.exp(logits_BTV - top_BT[..., None]), vocab_axis))
