"""Zero the smallest weights: the baseline of every sparse-pruning paper."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from etude.method import Method
from etude.methods.compress._matrices import matrices
from etude.values.errors import InputError
from etude.values.model import Model


@dataclass(frozen=True)
class Magnitude(Method):
    """Zero the weights of smallest absolute value, layer by layer, in every linear layer of the blocks.

    Source: Han et al., "Learning both weights and connections for efficient neural networks", 2015, section 3, with one share for
    every layer and without retraining, as Sun et al. ("Wanda", 2024) use it for their baseline.  Default: 50 %, as there.
    Departures: the number of zeros is exact, where a threshold would also take weights equal to it; experts are pruned like any
    linear layer, one by one.  Embeddings, norms, biases and the head stay.
    Removes: single weights, which become zero.
    Cost: sorting every layer.  The model keeps its shape: the zeros save nothing until something sparse runs them.
    """

    sparsity: float = 0.5
    """Share of each layer's weights that become zero, 0 < sparsity < 1; weights that are zero already count."""
    pattern: str = "unstructured"
    """``unstructured``, or ``n:m``: of every m consecutive inputs of an output n become ZERO, as Wanda's code reads it (hardware's 2:4 keeps two, which is
    the same; 1:4 zeroes one and keeps three).  `sparsity` must then say n / m."""

    def __post_init__(self) -> None:
        check(self.sparsity, self.pattern)

    def apply(self, model: Model) -> Model:
        pruned = model.copy()
        for path, weight in matrices(pruned):
            weight.masked_fill_(least(weight.abs(), self.sparsity, self.pattern, path, across=True), 0)
        return pruned


def check(sparsity: float, pattern: str) -> None:
    """Raises ValueError unless the share lies in (0, 1) and agrees with the pattern."""
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity is a share of the weights, more than 0 and less than 1, got {sparsity}; for a half pass 0.5")
    n, m = group(pattern) or (0, 0)
    if m and not 0 < n < m:
        raise ValueError(f"pattern n:m zeroes n of m weights, 0 < n < m, got {pattern!r}")
    if m and abs(n / m - sparsity) > 1e-9:
        raise ValueError(f"pattern {pattern} zeroes {n / m:g} of the weights, and sparsity says {sparsity}; pass sparsity={n / m:g} with it")


def group(pattern: str) -> tuple[int, int] | None:
    """n and m of a pattern ``n:m``, None if it is unstructured.  Raises ValueError for anything else."""
    if pattern == "unstructured":
        return None
    if not re.fullmatch(r"\d+:\d+", pattern):
        raise ValueError(f"pattern is unstructured or n:m such as 2:4, got {pattern!r}")
    n, _, m = pattern.partition(":")
    return int(n), int(m)


def least(scores: Tensor, sparsity: float, pattern: str, path: str, *, across: bool) -> Tensor:
    """Which weights have the smallest scores, a mask of the same shape; of equal ones the first go.

    scores: (output, input).  across: compare over the whole layer, not within each output; a pattern n:m always compares m neighbours.
    Raises InputError if the inputs do not divide into m.
    """
    outputs, inputs = scores.shape
    n, m = group(pattern) or (0, 0)
    if not m:
        m = outputs * inputs if across else inputs
        n = round(sparsity * m)
    elif inputs % m:
        raise InputError(f"pattern {pattern} needs a multiple of {m} inputs, and {path} has {inputs}")
    grouped = scores.reshape(-1, m)
    order = grouped.argsort(dim=1, stable=True)[:, :n]
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(1, order, True).reshape(outputs, inputs)
