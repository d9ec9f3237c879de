"""Round weights to a grid of few bits, and let those still to be rounded make up for the error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etude.engine.score import require_causal, sample_rows
from etude.engine.stream import require_dense
from etude.method import Method
from etude.methods.compress._grid import Grid, check_grid, grid, remember
from etude.methods.compress._second_order import Fix, groups, inverse_factor, sweep
from etude.values.corpus import Corpus
from etude.values.model import Model


@dataclass(frozen=True)
class GPTQ(Method):
    """Post-training quantization by second order: round a layer's inputs one after another, and correct those still to come by the inverse of the layer's second moments.

    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023 (arXiv 2210.17323), algorithm 1: columns in their given order, lazy
    updates, the Cholesky factor of the inverse, damping by 1 % of the mean diagonal (section 3.3); the grid of a group of inputs is that of the weights as they stand when the group's
    turn comes (section 4, "grouping").  Grids as in `compress.round_to_nearest`.  Defaults: 4 bits and groups of 128; 128 sequences of 2048 tokens in the paper, here as many tokens as
    64 of 512.
    Departures: each layer is judged by what the rounded layers before it write, those of its own block included, so that one pass is enough, and layers that read the same are solved at
    once; rows start with the start token and texts are not joined; padding does not count.  `order: activation` is not in the paper but in its authors' code: inputs with the largest
    second moments come first, with the grids that the groups have at the start.  Causal models without experts.
    The weights keep the dtype and the shape of the model, and their grids stand beside them: nothing runs faster, and `Model.export` writes the packed bits for transformers.
    Raises InputError for other models, and where a layer's second moments cannot be inverted.
    Removes: bits of the weights.
    Cost: one pass over the calibration text; for every layer inputs³ + outputs · inputs² multiplications; memory for the hidden states of the text.
    """

    bits: int = 4
    """Bits of a weight, 2 to 8."""
    group: int | None = 128
    """Consecutive inputs that share a scale; without a number (``null``) a whole output does."""
    symmetric: bool = False
    """The same levels on both sides of zero, and no zero point."""
    order: str = "given"
    """``given``, or ``activation``: the inputs with the largest second moments first."""
    damp: float = 0.01
    """What is added to the diagonal of the second moments, as a share of its mean, more than 0 (paper, section 3.3)."""
    tokens: int = 32768
    """Calibration tokens, at least 2."""
    length: int = 512
    """Longest row of calibration tokens, at least 3."""

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group)
        if self.tokens < 2 or self.length < 3:
            raise ValueError(f"tokens is at least 2 and length at least 3, got {self.tokens} and {self.length}")
        if not self.damp > 0:
            raise ValueError(f"damp is more than 0, got {self.damp}")
        if self.order not in ("given", "activation"):
            raise ValueError(f"order is given or activation, got {self.order!r}")

    def apply(self, model: Model, calibration: Corpus) -> Model:
        require_causal(model, "GPTQ")
        require_dense(model, "GPTQ")
        rounded = model.copy()
        found: dict[str, list[Grid]] = {}
        for weights, moments in groups(rounded, sample_rows(model, calibration, self.tokens, self.length)):
            sizes = [len(weight) for weight in weights.values()]
            whole, grids = self._round(torch.cat(list(weights.values())), moments, next(iter(weights)))
            for place, (path, weight) in enumerate(weights.items()):
                weight.copy_(whole.split(sizes)[place])
                found[path] = [Grid(one.scale.split(sizes)[place], one.zero.split(sizes)[place], one.low, one.high) for one in grids]
        for path, grids in found.items():
            remember(rounded, path, self.bits, self.group, grids)
        return rounded

    def _round(self, weight: Tensor, moments: Tensor, where: str) -> tuple[Tensor, list[Grid]]:
        """A weight (outputs, inputs) on its grids, and these, those of its groups of inputs in turn."""
        size = self.group or weight.shape[1]
        if self.order == "activation":
            grids = [grid(part.float(), self.bits, self.symmetric) for part in weight.split(size, 1)]
            order = moments.diagonal().argsort(descending=True, stable=True)
            factor = inverse_factor(moments[order][:, order], self.damp, where)
            owners = (order // size).tolist()
            whole = sweep(weight[:, order], factor, lambda first, live, roots: lambda place, column: _level(grids[owners[first + place]], column), 128)
            return whole[:, order.argsort()], grids
        found: list[Grid] = []

        def plan(first: int, live: Tensor, roots: Tensor) -> Fix:
            found.append(grid(live.T, self.bits, self.symmetric))
            return lambda place, column: _level(found[-1], column)

        return sweep(weight, inverse_factor(moments, self.damp, where), plan, size), found


def _level(grid: Grid, column: Tensor) -> Tensor:
    """The levels nearest to one input's weights, (outputs,)."""
    return grid.nearest(column[:, None])[:, 0]
