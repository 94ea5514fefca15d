"""The sameness of populations of which it is known: equals, strangers, and models that err by plan."""

import numpy as np
import pytest

from epigone.errors import UserError
from epigone.evaluate.contexts import Contexts
from epigone.evaluate.sameness import sameness

PREFIXES = tuple(np.array([i], np.int32) for i in range(3, 7))


class Table:
    """A model whose answer after the prefix i is row i - 3."""

    def __init__(self, rows):
        with np.errstate(divide="ignore"):
            self.scores = np.log(np.asarray(rows, dtype=np.float64))
        self.vocab_size = self.scores.shape[1]

    def next_log_probs(self, contexts):
        return self.scores[[int(context[-1]) - 3 for context in contexts]]


def sure(*answers, size=8):
    return Table(np.eye(size)[list(answers)])


def contexts(*targets):
    return Contexts(PREFIXES, np.array(targets))


def test_equals_are_one_model():
    found = sameness([sure(3, 4, 5, 6)] * 4, contexts(3, 4, 6, 5))
    assert found["effective_models"] == pytest.approx(1)
    assert found["agreement"] == found["error_agreement"] == 1
    assert found["capa_normalised"] == pytest.approx(1)
    assert found["js_distance"] == found["population_js"] == 0
    assert found["accuracy"] == found["systemic_failure"] == 0.5
    assert found["systemic_failure_expected"] == 0.5**4


def test_strangers_are_as_many_as_they_are():
    found = sameness([sure(3, 3, 3, 3), sure(4, 4, 4, 4), sure(5, 5, 5, 5)], contexts(6, 6, 6, 6))
    assert found["effective_models"] == pytest.approx(3)
    assert found["population_js"] == pytest.approx(np.log(3))
    assert found["js_distance"] == pytest.approx(np.sqrt(np.log(2)))
    assert found["agreement"] == found["error_agreement"] == 0
    assert found["systemic_failure"] == found["systemic_failure_ratio"] == 1


def test_errors_that_are_alike_are_told_from_answers_that_are():
    """Two are right at the same two places; of the others they err alike at one."""
    found = sameness([sure(3, 4, 5, 6), sure(3, 4, 5, 7)], contexts(3, 4, 7, 3))
    assert found["agreement"] == 0.75
    assert found["error_agreement"] == 0.5
    # Of the wrong answers (5, 6) and (5, 7) chance would match a quarter: (1/2 - 1/4) / (1 - 1/4).
    assert found["error_kappa"] == pytest.approx(1 / 3)


def test_capa_is_the_published_formula():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6), 4), rng.dirichlet(np.ones(6), 4)
    targets = np.array([0, 1, 2, 3])
    right_p, right_q = p[range(4), targets].mean(), q[range(4), targets].mean()
    expected = right_p * right_q + (1 - right_p) * (1 - right_q) / 5
    kappa = ((p * q).sum(axis=1).mean() - expected) / (1 - expected)
    assert sameness([Table(p), Table(q)], contexts(*targets))["capa"] == pytest.approx(kappa)


def test_models_that_err_independently_fail_together_as_chance_says():
    """The control: no measure tells of a common teacher where there is none."""
    rng = np.random.default_rng(1)
    places, models = 4000, 3
    prefixes = tuple(np.array([3 + i], np.int32) for i in range(places))
    targets = rng.integers(0, 10, places)

    def errs(together=None):
        wrong = rng.random(places) < 0.4 if together is None else together
        answers = np.where(wrong, (targets + 1 + rng.integers(0, 9, places)) % 10, targets)
        return Table(np.eye(10)[answers])

    alone = sameness([errs() for _ in range(models)], Contexts(prefixes, targets))
    assert alone["systemic_failure_ratio"] == pytest.approx(1, abs=0.2)
    assert abs(alone["error_kappa"]) < 0.05
    common = rng.random(places) < 0.4
    taught = sameness([errs(common) for _ in range(models)], Contexts(prefixes, targets))
    assert taught["systemic_failure_ratio"] == pytest.approx(0.4 / 0.4**3, rel=0.1)
    assert abs(taught["error_kappa"]) < 0.05


def test_one_model_is_no_population():
    with pytest.raises(UserError, match="a population of 1"):
        sameness([sure(3, 3, 3, 3)], contexts(3, 3, 3, 3))
