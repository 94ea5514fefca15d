"""The closed forms of collapse against chains of real n-gram models, each refitted to what the last one wrote.

The theory is about N independent draws a generation. Documents of a unigram model also draw their end, so a generation
here is one document of fixed length: draws from the model's own row, those of eos left out. An unsmoothed fit to that
document gives count / N to every token once eos is left out again, which makes the formulas exact.
"""

import doctest

import numpy as np
import pytest
from scipy import stats

from epigone.errors import UserError
from epigone.evaluate import collapse_theory as theory
from epigone.models.language_model import EOS
from epigone.models.ngram import NGram, NGramModel
from epigone.models.smoothing import mle

FIRST = 3


def test_the_examples_in_the_docstrings_hold():
    results = doctest.testmod(theory)
    assert results.attempted >= 15
    assert results.failed == 0


def refit(tokens: np.ndarray, vocab_size: int) -> NGramModel:
    return NGramModel.fit(NGram(order=1, smoothing=mle), [tokens], vocab_size)


def draw(model: NGramModel, n: int, rng: np.random.Generator) -> np.ndarray:
    """n draws from the unigram row, given that none is eos."""
    tokens = np.array([], np.int32)
    while len(tokens) < n:
        more = model.draw(np.array([], np.int32), n + n // 4 + 8, int(rng.integers(2**32)))
        tokens = np.concatenate([tokens, more[more != EOS]])
    return tokens[:n]


def shares(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    return np.bincount(tokens, minlength=vocab_size) / len(tokens)


def text_of(counts: list[int]) -> np.ndarray:
    return np.repeat(np.arange(FIRST, FIRST + len(counts)), counts).astype(np.int32)


ZIPF = text_of([24, 12, 8, 6, 5, 4, 4, 3])
V = FIRST + 8
N, GENERATIONS, CHAINS = 40, 8, 800
H0 = float(theory.heterozygosity(shares(ZIPF, V)))


def chains(regime, seed: int) -> np.ndarray:
    """Heterozygosity [chain, generation] of chains whose text of each generation is `regime(text, draw, rng)`."""
    rng = np.random.default_rng(seed)
    source = refit(ZIPF, V)
    result = np.empty((CHAINS, GENERATIONS + 1))
    for chain in range(CHAINS):
        model, text = source, np.array([], np.int32)
        result[chain, 0] = H0
        for generation in range(1, GENERATIONS + 1):
            text = regime(text, model, source, rng)
            model = refit(text, V)
            result[chain, generation] = theory.heterozygosity(shares(text, V))
    return result


def deviations(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Distance of the chains' mean from theory in standard errors, for generations 1 and later."""
    standard_error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    return (np.abs(found.mean(axis=0) - expected) / np.maximum(standard_error, 1e-15))[1:]


def replace(text, model, source, rng):
    return draw(model, N, rng)


def accumulate(text, model, source, rng):
    return np.concatenate([text, draw(model, N, rng)])


def fresh_quarter(text, model, source, rng):
    return np.concatenate([draw(model, N - N // 4, rng), draw(source, N // 4, rng)])


THEORIES = {
    replace: theory.heterozygosity_replace(H0, N, range(GENERATIONS + 1)),
    accumulate: theory.heterozygosity_accumulate(H0, N, range(GENERATIONS + 1)),
    fresh_quarter: theory.heterozygosity_fresh(H0, N, 0.25, range(GENERATIONS + 1)),
}


@pytest.mark.parametrize("regime", THEORIES)
def test_heterozygosity_follows_its_closed_form_and_no_other(regime):
    found = chains(regime, seed=1)
    assert deviations(found, THEORIES[regime]).max() < 4
    for other, expected in THEORIES.items():
        assert other is regime or deviations(found, expected).max() > 5


def simulated(texts, generations, real, seed):
    """Heterozygosity [chain, generation] where generations read as they say; `real` are counts of the real texts."""
    rng, given = np.random.default_rng(seed), iter(real)
    counts, fits = [], {}

    def fit(number):
        if number not in fits:
            read = sum(counts[j] for j in generations[number])
            fits[number] = read / read.sum(axis=1, keepdims=True)
        return fits[number]

    for text in texts:
        if text.part_of is not None:
            whole = counts[text.part_of]
            counts.append(np.array([rng.multivariate_hypergeometric(row, text.tokens) for row in whole]))
        elif text.writer is not None:
            counts.append(rng.multinomial(text.tokens, fit(text.writer)))
        else:
            counts.append(np.tile(next(given), (CHAINS, 1)))
    return np.stack([theory.heterozygosity(fit(number)) for number in range(len(generations))], axis=1)


def mixtures():
    """Regimes without a closed form of their own: (texts, who reads which, counts of the real ones)."""
    real = np.bincount(ZIPF - FIRST, minlength=8)
    other = np.array([5, 9, 1, 8, 2, 7, 3, 5])
    blocks, n = theory.Block, len(ZIPF)
    written = [blocks(n, writer=g) for g in range(4)]
    yield "grown", [blocks(n), *(blocks((g + 2) * n, writer=g) for g in range(4))], [[g] for g in range(5)], [real]
    window = [[0], [0, 1], [1, 2], [2, 3], [3, 4]]
    yield "window", [blocks(n), *written], window, [real]
    fixed = [blocks(n), blocks(20, part_of=0), *(blocks(n - 20, writer=g) for g in range(4))]
    yield "fixed part", fixed, [[0], [1, 2], [1, 3], [1, 4], [1, 5]], [real]
    fresh = [blocks(n), blocks(40), blocks(n - 40, writer=0), blocks(n, writer=1)]
    yield "another real text", fresh, [[0], [1, 2], [3]], [real, other]
    parts = [blocks(n), blocks(n, writer=0), blocks(33, part_of=0), blocks(33, part_of=1), blocks(n, writer=1)]
    parts += [blocks(22, part_of=0), blocks(22, part_of=1), blocks(22, part_of=4)]
    yield "subsample", parts, [[0], [2, 3], [5, 6, 7]], [real]


MIXTURES = {name: case for name, *case in mixtures()}


@pytest.mark.parametrize("name", MIXTURES)
def test_any_mixture_follows_the_recursion(name):
    texts, generations, real = MIXTURES[name]
    shares = np.array([counts / counts.sum() for counts in real])
    expected = theory.heterozygosity_of(texts, generations, shares @ shares.T)
    found = simulated(texts, generations, real, seed=3)
    assert deviations(found, expected).max() < 4
    # Nothing lost, and everything read from the one before, are theories too.
    for wrong in (np.full(len(generations), H0), theory.heterozygosity_replace(H0, N // 2, range(len(generations)))):
        assert deviations(found, wrong).max() > 5


def test_limits_are_where_the_recursions_go():
    assert theory.heterozygosity_accumulate(H0, N, 100_000) == pytest.approx(
        theory.heterozygosity_accumulate_limit(H0, N), rel=1e-6
    )
    assert theory.heterozygosity_fresh(H0, N, 0.1, 2000) == pytest.approx(
        theory.heterozygosity_fresh_limit(H0, N, 0.1), rel=1e-12
    )
    assert theory.heterozygosity_fresh(H0, N, 0.0, range(9)) == pytest.approx(
        theory.heterozygosity_replace(H0, N, range(9))
    )


def test_a_held_real_text_starts_the_product_one_block_later():
    """The N real tokens, kept in the text, are block 1; the first N that their own fit writes are block 2."""
    rng = np.random.default_rng(4)
    real = text_of([16, 9, 6, 4, 3, 2])
    found = [
        theory.heterozygosity(shares(np.concatenate([real, draw(refit(real, V), len(real), rng)]), V))
        for _ in range(2000)
    ]
    h0 = float(theory.heterozygosity(shares(real, V)))
    error = np.std(found, ddof=1) / np.sqrt(len(found))
    assert abs(np.mean(found) - theory.heterozygosity_accumulate(h0, len(real), 1, held=1)) < 4 * error
    assert abs(np.mean(found) - theory.heterozygosity_accumulate(h0, len(real), 1)) > 8 * error


@pytest.mark.parametrize("count", [1, 3])
def test_survival_of_rare_types_follows_the_recursion(count):
    types, generations = 1500 // count, (1, 2, 3, 5, 10, 20)
    rng = np.random.default_rng(7)
    # One frequent type takes the other half of the text, so that N is large against every rare count.
    text = text_of([1500, *[count] * types])
    alive = []
    for _ in range(max(generations)):
        text = draw(refit(text, FIRST + 1 + types), len(text), rng)
        alive.append(len(np.unique(text[text > FIRST])) / types)
    for t in generations:
        expected = float(theory.survival(count, t))
        assert abs(alive[t - 1] - expected) < 4 * np.sqrt(expected * (1 - expected) / types), t
    assert abs(alive[4] - theory.survival(count + 1, 5)) > 4 * np.sqrt(0.25 / types)


def test_survival_decays_like_two_over_t():
    assert theory.survival(1, 10_000) * 10_000 == pytest.approx(2, rel=0.01)


def test_fixation_probability_is_the_initial_share():
    """V = 5 types, N = 20 tokens: each chain runs until one type is left."""
    initial, chains_run = [8, 5, 4, 2, 1], 400
    rng = np.random.default_rng(11)
    winners = np.zeros(5)
    for _ in range(chains_run):
        text = text_of(initial)
        while len(set(text.tolist())) > 1:
            text = draw(refit(text, FIRST + 5), 20, rng)
        winners[text[0] - FIRST] += 1
    assert stats.chisquare(winners, theory.fixation_probability(initial) * chains_run).pvalue > 1e-4
    assert stats.chisquare(winners, np.full(5, chains_run / 5)).pvalue < 1e-6


def test_missing_mass_is_what_good_turing_estimates():
    p = 1 / np.arange(1, 5001)
    p /= p.sum()
    rng = np.random.default_rng(2)
    counts = rng.multinomial(3000, p, size=200)
    unseen = np.array([p[c == 0].sum() for c in counts])
    estimates = np.array([theory.missing_mass_good_turing(c) for c in counts])
    exact = theory.missing_mass(p, 3000)
    assert abs(unseen.mean() - exact) < 4 * unseen.std() / np.sqrt(200)
    # E[n_1 / N] = sum p (1 - p)^(N - 1): the expectation for one token less.
    assert abs(estimates.mean() - theory.missing_mass(p, 2999)) < 4 * estimates.std() / np.sqrt(200)
    assert estimates.std() == pytest.approx(0.009, abs=0.002)


def test_kernel_ridge_self_distillation_is_repeated_regression():
    rng = np.random.default_rng(8)
    x = rng.normal(size=(12, 3))
    kernel = np.exp(-((x[:, None] - x) ** 2).sum(axis=-1))
    y = rng.normal(size=(12, 2))
    fitted = y
    for _ in range(4):
        fitted = kernel @ np.linalg.solve(kernel + 0.3 * np.eye(12), fitted)
    assert theory.kernel_ridge_distillation(kernel, y, 0.3, 4) == pytest.approx(fitted, abs=1e-10)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: theory.heterozygosity_replace(0.5, 0, 1),
        lambda: theory.heterozygosity_accumulate(0.5, 10, 1, held=-1),
        lambda: theory.heterozygosity_fresh(0.5, 10, 1.5, 1),
        lambda: theory.survival(1, -1),
        lambda: theory.fixation_probability([0, 0]),
        lambda: theory.missing_mass_good_turing([]),
        lambda: theory.gaussian_median_variance(1, 3),
        lambda: theory.regression_replace(1.0, 10, 11, 3),
        lambda: theory.verification_threshold(0.0, 0.5),
        lambda: theory.kernel_ridge_distillation(np.eye(3), [1.0, 2.0], 1.0, 1),
    ],
)
def test_arguments_outside_the_theory_are_user_errors(wrong):
    with pytest.raises(UserError):
        wrong()
