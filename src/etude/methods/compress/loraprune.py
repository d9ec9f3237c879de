"""Train low-rank updates and, by their gradients alone, mask heads and channels meanwhile; at the end cut and merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from etude.engine import batch
from etude.engine.budget import Budget
from etude.engine.feed import Packed
from etude.engine.score import require_causal
from etude.engine.stream import require_dense
from etude.engine.train import Step, train
from etude.methods._lora import inject, merge
from etude.methods._training import Training
from etude.methods.compress._taylor import coupled
from etude.methods.compress._units import Site, cut, sites, threshold
from etude.methods.compress.drop_units import _share
from etude.values.anatomy import weight_of
from etude.values.corpus import Corpus
from etude.values.model import Model

CRITERIA = ("lora", "gradient", "magnitude", "random")


@dataclass(frozen=True)
class LoRAPrune(Training):
    """Structured pruning while LoRA trains, by an importance that needs no gradient of the frozen weights.

    With W' = W + s · B · A, the gradient of W is estimated as g_B · A + B · g_A - g_B · g_A, from the adapter's gradients, and Σ |estimate · W'| is taken over the
    rows and columns that a head, or a channel, has in a layer.  These scores are brought to norm 1 in each layer, added up over the layers from which the unit is cut, and averaged over the
    steps, each step weighing 1 - `memory`.  Every `every` steps the least important units, the same share in every block, are masked, as many as a cubic schedule says; a masked
    one stays so.  At the end they are cut out and the updates merged.
    Source: Zhang et al., "LoRAPrune: Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning", 2023 (arXiv 2305.18403), sections 3.2 and 3.3, and the authors' code, whose
    defaults these are; that code takes absolute values, where the paper writes squares, and so does this method.
    Departures: it reads gradients before they are clipped; the share is the one with which `ratio` of all blocks' parameters go; the last masking is at the ratio itself; heads that share
    keys and values go together; no dropout; the learning rate is that of `adapt.lora`, as budgets here are short.  ``gradient`` and ``magnitude`` are the paper's rivals: the true gradient,
    which costs memory for it, and Σ |W'|; ``random`` draws once.  One-shot pruning is `begin` and `end` together 1.  Causal models without experts.
    Removes: heads and feed-forward channels.
    Cost: the budget, and at every step a product of the size of each weight; memory for one of them.
    """

    paper = "loraprune"

    ratio: float = 0.5
    """Share of the blocks' parameters to delete, 0 < ratio < 1, met as nearly as whole heads and channels allow; the paper prunes 20 and 50 %."""
    criterion: str = "lora"
    """``lora``, ``gradient``, ``magnitude`` or ``random``."""
    rank: int = 8
    """Rank of each update."""
    alpha: float = 16.0
    """The update is scaled by s = alpha / rank."""
    memory: float = 0.9
    """Weight of the past in the moving average of the importance, 0 <= memory < 1."""
    every: int = 10
    """Steps from one masking to the next."""
    begin: float = 0.1
    """Share of the budget before the first masking."""
    end: float = 0.1
    """Share of the budget after the last masking; begin + end <= 1."""
    spared_first: float = 0.1
    """Share of the blocks, counted from the first and rounded to whole ones, in which nothing is deleted."""
    spared_last: float = 0.03125
    """The same, counted from the last; the authors' one of Llama's 32."""
    schedule: str = "linear"
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is a share of the blocks' parameters, more than 0 and less than 1, got {self.ratio}; for half pass 0.5")
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion is one of {', '.join(CRITERIA)}, got {self.criterion!r}")
        if self.rank < 1 or self.every < 1 or not self.alpha > 0:
            raise ValueError(f"rank and every are at least 1 and alpha more than 0, got {self.rank}, {self.every} and {self.alpha}")
        if not 0 <= self.memory < 1:
            raise ValueError(f"memory is at least 0 and less than 1, got {self.memory}")
        if not (self.begin >= 0 and self.end >= 0 and self.begin + self.end <= 1):
            raise ValueError(f"begin and end are shares of the budget, at least 0 and together at most 1, got {self.begin} and {self.end}")
        if not (self.spared_first >= 0 and self.spared_last >= 0 and self.spared_first + self.spared_last < 1):
            raise ValueError(f"spared_first and spared_last are shares of the blocks, at least 0 and together less than 1, got {self.spared_first} and {self.spared_last}")

    def apply(self, model: Model, corpus: Corpus, budget: Budget, seed: int) -> Model:
        require_causal(model, "LoRAPrune")
        require_dense(model, "LoRAPrune")
        blocks = model.anatomy.blocks
        first, last = round(self.spared_first * len(blocks)), len(blocks) - round(self.spared_last * len(blocks))
        places = [site for site in sites(model, "LoRAPrune") if first <= site.block < last]
        threshold(model, places, [_share(np.arange(len(site.units))) for site in places], self.ratio)  # refuses what cannot be met
        draft, documents = model.copy(), batch.Documents(model, corpus)
        asked = {name: parameter.requires_grad for name, parameter in draft.network.named_parameters()}
        inject(draft, {path: self.rank for block in blocks for path in model.anatomy.linears(block)}, self.alpha / self.rank, seed)
        masking = Masking(model, draft.network, places, self.criterion, self.memory, np.random.default_rng(seed))

        def look(step: Step) -> None:
            masking.measure()
            share = self.share(step.progress)
            if masking.share < share and (step.number % self.every == 0 or share == self.ratio):
                masking.mask(share)

        with masking.masked():
            train(draft, Packed(documents, self.length), self.recipe(), budget, seed, before_step=look, alone=True)
            if masking.share < self.ratio:
                masking.mask(self.ratio)
        merge(draft.network)
        for name, parameter in draft.network.named_parameters():
            parameter.requires_grad_(asked[name])
        cut(draft, places, masking.gone)
        return draft

    def share(self, progress: float) -> float:
        """Share of the blocks' parameters that is to be masked when this share of the budget is spent."""
        if progress > 1 - self.end:
            return self.ratio
        if progress <= self.begin:
            return 0.0
        return self.ratio * (1 - (1 - (progress - self.begin) / (1 - self.begin - self.end)) ** 3)


