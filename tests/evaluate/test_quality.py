import numpy as np
import pytest

from epigone.errors import Fault
from epigone.evaluate import evaluate_model, evaluation_contexts
from epigone.evaluate.quality import (
    Likelihood,
    bits_per_byte,
    impossible_share,
    likelihood,
    nats_per_end,
    nats_per_token,
    nats_per_token_error,
    paired_difference,
    perplexity,
    possible_nats_per_token,
)


def scored(*documents):
    """A judge that gives each document the scores written here."""

    class Judge:
        vocab_size = 5

        def log_probs(self, _):
            return [np.array(scores) for scores in documents]

    return likelihood(Judge(), [np.zeros(len(scores) - 1, dtype=np.int32) for scores in documents])


def test_hand_computed():
    text = scored([-1.0, -2.0, -3.0], [-4.0])
    assert nats_per_token(text) == 2.5
    assert perplexity(text) == pytest.approx(np.exp(2.5))
    # y = (6, 4), n = (3, 1), R = 2.5: residuals -1.5 and 1.5; sqrt(2 * 4.5) / 4.
    assert nats_per_token_error(text) == pytest.approx(0.75)
    assert bits_per_byte(text, [12, 8]) == pytest.approx(10 / np.log(2) / 20)
    assert nats_per_end(text) == 3.5
    assert np.array_equal(text[np.array([1, 0])].nats_M, [4, 6])


def test_paired_difference_by_hand():
    """Gaps 2 and -1 of sizes 3 and 1: 1/4; residuals 1.25 and -1.25, sqrt(2 * 3.125) / 4."""
    first, second = scored([-1.0, -2.0, -3.0], [-4.0]), scored([-1.0, -2.0, -1.0], [-5.0])
    assert paired_difference(first, second, first.events_M) == pytest.approx((0.25, 0.625))
    assert paired_difference(second, first, first.events_M)[0] == -0.25
    assert paired_difference(first, first, np.array([10, 20])) == (0, 0)
    assert np.isnan(paired_difference(first, scored([-1.0, -np.inf, -1.0], [-1.0]), first.events_M)).all()


def test_the_error_of_a_paired_difference_is_its_spread(bigram):
    """Over texts drawn anew; the error as if the two models had read different texts would be far above it."""
    truth = bigram.drawn(12, 0, concentration=2.0)
    near = bigram(0.9 * np.exp(truth.scores_VV) + 0.1 * np.exp(bigram.drawn(12, 1).scores_VV))
    gaps, errors, unpaired = [], [], []
    for seed in range(60):
        documents = truth.write(400, seed)
        one, other = likelihood(near, documents), likelihood(truth, documents)
        gap, error = paired_difference(one, other, one.events_M)
        gaps.append(gap)
        errors.append(error)
        unpaired.append(np.hypot(nats_per_token_error(one), nats_per_token_error(other)))
    assert np.mean(errors) == pytest.approx(np.std(gaps), rel=0.25)
    assert np.mean(unpaired) > 2 * np.std(gaps)


def test_uniform_model_has_its_vocabulary_as_perplexity(bigram):
    rows = np.zeros((6, 6))
    rows[:, 2:] = 0.25
    documents = [np.array([3, 4, 5]), np.array([], dtype=np.int32), np.array([5])]
    text = likelihood(bigram(rows), documents)
    assert perplexity(text) == pytest.approx(4)
    assert text.events_M.tolist() == [4, 1, 2]
    assert nats_per_token_error(text) == pytest.approx(0, abs=1e-15)


def test_two_parts_add_to_the_whole_and_order_does_not_matter(bigram):
    model = bigram.drawn(9, 0)
    documents = model.write(400, 1)
    whole = likelihood(model, documents)
    parts = likelihood(model, documents[40:]) + likelihood(model, documents[:40])
    for measure in (nats_per_token, nats_per_token_error, impossible_share):
        assert measure(parts) == pytest.approx(measure(whole), rel=1e-12)
    mean_of_means = np.mean([-scores.mean() for scores in model.log_probs(documents)])
    assert abs(mean_of_means - nats_per_token(whole)) > 0.01


