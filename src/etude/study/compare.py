"""From items to statements: intervals of means and of paired differences, over items and seeds.

A value was measured on I items under S seeds.  Both are samples: other items and other seeds would have given another mean.  So an
interval treats them as two crossed random effects (items × seeds, one observation a cell) and adds their variances; Student's t with
Satterthwaite's degrees of freedom pays for having few of either.  Differences are taken item by item and seed by seed first, so that what is
hard or easy for both sides cancels.  With three seeds a bootstrap over seeds would be too narrow; its coverage is why this is not one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from etude.study.expect import Expectation, Term
from etude.values.measurement import Measurement

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    """Two-sided probability of a value this far from zero, if it were zero."""
    visible: float | None = None
    """The smallest difference from zero that would have shown, with probability 0.8, at this level."""

    def as_data(self) -> dict[str, Any]:
        return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(self).items()}


def estimate(table: np.ndarray, exact: bool = False) -> Estimate:
    """The mean of a table (seeds, items) with its interval.

    One row means that seeds do not matter; one item that only seeds were sampled.  A single cell, or an exact table, has no interval unless
    its seeds differ.
    """
    seeds, items = table.shape
    mean = float(table.mean())
    if exact:
        table, items = table[:, :1], 1
    if seeds == 1 and items == 1:
        return Estimate(mean)
    variance, freedom = _variance(table)
    if variance <= 1e-24 * max(1.0, mean * mean):
        return Estimate(mean, mean, mean, 1.0 if mean == 0 else 0.0, 0.0)
    from scipy.stats import t

    half, error = float(t.ppf(0.5 + LEVEL / 2, freedom)), math.sqrt(variance)
    p = float(2 * t.sf(abs(mean) / error, freedom))
    return Estimate(mean, mean - half * error, mean + half * error, p, (half + float(t.ppf(0.8, freedom))) * error)


def _variance(table: np.ndarray) -> tuple[float, float]:
    """Variance of the grand mean, and its degrees of freedom."""
    seeds, items = table.shape
    if items == 1 or seeds == 1:
        values = table.ravel()
        return float(values.var(ddof=1) / len(values)), len(values) - 1
    mean, by_seed, by_item = table.mean(), table.mean(1), table.mean(0)
    square_seed = items * float(((by_seed - mean) ** 2).sum()) / (seeds - 1)
    square_item = seeds * float(((by_item - mean) ** 2).sum()) / (items - 1)
    rest = table - by_seed[:, None] - by_item[None, :] + mean
    freedom_rest = (seeds - 1) * (items - 1)
    square_rest = float((rest**2).sum()) / freedom_rest
    total = square_seed + square_item - square_rest
    larger = max(square_seed, square_item)
    if total <= larger:  # an effect that was estimated as negative: take it as absent, and claim no more
        return larger / (seeds * items), float(seeds - 1 if square_seed >= square_item else items - 1)
    bottom = square_seed**2 / (seeds - 1) + square_item**2 / (items - 1) + square_rest**2 / freedom_rest
    return total / (seeds * items), max(1.0, total**2 / bottom) if bottom else float(items - 1)


def stacked(by_seed: Sequence[Measurement]) -> np.ndarray:
    """One variant's influence, (seeds, items); identical seeds (the method takes none) count as one."""
    rows = [measurement.influence for measurement in by_seed]
    first = by_seed[0]
    return np.stack(rows if any(measurement is not first for measurement in by_seed) else rows[:1])


def mean(by_seed: Sequence[Measurement]) -> Estimate:
    """The mean of one variant over items and seeds."""
    return estimate(stacked(by_seed), exact=by_seed[0].exact)


def difference(one: Sequence[Measurement], other: Sequence[Measurement]) -> Estimate | None:
    """one - other, paired by item and seed; None if they were not measured on the same items."""
    first, second = stacked(one), stacked(other)
    if first.shape[1] != second.shape[1] or one[0].item_names != other[0].item_names:
        return None
    return estimate(np.subtract(*np.broadcast_arrays(first, second)), exact=one[0].exact and other[0].exact)


@dataclass(frozen=True)
class Outcome:
    """What became of an expectation."""

    text: str
    verdict: str
    """``holds``, ``contradicted`` or ``undecided``: whether the interval of the margin lies above zero, below it, or around it."""
    margin: Estimate
    sentence: str

    def as_data(self) -> dict[str, Any]:
        return {"text": self.text, "verdict": self.verdict, "margin": self.margin.as_data(), "sentence": self.sentence}


def judge(expectation: Expectation, measured: dict[Term, Sequence[Measurement]]) -> Outcome:
    """The margin by which an expectation holds, linearised item by item, and the verdict from its interval alone."""
    seeds = max(len(rows) for rows in measured.values())
    sampled = {term: rows for term, rows in measured.items() if not rows[0].exact}
    counts = {len(rows[0].items) for rows in sampled.values()}
    if len(counts) > 1:
        return Outcome(expectation.text, "undecided", Estimate(math.nan), "its sides were measured on different items and cannot be paired")
    items = counts.pop() if counts else 1
    table = np.zeros((seeds, items))
    for seed in range(seeds):
        values = {term: rows[seed].value for term, rows in measured.items()}
        centre = expectation.margin(values)
        table[seed] = centre
        for term, rows in sampled.items():
            step = 1e-6 * max(1.0, abs(values[term]))
            slope = (expectation.margin({**values, term: values[term] + step}) - expectation.margin({**values, term: values[term] - step})) / (2 * step)
            table[seed] += slope * (rows[seed].influence - values[term])
    if all(all(row is rows[0] for row in rows) for rows in measured.values()):
        table = table[:1]
    margin = estimate(table)
    low, high = (margin.value, margin.value) if margin.low is None or margin.high is None else (margin.low, margin.high)
    if math.isnan(margin.value):
        verdict = "undecided"
    elif low > 0 or (low == 0 and not expectation.strict):
        verdict = "holds"
    elif high < 0 or (high == 0 and expectation.strict):
        verdict = "contradicted"
    else:
        verdict = "undecided"
    return Outcome(expectation.text, verdict, margin, _sentence(verdict, margin))


def _sentence(verdict: str, margin: Estimate) -> str:
    interval = f" [{margin.low:.4g}, {margin.high:.4g}]" if margin.low is not None else ""
    match verdict:
        case "holds":
            return f"holds by {margin.value:.4g}{interval}"
        case "contradicted":
            return f"missed by {-margin.value:.4g}" + (f" [{-(margin.high or 0.0):.4g}, {-(margin.low or 0.0):.4g}]" if interval else "")
        case _:
            return f"undecided: the margin is {margin.value:.4g}{interval}; more items or seeds would narrow it"


def holm(probabilities: Sequence[float]) -> list[float]:
    """Holm's correction: each probability adjusted for how many comparisons were made (Holm, 1979)."""
    order = sorted(range(len(probabilities)), key=lambda i: probabilities[i])
    adjusted, highest = [0.0] * len(probabilities), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(probabilities) - rank) * probabilities[index]))
        adjusted[index] = highest
    return adjusted
