"""Smooth regression: a number from several others, each by a curve of its own (a generalised additive model)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SEGMENTS = 8
"""Pieces of each curve, between its least and its greatest value in training."""
PENALTIES = 10.0 ** np.arange(-3, 6, 2)
"""Weights of a curve's roughness that are tried, relative to its basis."""
CAUTION = 1.4
"""What a degree of freedom counts in generalised cross-validation, against overfitting (Kim and Gu, 2004)."""
SHRINKAGE = 1e-3
"""Weight of the curves' own size, which decides between terms that say the same."""


class Smooth(NamedTuple):
    """A fitted regression."""

    mean: float
    ends: np.ndarray
    """(terms, 2) least and greatest value of each term in training; beyond them a curve goes on straight."""
    centres: np.ndarray
    """(bases,) mean of each basis function in training."""
    weights: np.ndarray
    """(bases,)."""

    def __call__(self, terms: np.ndarray) -> np.ndarray:
        """Predictions, (rows,), from terms (rows, terms)."""
        return self.mean + (_bases(terms, self.ends) - self.centres) @ self.weights


def smooth(terms: np.ndarray, wanted: np.ndarray) -> Smooth:
    """Fit wanted (rows,) by a sum of curves of the terms (rows, terms).

    Each curve is a cubic B-spline whose second differences are penalised (Eilers and Marx, 1996); how much is chosen term by term, twice round, by generalised cross-validation
    (Wood, 2017, section 4.6).  Cost: terms · 10 solutions of a system of 11 unknowns a term.
    """
    wanted = np.asarray(wanted, np.float64)
    ends = np.stack([terms.min(0), terms.max(0)], 1).astype(np.float64)
    bases = _bases(terms, ends)
    centres, mean = bases.mean(0), float(wanted.mean())
    bases = bases - centres
    gram, target = bases.T @ bases, bases.T @ (wanted - mean)
    count, size = terms.shape[1], SEGMENTS + 3
    rough = np.diff(np.eye(size), 2, axis=0)
    rough = rough.T @ rough
    scales = np.array([max(np.trace(gram[part, part]), 1e-9) / size for part in _parts(count)])
    total = float(((wanted - mean) ** 2).sum())

    def solved(penalties: np.ndarray) -> tuple[float, np.ndarray]:
        penalty = np.zeros_like(gram)
        for part, scale, one in zip(_parts(count), scales, penalties, strict=True):
            penalty[part, part] = scale * (one * rough + SHRINKAGE * np.eye(size))
        found = np.linalg.solve(gram + penalty, np.column_stack([target, gram]))
        weights, freedom = found[:, 0], 1 + float(np.trace(found[:, 1:]))
        residual = total - 2 * float(weights @ target) + float(weights @ gram @ weights)
        left = len(wanted) - CAUTION * freedom
        return (max(residual, 0.0) / left**2 if left > 0 else np.inf), weights

    chosen = np.full(count, PENALTIES[-1])
    best, weights = solved(chosen)
    for _ in range(2):
        for term in range(count):
            for penalty in PENALTIES:
                tried = chosen.copy()
                tried[term] = penalty
                score, found = solved(tried)
                if score < best:
                    best, weights, chosen = score, found, tried
    return Smooth(mean, ends, centres, weights)


def _parts(count: int) -> Sequence[slice]:
    """Where each term's basis functions stand."""
    size = SEGMENTS + 3
    return [slice(term * size, (term + 1) * size) for term in range(count)]


def _bases(terms: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Basis functions of all terms side by side, (rows, terms · 11)."""
    return np.concatenate([_splines((terms[:, place] - low) / max(high - low, 1e-9)) for place, (low, high) in enumerate(ends)], 1)


def _splines(values: np.ndarray) -> np.ndarray:
    """Uniform cubic B-splines of values that lie in [0, 1] in training, (rows, 11); straight beyond."""
    inside = np.clip(values, 0, 1)
    at = np.minimum((inside * SEGMENTS).astype(int), SEGMENTS - 1)
    part = inside * SEGMENTS - at
    pieces = np.stack([(1 - part) ** 3, 3 * part**3 - 6 * part**2 + 4, -3 * part**3 + 3 * part**2 + 3 * part + 1, part**3], 1) / 6
    slopes = np.stack([-((1 - part) ** 2), 3 * part**2 - 4 * part, -3 * part**2 + 2 * part + 1, part**2], 1) / 2
    found = np.zeros((len(values), SEGMENTS + 3))
    beyond = (values - inside) * SEGMENTS
    np.put_along_axis(found, at[:, None] + np.arange(4), pieces + slopes * beyond[:, None], 1)
    return found


def ridge(answers: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Linear regression with a penalty on the size of its weights, chosen by leaving out each row in turn.

    answers: (rows, columns); wanted: (rows,).  Returns what is predicted of each row from the others, (rows,), the weights (columns,) and the constant.
    """
    mean, centre = answers.mean(0), float(wanted.mean())
    left, sizes, right = np.linalg.svd(answers - mean, full_matrices=False)
    projected, best = left.T @ (wanted - centre), np.inf
    for penalty in len(wanted) * 10.0 ** np.arange(-5, 2.5, 0.5):
        kept = sizes**2 / (sizes**2 + penalty)
        leverage = np.minimum(left**2 @ kept + 1 / len(wanted), 1 - 1e-9)
        residual = (wanted - centre - left @ (kept * projected)) / (1 - leverage)
        if (error := float((residual**2).mean())) < best:
            best, others = error, wanted - residual
            weights = right.T @ (sizes / (sizes**2 + penalty) * projected)
    return others, weights, centre - float(mean @ weights)
