"""Tune a pruned model by multiplying its weights, so that its zeros stay zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from etude.engine import batch
from etude.engine.budget import Budget
from etude.engine.feed import Packed
from etude.engine.score import require_causal
from etude.engine.train import train
from etude.methods._training import Training
from etude.values.anatomy import weight_of
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model


@dataclass(frozen=True)
class SPP(Training):
    """Freeze a sparse model, and learn for each linear layer of its blocks a multiplier M, so that its weight is W + scale · W ⊙ M.

    M (outputs, inputs) is the product, entry by entry, of two thin factors: `rank` rows (rank, inputs), each repeated for an equal share of the outputs, one after
    another, and a column (outputs, 1), repeated for all inputs.  Zero times anything is zero: whatever pattern of zeros comes in, by shares or n:m, goes out, in training and
    after M is multiplied into the weights at the end.  The column begins at zero, and with it the update; the rows are drawn uniformly within 1 / √inputs.
    A layer trains rank · inputs + outputs numbers; LoRA of half the rank about as many.
    Source: Lu et al., "SPP: Sparsity-Preserved Parameter-Efficient Fine-Tuning for Large Language Models", 2024 (arXiv 2405.16057), section 3, and the authors' code.
    Departures: shares of outputs differ by one where the rank does not divide them (the code refuses); experts, and everything outside the blocks' linear layers, stay as
    they are; a dense model is not refused, to which this is one more adapter; AdamW with the loop's betas.  The paper saves memory by a product for each row of M; here the
    backward pass forms W + scale · W ⊙ M again, so that only one layer's is ever held.  Causal models.
    Defaults: rank, scale, dropout, learning rate, warm-up and decay of the authors' script for 7 billion parameters, where 128 sequences make a step.
    Removes: nothing; it recovers a pruned model, and keeps its zeros.
    Cost: the budget, and four passes over the weights of a layer and micro-batch; with dropout, a product more.
    """

    paper = "spp-sparsity-preserved-peft"

    rank: int = 16
    """Rows of the thin factor; a layer with fewer outputs has one for each."""
    scale: float = 2.0
    """By what M is multiplied; in the authors' code the alpha 16 over the rank 8 of LoRA, beside which it was written."""
    dropout: float = 0.05
    """Share of a layer's input that its update does not see in training."""
    learning_rate: float = 4e-3
    schedule: str = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank is at least 1, got {self.rank}")
        if not self.scale > 0:
            raise ValueError(f"scale is more than 0, got {self.scale}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a share, at least 0 and less than 1, got {self.dropout}")

    def apply(self, model: Model, corpus: Corpus, budget: Budget, seed: int) -> Model:
        require_causal(model, "SPP")
        tuned = model.copy()
        asked = {name: parameter.requires_grad for name, parameter in tuned.network.named_parameters()}
        multiplied = self.inject(tuned, seed)
        train(tuned, Packed(batch.Documents(tuned, corpus), self.length), self.recipe(), budget, seed)
        merge(tuned.network, multiplied)
        for name, parameter in tuned.network.named_parameters():
            parameter.requires_grad_(asked[name])
        return tuned

    def inject(self, draft: Model, seed: int) -> dict[str, Multiplied]:
        """Put a `Multiplied` around every linear layer of the blocks; only these ask for gradients then.  By path.  Raises InputError if there are none."""
        paths = list(dict.fromkeys(path for block in draft.anatomy.blocks for path in draft.anatomy.linears(block)))
        if not paths:
            raise InputError(f"the blocks of this {draft.base.model_type} have no linear layers to tune")
        draft.network.requires_grad_(False)
        random = torch.Generator().manual_seed(seed)
        found = {path: Multiplied(draft.network.get_submodule(path), self.rank, self.scale, self.dropout, random) for path in paths}
        for path, module in found.items():
            draft.network.set_submodule(path, module)
        return found


class Multiplied(nn.Module):
    """A frozen linear layer whose weight is W + scale · W ⊙ M."""

    def __init__(self, layer: nn.Module, rank: int, scale: float, dropout: float, random: torch.Generator):
        super().__init__()
        weight = weight_of(layer)
        outputs, inputs = weight.shape
        rank = min(rank, outputs)
        self.layer, self.scale, self.dropout, self.in_features = layer, scale, dropout, inputs
        self.rows = nn.Parameter(((2 * torch.rand(rank, inputs, generator=random) - 1) / inputs**0.5).to(weight))
        self.column = nn.Parameter(weight.new_zeros(outputs, 1))
        self.turn: Tensor
        self.register_buffer("turn", torch.arange(outputs, device=weight.device) * rank // outputs)
        """Which row each output reads, (outputs,)."""

    def forward(self, inputs: Tensor) -> Tensor:
        device, bias = inputs.device.type, self.layer.bias
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        if self.dropout and self.training:
            plain = nn.functional.linear(inputs, weight_of(self.layer), bias)  # type: ignore[arg-type]
            return plain + self._product(nn.functional.dropout(inputs, self.dropout), None, 0.0, low)
        return self._product(inputs, bias, 1.0, low)

    def _product(self, inputs: Tensor, bias: Any, own: float, low: torch.dtype) -> Tensor:
        return _Product.apply(inputs, weight_of(self.layer), bias, self.rows, self.column, self.turn, self.scale, own, low)  # type: ignore[no-any-return]


def multiply(weight: Tensor, rows: Tensor, column: Tensor, turn: Tensor, scale: float, own: float) -> Tensor:
    """own · W + scale · W ⊙ M, (outputs, inputs).  own: 1 for the whole weight, 0 for its update alone."""
    return rows[turn].mul_(column).mul_(scale).add_(own).mul_(weight)


class _Product(torch.autograd.Function):
    """inputs · weightᵀ + bias, which keeps the factors for its backward pass, and not the weight that they make; W and the bias get no gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, column: Tensor, turn: Tensor, scale: float, own: float, low: torch.dtype) -> Tensor:
        read = inputs.to(low)
        ctx.save_for_backward(read, weight, rows, column, turn)
        ctx.scale, ctx.own, ctx.low, ctx.dtype = scale, own, low, inputs.dtype
        return nn.functional.linear(read, multiply(weight, rows, column, turn, scale, own).to(low), None if bias is None else bias.to(low))

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        read, weight, rows, column, turn = ctx.saved_tensors
        slope = slope.to(ctx.low)
        by_inputs = (slope @ multiply(weight, rows, column, turn, ctx.scale, ctx.own).to(ctx.low)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        by_multiplier = (slope.flatten(0, -2).T @ read.flatten(0, -2)).to(weight.dtype).mul_(weight).mul_(ctx.scale)  # (outputs, inputs)
        by_column = (by_multiplier * rows[turn]).sum(1, keepdim=True)
        by_rows = torch.zeros_like(rows).index_add_(0, turn, by_multiplier.mul_(column))
        return by_inputs, None, None, by_rows, by_column, None, None, None, None


def merge(network: nn.Module, multiplied: dict[str, Multiplied]) -> None:
    """Multiply every M into the weight that it belongs to, and take it away, in place."""
    for path, one in multiplied.items():
        with torch.no_grad():
            weight = weight_of(one.layer)
            weight.copy_(multiply(weight, one.rows, one.column, one.turn, one.scale, 1.0))
        network.set_submodule(path, one.layer)
