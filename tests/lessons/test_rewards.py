"""The policy gradient of whole texts: over every text of a tiny vocabulary, however packed, fused and cut."""

from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from training_toy import TRAINING, losses, own_texts, run, weights

from epigone.errors import UserError
from epigone.lessons.divergences import reverse_kl
from epigone.lessons.ensemble import Several, mean_of_probabilities
from epigone.lessons.fused import Hidden, Mesh
from epigone.lessons.heads import Head
from epigone.lessons.objective import Objective
from epigone.lessons.policy_gradient import Drawn, reads_later, sampled_reverse_kl, sequence_reverse_kl
from epigone.lessons.rewards import later_rewards, rewarded_loss
from epigone.models.sharding import make_mesh
from epigone.training.config import Hardware

V, LENGTH = 3, 3
TEXTS = np.array(list(product(range(V), repeat=LENGTH)), np.int32)
CONTEXTS = {prefix: i for i, prefix in enumerate(p for n in range(LENGTH) for p in product(range(V), repeat=n))}
PLACES = np.array([[CONTEXTS[tuple(text[:t])] for t in range(LENGTH)] for text in TEXTS])
STUDENT, TEACHER = (jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).normal(0, 1.2, (2, len(CONTEXTS), V)))
PLAIN = partial(sequence_reverse_kl, length_normalised=False)


def log_probs(table):
    """Of every text [27, 3], token by token: the model is a table of logits, a row for each beginning."""
    return jnp.take_along_axis(jax.nn.log_softmax(table)[PLACES], TEXTS[..., None], axis=-1)[..., 0]


def exact(table):
    """KL(S || P) over whole texts."""
    ours, theirs = log_probs(table).sum(-1), log_probs(TEACHER).sum(-1)
    return jnp.sum(jnp.exp(ours) * (ours - theirs))


def drawn_texts(sign=1.0):
    ratio = log_probs(TEACHER) - log_probs(STUDENT)
    sums = later_rewards(ratio, jnp.ones((27, 3), bool), jnp.ones((27, 3), jnp.int32))
    return Drawn(jnp.asarray(TEXTS), sign * sums[0], sums[1])


def expected(divergence, drawn):
    """The gradient of the loss, each text as often as the student writes it."""
    often = jax.lax.stop_gradient(jnp.exp(log_probs(STUDENT).sum(-1)))
    objective = Objective(divergence)

    def loss(table):
        return jnp.sum(often[:, None] * objective.loss(table[PLACES], TEACHER[PLACES], drawn))

    return jax.value_and_grad(loss)(STUDENT)


def test_over_all_texts_it_is_the_gradient_of_the_kl_of_whole_texts():
    value, gradient = expected(PLAIN, drawn_texts())
    assert float(value) == pytest.approx(float(exact(STUDENT)), rel=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(exact)(STUDENT), atol=1e-6)


@pytest.mark.parametrize(
    ("divergence", "sign"),
    [(reverse_kl, 1.0), (sampled_reverse_kl, 1.0), (PLAIN, -1.0), (sequence_reverse_kl, 1.0)],
    ids=["single steps", "single steps by draws", "another sign", "normalised by length"],
)
def test_without_the_later_rewards_or_with_others_it_is_another_gradient(divergence, sign):
    gradient = expected(divergence, drawn_texts(sign))[1]
    assert np.abs(gradient - jax.grad(exact)(STUDENT)).max() > 0.05


def test_single_steps_agree_at_the_last_token_alone():
    last = slice(CONTEXTS[(0, 0)], None)
    single, whole = (expected(d, drawn_texts())[1] for d in (reverse_kl, PLAIN))
    np.testing.assert_allclose(single[last], whole[last], atol=1e-7)
    assert np.abs(single[0] - whole[0]).max() > 0.05


def test_length_normalised_rewards_are_means():
    drawn = drawn_texts()
    means = drawn._replace(later_BT=drawn.later_BT / np.array([2.0, 1.0, 1.0]), count_BT=jnp.ones((27, 3)))
    np.testing.assert_allclose(
        expected(sequence_reverse_kl, drawn)[1], expected(sequence_reverse_kl, means)[1], atol=1e-7
    )


def test_rewards_stay_within_a_text_and_given_tokens_have_none():
    """Two texts in a row with a prompt each, one alone, and padding; against sums with loops."""
    random = np.random.default_rng(1)
    reward = random.normal(size=(3, 8)).astype(np.float32)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2], [1] * 8, [1, 1, 1, 1, 1, 0, 0, 0]], np.int32)
    drawn = np.array([[0, 1, 1, 1, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]], bool)
    sums, counts = np.zeros((2, 3, 8))
    for b, t, u in product(range(3), range(8), range(8)):
        if u > t and segments[b, u] == segments[b, t] and drawn[b, u]:
            sums[b, t] += reward[b, u]
            counts[b, t] += 1
    found = later_rewards(jnp.asarray(reward), jnp.asarray(drawn), jnp.asarray(segments))
    np.testing.assert_allclose(found[0], sums, atol=1e-6)
    np.testing.assert_array_equal(found[1], counts)


