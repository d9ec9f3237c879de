"""Round every weight to the nearest of a few levels: the baseline of every quantization paper."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etude.method import Method
from etude.methods.compress.magnitude import _weights
from etude.values.model import Model


@dataclass(frozen=True)
class RoundToNearest(Method):
    """Round the weights of every linear layer of the blocks to the nearest of 2^bits evenly spaced levels, a group of inputs at a time.

    A group is so many consecutive inputs of one output.  Without `symmetric`, with lo the least weight of the group and hi its largest, both widened to hold 0, and q levels:
    scale = (hi - lo) / (q - 1), zero = round(-lo / scale), and w becomes scale · (clip(round(w / scale) + zero, 0, q - 1) - zero).  With it, scale = max|w| / (q / 2 - 1), and
    w becomes scale · round(w / scale): one level fewer, the same on both sides of 0.  Either way 0 stays 0.  Halves are rounded to even.

    Quantization is simulated: the rounded values are stored in the dtype and the shape of the model, so that nothing shrinks and nothing runs faster; what it costs in quality is the same.
    Source: the baseline RTN of Frantar et al., "GPTQ", 2023 (arXiv 2210.17323), section 4, with their quantizer; groups of 128 and asymmetric levels as in Lin et al., "AWQ", 2024
    (arXiv 2306.00978), section 5.
    Departures: where a layer's inputs do not divide into groups the last one is shorter; scales stay in float32.  Embeddings, norms, biases and the head stay; experts are rounded one by one.
    Cost: a pass over the weights.
    """

    bits: int = 4
    """Bits of a weight, 2 to 8."""
    group: int | None = 128
    """Consecutive inputs that share a scale; without a number (``null``) a whole output does."""
    symmetric: bool = False
    """The same levels on both sides of zero, and no zero point."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits is from 2 to 8, got {self.bits}")
        if self.group is not None and self.group < 2:
            raise ValueError(f"group is a number of inputs, at least 2, got {self.group}; null makes it a whole output")

    def apply(self, model: Model) -> Model:
        rounded = model.copy()
        for _, weight in _weights(rounded):
            size = self.group or weight.shape[1]
            for part in weight.split(size, dim=1):
                part.copy_(self.rounded(part.float()))
        return rounded

    def rounded(self, weight: Tensor) -> Tensor:
        """A group of every output, (outputs, inputs) float32, on its levels; the same shape."""
        levels = 1 << self.bits
        if self.symmetric:
            scale = _positive(weight.abs().amax(1, keepdim=True) / (levels // 2 - 1))
            return scale * (weight / scale).round()
        low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
        scale = _positive((high - low) / (levels - 1))
        zero = (-low / scale).round()
        return scale * (((weight / scale).round() + zero).clamp(0, levels - 1) - zero)


def _positive(scale: Tensor) -> Tensor:
    """The scale, and 1 where all weights are zero and any will do."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
