"""Detectors against references written out, and thresholds against the rate of false alarms that they promise."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics.pairwise import rbf_kernel

from epigone.arena import detectors
from epigone.arena.detectors import Query, calibrated, coordination, detected
from epigone.errors import UserError
from epigone.evaluate.similarity import word_features

RANDOM = np.random.default_rng(0)


def window(prompts, times=None, account="a"):
    times = range(len(prompts)) if times is None else times
    return [
        Query(float(time), account, np.array(prompt, np.int32)) for time, prompt in zip(times, prompts, strict=True)
    ]


def drawn(count, words=200, length=12, seed=0):
    """Prompts of Zipf's words."""
    p = 1 / np.arange(1, words + 1)
    return np.random.default_rng(seed).choice(np.arange(10, 10 + words), (count, length), p=p / p.sum())


def test_volume_is_the_fullest_span():
    times = np.sort(RANDOM.uniform(0, 20_000, 80))
    expected = max(sum(t - 3600 < s <= t for s in times) for t in times)
    assert detectors.volume(window([[1]] * 80, times)) == expected
    assert detectors.volume([]) == 0


def test_a_clock_is_regular_a_poisson_process_less_and_bursts_least():
    times = [np.arange(400.0), np.cumsum(RANDOM.exponential(1, 400)), np.cumsum(RANDOM.exponential(1, 400) ** 3)]
    clock, poisson, bursts = (detectors.regularity(window([[1]] * 400, t)) for t in times)
    assert clock == pytest.approx(0)
    assert poisson == pytest.approx(-1, abs=0.15)
    assert bursts < -1.5
    assert detectors.regularity(window([[1]] * 2)) == -np.inf


def test_coverage_and_repetition_at_their_ends_and_between():
    same, other = window([[5, 6, 7, 8]] * 8), window([[10 * n, 10 * n + 1] for n in range(1, 9)])
    assert detectors.coverage(same) == pytest.approx(1 / 8)
    assert detectors.coverage(other) == pytest.approx(1)
    assert detectors.repetition(same) == 1
    assert detectors.repetition(other) == 1 / 8
    assert detectors.coverage([]) == detectors.repetition([]) == 0
    begins, ends = ([[1, 2, 3, n, n + 1] for n in range(10, 16)], [[n, n + 1, 1, 2, 3] for n in range(10, 15)])
    assert detectors.repetition(window(begins + ends)) == 6 / 11
    assert detectors.repetition(window(ends + begins[:2])) == 5 / 7


def test_novelty_counts_pairs_that_nobody_asked():
    seen = detectors.pairs(window([[1, 2, 3], [3, 4]]))
    assert seen == {(1, 2), (2, 3), (3, 4)}
    assert detectors.novelty(window([[1, 2, 3, 4, 5], [2, 1]]), seen) == 2 / 5
    assert detectors.novelty(window([[1]]), seen) == 0


def test_mmd_is_the_formula_and_0_on_average_where_both_are_alike():
    honest, other = window(drawn(30)), window(drawn(20, seed=1))
    features = word_features([query.prompt for query in (*other, *honest)]).toarray()
    x, y = features[:20], features[20:]
    apart = np.linalg.norm(y[:, None] - y[None], axis=2)[~np.eye(30, dtype=bool)]
    expected = 0.0
    for width in np.median(apart) * np.array([0.5, 1, 2]):
        kxx, kyy, kxy = (rbf_kernel(a, b, gamma=1 / (2 * width**2)) for a, b in ((x, x), (y, y), (x, y)))
        expected += (kxx.sum() - 20) / (20 * 19) + (kyy.sum() - 30) / (30 * 29) - 2 * kxy.mean()
    assert detectors.mmd(other, honest) == pytest.approx(expected / 3, abs=1e-9)
    alike = [detectors.mmd(window(drawn(15, seed=n)), window(drawn(15, seed=n + 1000))) for n in range(200)]
    assert abs(np.mean(alike)) < 4 * np.std(alike) / np.sqrt(200)
    far = [detectors.mmd(window(drawn(15, seed=n) % 50 + 900), window(drawn(15, seed=n + 1000))) for n in range(20)]
    assert min(far) > max(alike)