@dataclass
class Masking:
    """Importance of the units of a network with adapters, and the masks on what its output projections read."""

    model: Model
    """The model without adapters, which knows sizes."""
    network: nn.Module
    places: list[Site]
    criterion: str
    memory: float
    random: np.random.Generator
    share: float = 0.0
    """Share of the blocks' parameters that is masked."""
    gone: list[list[int]] = field(init=False)
    """Masked heads and channels, by site."""
    scores: list[np.ndarray] = field(init=False)
    """Moving average of the importance, by site (units,)."""

    def __post_init__(self) -> None:
        self.gone = [[] for _ in self.places]
        drawn = self.criterion == "random"
        self.scores = [self.random.random(len(site.units)) if drawn else np.zeros(len(site.units)) for site in self.places]
        self.members = [coupled(self.model, site) for site in self.places]
        self.masks = [torch.ones(site.width * sum(map(len, site.units)), device=next(self.network.parameters()).device) for site in self.places]
        self.gradients: dict[str, Tensor] = {}

    def measure(self) -> None:
        """Take this step's gradients into the moving average."""
        if self.criterion == "random":
            return
        for place, (site, rows_of) in enumerate(zip(self.places, self.members, strict=True)):
            columns = self._salience(site.output).sum(0).cpu().numpy()
            total = _unit(np.array([columns[site.columns(unit)].sum() for unit in site.units]))
            for path, by_unit in rows_of.items():
                outputs = self._salience(path).sum(1).cpu().numpy()
                total = total + _unit(np.array([outputs[rows].sum() for rows in by_unit]))
            if np.isfinite(total).all():
                self.scores[place] = self.memory * self.scores[place] + (1 - self.memory) * total
        self.gradients.clear()

    def mask(self, share: float) -> None:
        """Mask the least important units, so that this share of the blocks' parameters is masked; those that are stay."""
        ranked = []
        for site, scores, gone in zip(self.places, self.scores, self.gone, strict=True):
            already = np.array([set(unit) <= set(gone) for unit in site.units])
            ranked.append(_share(np.where(already, -1.0, scores)))
        self.gone, self.share = threshold(self.model, self.places, ranked, share), share
        for site, mask, gone in zip(self.places, self.masks, self.gone, strict=True):
            mask[site.columns(gone)] = 0.0

    @contextmanager
    def masked(self) -> Iterator[None]:
        """Inside, the masks hold, and the gradients of weights are kept where the criterion needs them."""
        handles = [self.network.get_submodule(site.output).register_forward_pre_hook(_masking(mask)) for site, mask in zip(self.places, self.masks, strict=True)]
        if self.criterion == "gradient":
            paths = {path for site, rows_of in zip(self.places, self.members, strict=True) for path in (site.output, *rows_of)}
            handles += [self.network.get_submodule(path).register_forward_hook(self._watching(path)) for path in sorted(paths)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _salience(self, path: str) -> Tensor:
        """|gradient · weight| of a layer with its update, (output, input)."""
        layer: Any = self.network.get_submodule(path)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            merged = weight_of(layer.get_base_layer()) + layer.scaling["default"] * (b @ a)
            match self.criterion:
                case "lora":
                    return ((b.grad @ a + b @ a.grad - b.grad @ a.grad) * merged).abs().double()
                case "gradient":
                    return (self.gradients[path] * merged).abs().double()
                case _:
                    return merged.abs().double()

    def _watching(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        """Adds up the gradient of a layer's weight, whether or not it is frozen."""

        def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            read = args[0].detach().flatten(0, -2).float()

            def add(slope: Tensor) -> None:
                gradient = slope.detach().flatten(0, -2).float().T @ read
                self.gradients[path] = self.gradients[path] + gradient if path in self.gradients else gradient

            if output.requires_grad:
                output.register_hook(add)

        return watch


def _masking(mask: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, args: (args[0] * mask.to(args[0].dtype), *args[1:])


def _unit(scores: np.ndarray) -> np.ndarray:
    """Scores of euclidean norm 1."""
    return scores / (np.linalg.norm(scores) + 1e-12)
