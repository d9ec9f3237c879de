"""Which questions of a bank many variants of some models answer rightly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from etude.engine.progress import report
from etude.method import Method
from etude.methods.evaluate._bank import Bank
from etude.values.anatomy import weight_of
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.lazy import lazy
from etude.values.model import Model

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

MOST = 8192
"""So many variants are numbered."""
WHOLE = 0.75
"""What a block's share of zeros has of the whole variant's."""


@dataclass(frozen=True)
class Variants(Method):
    """Many examinees from few models, for statistics that need hundreds of them: each variant's weights are mixed from the models' and then pruned.

    Variant i has the first model's weights plus, of each other model, a share in [0, `mixture`] of what tells it from the first (task arithmetic: Ilharco et al., 2023); then in each block a share of
    every linear layer's weights, those of least absolute value, becomes zero; embeddings and norms stay.  A block's share is three parts of one number for the whole variant and one part of its
    own, each between the two of `sparsity`.  All these numbers are the i-th point of Sobol's sequence, so that variants are spread evenly and nothing is drawn: variant 7 is the same
    among 10 and among 1000.
    Such models are kin, as are the merged and tuned models on public leaderboards; they differ less in kind than models that were trained apart.

    Gives what `evaluate.responses` gives; a model's name is its variant's number.
    Raises InputError if the models are not of one structure, and what `evaluate.responses` raises.
    Cost: a forward pass of every variant over the different prompts and choices, a copy of the weights and a sort of every layer.
    """

    variants: int = 50
    """How many variants."""
    first: int = 0
    """Number of the first: variants of other numbers are other models."""
    sparsity: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of a layer's weights that become zero; small models hardly feel half of them missing."""
    mixture: float = 1.0
    """Largest share of another model's difference that is added."""

    def __post_init__(self) -> None:
        if self.variants < 1:
            raise ValueError(f"variants is a number of models, at least 1, got {self.variants}")
        if self.first < 0 or self.first + self.variants > MOST:
            raise ValueError(f"variants have numbers from 0 to {MOST - 1}, got {self.first} to {self.first + self.variants - 1}")
        if not 0 <= self.sparsity[0] <= self.sparsity[1] <= 1:
            raise ValueError(f"sparsity is two shares of the weights from 0 to 1, the smaller one first, got {self.sparsity}; for up to a half pass [0, 0.5]")
        if self.mixture < 0:
            raise ValueError(f"mixture is at least 0, got {self.mixture}")

    def apply(self, models: list[Model], bank: Corpus) -> Corpus:
        questions = Bank.of(bank)
        base, *others = models
        _check(models)
        layers = [list(base.anatomy.linears(block)) for block in base.anatomy.blocks]
        right = []
        for place, point in enumerate(self._points(len(others), len(layers))):
            right.append(questions.right(variant(base, others, layers, point)))
            report("asking", place + 1, self.variants)
        return questions.records([str(self.first + place) for place in range(self.variants)], right)

    def _points(self, others: int, blocks: int) -> np.ndarray:
        """Each variant's numbers: a share of every other model, a sparsity for the whole, and one for each block.  (variants, others + 1 + blocks)."""
        from scipy.stats import qmc

        points = qmc.Sobol(others + 1 + blocks, scramble=False).random(1 << (self.first + self.variants - 1).bit_length())[self.first : self.first + self.variants]
        low, high = self.sparsity
        return np.concatenate([self.mixture * points[:, :others], low + (high - low) * points[:, others:]], 1)


def _check(models: Sequence[Model]) -> None:
    """Raises InputError unless all models have the same parameters."""
    shapes = [{name: tuple(weight.shape) for name, weight in model.network.named_parameters()} for model in models]
    for place, other in enumerate(shapes):
        if other != shapes[0]:
            raise InputError(f"model {place + 1} of {len(models)} has other parameters than the first, so that they cannot be mixed", remedy="Give models that were trained from one checkpoint.")


def variant(base: Model, others: Sequence[Model], layers: Sequence[Sequence[str]], point: np.ndarray) -> Model:
    """The variant with these numbers; layers: paths of each block's linear layers."""
    found = base.copy()
    shares, whole, own = point[: len(others)], point[len(others)], point[len(others) + 1 :]
    with torch.no_grad():
        parts = [dict(model.network.named_parameters()) for model in (base, *others)]
        for name, weight in found.network.named_parameters():
            for share, theirs in zip(shares, parts[1:], strict=True):
                weight.add_(theirs[name] - parts[0][name], alpha=float(share))
        for paths, sparsity in zip(layers, own, strict=True):
            for path in paths:
                prune(weight_of(found.network.get_submodule(path)).detach(), WHOLE * whole + (1 - WHOLE) * sparsity)
    return found


def prune(weight: torch.Tensor, share: float) -> None:
    """Zero this share of a matrix, the weights of least absolute value, in place."""
    count = round(share * weight.numel())
    if count:
        weight.masked_fill_(weight.abs() <= weight.abs().flatten().kthvalue(count).values, 0)