def test_prada_is_its_recursion_and_sees_prompts_that_are_made_from_others():
    natural, made = window(drawn(60)), drawn(60)
    made[20:] = made[20 - 20 : 60 - 20]  # queries that repeat, up to one word, what was asked
    made[20:, 5] = 900 + np.arange(40)
    assert detectors.prada(window(made)) > detectors.prada(natural) + 0.1
    rows = word_features([query.prompt for query in natural]).toarray()
    kept, least, distances, grown = [0], 0.0, [], []
    for n in range(1, 60):
        near = min(np.sqrt(((rows[n] - rows[k]) ** 2).sum()) for k in kept)
        distances.append(near)
        if near > least:
            kept.append(n)
            grown.append(near)
            least = max(least, np.mean(grown) - np.std(grown))
    distances = [d for d in distances if abs(d - np.mean(distances)) <= 3 * np.std(distances)]
    assert detectors.prada(natural) == pytest.approx(1 - stats.shapiro(distances).statistic, abs=1e-6)
    assert detectors.prada(natural[:10]) == 0


def coordinated(frame, times, others=30):
    """Five accounts with this frame at these times, among others with their own at their own."""
    log = {}
    for n in range(5):
        prompts = [[*frame, 100 + k, k] for k in range(len(times))]
        log[f"x{n}"] = window(prompts, np.sort(times + RANDOM.uniform(0, 100, len(times))), f"x{n}")
    for n in range(others):
        own = np.sort(RANDOM.uniform(0, 400_000, 20))
        log[f"h{n}"] = window([[500 + n, 501 + n, 502 + n, k, 7] for k in range(20)], own, f"h{n}")
    return log


def test_coordination_needs_both_frames_and_times():
    together = np.sort(RANDOM.uniform(0, 400_000, 20))
    found = coordination(coordinated((1, 2, 3), together))
    assert {found[f"x{n}"] for n in range(5)} == {4.0}
    assert {found[f"h{n}"] for n in range(30)} == {0.0}
    log = coordinated((1, 2, 3), together)
    for n in range(5):  # the same frame, but each at times of its own
        times = np.sort(RANDOM.uniform(0, 400_000, 20))
        log[f"x{n}"] = [query._replace(time=t) for query, t in zip(log[f"x{n}"], times, strict=True)]
    assert set(coordination(log).values()) == {0.0}
    assert coordination({}) == {}


@pytest.mark.parametrize("rate", [0.1, 0.02])
def test_the_rate_of_false_alarms_is_what_the_threshold_says(rate):
    """Over 3,000 calibrations of 199 numbers that are far from normal: the mean is (n + 1 - k) / (n + 1), and 95 % of
    the true rates lie in the interval, within four errors."""
    true, inside = [], []
    for scores in np.random.default_rng(3).exponential(size=(3_000, 199)) ** 3:
        threshold = calibrated(scores, rate)
        true.append(np.exp(-(threshold.value ** (1 / 3))))
        inside.append(threshold.low <= true[-1] <= threshold.high)
    assert abs(np.mean(true) - rate) < 4 * np.std(true) / np.sqrt(3_000)
    assert abs(np.mean(inside) - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 3_000)


def test_the_detected_share_has_an_exact_interval():
    threshold = calibrated(np.arange(99.0), 0.05)
    assert threshold.value == 94
    assert str(threshold) == (
        "above 94, where at most 5.00% (95 % interval 1.66% to 10.02%) of honest windows are, by 99 of them"
    )
    share, low, high = detected([100.0] * 18 + [0.0] * 2, threshold)
    assert share == 0.9
    assert (low, high) == pytest.approx((stats.beta.ppf(0.025, 18, 3), stats.beta.ppf(0.975, 19, 2)))


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda: calibrated([1.0] * 50, 0.01), "0.01 of 50"),
        (lambda: calibrated([1.0] * 50, 1.0), "1.0 of 50"),
        (lambda: detectors.mmd(window([[1]]), window([[1], [2]])), "1 and 2 queries"),
    ],
)
def test_too_little_is_told(ask, told):
    with pytest.raises(UserError, match=told):
        ask()
