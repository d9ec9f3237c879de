"""Item response theory: how able an examinee is, how hard and how telling a question, from right and wrong answers alone.

The two-parameter logistic model: a question with discrimination a and intercept d is answered rightly with probability 1 / (1 + exp(-(a·θ + d))) by an examinee of
ability θ; abilities are standard normal.  The ability at which the chance is one half, the difficulty, is -d / a.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NODES = np.linspace(-6, 6, 61)
"""Abilities at which integrals over ability are evaluated, as many as the R package mirt takes."""
WEIGHTS = np.exp(-(NODES**2) / 2) / np.exp(-(NODES**2) / 2).sum()
SLOPE_SPREAD, INTERCEPT_SPREAD = 2.0, 3.0
"""Standard deviations of the normal priors around 0: weak, but they keep the parameters of a question finite that splits few examinees perfectly."""
LONGEST_STEP = 1.0


class Questions(NamedTuple):
    """Parameters of some questions."""

    discrimination: np.ndarray
    """(questions,) a; negative where the better examinees answer wrongly more often."""
    intercept: np.ndarray
    """(questions,) d."""

    def pick(self, places: np.ndarray) -> Questions:
        return Questions(self.discrimination[places], self.intercept[places])


def chances(ability: np.ndarray, questions: Questions) -> np.ndarray:
    """Probability of a right answer, (examinees, questions), inside (0, 1)."""
    logits = np.multiply.outer(ability, questions.discrimination) + questions.intercept
    return 1 / (1 + np.exp(-np.clip(logits, -30, 30)))


def information(ability: np.ndarray, questions: Questions) -> np.ndarray:
    """Fisher information about the ability that an answer gives, a² · p · (1 - p), (examinees, questions)."""
    right = chances(ability, questions)
    return questions.discrimination**2 * right * (1 - right)


def posterior(answers: np.ndarray, questions: Questions) -> np.ndarray:
    """Probability of each of NODES given an examinee's answers, (examinees, nodes); answers (examinees, questions), 0 or 1."""
    right = chances(NODES, questions)
    logs = answers @ np.log(right).T + (1 - answers) @ np.log1p(-right).T + np.log(WEIGHTS)
    found = np.exp(logs - logs.max(1, keepdims=True))
    return found / found.sum(1, keepdims=True)


def abilities(answers: np.ndarray, questions: Questions) -> np.ndarray:
    """Expected ability given the answers (EAP), (examinees,)."""
    return posterior(answers, questions) @ NODES


def fit(answers: np.ndarray, cycles: int = 500, tolerance: float = 1e-4) -> Questions:
    """Questions' parameters by marginal maximum likelihood, the abilities integrated out: the EM algorithm of Bock and Aitkin, 1981.

    answers: (examinees, questions), 0 or 1.  Ends when no parameter moved by more than `tolerance` (mirt's is the same), or after so many cycles.  Weak normal priors, for
    there may be few examinees.  The sign is such that ability rises with the number of right answers.
    Cost: cycles · examinees · questions · nodes.
    """
    answers = np.asarray(answers, np.float64)
    share = (answers.sum(0) + 0.5) / (len(answers) + 1)
    questions = Questions(np.ones(answers.shape[1]), np.log(share / (1 - share)))
    for _ in range(cycles):
        weights = posterior(answers, questions)
        found = _maximised(questions, weights.sum(0), weights.T @ answers)
        moved = max(np.abs(found.discrimination - questions.discrimination).max(), np.abs(found.intercept - questions.intercept).max())
        questions = found
        if moved < tolerance:
            break
    if questions.discrimination.sum() < 0:
        questions = Questions(-questions.discrimination, questions.intercept)
    return questions


def _maximised(questions: Questions, asked: np.ndarray, right: np.ndarray, steps: int = 3) -> Questions:
    """Some of Newton's steps towards the likeliest parameters, every question by itself.

    asked: (nodes,) expected number of examinees there; right: (nodes, questions) expected right answers of theirs.
    """
    slope, intercept = questions
    for _ in range(steps):
        chance = chances(NODES, Questions(slope, intercept))
        surplus, spread = right - asked[:, None] * chance, asked[:, None] * chance * (1 - chance)
        gradient = np.stack([NODES @ surplus - slope / SLOPE_SPREAD**2, surplus.sum(0) - intercept / INTERCEPT_SPREAD**2])
        first, mixed, second = NODES**2 @ spread + SLOPE_SPREAD**-2, NODES @ spread, spread.sum(0) + INTERCEPT_SPREAD**-2
        determinant = first * second - mixed**2
        step = np.stack([second * gradient[0] - mixed * gradient[1], first * gradient[1] - mixed * gradient[0]]) / determinant
        step *= np.minimum(1, LONGEST_STEP / np.maximum(np.abs(step).max(0), 1e-12))
        slope, intercept = slope + step[0], intercept + step[1]
    return Questions(slope, intercept)


def common_factor(values: np.ndarray, cycles: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """One common factor of several variables: their loadings, and the weights that estimate it from standardised variables.

    values: (examinees, variables).  Principal axes: communalities are iterated until the loadings explain the correlations off the diagonal (the minimum-residual solution).
    Weights are Thurstone's regression.  Returns two (variables,) arrays; loadings sum to a positive number.
    """
    if values.shape[1] == 1:
        return np.ones(1), np.ones(1)
    correlations = np.corrcoef(values.T)
    communalities = np.clip(np.max(np.abs(correlations - np.eye(len(correlations))), 0), 0, 0.99)
    for _ in range(cycles):
        reduced = correlations.copy()
        np.fill_diagonal(reduced, communalities)
        sizes, axes = np.linalg.eigh(reduced)
        loadings = axes[:, -1] * np.sqrt(max(sizes[-1], 0.0))
        found = np.clip(loadings**2, 0, 0.995)
        if np.abs(found - communalities).max() < 1e-8:
            break
        communalities = found
    if loadings.sum() < 0:
        loadings = -loadings
    return loadings, np.linalg.solve(correlations + 1e-6 * np.eye(len(correlations)), loadings)
