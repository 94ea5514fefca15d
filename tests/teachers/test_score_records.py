"""What is kept, and its compact record: right to half a step of its numbers, as small as was said, and unbiased."""

import jax
import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import chisquare

from epigone.arena.policies import POLICIES
from epigone.errors import Fault, UserError
from epigone.teachers.bits import Reader, pack, width_of
from epigone.teachers.kept import HiddenStates, Places, RandomDraws, Shown, TopK, TopP
from epigone.teachers.score_records import LOWEST, decode, encode

NONE = -1e9
STEP = 1 / 512
"""Half a step of a stored log-probability."""


def zipf(tokens, vocab_size, seed=0, sharpness=1.6):
    """Logits of a teacher that is sure of a few tokens, with a long tail."""
    draw = np.random.default_rng(seed)
    ranks = -sharpness * np.log(np.arange(1, vocab_size + 1))
    return np.stack([draw.permutation(ranks) for _ in range(tokens)]).astype(np.float32)


def kept(scores, logits, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(logits))
    places = Places(keys, np.zeros(len(logits), np.int32), np.zeros((len(logits), 1), np.int32))
    return jax.device_get(jax.jit(scores.keep)(logits, places))


@pytest.mark.parametrize("width", [1, 7, 12, 17, 18, 25])
def test_numbers_come_back_from_their_bits(width):
    numbers = np.random.default_rng(width).integers(0, 2**width, 1001)
    numbers[:2] = 0, 2**width - 1
    data = pack(numbers, width)
    assert len(data) == -(-1001 * width // 8)
    np.testing.assert_array_equal(Reader(data).numbers(1001, width), numbers)


@pytest.mark.parametrize(("values", "width"), [(2, 1), (3, 2), (256, 8), (257, 9), (128_256, 17), (262_144, 18)])
def test_ids_take_as_many_bits_as_the_vocabulary_needs(values, width):
    assert width_of(values) == width


@pytest.mark.parametrize("vocab_size", [5, 300, 128_256])
@pytest.mark.parametrize("scores", [TopK(4), TopK(16, rest="zero"), TopP(0.7), TopP(0.99, most=40), TopK(100)])
def test_the_best_come_back(scores, vocab_size):
    logits = zipf(9, vocab_size)
    found = kept(scores, logits)
    ids, log_probs, rest = decode(scores, vocab_size, 9, encode(scores, vocab_size, found))
    whole = log_softmax(logits.astype(np.float64), axis=-1)
    order = np.argsort(-whole, axis=-1)[:, : ids.shape[1]]
    there = log_probs > NONE
    np.testing.assert_array_equal(ids[there], order[there])
    exact = np.maximum(np.take_along_axis(whole, order, -1), -LOWEST)
    # Between stored ranks of a long curve lies a straight line, which a power law is.
    assert np.abs(log_probs - exact)[there].max() < (STEP + 1e-5 if ids.shape[1] <= 17 else 0.02)
    if scores.rest == "bucket":
        others = np.array(
            [
                1 - np.exp(row[mine]).sum()
                for row, mine in zip(
                    np.sort(whole)[:, ::-1], there.sum(1)[:, None] > np.arange(vocab_size), strict=True
                )
            ]
        )
        np.testing.assert_allclose(np.exp(rest), others, rtol=2 * STEP, atol=2e-6)
    if isinstance(scores, TopP):
        held = np.cumsum(np.exp(np.sort(whole)[:, ::-1]), axis=-1)
        wanted = np.minimum((held < scores.p).sum(1) + 1, ids.shape[1])
        np.testing.assert_array_equal(there.sum(1), wanted)


def test_tokens_that_are_never_predicted_are_never_kept():
    logits = zipf(6, 20)
    logits[:, 3:18] = NONE
    for temperature in (0.5, 1.0, 4.0):
        for scores in (TopK(8), TopP(1.0, most=8), RandomDraws(30)):
            ids, log_probs, _ = decode(scores, 20, 6, encode(scores, 20, kept(scores, logits / temperature)))
            assert not set(ids[log_probs > NONE]) & set(range(3, 18))


@pytest.mark.parametrize("power", [1.0, 0.6])
def test_draws_estimate_every_probability_without_bias(power):
    vocab_size, tokens, scores = 12, 4000, RandomDraws(10, power)
    row = zipf(1, vocab_size)[0]
    found = kept(scores, np.tile(row, (tokens, 1)))
    ids, log_weights, entropy = decode(scores, vocab_size, tokens, encode(scores, vocab_size, found))
    weights = np.zeros((tokens, vocab_size))
    there = log_weights > NONE
    np.add.at(weights, (np.nonzero(there)[0], ids[there]), np.exp(log_weights[there]))
    p = np.exp(log_softmax(row.astype(np.float64)))
    error = weights.std(0) / np.sqrt(tokens)
    assert (np.abs(weights.mean(0) - p) < 4.5 * error + 2 * STEP * p).all()
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(), atol=STEP + 1e-5)
    # The negative control: draws from p^0.6 whose weights are not corrected.
    if power != 1.0:
        counts = np.zeros(vocab_size)
        np.add.at(counts, found.ids_CM.ravel(), 1)
        assert (np.abs(counts / counts.sum() - p) > 4.5 * error).any()
        tilted = p**power / (p**power).sum()
        assert chisquare(counts, tilted * counts.sum()).pvalue > 1e-3
        assert chisquare(counts, p * counts.sum()).pvalue < 1e-6


def test_records_are_as_small_as_they_are_said_to_be():
    logits = zipf(40, 128_256, sharpness=2.0)
    best = encode(TopK(128), 128_256, kept(TopK(128), logits))
    assert len(best) / 40 <= 300
    drawn = kept(RandomDraws(50), zipf(40, 128_256, sharpness=1.35))
    different = np.mean([len(np.unique(row)) for row in drawn.ids_CM])
    assert different >= 12
    assert len(encode(RandomDraws(50), 128_256, drawn)) / 40 <= 36 + (different - 12) * 17 / 8


def test_a_record_that_is_cut_or_too_long_is_a_fault():
    scores = TopK(4)
    data = encode(scores, 300, kept(scores, zipf(9, 300)))
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(Fault, match="bytes"):
            decode(scores, 300, 9, wrong)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TopK(0),
        lambda: TopP(0.0),
        lambda: TopP(1.5),
        lambda: RandomDraws(0),
        lambda: RandomDraws(5, power=0.0),
        lambda: HiddenStates("float16"),
        lambda: TopK(3, rest="tail"),
        lambda: Shown(POLICIES["text"]),
        lambda: Shown(POLICIES["best5"], best=-1),
        lambda: Shown(POLICIES["best5"], times=0.0),
    ],
)
def test_what_cannot_be_kept_is_refused(make):
    with pytest.raises(UserError):
        make()
