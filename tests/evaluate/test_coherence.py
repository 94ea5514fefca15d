"""Mutual information against chains of which it is known, and against text without any."""

import numpy as np
import pytest

from epigone.evaluate.coherence import mutual_information


def chain(stay, tokens, seed, length=40):
    """Documents of a fair two-state chain that stays with a given probability, as ids 3 and 4."""
    rng = np.random.default_rng(seed)
    changes = rng.random((tokens // length, length)) > stay
    changes[:, 0] = rng.random(len(changes)) > 0.5
    return list((3 + np.cumsum(changes, axis=1) % 2).astype(np.int32))


def known(stay, distance):
    """I(d) of such a chain: ln 2 less the entropy of whether two states at that distance are the same."""
    same = (1 + (2 * stay - 1) ** distance) / 2
    return np.log(2) + same * np.log(same) + (1 - same) * np.log(1 - same)


@pytest.mark.parametrize("distance", [1, 2, 4])
def test_a_chain_forgets_as_its_second_eigenvalue_says(distance):
    found = mutual_information(chain(0.9, 200_000, seed=distance), distance)
    assert found == pytest.approx(known(0.9, distance), rel=0.03)


def test_text_without_order_has_none_and_the_naive_figure_would_have_some():
    rng = np.random.default_rng(0)
    documents = list(rng.integers(3, 83, (100, 20)).astype(np.int32))
    corrected = [mutual_information(documents, d, seed=d) for d in (1, 2, 4)]
    assert np.abs(corrected).max() < 0.1
    # 80 x 80 pairs in 1,900 places look like more than a nat if nothing is taken off.
    naive = mutual_information(documents, 1) + _by_chance(documents)
    assert naive > 1


def _by_chance(documents):
    """What shuffled words show."""
    mixed = np.random.default_rng(1).permutation(np.concatenate(documents))
    first, second = mixed[:-1] - 3, mixed[1:] - 3
    joint = np.bincount(first * 80 + second, minlength=6400).reshape(80, 80) / len(first)
    expected = joint.sum(axis=1)[:, None] * joint.sum(axis=0)
    return float(np.sum(joint[joint > 0] * np.log(joint[joint > 0] / expected[joint > 0])))


def test_documents_do_not_speak_across_their_ends():
    lone = [np.array([3], np.int32), np.array([4], np.int32)]
    assert np.isnan(mutual_information(lone, 1))
    assert np.isnan(mutual_information([], 1))
