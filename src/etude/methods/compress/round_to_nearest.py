"""Round every weight to the nearest of a few levels: the baseline of every quantization paper."""

from __future__ import annotations

from dataclasses import dataclass

from etude.method import Method
from etude.methods.compress._grid import check_grid, grid, remember
from etude.methods.compress._matrices import matrices
from etude.values.model import Model


@dataclass(frozen=True)
class RoundToNearest(Method):
    """Round the weights of every linear layer of the blocks to the nearest of 2^bits evenly spaced levels, a group of inputs at a time.

    A group is so many consecutive inputs of one output.  Without `symmetric`, with lo the least weight of the group and hi its largest, both widened to hold 0, and q levels:
    scale = (hi - lo) / (q - 1), zero = round(-lo / scale), and w becomes scale · (clip(round(w / scale) + zero, 0, q - 1) - zero).  With it, scale = max|w| / (q / 2 - 1), and
    w becomes scale · round(w / scale): one level fewer, the same on both sides of 0.  Either way 0 stays 0.  Halves are rounded to even.

    The rounded values are stored in the dtype and the shape of the model, with their grids beside them, so that nothing runs faster; what it costs in quality is the same, and
    `Model.export` writes the packed bits for transformers.
    Source: the baseline RTN of Frantar et al., "GPTQ", 2023 (arXiv 2210.17323), section 4, with their quantizer; groups of 128 and asymmetric levels as in Lin et al., "AWQ", 2024
    (arXiv 2306.00978), section 5.
    Departures: where a layer's inputs do not divide into groups the last one is shorter; scales stay in float32.  Embeddings, norms, biases and the head stay; experts are rounded one by one.
    Removes: bits of the weights.
    Cost: a pass over the weights.
    """

    bits: int = 4
    """Bits of a weight, 2 to 8."""
    group: int | None = 128
    """Consecutive inputs that share a scale; without a number (``null``) a whole output does."""
    symmetric: bool = False
    """The same levels on both sides of zero, and no zero point."""

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group)

    def apply(self, model: Model) -> Model:
        rounded, grids = model.copy(), {}
        alone = {path for block in rounded.anatomy.blocks for path in block.parts.linears}
        for path, weight in matrices(rounded):
            parts = weight.split(self.group or weight.shape[1], dim=1)
            found = [grid(part.float(), self.bits, self.symmetric) for part in parts]
            for part, one in zip(parts, found, strict=True):
                part.copy_(one.nearest(part.float()))
            if path in alone:
                grids[path] = found
        for path, found in grids.items():
            remember(rounded, path, self.bits, self.group, found)
        return rounded
