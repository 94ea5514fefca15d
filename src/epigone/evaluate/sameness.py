"""What a population of models has in common: whether they answer, err and write alike, and how many they are worth.

All measures are of next-token distributions at the same places of held-out text, over one vocabulary, in float64; of a
population of M models, means over its pairs. Models of independent origin agree too, where the answer is easy: a
measure tells of copying only beside that of a population that shares no teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from scipy.special import entr

from epigone.errors import UserError
from epigone.evaluate.agreement import chance_corrected
from epigone.evaluate.contexts import Contexts, score_contexts
from epigone.evaluate.similarity import vendi
from epigone.models.language_model import LanguageModel


def sameness(models: Sequence[LanguageModel], contexts: Contexts, *, padded: bool = False) -> dict[str, float]:
    """How alike M >= 2 models are at the same places.

    - `agreement`: share of places at which two say the same best word; `agreement_kappa`: chance corrected (Cohen).
    - `error_agreement`: the same where both are wrong, so that they are wrong the same way (Kim et al. 2025);
      `error_kappa`: chance corrected, from how often each gives each wrong answer there.
    - `capa`: kappa_p = (c_obs - c_exp) / (1 - c_exp) of probabilities (Goel et al. 2025); `capa_normalised`: over the
      geometric mean of the two models' kappa_p with themselves, which is below 1 for a model that is not sure.
    - `js_distance`: square root of the Jensen-Shannon divergence of two models' answers, in nats.
    - `population_js`: entropy of the mean of all answers less the mean of their entropies, 0..ln M.
    - `effective_models`: exp of the entropy of the eigenvalues of K / M, K_ab = mean_x sum_o sqrt(p_a p_b): how many
      models without anything in common show as much variety, 1..M; the rank of the matrix of their scores, made soft.
    - `accuracy`: mean share of places where a model is right.
    - `systemic_failure`: share of places at which all are wrong (Bommasani et al. 2022); `systemic_failure_expected`:
      of models with these accuracies and nothing in common; `systemic_failure_ratio`: the one over the other.

    What has no value (a kappa where all answers are one) is absent.

    Raises:
        UserError: fewer than two models, or other vocabularies.
    """
    if len(models) < 2:
        raise UserError(f"a population of {len(models)} has no sameness: compare two models or more")
    answers, done = _Answers(len(models)), 0
    for scores in score_contexts(models, contexts.prefixes, padded=padded):
        # All models' scores are taken at few places at once, so that their number costs no memory.
        for few in np.array_split(np.arange(len(scores[0])), min(len(models), len(scores[0]))):
            answers.add(np.stack([scores_MV[few] for scores_MV in scores]), contexts.targets_M[done + few])
        done += len(scores[0])
    return answers.measures()


@dataclass
class _Answers:
    """Sums over places, chunk by chunk; N models, M places of a chunk, V tokens."""

    models: int
    first: list[np.ndarray] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)
    right: list[np.ndarray] = field(default_factory=list)
    same_NN: np.ndarray | float = 0.0
    overlap_NN: np.ndarray | float = 0.0
    js: dict[tuple[int, int], float] = field(default_factory=dict)
    population_js: float = 0.0
    options: float = 0.0

    def add(self, scores_NMV: np.ndarray, targets_M: np.ndarray) -> None:
        p_NMV = np.exp(scores_NMV)
        flat = p_NMV.reshape(self.models, -1)
        roots = np.sqrt(flat)
        self.first.append(scores_NMV.argmax(axis=2))
        self.targets.append(targets_M)
        self.right.append(p_NMV[:, np.arange(len(targets_M)), targets_M])
        self.same_NN = self.same_NN + flat @ flat.T
        self.overlap_NN = self.overlap_NN + roots @ roots.T
        self.options += float(np.sum(1 / np.maximum(1, (p_NMV.max(axis=0) > 0).sum(axis=1) - 1)))
        entropies = entr(p_NMV).sum(axis=(1, 2))
        for a, b in combinations(range(self.models), 2):
            both = entr((p_NMV[a] + p_NMV[b]) / 2).sum(axis=1) - (entr(p_NMV[a]) + entr(p_NMV[b])).sum(axis=1) / 2
            self.js[a, b] = self.js.get((a, b), 0.0) + float(np.sqrt(np.maximum(both, 0.0)).sum())
        self.population_js += float(entr(p_NMV.mean(axis=0)).sum() - entropies.mean())

    def measures(self) -> dict[str, float]:
        first_NM, right_NM = np.concatenate(self.first, axis=1), np.concatenate(self.right, axis=1)
        wrong_NM = first_NM != np.concatenate(self.targets)
        places, pairs = first_NM.shape[1], list(combinations(range(self.models), 2))
        capa_NN = _capa(np.asarray(self.same_NN) / places, right_NM.mean(axis=1), self.options / places)
        itself_N = np.diag(capa_NN)
        both_wrong = [(a, b, wrong_NM[a] & wrong_NM[b]) for a, b in pairs]
        errors = [(first_NM[a][where], first_NM[b][where]) for a, b, where in both_wrong if where.any()]
        expected = float(np.prod(wrong_NM.mean(axis=1)))
        failure = float(wrong_NM.all(axis=0).mean())
        found: dict[str, Sequence[float | None]] = {
            "agreement": [float(np.mean(first_NM[a] == first_NM[b])) for a, b in pairs],
            "agreement_kappa": [chance_corrected(first_NM[a], first_NM[b]) for a, b in pairs],
            "error_agreement": [float(np.mean(x == y)) for x, y in errors],
            "error_kappa": [chance_corrected(x, y) for x, y in errors],
            "capa": [float(capa_NN[a, b]) for a, b in pairs],
            "capa_normalised": [
                float(capa_NN[a, b] / np.sqrt(itself_N[a] * itself_N[b]))
                for a, b in pairs
                if min(itself_N[a], itself_N[b]) > 0
            ],
            "js_distance": [self.js[pair] / places for pair in pairs],
            "population_js": [self.population_js / places],
            "effective_models": [vendi(np.asarray(self.overlap_NN) / places)],
            "accuracy": [float(1 - wrong_NM.mean())],
            "systemic_failure": [failure],
            "systemic_failure_expected": [expected],
            "systemic_failure_ratio": [failure / expected] if expected > 0 else [],
        }
        known = {name: [value for value in values if value is not None] for name, values in found.items()}
        return {name: float(np.mean(values)) for name, values in known.items() if values}


def _capa(same_NN: np.ndarray, right_N: np.ndarray, wrong_option: float) -> np.ndarray:
    """kappa_p [N, N]: c_exp = a b + (1 - a)(1 - b) / (|O| - 1), a and b the mean probabilities of the right answer."""
    expected_NN = np.outer(right_N, right_N) + np.outer(1 - right_N, 1 - right_N) * wrong_option
    return (same_NN - expected_NN) / (1 - expected_NN)
