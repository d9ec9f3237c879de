"""Weights as sums of signs times powers of two, so that products become shifts and additions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from etude.engine.progress import report
from etude.engine.score import require_causal, sample_rows
from etude.engine.stream import require_dense
from etude.method import Method
from etude.methods.compress._codes import coded
from etude.methods.compress._second_order import Fix, groups, inverse_factor, sweep
from etude.values.anatomy import weight_of
from etude.values.corpus import Corpus
from etude.values.model import Model

OBJECTIVES = ("joint", "weights")


@dataclass(frozen=True)
class ShiftAddLLM(Method):
    """Post-training reparameterization: each weight matrix as a sum of few sign matrices, each with scales that are powers of two.

    ``weights``: for every `group` of inputs of an output, the scales and signs that come closest to the weights (binary coding).  ``joint``: for every input, with scales for each
    `group` of outputs, one input after another, and the inputs to come make up for the error by the inverse of the layer's second moments, as in GPTQ.
    Mixed bits: with `mixed`, each layer gets bits - 1, bits or bits + 1, `bits` on average over the weights, so that the sum over the layers of their outputs' relative squared errors is least, as
    ``weights`` coding would make them on the model as it comes; an integer programme (SciPy's HiGHS).
    Source: You et al., "ShiftAddLLM: Accelerating Pretrained LLMs via Post-Training Multiplication-Less Reparameterization", 2024 (arXiv 2406.05981), sections 4.1 to 4.3; the alternating fit is
    that of its references, LUT-GEMM and Xu et al. (2018).
    Departures: the layers' sensitivity is measured in their outputs, where the paper has a product of two norms of its importance scores; bits are mixed over all layers at once; its layout in which
    eight inputs share scales is left out; layers are judged as in `compress.gptq`.  Causal models without experts.
    The arithmetic is simulated: values are stored in the dtype and the shape of the model, nothing shrinks, and nothing runs faster.
    Raises InputError for other models, and where a layer's second moments cannot be inverted.
    Removes: bits of the weights.
    Cost: one pass over the calibration text for ``joint`` and one for `mixed`; the fits, 15 rounds of members · 2^bits comparisons a group.
    """

    paper = "shiftaddllm"

    bits: int = 3
    """Sign matrices, 1 to 6; the paper's 2 and 3."""
    objective: str = "joint"
    """``joint`` or ``weights``."""
    mixed: bool = False
    """Whether layers get more or fewer bits by their sensitivity."""
    group: int = 128
    """Inputs of an output (``weights``), or outputs of an input (``joint``), that share scales at most, at least 2; a layer's groups are as even as can be."""
    damp: float = 0.01
    """What is added to the diagonal of the second moments, as a share of its mean, more than 0."""
    tokens: int = 32768
    """Calibration tokens, at least 2."""
    length: int = 512
    """Longest row of calibration tokens, at least 3."""

    def __post_init__(self) -> None:
        if self.bits - self.mixed < 1 or self.bits + self.mixed > 6:
            raise ValueError(f"bits is from 1 to 6, or with mixed from 2 to 5, got {self.bits}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective is one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.group < 2 or not self.damp > 0:
            raise ValueError(f"group is at least 2 and damp more than 0, got {self.group} and {self.damp}")
        if self.tokens < 2 or self.length < 3:
            raise ValueError(f"tokens is at least 2 and length at least 3, got {self.tokens} and {self.length}")

    def apply(self, model: Model, calibration: Corpus) -> Model:
        require_causal(model, "ShiftAddLLM")
        require_dense(model, "ShiftAddLLM")
        rows, made = sample_rows(model, calibration, self.tokens, self.length), model.copy()
        bits = self._allotted(made, rows)
        if self.objective == "weights":
            for place, (path, count) in enumerate(bits.items()):
                weight = weight_of(made.network.get_submodule(path)).detach()
                weight.copy_(self._by_inputs(weight, count))
                report("fitting signs and scales", place + 1, len(bits))
            return made
        for weights, moments in groups(made, rows):
            factor = inverse_factor(moments, self.damp, next(iter(weights)))
            for path, weight in weights.items():
                weight.copy_(sweep(weight, factor, self._plan(bits[path]), len(factor)))
        return made

    def _plan(self, bits: int):  # type: ignore[no-untyped-def]
        def plan(first: int, live: Tensor, roots: Tensor) -> Fix:
            return lambda place, column: self._in_groups(column[None], bits)[0]

        return plan

    def _by_inputs(self, weight: Tensor, bits: int) -> Tensor:
        return self._in_groups(weight.float(), bits).to(weight.dtype)

    def _in_groups(self, values: Tensor, bits: int) -> Tensor:
        """Rows coded in the fewest groups of consecutive members that are no larger than `group`, and as even as can be; (rows, members)."""
        rows, members = values.shape
        count = -(-members // self.group)
        small, larger = divmod(members, count)
        edge = larger * (small + 1)
        parts = [coded(part.reshape(-1, size), bits, powers=True).view(rows, -1) for part, size in ((values[:, :edge], small + 1), (values[:, edge:], small)) if part.shape[1]]
        return torch.cat(parts, 1)

    def _allotted(self, model: Model, rows: list[np.ndarray]) -> dict[str, int]:
        """Bits of every layer, by path."""
        paths = [path for block in model.anatomy.blocks for path in block.parts.linears]
        if not self.mixed:
            return dict.fromkeys(paths, self.bits)
        choices = (self.bits - 1, self.bits, self.bits + 1)
        errors, sizes = {}, {}
        for weights, moments in groups(model, rows):
            for path, weight in weights.items():
                sizes[path] = weight.numel()
                errors[path] = [_error(weight.float(), self._by_inputs(weight, count).float(), moments) for count in choices]
        return dict(zip(errors, allot([errors[path] for path in errors], [sizes[path] for path in errors], choices, self.bits), strict=True))


def _error(weight: Tensor, other: Tensor, moments: Tensor) -> float:
    """Squared error of a layer's outputs, as a share of their squares."""
    gap = weight - other
    return float(((gap @ moments) * gap).sum(dtype=torch.float64) / ((weight @ moments) * weight).sum(dtype=torch.float64).clamp(min=1e-30))


def allot(errors: list[list[float]], sizes: list[int], choices: tuple[int, ...], bits: int) -> list[int]:
    """One of the choices for every layer, so that the errors' sum is least and the mean over the weights at most `bits`.

    errors: of each layer under each choice; sizes: weights of each layer.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, options = len(errors), len(choices)
    one_each = np.kron(np.eye(layers), np.ones(options))
    spent = np.concatenate([[size * choice / sum(sizes) for choice in choices] for size in sizes])
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(spent[None], -np.inf, bits + 1e-9)]
    found = milp(np.concatenate(errors), integrality=np.ones(layers * options), bounds=Bounds(0, 1), constraints=limits)
    return [choices[place] for place in found.x.reshape(layers, options).argmax(1)]
