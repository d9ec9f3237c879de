"""Train a partially binarized model: the salient weights stay, the signs of the others learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from etude.engine import batch
from etude.engine.budget import Budget
from etude.engine.feed import Packed
from etude.engine.score import require_causal
from etude.engine.stream import require_dense
from etude.engine.train import train
from etude.methods._training import Training
from etude.methods.compress.pb_llm import highest
from etude.values.corpus import Corpus
from etude.values.model import Model
from etude.values.trace import output_dim


@dataclass(frozen=True)
class PBLLMTuning(Training):
    """Partial binarization while training: weights of small magnitude are plus or minus one scale an output, and what lies behind their signs is trained straight through.

    Source: Shang et al., "PB-LLM: Partially Binarized Large Language Models", 2023 (arXiv 2310.00034), the training part (section 3.3): the salient weights, those of largest magnitude, are
    frozen; the others' scale is the mean magnitude of what lies behind them, computed anew at every step, and their gradient passes the sign where that lies within [-1, 1].
    Departures: the salient weights stay in full precision, where the paper has 8 bits; embeddings, norms, biases and the head stay as they are; the gradient does not go through the
    scale; the learning rate is ours, for short budgets, where the paper takes 2e-5 for ten thousand steps.  Causal models without experts.
    The weights keep the dtype and the shape of the model: nothing shrinks here.
    Removes: bits of the weights.
    Cost: the budget, and four passes over the weights of a layer and micro-batch.
    """

    paper = "pb-llm"

    salient: float = 0.1
    """Share of each layer's weights that are kept as they are, 0 <= salient < 1."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.salient < 1:
            raise ValueError(f"salient is a share of the weights, at least 0 and less than 1, got {self.salient}; for a tenth pass 0.1")

    def apply(self, model: Model, corpus: Corpus, budget: Budget, seed: int) -> Model:
        require_causal(model, "PB-LLM")
        require_dense(model, "PB-LLM")
        draft = model.copy()
        asked = {name: parameter.requires_grad for name, parameter in draft.network.named_parameters()}
        draft.network.requires_grad_(False)
        paths = [path for block in draft.anatomy.blocks for path in draft.anatomy.linears(block)]
        modules: list[Any] = [draft.network.get_submodule(path) for path in paths]
        for module in modules:
            parametrize.register_parametrization(module, "weight", Binary(module.weight.detach(), self.salient, output_dim(module)))
            module.parametrizations.weight.original.requires_grad_(True)
        train(draft, Packed(batch.Documents(draft, corpus), self.length), self.recipe(), budget, seed)
        for module in modules:
            parametrize.remove_parametrizations(module, "weight")
        for name, parameter in draft.network.named_parameters():
            parameter.requires_grad_(asked[name])
        return draft


class Binary(nn.Module):
    """A weight whose salient entries are fixed, and whose others are the signs of what is trained, times a scale for each output."""

    def __init__(self, weight: Tensor, salient: float, outputs: int):
        """outputs: the dimension of the weight that holds them."""
        super().__init__()
        self.along = 1 - outputs
        self.kept: Tensor
        self.values: Tensor
        self.register_buffer("kept", highest(weight.abs(), salient), persistent=False)
        self.register_buffer("values", weight.clone(), persistent=False)

    def forward(self, latent: Tensor) -> Tensor:
        return _Straight.apply(latent, self.kept, self.values, self.along)  # type: ignore[no-any-return]


class _Straight(torch.autograd.Function):
    """Signs times their scale, whose gradient passes to what lies behind them as it is, within [-1, 1]."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, kept: Tensor, values: Tensor, along: int) -> Tensor:
        binary = ~kept
        scale = (latent.abs() * binary).sum(along, keepdim=True) / binary.sum(along, keepdim=True).clamp(min=1)
        ctx.save_for_backward(latent, kept)
        return torch.where(kept, values, torch.where(latent < 0, -scale, scale))

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        latent, kept = ctx.saved_tensors
        return slope.masked_fill(kept | (latent.abs() > 1), 0), None, None, None
