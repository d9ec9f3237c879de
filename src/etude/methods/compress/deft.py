"""Fine-tune by low-rank updates that also push feed-forward activations to zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etude.engine import activations, batch
from etude.engine.batch import IGNORED
from etude.engine.budget import Budget
from etude.engine.corrupt import reading
from etude.engine.feed import Batch
from etude.engine.losses import Lost
from etude.engine.train import train
from etude.methods._lora import inject, merge
from etude.methods._training import Training
from etude.methods._vocabulary import require_one_stack
from etude.values.corpus import Corpus
from etude.values.model import Model

PENALTIES = ("density", "magnitude")


@dataclass(frozen=True)
class DEFT(Training):
    """LoRA whose loss adds `weight` times a smooth count of the feed-forward activations that are not zero: x² / (x² + epsilon), averaged over tokens, channels and blocks.

    The count saturates: what is large costs no more for being larger, and only what is near zero, to some roots of epsilon, is drawn there.  Only the updates B · A of the blocks' linear
    layers are trained; at the end they are added to the weights.  What is counted is what the layer's second projection reads: of a gated layer the product of the gate and its other half.
    Source: Runwal et al., "From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in Transformers", 2025 (arXiv 2402.01911), and the authors' code,
    whose weight 1 and epsilon 1e-7 are the defaults here.
    Departures: of the ways of fine-tuning LoRA alone, merged; the model is tuned as a language model, next tokens or hidden ones, as it is its kind, not as a classifier; padding is not counted
    (the authors count it); of a gated layer the authors count the gate alone.  Without ADA-DEFT, which learns to skip layers.  ``magnitude`` is the usual alternative, the mean of |x|.
    Causal and masked models without experts.  Raises InputError for others.
    Removes: nothing from the weights; activations become zero.
    Cost: the budget, and memory for the activations, which training keeps anyway.  The network is not compiled.
    """

    paper = "deft-activation-density"

    weight: float = 1.0
    """Weight of the penalty beside the mean loss, at least 0; 0 is LoRA alone."""
    epsilon: float = 1e-7
    """The square of the size at which an activation counts half, more than 0."""
    penalty: str = "density"
    """``density``, or ``magnitude`` for the mean absolute activation."""
    rank: int = 8
    """Rank of each update."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    share: float = 0.15
    """Share of the tokens that are hidden from a masked model."""
    schedule: str = "linear"
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight >= 0 or not self.epsilon > 0:
            raise ValueError(f"weight is at least 0 and epsilon more than 0, got {self.weight} and {self.epsilon}")
        if self.penalty not in PENALTIES:
            raise ValueError(f"penalty is {' or '.join(PENALTIES)}, got {self.penalty!r}")
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"rank is at least 1 and alpha more than 0, got {self.rank} and {self.alpha}")
        if not 0 < self.share < 1:
            raise ValueError(f"share is more than 0 and less than 1, got {self.share}")

    def apply(self, model: Model, corpus: Corpus, budget: Budget, seed: int) -> Model:
        require_one_stack(model, "DEFT")
        paths, adapted = activations.outputs(model, "DEFT"), model.copy()
        asked = {name: parameter.requires_grad for name, parameter in adapted.network.named_parameters()}
        linears = [path for block in model.anatomy.blocks for path in model.anatomy.linears(block)]
        inject(adapted, dict.fromkeys(linears, self.rank), self.alpha / self.rank, seed)
        feed, task = reading(adapted, batch.Documents(adapted, corpus), self.length, self.share)
        feed.even = False  # hooks catch the activations: nothing to compile
        with activations.watched(adapted.network, paths) as seen:

            def loss(network: nn.Module, part: Batch) -> Lost:
                seen.clear()
                found = task(network, part)
                lost = found if isinstance(found, Lost) else Lost(found)
                counted = int((part.labels != IGNORED).sum()) if lost.counted is None else lost.counted
                penalty = counted * torch.stack([self.penalised(read, part.mask) for read in seen]).mean()
                seen.clear()
                return Lost(lost.total + self.weight * penalty, counted, {self.penalty: penalty.detach()})

            train(adapted, feed, self.recipe(), budget, seed, loss)
        merge(adapted.network)
        for name, parameter in adapted.network.named_parameters():
            parameter.requires_grad_(asked[name])
        return adapted

    def penalised(self, read: Tensor, mask: Tensor | None) -> Tensor:
        """Mean penalty of one layer's activations, (rows, length, channels) or rows laid end to end, over real tokens and channels."""
        tokens = read.flatten(0, -2) if mask is None else read.flatten(0, -2)[mask.bool().flatten()]
        if self.penalty == "magnitude":
            return tokens.abs().mean()
        squares = tokens.square()
        return (squares / (squares + self.epsilon)).mean()