@pytest.mark.parametrize("shape", [None, (2, 2, 2), (1, 2, 4)], ids=str)
def test_it_is_fused_and_cut_over_a_mesh(shape):
    random = np.random.default_rng(3)
    B, T, D, rows = 4, 6, 5, 16
    hidden, known = (jnp.asarray(random.normal(size=(B, T, D)), jnp.float32) for _ in range(2))
    weight, head = (jnp.asarray(random.normal(size=(rows, D)), jnp.float32) for _ in range(2))
    targets = jnp.asarray(random.integers(0, rows, (B, T)), jnp.int32)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2]] * B, jnp.int32)
    given = jnp.asarray(random.random((B, T)) * np.array([0, 1, 1, 0, 1, 1]), jnp.float32)
    objective = Objective(sequence_reverse_kl)

    def dense(student):
        logits = [jnp.einsum("btd,vd->btv", *pair) for pair in (student, (known, head))]
        ours, theirs = (jnp.take_along_axis(jax.nn.log_softmax(x), targets[..., None], -1)[..., 0] for x in logits)
        drawn = Drawn(targets, *later_rewards(theirs - ours, given > 0, segments))
        return jnp.sum(objective.loss(*logits, drawn) * given)

    def fused(student):
        cut = Mesh() if shape is None else Mesh(("data", "fsdp"), "tensor")
        args = (Hidden(*student), Hidden(known, head), targets, given)
        return rewarded_loss(objective.loss, *args, segments_BT=segments, mesh=cut, chunk=5)[0]

    wanted, student = jax.value_and_grad(dense)((hidden, weight)), (hidden, weight)
    if shape is None:
        found = jax.jit(jax.value_and_grad(fused))(student)
    else:
        with jax.set_mesh(make_mesh(*shape)):
            found = jax.jit(jax.value_and_grad(fused))(jax.device_put(student, P()))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-5), found, wanted)


def test_several_teachers_and_equal_models():
    random = np.random.default_rng(4)
    logits, targets = jnp.asarray(random.normal(size=(2, 4, 7)), jnp.float32), jnp.ones((2, 4), jnp.int32)
    hidden, eye, ones = logits, jnp.eye(7), jnp.ones((2, 4))
    loss = partial(rewarded_loss, Objective(PLAIN).loss, segments_BT=targets)
    several = Several((logits, logits), jnp.ones((2, 4, 2)), mean_of_probabilities, None)
    for teacher, heads in ((logits, (None,)), (several, (None, None))):

        def total(hidden, teacher=teacher, heads=heads):
            return loss(Hidden(hidden, eye), teacher, targets, ones, heads=(Head(), *heads))[0]

        by = jax.jit(jax.grad(total))(hidden)
        np.testing.assert_allclose(by, 0.0, atol=1e-6)


def test_it_trains_on_own_texts_and_a_mesh_changes_nothing(tmp_path):
    given = own_texts(share=1.0, replay=0, reuse=1) | {"objective": Objective(sequence_reverse_kl)}
    given |= {"training": replace(TRAINING, steps=3, log_every=1, compare_every=None)}
    one = run(tmp_path / "one", **given)
    cut = run(tmp_path / "cut", hardware=Hardware(data=2, fsdp=2, tensor=2, microbatches=2), **given)
    np.testing.assert_allclose(losses(cut), losses(one), rtol=1e-5)
    for name, wanted in weights(one).items():
        np.testing.assert_allclose(weights(cut)[name], wanted, atol=1e-4, err_msg=name)
    single = run(tmp_path / "single", **(given | {"objective": Objective(reverse_kl)}))
    assert losses(single)[0] == pytest.approx(losses(one)[0], rel=1e-5)
    assert losses(single)[2] != pytest.approx(losses(one)[2], rel=1e-5)


def test_what_does_not_fit_is_refused(tmp_path):
    assert reads_later(PLAIN)
    assert not reads_later(sampled_reverse_kl)
    with pytest.raises(UserError, match="sequence_reverse_kl needs to know what came later"):
        Objective(sequence_reverse_kl).loss(STUDENT[None], TEACHER[None], jnp.zeros((1, len(CONTEXTS)), jnp.int32))
    given = own_texts(share=0.7, replay=0, reuse=1) | {"objective": Objective(sequence_reverse_kl)}
    with pytest.raises(UserError, match="sequence_reverse_kl is of tokens that the student drew: set on_policy"):
        run(tmp_path, **given)
