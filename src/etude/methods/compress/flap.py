"""Delete the heads and channels that hardly vary, and let a bias stand in for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from etude.engine.score import require_causal, sample_rows
from etude.engine.stream import moments, require_dense
from etude.method import Method
from etude.values.anatomy import Block, weight_of
from etude.values.corpus import Corpus
from etude.values.edits import Bias
from etude.values.errors import InputError
from etude.values.model import Model
from etude.values.trace import Attention, FeedForward


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
        sites = [*_sites(model)]
        if not sites:
            raise InputError(f"FLAP found no heads and no feed-forward channels in this {model.base.model_type}")
        found = moments(model, sample_rows(model, calibration, self.tokens, self.length), [site.output for site in sites])
        scores = [site.scores(model, found[site.output][1]) for site in sites]
        total = sum(parameter.numel() for block in model.anatomy.blocks for parameter in block.module.parameters())
        gone = _threshold(scores, [site.costs for site in sites], self.ratio, total)
        pruned = model.copy()
        heads: dict[int, list[int]] = {}
        channels: dict[int, list[int]] = {}
        for site, units in zip(sites, gone, strict=True):
            members = sorted(member for unit in units for member in site.units[unit])
            if members:
                (heads if site.attention else channels)[site.block] = members
                if self.compensate:
                    _compensate(pruned, site.output, site.columns(members), found[site.output][0])
        pruned.anatomy.drop_heads(heads)
        pruned.anatomy.drop_channels(channels)
        return pruned


@dataclass(frozen=True)
class _Site:
    """One output projection and what can be deleted before it."""

    block: int
    attention: bool
    output: str
    """Path of the projection."""
    width: int
    """Input channels that a head, or a channel, has there."""
    units: list[tuple[int, ...]]
    """Heads, or channels, that go only together."""
    costs: np.ndarray
    """Parameters that go with each unit, (units,)."""

    def columns(self, members: list[int] | tuple[int, ...]) -> list[int]:
        return [member * self.width + i for member in members for i in range(self.width)]

    def scores(self, model: Model, variance: Tensor) -> np.ndarray:
        """Standardised fluctuation of every unit, (units,): the mean over its channels."""
        weight = weight_of(model.network.get_submodule(self.output)).detach().double()
        fluctuation = (variance * weight.square().sum(0)).cpu().numpy()
        spread = fluctuation.std()
        standard = (fluctuation - fluctuation.mean()) / spread if spread > 0 else np.zeros_like(fluctuation)
        return standard[np.array([self.columns(unit) for unit in self.units])].mean(1)


def _sites(model: Model) -> Iterator[_Site]:
    for block in model.anatomy.blocks:
        if block.attention is not None:
            yield _heads(model.network, block, block.attention)
        if block.feed_forward is not None:
            yield _channels(model.network, block, block.feed_forward)


def _heads(network: nn.Module, block: Block, attention: Attention) -> _Site:
    """Heads that share keys and values are a unit; where all share the same, each is one, and the keys and values stay."""
    units: list[tuple[int, ...]] = list(attention.groups) if len(attention.groups) > 1 else [(head,) for head in attention.groups[0]]
    written = weight_of(network.get_submodule(attention.output)).shape[0]
    costs = np.array([written * attention.head_dim * len(unit) for unit in units])
    for path, rows in attention.rows.items():
        cost = _row_cost(network.get_submodule(path))
        costs += [cost * sum(bool(users) and users <= set(unit) for users in rows) for unit in units]
    return _Site(block.index, True, attention.output, attention.head_dim, units, costs)


def _channels(network: nn.Module, block: Block, layer: FeedForward) -> _Site:
    written = weight_of(network.get_submodule(layer.output)).shape[0]
    cost = written + sum(len(offsets) * _row_cost(network.get_submodule(path)) for path, offsets in layer.inputs.items())
    return _Site(block.index, False, layer.output, 1, [(channel,) for channel in range(layer.channels)], np.full(layer.channels, cost))


def _row_cost(module: nn.Module) -> int:
    """Parameters of one output of a linear layer."""
    return weight_of(module).shape[1] + (getattr(module, "bias", None) is not None)


def _threshold(scores: list[np.ndarray], costs: list[np.ndarray], ratio: float, total: int) -> list[list[int]]:
    """Units below one common threshold, by site, so that their cost comes nearest to ratio · total; the best unit of a site stays.

    Raises InputError if so much cannot go.
    """
    sites = np.concatenate([np.full(len(score), site) for site, score in enumerate(scores)])
    units = np.concatenate([np.arange(len(score)) for score in scores])
    free = np.concatenate([np.arange(len(score)) != score.argmax() for score in scores])
    order = np.argsort(np.concatenate(scores), kind="stable")
    order = order[free[order]]
    going = np.concatenate([[0], np.cumsum(np.concatenate(costs)[order])])
    if going[-1] < ratio * total:
        raise InputError(f"ratio {ratio} cannot be met: with one head group and one channel left in every block {going[-1] / total:.2f} of the blocks' parameters go")
    chosen = order[: int(np.abs(going - ratio * total).argmin())]
    return [units[chosen[sites[chosen] == site]].tolist() for site in range(len(scores))]


def _compensate(model: Model, path: str, columns: list[int], mean: Tensor) -> None:
    """Add to a projection's bias what these input channels contribute on average."""
    module = model.network.get_submodule(path)
    if getattr(module, "bias", None) is None:
        model.edit(Bias(path))
    constant = weight_of(module).detach()[:, columns].double() @ mean[columns]
    module.bias.detach().add_(constant)  # type: ignore[operator, union-attr]
