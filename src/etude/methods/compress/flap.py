"""Delete the heads and channels that hardly vary, and let a bias stand in for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from etude.engine.score import require_causal, sample_rows
from etude.engine.stream import moments, require_dense
from etude.method import Method
from etude.methods.compress._units import Site, cut, sites, threshold
from etude.values.anatomy import weight_of
from etude.values.corpus import Corpus
from etude.values.edits import Bias
from etude.values.model import Model


@dataclass(frozen=True)
class FLAP(Method):
    """Structured pruning without retraining: heads and channels whose output fluctuates least become a constant bias.

    Source: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", 2023 (arXiv 2312.11983), metric WIFV
    with structure AL-AM.  An input channel of an output projection scores its variance over the calibration tokens times the
    squared norm of its weight column; scores are standardised within each block and module; a head scores the mean of its
    channels; one threshold over heads and channels of all blocks, weighed by the parameters that each costs, meets `ratio`.
    Default: 20 %, the least of the paper's (20, 30 and 50); its code reads 1024 sequences of 2048 tokens, here as many tokens as 64 of 512.
    Departures from the paper's code: it squares the scores of attention before it standardises them, which the metric does not say; it
    knows only Llama with as many keys as queries, where here heads that share keys and values go together; it weighs a head as 512 / 3 channels,
    here by real parameter counts; it may empty a layer, here the best unit of every layer stays.  Causal models without experts.
    Removes: heads and feed-forward channels.
    Cost: one forward pass over the calibration text.
    """

    paper = "flap-structured-pruning"

    ratio: float = 0.2
    """Share of the blocks' parameters to delete, 0 < ratio < 1, met as nearly as whole heads and channels allow; biases that compensation adds are not counted."""
    compensate: bool = True
    """Whether the mean contribution of what is deleted is added to the projection's bias."""
    tokens: int = 32768
    """Calibration tokens, at least 2."""
    length: int = 512
    """Longest row of calibration tokens, at least 3."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is a share of the blocks' parameters, more than 0 and less than 1, got {self.ratio}; for a fifth pass 0.2")
        if self.tokens < 2 or self.length < 3:
            raise ValueError(f"tokens is at least 2 and length at least 3, got {self.tokens} and {self.length}")

    def apply(self, model: Model, calibration: Corpus) -> Model:
        require_causal(model, "FLAP")
        require_dense(model, "FLAP")
        places = sites(model, "FLAP")
        found = moments(model, sample_rows(model, calibration, self.tokens, self.length), [site.output for site in places])
        gone = threshold(model, places, [_scores(site, model, found[site.output][1]) for site in places], self.ratio)
        pruned = model.copy()
        if self.compensate:
            for site, members in zip(places, gone, strict=True):
                if members:
                    _compensate(pruned, site.output, site.columns(members), found[site.output][0])
        cut(pruned, places, gone)
        return pruned


def _scores(site: Site, model: Model, variance: Tensor) -> np.ndarray:
    """Standardised fluctuation of every unit of a site, (units,): the mean over its channels."""
    weight = weight_of(model.network.get_submodule(site.output)).detach().double()
    fluctuation = (variance * weight.square().sum(0)).cpu().numpy()
    spread = fluctuation.std()
    return site.mean((fluctuation - fluctuation.mean()) / spread if spread > 0 else np.zeros_like(fluctuation))


def _compensate(model: Model, path: str, columns: list[int], mean: Tensor) -> None:
    """Add to a projection's bias what these input channels contribute on average."""
    module = model.network.get_submodule(path)
    if getattr(module, "bias", None) is None:
        model.edit(Bias(path))
    constant = weight_of(module).detach()[:, columns].double() @ mean[columns]
    module.bias.detach().add_(constant)  # type: ignore[operator, union-attr]
