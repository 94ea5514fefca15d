"""The small chains of which theory speaks, simulated: models refitted to their own samples, many chains at once.

Each is the experiment behind a closed form of `epigone.evaluate.collapse_theory`; a notebook draws the two together.
For chains of words, whose theory is exact, a lineage is grown (`configs/generations/drift.py`).
"""

import numpy as np

from epigone.errors import UserError


def gaussian_variances(samples: int, generations: int, chains: int, seed: int = 0) -> np.ndarray:
    """Variance of a Gaussian refitted to its own draws, [chains, generations + 1]; the first is 1.

    Each generation takes the unbiased mean and variance of `samples` draws of the one before (Shumailov et al. 2024,
    theorem 3.1). The mean over chains stays 1; `gaussian_mean_log_variance` and `gaussian_median_variance` fall.

    >>> gaussian_variances(20, 3, 2).shape
    (2, 4)
    """
    _check(samples >= 2, f"{samples} draws: a variance needs 2 or more")
    rng = np.random.default_rng(seed)
    variances = np.ones((chains, generations + 1))
    for g in range(generations):
        # (n - 1) s^2 / sigma^2 of n normal draws is chi-squared with n - 1 degrees of freedom (Cochran 1934).
        variances[:, g + 1] = variances[:, g] * rng.chisquare(samples - 1, chains) / (samples - 1)
    return variances


def regression_errors(
    dimension: int,
    samples: int,
    generations: int,
    chains: int,
    *,
    accumulate: bool = False,
    noise: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """Excess error |w_n - w|^2 of least squares fitted to labels of the fit before, [chains, generations].

    The first is fitted to real labels y = x w + noise. Each generation draws fresh isotropic inputs, labels them by the
    last fit with fresh noise, and fits them alone (`regression_replace`), or with all earlier ones
    (`regression_accumulate`). Gerstgrasser et al. 2024, section 3.
    """
    _check(samples > dimension + 1, f"{samples} samples in {dimension} dimensions: take more than d + 1")
    rng = np.random.default_rng(seed)
    fits_CD = np.zeros((chains, dimension))  # the real weights are 0: what is fitted is the error
    moments_CDD, sums_CD = np.zeros((chains, dimension, dimension)), np.zeros((chains, dimension))
    errors = np.empty((chains, generations))
    for g in range(generations):
        inputs = rng.normal(size=(chains, samples, dimension))
        labels = np.einsum("ctd,cd->ct", inputs, fits_CD) + noise * rng.normal(size=(chains, samples))
        fresh = np.einsum("ctd,cte->cde", inputs, inputs), np.einsum("ctd,ct->cd", inputs, labels)
        moments_CDD, sums_CD = (moments_CDD + fresh[0], sums_CD + fresh[1]) if accumulate else fresh
        fits_CD = np.linalg.solve(moments_CDD, sums_CD[..., None])[..., 0]
        errors[:, g] = np.square(fits_CD).sum(axis=1)
    return errors


def verified_accuracy(
    label_error: float,
    keep_correct: float,
    keep_wrong: float,
    *,
    dimension: int = 50,
    samples: int = 100_000,
    seed: int = 0,
) -> float:
    """Accuracy of a linear student taught by labels of which a share is wrong and a verifier keeps some.

    Inputs are isotropic; labels are the sign of one direction, wrong with chance `label_error`; the verifier keeps
    correct ones with chance phi = `keep_correct` and wrong ones with psi = `keep_wrong`; the student's weights are the
    mean of y x over what is kept. Above the error `verification_threshold(phi, psi)` it learns the opposite (Feng et
    al. 2024).
    """
    _check(0 <= label_error <= 1, f"label_error {label_error}: it must lie in [0, 1]")
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(samples, dimension))
    wrong = rng.random(samples) < label_error
    labels = np.where(wrong, -1, 1) * np.sign(inputs[:, 0])
    kept = rng.random(samples) < np.where(wrong, keep_wrong, keep_correct)
    weights = labels[kept] @ inputs[kept]
    fresh = rng.normal(size=(samples, dimension))
    return float(np.mean(np.sign(fresh @ weights) == np.sign(fresh[:, 0])))


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UserError(otherwise)
