"""Zero weights, and let those that stay make up for them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from etude.engine.score import require_causal, sample_rows
from etude.engine.stream import require_dense
from etude.method import Method
from etude.methods.compress._second_order import COLUMNS, Fix, groups, inverse_factor, sweep
from etude.methods.compress.magnitude import check, group, least
from etude.values.anatomy import weight_of
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model


@dataclass(frozen=True)
class SparseGPT(Method):
    """One-shot pruning by second order: go through a layer's inputs, zero the weights whose loss costs least, and correct the inputs still to come.

    Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023 (arXiv 2301.00774), algorithm 1: with H⁻¹ the inverse of the layer's
    damped second moments XXᵀ, a weight w of input c scores w² / [H⁻¹]cc², the mask is chosen anew for every `block` inputs over all outputs (n:m: for every m inputs, within each output),
    and the error of what is zeroed is spread over the later inputs.  Defaults: 50 %, blocks of 128 and damping of 1 % of the mean diagonal as there (section 3.4, section 4); 128
    sequences of 2048 tokens in the paper, here as many tokens as 64 of 512.
    Departures: each layer is judged by what the pruned layers before it write, those of its own block included (the paper's code: those of the blocks before it), so that one pass is
    enough, and layers that read the same are solved at once; rows start with the start token and texts are not joined; padding does not count.  Causal models without experts.
    Raises InputError for other models, where a pattern n:m does not divide a layer's inputs, and where a layer's second moments cannot be inverted.
    Removes: single weights, which become zero.
    Cost: one pass over the calibration text; for every layer inputs³ + outputs · inputs² multiplications; memory for the hidden states of the text.
    The model keeps its shape: the zeros save nothing until something sparse runs them.
    """

    sparsity: float = 0.5
    """Share of each layer's weights that become zero, 0 < sparsity < 1."""
    pattern: str = "unstructured"
    """``unstructured``, or ``n:m``: of every m consecutive inputs of an output n become zero.  `sparsity` must then say n / m."""
    block: int = 128
    """Inputs for which a mask is chosen at once, at least 1 (paper, section 3.4)."""
    damp: float = 0.01
    """What is added to the diagonal of the second moments, as a share of its mean, more than 0 (paper's code)."""
    tokens: int = 32768
    """Calibration tokens, at least 2."""
    length: int = 512
    """Longest row of calibration tokens, at least 3."""

    def __post_init__(self) -> None:
        check(self.sparsity, self.pattern)
        if self.tokens < 2 or self.length < 3:
            raise ValueError(f"tokens is at least 2 and length at least 3, got {self.tokens} and {self.length}")
        if self.block < 1 or not self.damp > 0:
            raise ValueError(f"block is at least 1 and damp more than 0, got {self.block} and {self.damp}")

    def apply(self, model: Model, calibration: Corpus) -> Model:
        require_causal(model, "SparseGPT")
        require_dense(model, "SparseGPT")
        pruned = model.copy()
        self._check(pruned)
        for weights, moments in groups(pruned, sample_rows(model, calibration, self.tokens, self.length)):
            paths, sizes = list(weights), [len(weight) for weight in weights.values()]
            factor = inverse_factor(moments, self.damp, paths[0])
            plan = functools.partial(self._plan, paths, sizes)
            whole = sweep(torch.cat(list(weights.values())), factor, plan, self._run)
            for weight, part in zip(weights.values(), whole.split(sizes), strict=True):
                weight.copy_(part)
        return pruned

    def _plan(self, paths: list[str], sizes: list[int], first: int, live: Tensor, roots: Tensor) -> Fix:
        """Zero the cheapest weights of these inputs, layer by layer; with a pattern, of every m inputs when their turn comes."""
        size, gone = self._size or len(live), torch.zeros_like(live, dtype=torch.bool)

        def fix(place: int, column: Tensor) -> Tensor:
            if place % size == 0:
                scores = (live[place : place + size] / roots[place : place + size, None]).square().T.split(sizes)
                chosen = [least(one, self.sparsity, self.pattern, path, across=True) if self._size else _least(one, self.sparsity) for one, path in zip(scores, paths, strict=True)]
                gone[place : place + size] = torch.cat(chosen).T
            return column.masked_fill(gone[place], 0)

        return fix

    @property
    def _size(self) -> int:
        """Inputs among which a pattern n:m compares, 0 without one."""
        return (group(self.pattern) or (0, 0))[1]

    @property
    def _run(self) -> int:
        """Inputs that are planned together: those that must be up to date when a mask is chosen among them."""
        return self.block if not self._size else COLUMNS if COLUMNS % self._size == 0 else self._size

    def _check(self, model: Model) -> None:
        """Raises InputError if a pattern does not divide every layer's inputs."""
        for block in model.anatomy.blocks:
            for path, module in model.anatomy.linears(block).items():
                inputs = weight_of(module).shape[1]
                if self._size and inputs % self._size:
                    raise InputError(f"pattern {self.pattern} needs a multiple of {self._size} inputs, and {path} has {inputs}")


def _least(scores: Tensor, sparsity: float) -> Tensor:
    """The mask that `least` gives across a layer without a pattern, by selection instead of sorting: a quarter of the time."""
    count = round(sparsity * scores.numel())
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    last = flat.kthvalue(count).values
    mask = flat < last
    mask[(flat == last).nonzero()[: count - int(mask.sum()), 0]] = True
    return mask.reshape(scores.shape)
