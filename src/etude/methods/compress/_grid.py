"""Grids of a few bits, and the weights on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etude.values.anatomy import weight_of
from etude.values.model import Model
from etude.values.packed import SCALE, ZERO, Quantized


@dataclass(frozen=True)
class Grid:
    """Evenly spaced levels scale · (q - zero) for a group of inputs of every output; scale and zero are (outputs, 1) float32."""

    scale: Tensor
    zero: Tensor
    low: int
    high: int
    """Least and largest q."""

    def nearest(self, weight: Tensor) -> Tensor:
        """The level nearest to each weight, (outputs, inputs) float32; halves go to the even integer."""
        return self.scale * (((weight / self.scale).round() + self.zero).clamp(self.low, self.high) - self.zero)


def grid(weight: Tensor, bits: int, symmetric: bool) -> Grid:
    """The grid that spans a group of every output, (outputs, inputs) float32, and holds 0.

    Integers run from -2^(bits - 1) up.  Symmetric: scale = max|w| / (2^(bits - 1) - 1), and the lowest level is left out, so that both sides are the same.
    """
    half = 1 << (bits - 1)
    if symmetric:
        scale = _positive(weight.abs().amax(1, keepdim=True) / (half - 1))
        return Grid(scale, torch.zeros_like(scale), 1 - half, half - 1)
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    scale = _positive((high - low) / (2 * half - 1))
    return Grid(scale, (-low / scale).round() - half, -half, half - 1)


def remember(model: Model, path: str, bits: int, group: int | None, grids: list[Grid]) -> None:
    """Write the grids of a draft's layer beside its weight, those of its groups of inputs in turn."""
    symmetric = all(bool((one.zero == 0).all()) and one.low == -one.high for one in grids)
    model.replace_edits([edit for edit in model.edits if not (isinstance(edit, Quantized) and edit.module == path)])
    model.edit(Quantized(path, bits, group if group and group < weight_of(model.network.get_submodule(path)).shape[1] else None, symmetric))
    module = model.network.get_submodule(path)
    getattr(module, SCALE).copy_(torch.cat([one.scale for one in grids], 1))
    if not symmetric:
        getattr(module, ZERO).copy_(torch.cat([one.zero for one in grids], 1))


def check_grid(bits: int, group: int | None) -> None:
    """Raises ValueError for a grid that is none."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits is from 2 to 8, got {bits}")
    if group is not None and group < 2:
        raise ValueError(f"group is a number of inputs, at least 2, got {group}; null makes it a whole output")


def _positive(scale: Tensor) -> Tensor:
    """The scale, and 1 where all weights are zero and any will do."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
