"""Delete the heads and channels without which a layer's output changes least, and fit what is left to the old output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from etude.engine.score import require_causal, sample_rows
from etude.engine.stream import require_dense, through_blocks
from etude.method import Method
from etude.methods.compress._units import Site, cut, sites, threshold
from etude.methods.compress.drop_units import _share
from etude.values.anatomy import Block, weight_of
from etude.values.corpus import Corpus
from etude.values.model import Model


@dataclass(frozen=True)
class GreedyOutput(Method):
    """Structured pruning without gradients: greedily delete what changes the output of values and output projection, or of up and down, least; then two least-squares fits.

    A depth-2 unit is a head's values with its columns of the output projection W, or a feed-forward channel with its column of W.  W reads h; without the units
    S its output over the calibration tokens is off by E‖W_S h_S‖², a sum over S of the entries of (WᵀW) ∘ E[h hᵀ]: second moments of what units write,
    and how they overlap.  Units go one by one, each that which adds least to the error of all that have gone; in every block the same share of heads
    and of channels, to a unit.  Heads that share keys and values go together.
    Repair goes along the model: before a layer is pruned, its input projections are fitted to what they gave in the whole model, on what the pruned blocks
    before them now write; afterwards the columns of W that stay are fitted to the whole model's output.  Both are linear least squares.
    Source: Li, Dong and Lei, "Greedy Output Approximation: Towards Efficient Structured Pruning for LLMs Without Retraining", 2024 (arXiv 2407.19126).
    Departures: written from its abstract and from summaries, since neither its text nor code could be had: what exactly the two steps fit, and how far
    the greedy choice counts what units have in common, is this method's reading.  The paper has a further criterion for heads, their likeness to one another, which is left out:
    the overlap above stands for it.  Fits are damped towards the weights as they were, so that where nothing has changed they change nothing.
    Causal models without experts.
    Removes: heads and feed-forward channels.
    Cost: a pass of the whole and a pass of the pruned model over the calibration text; memory for what one layer reads of all of it, and for matrices of
    channels · channels, of which each layer solves one system.
    """

    paper = "greedy-output-approximation"

    ratio: float = 0.2
    """Share of the blocks' parameters to delete, 0 < ratio < 1, met as nearly as whole heads and channels allow; 20 % is the least of the check."""
    repair: bool = True
    """Whether the weights that stay are fitted to the whole model's outputs."""
    damping: float = 0.01
    """How much a fit holds on to the weights as they were: a share of the mean second moment of what the layer reads, more than 0; 1 % as in SparseGPT's code."""
    tokens: int = 32768
    """Calibration tokens, at least 2; as many as 64 rows of 512."""
    length: int = 512
    """Longest row of calibration tokens, at least 3."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is a share of the blocks' parameters, more than 0 and less than 1, got {self.ratio}; for a fifth pass 0.2")
        if not self.damping > 0:
            raise ValueError(f"damping is more than 0, got {self.damping}")
        if self.tokens < 2 or self.length < 3:
            raise ValueError(f"tokens is at least 2 and length at least 3, got {self.tokens} and {self.length}")

    def apply(self, model: Model, calibration: Corpus) -> Model:
        require_causal(model, "greedy output approximation")
        require_dense(model, "greedy output approximation")
        places = {site.output: site for site in sites(model, "greedy output approximation")}
        counts = self._counts(model, list(places.values()))
        rows = sample_rows(model, calibration, self.tokens, self.length)
        pruned = model.copy()
        gone: dict[str, list[int]] = {}
        for block, group, moments in side_by_side(model, pruned, rows):
            for path in group:
                weight = weight_of(pruned.network.get_submodule(path)).detach()
                if path in places:
                    site = places[path]
                    gone[path] = greedily(weight, moments[0], site, counts[path])
                    self._project(weight, moments, site.columns(gone[path]))
                elif self.repair and path in _inputs(block):
                    weight.copy_(fit(weight, moments[0], moments[1], self.damping))
        cut(pruned, list(places.values()), [gone[path] for path in places])
        return pruned

    def _counts(self, model: Model, places: list[Site]) -> dict[str, int]:
        """How many units go from every site, by its output: the same share of each, whichever they are."""
        alike = [_share(np.arange(len(site.units))) for site in places]
        gone = threshold(model, places, alike, self.ratio)
        return {site.output: len(members) // len(site.units[0]) for site, members in zip(places, gone, strict=True)}

    def _project(self, weight: Tensor, moments: Tensor, columns: list[int]) -> None:
        """Empty these columns of an output projection, and fit the others, in place."""
        kept = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        kept[columns] = False
        fitted = fit(weight, moments[0], moments[1], self.damping, kept) if self.repair else weight[:, kept].clone()
        weight.zero_()
        weight[:, kept] = fitted


def _inputs(block: Block) -> set[str]:
    """Paths of the layers that make up the block's units before the output projections: of queries, keys and values, of gate and up."""
    attention, layer = block.attention, block.feed_forward
    return {*(attention.rows if attention else ()), *(layer.inputs if layer else ())}


