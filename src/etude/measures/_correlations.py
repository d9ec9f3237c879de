"""Correlations as numbers an item, so that they have an interval."""

from __future__ import annotations

import numpy as np


def products(one: np.ndarray, other: np.ndarray, *, ranks: bool = False) -> np.ndarray:
    """A number an item whose mean is Pearson's correlation r, or of their ranks Spearman's, and whose spread is its uncertainty to first order, the ranks taken as they are.

    Both (items,); ties share their mean rank.  With standardised values a and b: ab - r(a² + b²)/2 + r.  Zero everywhere if one side is constant: it says nothing.
    """
    from scipy.stats import rankdata

    a, b = (rankdata(values) if ranks else np.asarray(values, np.float64) for values in (one, other))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return np.zeros(len(a))
    a, b = ((values - values.mean()) / values.std() for values in (a, b))
    correlation = float(np.mean(a * b))
    return a * b - correlation * (a**2 + b**2) / 2 + correlation