@pytest.mark.parametrize("zero", [-np.inf, -1e9])
def test_impossible_events_are_counted_not_hidden(zero):
    text = scored([-1.0, zero, -3.0], [-2.0])
    assert nats_per_token(text) == perplexity(text) == bits_per_byte(text, [1, 1]) == np.inf
    assert impossible_share(text) == 0.25
    assert possible_nats_per_token(text) == 2.0
    assert np.isnan(nats_per_token_error(text))


def test_a_cut_document_has_no_end_to_score(bigram):
    model = bigram.drawn(7, 3)
    documents = [np.array([3, 4, 5]), np.array([6])]
    text = likelihood(model, documents, cut_at=3)
    assert text.events_M.tolist() == [3, 2]
    assert text.nats_M[0] == pytest.approx(-model.log_probs(documents)[0][:3].sum())


def test_error_matches_the_spread_of_repeated_texts(bigram):
    model, judge = bigram.drawn(12, 5), bigram.drawn(12, 6, concentration=5.0)
    texts = [likelihood(judge, model.write(1500, seed)) for seed in range(200)]
    spread = np.std([nats_per_token(text) for text in texts], ddof=1)
    predicted = np.mean([nats_per_token_error(text) for text in texts])
    assert predicted == pytest.approx(spread, rel=0.2)


def test_error_of_dependent_tokens_is_above_the_naive_one():
    # All tokens of a document cost the same: ten tokens tell no more than one.
    costs = np.random.default_rng(0).normal(3, 1, 200)
    text = Likelihood(costs * 10, np.full(200, 10), np.zeros(200, dtype=int), costs)
    naive = np.std(np.repeat(costs, 10)) / np.sqrt(2000)
    assert nats_per_token_error(text) == pytest.approx(np.std(costs, ddof=1) / np.sqrt(200))
    assert nats_per_token_error(text) > 3 * naive


@pytest.mark.parametrize("bad", [[np.nan, -1.0], [0.5, -1.0]])
def test_scores_that_are_no_log_probabilities_are_a_fault(bad):
    with pytest.raises(Fault, match="log-probability is"):
        scored(bad)


def test_byte_counts_must_match():
    with pytest.raises(ValueError, match="2 byte counts for 1 documents"):
        bits_per_byte(scored([-1.0]), [3, 4])


def test_metrics_of_a_model_hold_what_was_asked_for_only(bigram):
    model = bigram.drawn(9, 0)
    documents = model.write(2000, 1)
    plain = evaluate_model(model, documents)
    full = evaluate_model(model, documents, [3] * len(documents), evaluation_contexts(documents, 200))
    assert set(full) - set(plain) == {"bits_per_byte", "ece", "ece_adaptive", "accuracy", "confidence"}
    assert plain["tokens_evaluated"] == sum(len(d) + 1 for d in documents)
    assert plain["perplexity"] == pytest.approx(np.exp(plain["nats_per_token"]))
    assert "nats_per_possible_token" not in plain
    assert "nats_per_token_error" not in evaluate_model(model, documents[:1])


def test_the_true_model_has_the_lowest_perplexity_and_impossible_text_says_so(bigram):
    truth, other = bigram.drawn(9, 0), bigram.drawn(9, 1)
    documents = truth.write(3000, 1)
    true, false = evaluate_model(truth, documents), evaluate_model(other, documents)
    assert true["perplexity"] < false["perplexity"]
    assert true["impossible"] == 0
    rows = np.zeros((9, 9))
    rows[:, 2] = 1
    mute = evaluate_model(bigram(rows), documents)
    assert mute["perplexity"] == np.inf
    assert mute["impossible"] > 0.3
    assert "nats_per_token_error" not in mute
