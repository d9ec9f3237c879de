"""Adapt a model by choosing which of its weights stay, and changing none of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from etude.engine import batch, losses
from etude.engine.batch import IGNORED
from etude.engine.budget import Budget
from etude.engine.feed import Batch, Packed
from etude.engine.score import require_causal
from etude.engine.select import highest
from etude.engine.train import train
from etude.methods._training import Training
from etude.values.anatomy import weight_of
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

ALLOCATIONS = ("sigmoid", "uniform")


@dataclass(frozen=True)
class StaticModelPruning(Training):
    """Freeze all weights, learn a score for each weight of the blocks' linear layers, and keep those with the highest: the task is learned by what is taken away.

    A score's gradient is that of the loss with respect to its weight's place in the mask, gradient · weight, as if the mask were the score (straight-through).  The share
    that is kept falls from 1 to 1 - sparsity over the `ramp`, as 1 - sparsity · (1 - (1 - t)³).  ``uniform`` keeps that share of every matrix (SMP-L);
    ``sigmoid`` gives the matrices of one kind, such as the queries of all blocks, shares in proportion to the mean sigmoid of their scores (SMP-S).  The mean sigmoid over all
    matrices, times `penalty` · (1 - (1 - progress)³), is added to the loss.  At the end the others are zero, and what stays is what it was: a bit a weight stores the task.
    With `tuned` all parameters learn too, by the same learning rate; with ``uniform`` and no penalty this is movement pruning (Sanh et al., 2020), the paper's rival.
    Source: Jiang et al., "Pruning Pre-trained Language Models Without Fine-Tuning", 2022 (arXiv 2210.06210), section 3, and the authors' code.
    Departures: a causal model that goes on with the task's text, where they classify by label words; no teacher beside the labels; a share above 1 is cut to 1.  Experts stay whole.
    Defaults: 90 %, learning rate, penalty and ramp of the authors' script for MNLI, which takes 74 thousand steps; there the score's rate does not decay by weight, nor here.
    Removes: single weights, which become zero.
    Cost: the budget, a selection among all scores a step, and memory for scores and their moments as for full fine-tuning.
    """

    paper = "static-model-pruning"

    sparsity: float = 0.9
    """Share of the weights that are zero at the end, 0 < sparsity < 1."""
    allocation: str = "sigmoid"
    """``sigmoid`` or ``uniform``."""
    penalty: float = 400.0
    """Weight of the mean sigmoid at the end, in nats a token, at least 0."""
    ramp: float = 0.6
    """Share of the budget over which the zeros grow, more than 0 and at most 1."""
    tuned: bool = False
    """Whether the weights learn too."""
    learning_rate: float = 2e-2
    schedule: str = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity is a share of the weights, more than 0 and less than 1, got {self.sparsity}; for nine tenths pass 0.9")
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation is one of {', '.join(ALLOCATIONS)}, got {self.allocation!r}")
        if self.penalty < 0:
            raise ValueError(f"penalty is at least 0, got {self.penalty}")
        if not 0 < self.ramp <= 1:
            raise ValueError(f"ramp is a share of the budget, more than 0 and at most 1, got {self.ramp}")
        if self.optimizer != "adamw":
            raise ValueError(f"optimizer is adamw, which moves every score by itself, got {self.optimizer!r}")

    def apply(self, model: Model, corpus: Corpus, budget: Budget, seed: int) -> Model:
        require_causal(model, "static model pruning")
        pruned = model.copy()
        asked = {name: parameter.requires_grad for name, parameter in pruned.network.named_parameters()}
        selection = Selection(self, pruned)
        train(pruned, Packed(batch.Documents(pruned, corpus), self.length), self.recipe(), budget, seed, selection.loss)
        selection.merge()
        for name, parameter in pruned.network.named_parameters():
            parameter.requires_grad_(asked[name])
        return pruned


class Masked(nn.Module):
    """A linear layer whose weight is W ⊙ mask, and a score for each weight."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        weight = weight_of(layer)
        self.layer, self.in_features = layer, weight.shape[1]
        self.scores = nn.Parameter(torch.zeros_like(weight, memory_format=torch.contiguous_format))
        self.mask: Tensor
        self.register_buffer("mask", torch.ones_like(self.scores, dtype=torch.bool))

    def forward(self, inputs: Tensor) -> Tensor:
        weight = _Straight.apply(weight_of(self.layer), self.scores, self.mask)
        return nn.functional.linear(inputs, weight, self.layer.bias)  # type: ignore[arg-type]


class _Straight(torch.autograd.Function):
    """W ⊙ mask, whose gradient passes to the scores as if they were the mask."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        weight, mask = ctx.saved_tensors
        return slope * mask if ctx.needs_input_grad[0] else None, slope * weight, None


class Selection:
    """The masks of a draft while their scores are learned.  They follow from the scores and the share of the budget alone, so that a killed run finds them again."""

    def __init__(self, method: StaticModelPruning, draft: Model):
        self.method, self.network, self.at = method, draft.network, -1.0
        self.network.requires_grad_(method.tuned)
        self.masked: dict[str, Masked] = {}
        self.kinds: dict[tuple[str, str], list[Masked]] = {}
        for block in draft.anatomy.blocks:
            for path in draft.anatomy.linears(block):
                if path not in self.masked:
                    self.masked[path] = Masked(self.network.get_submodule(path))
                    self.kinds.setdefault((block.stack, path.removeprefix(block.path)), []).append(self.masked[path])
        if not self.masked:
            raise InputError(f"the blocks of this {draft.base.model_type} have no linear layers to prune")
        for path, one in self.masked.items():
            self.network.set_submodule(path, one)

    def loss(self, network: nn.Module, batch: Batch) -> losses.Lost:
        if batch.progress != self.at:
            self.at = batch.progress
            self.select(1 - self.method.sparsity * (1 - (1 - min(1.0, self.at / self.method.ramp)) ** 3))
        total = losses.next_token(network, batch)
        if not self.method.penalty:
            return losses.Lost(total)
        counted = (batch.labels != IGNORED).sum()
        crowd = counted * torch.stack([one.scores.sigmoid().mean() for one in self.masked.values()]).mean()
        pressure = self.method.penalty * (1 - (1 - self.at) ** 3) * crowd
        # Its gradient alone: a term that grows from 0 to hundreds of nats would look like divergence to the loop.
        return losses.Lost(total + pressure - pressure.detach(), parts={"mean_sigmoid": crowd.detach()})

    @torch.no_grad()
    def select(self, share: float) -> None:
        """Keep this share of the weights, in each matrix those with the highest scores; of equal ones the first."""
        for members in self.kinds.values():
            mass = torch.stack([one.scores.float().sigmoid().mean() for one in members]).double()
            shares = share * mass / mass.mean() if self.method.allocation == "sigmoid" else torch.full_like(mass, share)
            for one, own in zip(members, shares.tolist(), strict=True):
                one.mask.copy_(highest(one.scores, max(1, round(min(1.0, own) * one.scores.numel()))))

    @torch.no_grad()
    def merge(self) -> None:
        """Write the zeros of the last share into the weights, and take the scores away."""
        self.select(1 - self.method.sparsity)
        for path, one in self.masked.items():
            weight_of(one.layer).masked_fill_(~one.mask, 0)
            self.network.set_submodule(path, one.layer)
