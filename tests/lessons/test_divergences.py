"""Divergences against scipy in float64, by finite differences, at their edges, and under every way to split a batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from scipy.special import log_softmax, rel_entr, softmax

from epigone.errors import UserError
from epigone.lessons.divergences import (
    adaptive_kl,
    alpha_beta,
    cross_entropy,
    forward_kl,
    jsd,
    logit_mse,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)


def kl(p, q):
    return rel_entr(p, q).sum(-1)


def skewed(p, q, share):
    return kl(p, share * p + (1 - share) * q)


def jensen_shannon(p, s, beta):
    mixture = beta * p + (1 - beta) * s
    return beta * kl(p, mixture) + (1 - beta) * kl(s, mixture)


def adaptive(p, s, mass):
    """As in Wu et al.: sort by the teacher, and cut where the cumulative probability passes the mass."""
    order = np.argsort(-p, axis=-1)
    sorted_p, gaps = (np.take_along_axis(x, order, -1) for x in (p, np.abs(p - s)))
    head = np.cumsum(sorted_p, -1) <= mass
    head[..., 0] = True
    share = (gaps * head).sum(-1) / gaps.sum(-1)
    return share * kl(p, s) + (1 - share) * kl(s, p)


def cichocki(p, s, a, b):
    """Wang et al. 2025, eq. 6; at b = 0 Cichocki et al. 2011, eq. 21."""
    if b == 0:
        return (p**a * np.log(p**a / s**a) - p**a + s**a).sum(-1) / a**2
    return -(p**a * s**b - a / (a + b) * p ** (a + b) - b / (a + b) * s ** (a + b)).sum(-1) / (a * b)


NAMED = {
    "forward_kl": (forward_kl, kl),
    "reverse_kl": (reverse_kl, lambda p, s: kl(s, p)),
    "symmetric_kl": (symmetric_kl, lambda p, s: (kl(p, s) + kl(s, p)) / 2),
    "symmetric_kl_0.2": (partial(symmetric_kl, reverse_weight=0.2), lambda p, s: 0.8 * kl(p, s) + 0.2 * kl(s, p)),
    "jsd": (jsd, lambda p, s: jensen_shannon(p, s, 0.5)),
    "jsd_0.1": (partial(jsd, beta=0.1), lambda p, s: jensen_shannon(p, s, 0.1)),
    "jsd_0.9": (partial(jsd, beta=0.9), lambda p, s: jensen_shannon(p, s, 0.9)),
    "skew_forward_kl": (skew_forward_kl, lambda p, s: skewed(p, s, 0.1)),
    "skew_forward_kl_0.6": (partial(skew_forward_kl, alpha=0.6), lambda p, s: skewed(p, s, 0.6)),
    "skew_reverse_kl": (skew_reverse_kl, lambda p, s: skewed(s, p, 0.1)),
    "skew_reverse_kl_0.6": (partial(skew_reverse_kl, alpha=0.6), lambda p, s: skewed(s, p, 0.6)),
    "adaptive_kl": (adaptive_kl, lambda p, s: adaptive(p, s, 0.5)),
    "adaptive_kl_0.9": (partial(adaptive_kl, head_mass=0.9), lambda p, s: adaptive(p, s, 0.9)),
    "total_variation": (total_variation, lambda p, s: np.abs(p - s).sum(-1) / 2),
    "alpha_beta": (alpha_beta, lambda p, s: cichocki(p, s, 0.2, 0.7)),
    "alpha_beta_0.8_0.1": (partial(alpha_beta, alpha=0.8, beta=0.1), lambda p, s: cichocki(p, s, 0.8, 0.1)),
    "alpha_beta_1.5_0": (partial(alpha_beta, alpha=1.5, beta=0.0), lambda p, s: cichocki(p, s, 1.5, 0)),
    "logit_mse": (logit_mse, None),
}
every_divergence = pytest.mark.parametrize("divergence", [f for f, _ in NAMED.values()], ids=NAMED.keys())
SMOOTH = {name: f for name, (f, _) in NAMED.items() if not name.startswith("adaptive")}
"""Those whose gradient is that of their value: the shares of adaptive_kl are constants for it."""


def reference(name, student, teacher, temperature):
    """In float64, as the papers write it."""
    student, teacher = (np.float64(x) / temperature for x in (student, teacher))
    if name == "logit_mse":
        return ((student - teacher) ** 2).mean(-1)
    return NAMED[name][1](softmax(teacher, axis=-1), softmax(student, axis=-1))


def random_logits(seed, shape=(2, 5, 33), scale=3.0):
    student, teacher = np.random.default_rng(seed).normal(size=(2, *shape)) * scale
    return student.astype(np.float32), teacher.astype(np.float32)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_agrees_with_scipy_in_float64(name, temperature):
    student, teacher = random_logits(0)
    expected = reference(name, student, teacher, temperature)
    divergence = NAMED[name][0]
    plain = divergence(student, teacher, temperature=temperature, temperature_squared=False)
    scaled = divergence(student, teacher, temperature=temperature)
    traced = jax.jit(lambda temperature: divergence(student, teacher, temperature=temperature))(temperature)
    assert plain.dtype == jnp.float32
    np.testing.assert_allclose(plain, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(scaled, expected * temperature**2, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(traced, scaled, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMED)
def test_float64_in_float64_out(name):
    student, teacher = (np.float64(x) for x in random_logits(1))
    with jax.enable_x64(True):
        given = {"temperature": 2.0, "temperature_squared": False}
        value = NAMED[name][0](jnp.asarray(student), jnp.asarray(teacher), **given)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, reference(name, student, teacher, 2.0), rtol=1e-11)


@pytest.mark.parametrize("divergence", SMOOTH.values(), ids=SMOOTH.keys())
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


def test_the_shares_of_adaptive_kl_are_constants_for_its_gradient():
    student, teacher = random_logits(16)
    forward, reverse, mixed = (
        jax.vmap(jax.vmap(jax.grad(lambda s, t, f=f: f(s[None, None], t[None, None])[0, 0])))(student, teacher)
        for f in (forward_kl, reverse_kl, adaptive_kl)
    )
    values = (forward_kl(student, teacher), reverse_kl(student, teacher), adaptive_kl(student, teacher))
    share = np.asarray((values[2] - values[1]) / (values[0] - values[1]))[..., None]
    assert np.all((share > 0) & (share < 1))
    np.testing.assert_allclose(mixed, share * forward + (1 - share) * reverse, atol=1e-4)


CLOSE = {
    "symmetric_kl to forward": (partial(symmetric_kl, reverse_weight=0.0), forward_kl, None),
    "symmetric_kl to reverse": (partial(symmetric_kl, reverse_weight=1.0), reverse_kl, None),
    "skew_forward_kl to forward": (skew_forward_kl, forward_kl, {"alpha": 0.0}),
    "skew_reverse_kl to reverse": (skew_reverse_kl, reverse_kl, {"alpha": 0.0}),
    "alpha_beta to forward": (alpha_beta, forward_kl, {"alpha": 1.0, "beta": 0.0}),
    "alpha_beta to reverse": (alpha_beta, reverse_kl, {"alpha": 0.0, "beta": 1.0}),
}


@pytest.mark.parametrize(("function", "limit", "end"), CLOSE.values(), ids=CLOSE.keys())
def test_end_points_are_limits_of_values_and_gradients(function, limit, end):
    student, teacher = random_logits(17, scale=1.0)
    both = lambda f: jax.value_and_grad(lambda s: f(s, teacher).sum())(student)  # noqa: E731
    wanted = both(limit)
    for near in (0.0, 1e-6):
        inside = {name: abs(value - near) for name, value in (end or {}).items()}
        value, gradient = both(partial(function, **inside))
        np.testing.assert_allclose(value, wanted[0], rtol=2e-5)
        np.testing.assert_allclose(gradient, wanted[1], atol=2e-5)


@pytest.mark.parametrize("function", [skew_forward_kl, skew_reverse_kl])
def test_nothing_is_left_of_a_divergence_from_a_mixture_that_is_all_its_own(function):
    student, teacher = random_logits(18)
    value, gradient = jax.value_and_grad(lambda s: function(s, teacher, alpha=1.0).sum())(student)
    assert value == 0.0
    assert not np.any(gradient)
    assert np.max(function(student, teacher, alpha=1 - 1e-6)) < 1e-5


def test_alpha_beta_at_one_half_is_four_times_the_squared_hellinger_distance():
    student, teacher = random_logits(19)
    s, p = (softmax(np.float64(x), axis=-1) for x in (student, teacher))
    hellinger = 1 - np.sqrt(s * p).sum(-1)
    np.testing.assert_allclose(alpha_beta(student, teacher, alpha=0.5, beta=0.5), 4 * hellinger, rtol=1e-5)


def test_forward_kl_tends_to_half_the_logit_mse():
    student, teacher = (x - x.mean(-1, keepdims=True) for x in random_logits(20))
    np.testing.assert_allclose(
        forward_kl(student, teacher, temperature=3e2), logit_mse(student, teacher) / 2, rtol=0.05
    )


@every_divergence
def test_a_vocabulary_cut_over_devices_changes_nothing(divergence):
    """Values and both gradients, in shard_map over eight devices."""
    student, teacher = random_logits(21, (2, 3, 40))
    student[..., 37:], teacher[..., 37:] = -np.inf, -np.inf
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.shard_map(
        partial(divergence, temperature=0.7, vocab_axis="tensor"),
        mesh=mesh,
        in_specs=P(None, None, "tensor"),
        out_specs=P(),
    )
    weights = np.random.default_rng(0).normal(size=(2, 3))
    found, expected = (
        jax.jit(jax.value_and_grad(lambda s, t, f=f: (f(s, t) * weights).sum(), argnums=(0, 1)))(student, teacher)
        for f in (cut, partial(divergence, temperature=0.7))
    )
    for mine, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-6)


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


def test_cross_entropy_of_a_cut_vocabulary():
    logits, _ = random_logits(22, (2, 3, 40))
    targets = np.random.default_rng(0).integers(0, 40, (2, 3)).astype(np.int32)
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.shard_map(
        partial(cross_entropy, vocab_axis="tensor"), mesh=mesh, in_specs=(P(None, None, "tensor"), P()), out_specs=P()
    )
    np.testing.assert_allclose(jax.jit(cut)(logits, targets), cross_entropy(logits, targets), rtol=1e-5)


def test_cross_entropy_agrees_with_scipy():
    logits, _ = random_logits(13)
    targets = np.random.default_rng(0).integers(0, 33, (2, 5)).astype(np.int32)
    expected = -np.take_along_axis(log_softmax(np.float64(logits), axis=-1), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(cross_entropy(logits, targets), expected, rtol=1e-5)
    assert cross_entropy(jnp.asarray(logits, jnp.bfloat16), targets).dtype == jnp.float32


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
@pytest.mark.parametrize(
    ("function", "name"),
    [(jsd, "beta"), (skew_forward_kl, "alpha"), (skew_reverse_kl, "alpha"), (symmetric_kl, "reverse_weight"),
     (adaptive_kl, "head_mass")],
)  # fmt: skip
def test_shares_outside_their_range_are_refused(function, name, share):
    with pytest.raises(UserError, match=f"{name}="):
        function(*random_logits(14), **{name: share})


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (-0.1, 1.0), (1.0, -0.1), (float("nan"), 1.0)])
def test_alpha_beta_refuses_what_is_no_divergence(alpha, beta):
    with pytest.raises(UserError, match="alpha="):
        alpha_beta(*random_logits(14), alpha=alpha, beta=beta)


@every_divergence
def test_refuses_what_cannot_be_meant(divergence):
    student, teacher = random_logits(15)
    with pytest.raises(UserError, match="temperature=0"):
        divergence(student, teacher, temperature=0.0)
    with pytest.raises(UserError, match="32 entries a token, student logits 33"):
        divergence(student, teacher[..., :32])