def side_by_side(whole: Model, pruned: Model, rows: Sequence[np.ndarray]) -> Iterator[tuple[Block, list[str], Tensor]]:
    """Walk through both models at once, one group of layers that read the same after another; the pruned one's weights may be changed on the way.

    Yields a block of the pruned model, the group's paths, and (2, channels, channels) float64: means over the tokens of r rᵀ and of w rᵀ, where r is what
    the group reads in the pruned model and w what it reads in the whole one.
    """
    read: list[Tensor] = []
    count = sum(map(len, rows))

    def keep(tokens: Tensor) -> Tensor:
        read.append(tokens)
        return tokens.new_zeros(1)

    def compare(tokens: Tensor) -> Tensor:
        return torch.stack([tokens.T @ tokens, read.pop(0).T @ tokens]).double() / count

    groups = sum(1 for _ in through_blocks(whole, rows[:1], lambda tokens: tokens.sum(0)))
    one: Any = through_blocks(whole, rows, keep)
    other: Any = through_blocks(pruned, rows, compare)
    with closing(one), closing(other):  # ended in the reverse of the order in which they began
        for _ in range(groups):
            next(one)
            block, sums = next(other)
            yield block, list(sums), next(iter(sums.values()))
        next(other, None)
        next(one, None)


def greedily(weight: Tensor, moment: Tensor, site: Site, count: int) -> list[int]:
    """Members (heads or channels) of the `count` units of a site that go: each is the one that, with those before it, changes the output least.

    weight: (outputs, channels); moment: (channels, channels), E[h hᵀ].  Returns them in order of place.
    """
    overlap = (weight.T @ weight).double() * moment
    owners = torch.zeros(len(site.units), len(moment), dtype=torch.float64, device=weight.device)
    for index, unit in enumerate(site.units):
        owners[index, site.columns(unit)] = 1
    shared = owners @ overlap @ owners.T if site.width > 1 or len(site.units) != len(moment) else overlap
    adds = shared.diagonal().clone()
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(int(adds.argmin()))
        adds += 2 * shared[chosen[-1]]
        adds[chosen[-1]] = torch.inf
    return sorted(member for index in chosen for member in site.units[index])


def fit(weight: Tensor, own: Tensor, cross: Tensor, damping: float, kept: Tensor | None = None) -> Tensor:
    """The weights F, (outputs, kept channels), that minimise E‖weight · w - F · r‖² + damping · mean E[r²] · ‖F - weight‖².

    weight: (outputs, channels); own: E[r rᵀ] and cross: E[w rᵀ], (channels, channels); kept: which channels r has, by default all.
    """
    kept = torch.ones(len(own), dtype=torch.bool, device=own.device) if kept is None else kept
    full = weight.double()
    own, cross = own[kept][:, kept], cross[:, kept]
    hold = damping * own.diagonal().mean().clamp(min=torch.finfo(weight.dtype).tiny)
    system = own + hold * torch.eye(len(own), dtype=own.dtype, device=own.device)
    wanted = full @ cross + hold * full[:, kept]
    return torch.cholesky_solve(wanted.T, torch.linalg.cholesky(system)).T.to(weight.dtype)
