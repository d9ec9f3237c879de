"""Weaken the heads and channels that will go while the rest can still learn their part, then delete them, then train on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from etude.engine import batch
from etude.engine.budget import Budget
from etude.engine.feed import Packed
from etude.engine.score import require_causal, sample_rows
from etude.engine.stream import moments, require_dense
from etude.engine.train import Step, train
from etude.methods._training import Training
from etude.methods.compress._taylor import coupled
from etude.methods.compress._units import Site, cut, sites, threshold
from etude.methods.compress.drop_units import RULES, _magnitudes, _share
from etude.values.anatomy import output_dim
from etude.values.corpus import Corpus
from etude.values.lazy import lazy
from etude.values.model import Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = lazy("torch")

NORMS = ("l2", "l1")


@dataclass(frozen=True)
class DReSS(Training):
    """Structured pruning that regularises first: choose what goes, train with a penalty on its weights alone, delete it, train without.

    The heads and channels are chosen once, from the model as it comes, the same share in every block.  For the first part of the budget the loss is that of
    the next token plus `penalty` · Σ w² (or Σ |w|) over all weights that will go: rows of queries, keys, values, gate and up, with their biases, and columns of the
    output projections.  So they fade while everything else is trained to do without them.  Then they are cut out, and the rest of the budget recovers the smaller model.
    Source: Feng et al., "DReSS: Data-driven Regularized Structured Streamlining for Large Language Models", 2025 (arXiv 2501.17905): regularise, prune, fine-tune.
    Departures: the authors' code is not public, and how they choose what goes, their penalty and its weight are not repeated here: the choice is one of
    `compress.drop_units`, and the weight ours: with Adam what is penalised shrinks by at most the learning rate a step, so that a short first phase fades it only in
    part.  Both phases train all weights, each with the
    whole schedule; the share of each is ours.  The penalty enters as its gradient, once a step, and is not part of the loss in the history.
    Causal models without experts.
    Removes: heads and feed-forward channels.
    Cost: the budget, and for ``wanda`` a forward pass over the calibration text.
    """

    paper = "dress"

    ratio: float = 0.3
    """Share of the blocks' parameters to delete, 0 < ratio < 1, met as nearly as whole heads and channels allow."""
    choose: str = "magnitude"
    """What goes, as in `compress.drop_units`: ``random``, ``magnitude`` or ``wanda``."""
    penalty: float = 0.01
    """Weight of the penalty beside the mean loss in nats, at least 0; at 0 the model is trained, cut and trained, without regularisation."""
    norm: str = "l2"
    """What is penalised: ``l2``, the sum of squares, or ``l1``, the sum of absolute values."""
    regularized: float = 0.5
    """Share of the budget before the cut, 0 < regularized <= 1; at 1 recovery is left to a step of its own."""
    tokens: int = 32768
    """Calibration tokens that ``wanda`` reads, at least 2, in rows of `length`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is a share of the blocks' parameters, more than 0 and less than 1, got {self.ratio}; for a fifth pass 0.2")
        if self.choose not in RULES:
            raise ValueError(f"choose is one of {', '.join(RULES)}, got {self.choose!r}")
        if self.norm not in NORMS:
            raise ValueError(f"norm is one of {', '.join(NORMS)}, got {self.norm!r}")
        if not self.penalty >= 0:
            raise ValueError(f"penalty is at least 0, got {self.penalty}")
        if not 0 < self.regularized <= 1:
            raise ValueError(f"regularized is a share of the budget, more than 0 and at most 1, got {self.regularized}; for half pass 0.5")
        if self.tokens < 2 or self.length < 3:
            raise ValueError(f"tokens is at least 2 and length at least 3, got {self.tokens} and {self.length}")

    def apply(self, model: Model, corpus: Corpus, budget: Budget, seed: int) -> Model:
        require_causal(model, "DReSS")
        require_dense(model, "DReSS")
        places = sites(model, "DReSS")
        gone = self.chosen(model, places, corpus, seed)
        first, rest = self._phases(budget)
        draft, documents = model.copy(), batch.Documents(model, corpus)
        train(draft, Packed(documents, self.length), self.recipe(), first, seed, before_step=self.fading(draft, places, gone), note="regularising what goes")
        cut(draft, places, gone)
        if rest is not None:
            train(draft, Packed(documents, self.length), self.recipe(), rest, seed + 1, note="recovering")
        return draft

    def chosen(self, model: Model, places: list[Site], corpus: Corpus, seed: int) -> list[list[int]]:
        """Heads and channels that will go, by site: those that `compress.drop_units` deletes."""
        if self.choose == "random":
            random = np.random.default_rng(seed)
            scores = [random.random(len(site.units)) for site in places]
        else:
            norms: dict[str, Any] = {site.output: 1.0 for site in places}
            if self.choose == "wanda":
                found = moments(model, sample_rows(model, corpus, self.tokens, self.length), [site.output for site in places])
                norms = {path: (variance + mean.square()).sqrt().cpu().numpy() for path, (mean, variance) in found.items()}
            scores = [site.mean(_magnitudes(model, site) * norms[site.output]) for site in places]
        return threshold(model, places, [_share(score) for score in scores], self.ratio)

    def fading(self, model: Model, places: list[Site], gone: list[list[int]]) -> Callable[[Step], None]:
        """What adds the penalty's gradient to that of the loss, in place."""
        listed = penalized(model, places, gone)

        def fade(step: Step) -> None:
            for parameter, dim, chosen in listed:
                if parameter.grad is not None:
                    weights = parameter.detach().index_select(dim, chosen)
                    slope = 2 * weights if self.norm == "l2" else weights.sign()
                    parameter.grad.index_add_(dim, chosen, slope, alpha=self.penalty)

        return fade

    def _phases(self, budget: Budget) -> tuple[Budget, Budget | None]:
        """The budget before and after the cut; steps are whole, at least one in each phase."""
        first = budget.amount * self.regularized
        if budget.unit == "steps":
            first = float(min(max(1, round(first)), max(1, budget.amount - (self.regularized < 1))))
        rest = budget.amount - first
        return Budget(first, budget.unit), Budget(rest, budget.unit) if rest > 0 else None


def penalized(model: Model, places: list[Site], gone: list[list[int]]) -> list[tuple[nn.Parameter, int, Tensor]]:
    """Every parameter of which a part will go: the dimension, and the indices along it."""
    found: list[tuple[nn.Parameter, int, Tensor]] = []
    device = model.network.device
    for site, members in zip(places, gone, strict=True):
        if not members:
            continue
        output: Any = model.network.get_submodule(site.output)
        found.append((output.weight, 1 - output_dim(output), torch.tensor(site.columns(members), device=device)))
        leaving = set(members)
        for path, by_unit in coupled(model, site).items():
            layer: Any = model.network.get_submodule(path)
            rows = torch.tensor(sorted(row for unit, own in zip(site.units, by_unit, strict=True) if leaving >= set(unit) for row in own), device=device)
            if len(rows):
                found.append((layer.weight, output_dim(layer), rows))
                if getattr(layer, "bias", None) is not None:
                    found.append((layer.bias, 0, rows))
    return found
