"""K-means."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST = 300
"""Rounds of Lloyd's algorithm, if it does not settle before."""


def clusters(points: Tensor, count: int, restarts: int, random: torch.Generator) -> Tensor:
    """Which of `count` clusters each point is in, (points,): the best of several runs of Lloyd's algorithm, each begun with greedy k-means++ (Arthur and Vassilvitskii, 2007).

    points: (points, dimensions), at least `count`.  Every cluster has a point.  The best is the least sum of squared distances to the centroids.
    Cost: memory for the distances of all pairs of points; a run takes points · count · dimensions operations a round.
    """
    apart = torch.cdist(points, points).square()
    runs = [_lloyd(points, _begin(apart, count, random), count) for _ in range(restarts)]
    return min(runs, key=lambda labels: inertia(points, labels, count))


def centroids(points: Tensor, labels: Tensor, count: int) -> Tensor:
    """Mean of every cluster's points, (count, dimensions); one without points lies at zero."""
    sums = points.new_zeros(count, points.shape[1]).index_add_(0, labels, points)
    return sums / sizes(labels, count).clamp(min=1)[:, None].to(points)


def sizes(labels: Tensor, count: int) -> Tensor:
    """Points of every cluster, (count,)."""
    return torch.bincount(labels, minlength=count)


def inertia(points: Tensor, labels: Tensor, count: int) -> float:
    """Sum of squared distances of the points to their centroids."""
    return float((points - centroids(points, labels, count)[labels]).square().sum(dtype=torch.float64))


def _begin(apart: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Points to begin with: each the best of a few, drawn with a chance that is their squared distance to those before; none twice.

    apart: squared distances of all pairs.  As scikit-learn does it: 2 + ln(count) candidates, of which the one counts that leaves the points nearest.
    """
    tries = 2 + int(math.log(count))
    nearest = torch.ones_like(apart[0])
    free = torch.ones_like(nearest)
    chosen: list[int] = []
    for place in range(count):
        weights = nearest * free
        if not weights.any():
            weights = free  # fewer different points than clusters
        reach = weights.double().cumsum(0)
        marks = torch.rand(tries if place else 1, generator=random, dtype=torch.float64).to(reach) * reach[-1]
        drawn = torch.searchsorted(reach, marks, right=True).clamp(max=int(weights.nonzero()[-1]))
        left = torch.minimum(nearest, apart[drawn]) if place else apart[drawn]
        best = int(left.sum(1).argmin())
        chosen.append(int(drawn[best]))
        free[chosen[-1]] = 0
        nearest = left[best]
    return torch.tensor(chosen, device=apart.device)


def _lloyd(points: Tensor, begin: Tensor, count: int) -> Tensor:
    """Assign points to the nearest centroid and move the centroids, until nothing changes."""
    means, before = points[begin], None
    for _ in range(MOST):
        labels = torch.addmm(means.square().sum(1), points, means.T, alpha=-2).argmin(1)
        for empty in (sizes(labels, count) == 0).nonzero().flatten().tolist():
            labels[_farthest(points, means, labels, count)] = empty
        if before is not None and labels.equal(before):
            break
        means, before = centroids(points, labels, count), labels
    return labels


def _farthest(points: Tensor, means: Tensor, labels: Tensor, count: int) -> int:
    """The point farthest from its centroid, of those whose cluster has others."""
    distances = (points - means[labels]).square().sum(1)
    return int(distances.masked_fill(sizes(labels, count)[labels] < 2, -1).argmax())
