"""Divergences against scipy in float64, by finite differences, at their edges, and under every way to split a batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import log_softmax, rel_entr, softmax

from epigone.errors import UserError
from epigone.lessons.divergences import cross_entropy, forward_kl, jsd, reverse_kl

NAMED = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd_half": jsd,
    "jsd_0.1": partial(jsd, beta=0.1),
    "jsd_0.9": partial(jsd, beta=0.9),
}
every_divergence = pytest.mark.parametrize("divergence", NAMED.values(), ids=NAMED.keys())


def reference(name, student, teacher, temperature):
    s, p = (softmax(np.float64(x) / temperature, axis=-1) for x in (student, teacher))
    if name == "forward_kl":
        return rel_entr(p, s).sum(-1)
    if name == "reverse_kl":
        return rel_entr(s, p).sum(-1)
    beta = {"jsd_half": 0.5, "jsd_0.1": 0.1, "jsd_0.9": 0.9}[name]
    mixture = beta * p + (1 - beta) * s
    return beta * rel_entr(p, mixture).sum(-1) + (1 - beta) * rel_entr(s, mixture).sum(-1)


def random_logits(seed, shape=(2, 5, 33), scale=3.0):
    student, teacher = np.random.default_rng(seed).normal(size=(2, *shape)) * scale
    return student.astype(np.float32), teacher.astype(np.float32)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_agrees_with_scipy_in_float64(name, temperature):
    student, teacher = random_logits(0)
    expected = reference(name, student, teacher, temperature)
    plain = NAMED[name](student, teacher, temperature=temperature, temperature_squared=False)
    scaled = NAMED[name](student, teacher, temperature=temperature)
    assert plain.dtype == jnp.float32
    np.testing.assert_allclose(plain, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(scaled, expected * temperature**2, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMED)
def test_float64_in_float64_out(name):
    student, teacher = (np.float64(x) for x in random_logits(1))
    with jax.enable_x64(True):
        value = NAMED[name](jnp.asarray(student), jnp.asarray(teacher), temperature=2.0, temperature_squared=False)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, reference(name, student, teacher, 2.0), rtol=1e-12)


@every_divergence
def test_gradients_by_finite_differences_for_both_sides(divergence):
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(x, jnp.float64) for x in random_logits(2, (1, 2, 7)))
        check_grads(partial(divergence, temperature=1.7), (student, teacher), order=1, modes=("fwd", "rev"))


@every_divergence
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("jitted", [False, True])
def test_identical_logits_give_exactly_nothing(divergence, dtype, jitted):
    logits = jnp.asarray(random_logits(3, (1, 3, 256_000), 4.0)[0], dtype)
    both = jax.value_and_grad(lambda s, t: divergence(s, t, temperature=0.7).sum(), argnums=(0, 1))
    value, gradients = (jax.jit(both) if jitted else both)(logits, jnp.array(logits))
    assert value == 0.0
    assert all(not np.any(gradient) for gradient in gradients)


@every_divergence
def test_identical_models_in_bfloat16_give_exactly_nothing(divergence):
    """Student and teacher logits made inside one program: XLA may round one side and not the other."""

    def through_heads(student_head_DV, teacher_head_DV, hidden_BTD):
        logits = (jnp.einsum("btd,dv->btv", hidden_BTD, head) for head in (student_head_DV, teacher_head_DV))
        return divergence(*logits).sum()

    hidden_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 16)), jnp.bfloat16)
    head_DV = jnp.asarray(np.random.default_rng(1).normal(size=(16, 5003)), jnp.bfloat16)
    value, gradient = jax.jit(jax.value_and_grad(through_heads))(head_DV, jnp.array(head_DV), hidden_BTD)
    assert value == 0.0
    assert not np.any(gradient)


@every_divergence
@pytest.mark.parametrize("distance", [1e-6, 1e-4, 1e-2, 1.0, 30.0])
def test_never_negative(divergence, distance):
    student, noise = random_logits(4, (4, 16, 501))
    assert np.min(divergence(student, student + np.float32(distance) * noise)) >= 0.0


def test_small_divergences_do_not_drown_in_rounding():
    student, noise = random_logits(5, (2, 4, 4099))
    teacher = student + np.float32(1e-3) * noise
    np.testing.assert_allclose(forward_kl(student, teacher), reference("forward_kl", student, teacher, 1.0), atol=1e-7)


@every_divergence
@pytest.mark.parametrize("masked", [-np.inf, -1e9, -1e4])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_masked_entries_change_nothing(divergence, masked, temperature):
    student, teacher = random_logits(6)
    wide = [np.concatenate([x, np.full((2, 5, 4), masked, np.float32)], -1) for x in (student, teacher)]
    loss = lambda s, t: divergence(s, t, temperature=temperature).sum()  # noqa: E731
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(*wide)
    expected, expected_gradients = jax.value_and_grad(loss, argnums=(0, 1))(student, teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient[..., :33], wanted, rtol=1e-5, atol=1e-6)
        assert not np.any(gradient[..., 33:])


@every_divergence
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_double_underflow_and_low_temperature_stay_finite(divergence, scale):
    student, teacher = random_logits(7, scale=scale)
    loss = lambda s, t: divergence(s, t, temperature=0.05).sum()  # noqa: E731
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(student, teacher)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


@every_divergence
def test_entries_masked_on_one_side_only_stay_finite(divergence):
    student, teacher = random_logits(8)
    for pair in ((student, masked_first(teacher)), (masked_first(student), teacher)):
        value, gradient = jax.value_and_grad(lambda s, t: divergence(s, t, temperature=0.05).sum())(*pair)
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))


def masked_first(logits):
    masked = logits.copy()
    masked[..., :3] = -np.inf
    return masked


def test_jsd_end_points_are_the_limits_of_its_scaled_form():
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(x, jnp.float64) for x in random_logits(9, scale=1.0))
        np.testing.assert_array_equal(jsd(student, teacher, beta=0.0), forward_kl(student, teacher))
        np.testing.assert_array_equal(jsd(student, teacher, beta=1.0), reverse_kl(student, teacher))
        near = 1e-5
        np.testing.assert_allclose(jsd(student, teacher, beta=near) / near, forward_kl(student, teacher), rtol=1e-2)
        np.testing.assert_allclose(jsd(student, teacher, beta=1 - near) / near, reverse_kl(student, teacher), rtol=1e-2)


def test_jsd_swaps_sides_with_beta():
    student, teacher = random_logits(10)
    np.testing.assert_allclose(jsd(student, teacher, beta=0.2), jsd(teacher, student, beta=0.8), rtol=1e-5)


def test_temperature_squared_keeps_the_gradient_of_high_temperatures():
    """Hinton et al. 2015: for large T, T^2 dKL/ds tends to (s - t) / V for centred logits."""
    student, teacher = (x - x.mean(-1, keepdims=True) for x in random_logits(11))
    gradient = jax.grad(lambda s: forward_kl(s, teacher, temperature=1e3).sum())(student)
    np.testing.assert_allclose(gradient, (student - teacher) / 33, atol=5e-3)


def test_forward_kl_holds_the_teachers_entropy():
    student, teacher = random_logits(12)
    p = softmax(np.float64(teacher), axis=-1)
    soft_cross_entropy = -(p * log_softmax(np.float64(student), axis=-1)).sum(-1)
    entropy = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(forward_kl(student, teacher), soft_cross_entropy - entropy, rtol=1e-5)


def test_cross_entropy_agrees_with_scipy():
    logits, _ = random_logits(13)
    targets = np.random.default_rng(0).integers(0, 33, (2, 5)).astype(np.int32)
    expected = -np.take_along_axis(log_softmax(np.float64(logits), axis=-1), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(cross_entropy(logits, targets), expected, rtol=1e-5)
    assert cross_entropy(jnp.asarray(logits, jnp.bfloat16), targets).dtype == jnp.float32


@pytest.mark.parametrize("beta", [-0.1, 1.5, float("nan")])
def test_jsd_refuses_a_beta_outside_its_range(beta):
    with pytest.raises(UserError, match="beta"):
        jsd(*random_logits(14), beta=beta)


@every_divergence
def test_refuses_what_cannot_be_meant(divergence):
    student, teacher = random_logits(15)
    with pytest.raises(UserError, match="temperature=0"):
        divergence(student, teacher, temperature=0.0)
    with pytest.raises(UserError, match="32 entries a token, student logits 33"):
        divergence(student, teacher[..., :32])
