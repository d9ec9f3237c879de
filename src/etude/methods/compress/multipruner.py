"""Prune in three dimensions, one after another: parts of blocks, feed-forward channels, heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from etude.engine.progress import report, silent
from etude.engine.score import mean_loss, require_causal, sample_rows
from etude.engine.stream import require_dense
from etude.method import Method
from etude.methods.compress._units import Site, cut, sites
from etude.values.anatomy import weight_of
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model
from etude.values.sublayers import Sublayer, silence, sublayers


@dataclass(frozen=True)
class MultiPruner(Method):
    """Training-free pruning of attentions and feed-forward layers as wholes, then of channels, then of heads, each greedily by the loss on calibration text.

    First whole attentions and feed-forward layers go, each time the one whose absence raises the loss least, until their part of `ratio` is spent.  Then channels go, a `portion`
    of a layer's at a time, those of
    smallest weights first, from the layer whose loss of them raises the loss least; then heads likewise, a group that shares keys and values at a time.
    Source: Muñoz, Yuan and Jain, "MultiPruner: Balanced Structure Removal in Foundation Models", 2025 (arXiv 2501.09949): the order of its three steps, sub-blocks by perplexity as
    in BlockPruner, channels and
    heads in the order of their weights' sums of magnitudes.  Default `distribution`: the paper's 44 : 52 : 4 for Llama-2 7B.
    Departures: written from the paper's account, its code was not read; a candidate that would pass its part of the budget is not tried, and what one dimension cannot spend goes
    to the next; the last step stops at
    what comes nearest to `ratio`; where the heads' part buys no head group (few heads), channels take it; the attention of the first block stays, since transformers reads the
    cache's length there.
    With a distribution of (1, 0, 0) it is BlockPruner (Zhong et al., 2024), with (0, 0.9, 0.1) a pruner of width alone.  Causal models without experts.
    Raises InputError for others, and where `ratio` cannot be met to a twentieth.
    Removes: attentions and feed-forward layers as wholes, feed-forward channels, heads.
    Cost: a forward pass over the calibration text for every candidate of every round: about sub-layers² · share and blocks · rounds of each width.
    """

    paper = "multipruner"

    ratio: float = 0.2
    """Share of the blocks' parameters to delete, 0 < ratio < 1, met as nearly as the last portion allows; the paper reports 7 to 22 %, the check asks for 20 to 40."""
    distribution: tuple[float, ...] = (0.44, 0.52, 0.04)
    """Shares of what goes that fall to sub-layers, channels and heads; each at least 0, together 1."""
    portion: float = 0.05
    """Share of a layer's channels that goes at a time, 0 < portion < 1; the paper takes 1024 of 11008 or fewer."""
    tokens: int = 8192
    """Calibration tokens; 256 rows of Alpaca in the paper."""
    length: int = 512
    """Longest row of calibration tokens."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is a share of the blocks' parameters, more than 0 and less than 1, got {self.ratio}; for a fifth pass 0.2")
        if len(self.distribution) != 3 or min(self.distribution) < 0 or abs(sum(self.distribution) - 1) > 1e-6:
            raise ValueError(f"distribution is three shares that add up to 1, of sub-layers, channels and heads; got {self.distribution}")
        if not 0 < self.portion < 1:
            raise ValueError(f"portion is a share of a layer's channels, more than 0 and less than 1, got {self.portion}")
        if self.tokens < 2 or self.length < 3:
            raise ValueError(f"tokens is at least 2 and length at least 3, got {self.tokens} and {self.length}")

    def apply(self, model: Model, calibration: Corpus) -> Model:
        require_causal(model, "MultiPruner")
        require_dense(model, "MultiPruner")
        sites(model, "MultiPruner")  # refuses what has none
        first = sublayers(model) if self.distribution[0] else []
        pruning = Pruning(model.copy(), sample_rows(model, calibration, self.tokens, self.length), self.ratio, self.portion)
        if first:
            pruning.whole(self.distribution[0])
        if self.distribution[1]:
            pruning.narrow(False, sum(self.distribution[:2]))
        if self.distribution[2]:
            pruning.narrow(True, 1.0)
        if self.distribution[1]:
            pruning.narrow(False, 1.0, last=True)  # what no head group could spend
        if abs(pruning.gone / pruning.total - self.ratio) > 0.05:
            raise InputError(f"ratio {self.ratio} cannot be met along these dimensions: {pruning.gone / pruning.total:.2f} of the blocks' parameters go", remedy="Set another distribution or ratio.")
        return pruning.draft


@dataclass
class Pruning:
    """A draft that loses one thing after another."""

    draft: Model
    rows: Sequence[np.ndarray]
    ratio: float
    portion: float
    total: int = field(init=False)
    channels: dict[int, int] = field(init=False)
    """Channels that every block had at the beginning."""

    def __post_init__(self) -> None:
        self.total = self._size()
        self.channels = {block.index: block.feed_forward.channels for block in self.draft.anatomy.blocks if block.feed_forward}

    @property
    def gone(self) -> int:
        """Parameters of the blocks that went."""
        return self.total - self._size()

    def _size(self) -> int:
        return sum(parameter.numel() for block in self.draft.anatomy.blocks for parameter in block.module.parameters())

    def _room(self, part: float) -> float:
        """Parameters that may still go until this part of the ratio is spent."""
        return part * self.ratio * self.total - self.gone

    @torch.no_grad()
    def _loss(self, output: str, columns: list[int] | None = None) -> float:
        """The loss without some input channels of an output projection, by default without all that it writes; as a cut would have it, and without one."""
        module: Any = self.draft.network.get_submodule(output)
        weight, bias = weight_of(module), getattr(module, "bias", None)
        kept = weight.clone(), None if bias is None else bias.clone()
        weight[:, slice(None) if columns is None else columns] = 0
        if columns is None and bias is not None:
            bias.zero_()
        try:
            with silent():
                return mean_loss(self.draft, self.rows, window=max(map(len, self.rows)))
        finally:
            weight.copy_(kept[0])
            if bias is not None:
                bias.copy_(kept[1])

    def _output(self, index: int, attention: bool) -> str:
        """Path of the projection by which an attention or a feed-forward layer writes."""
        block = self.draft.anatomy.blocks[index]
        part = block.attention if attention else block.feed_forward
        assert part is not None
        return part.output

    def whole(self, part: float) -> None:
        """Take sub-layers away while they fit."""
        while fitting := [one for one in self._sublayers() if one.parameters <= self._room(part)]:
            losses = [self._loss(self._output(one.block, one.attention)) for one in fitting]
            silence(self.draft, [fitting[int(np.argmin(losses))]])
            report("taking parts of blocks away", self.gone, self.ratio * self.total)

    def _sublayers(self) -> list[Sublayer]:
        try:
            return sublayers(self.draft)
        except InputError:
            return []  # none is left

    def narrow(self, attention: bool, part: float, last: bool = False) -> None:
        """Take portions of channels, or groups of heads, away while they fit; the last portion may pass the budget by half of itself."""
        while True:
            places = [site for site in sites(self.draft, "MultiPruner") if site.attention == attention and len(site.units) > 1]
            offered = [(site, count) for site in places if (count := self._portion(site)) and site.costs[0] * count <= self._room(part) + (site.costs[0] * count / 2 if last else 0)]
            if not offered:
                return
            losses = [self._loss(site.output, site.columns(self._least(site, count))) for site, count in offered]
            site, count = offered[int(np.argmin(losses))]
            cut(self.draft, [site], [self._least(site, count)])
            report("taking heads away" if attention else "taking channels away", self.gone, self.ratio * self.total)

    def _portion(self, site: Site) -> int:
        """Units that go from a site at a time; at least one stays."""
        return min(len(site.units) - 1, 1 if site.attention else max(1, round(self.portion * self.channels[site.block])))

    def _least(self, site: Site, count: int) -> list[int]:
        """Members of the units with the smallest sums of the output projection's magnitudes."""
        magnitudes = weight_of(self.draft.network.get_submodule(site.output)).detach().double().abs().sum(0).cpu().numpy()
        order = np.argsort(site.mean(magnitudes), kind="stable")[:count]
        return sorted(member for unit in order for member in site.units[unit])
