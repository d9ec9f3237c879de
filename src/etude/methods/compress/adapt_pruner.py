"""Prune a little where the hidden states hardly change, train a little, and measure again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from etude.engine import batch
from etude.engine.budget import Budget
from etude.engine.feed import Packed
from etude.engine.optimize import scale
from etude.engine.progress import report, silent
from etude.engine.score import block_changes, require_causal, sample_rows
from etude.engine.stream import require_dense
from etude.engine.train import train
from etude.methods._training import Training
from etude.methods.compress._taylor import importance
from etude.methods.compress._units import Site, cut, sites
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

MOST = 0.99
"""Largest share of a block's heads or channels that may go."""


@dataclass(frozen=True)
class AdaptPruner(Training):
    """Structured pruning interleaved with training; blocks that change the hidden states less lose more.

    A round prunes towards its part of `ratio` and then trains on its part of the budget.  To prune, it measures how far each block turns the hidden states of
    calibration text (one minus the cosine of its input and output), brings these to a mean of 0 and a largest magnitude of 1, adds `step` - `amplitude` · that
    to the share of heads and channels that each block has lost, deletes within each block those of least Σ |gradient · weight| over all coupled weights, and measures
    anew, until the round's size is reached.  With one round it is Adapt-Pruner without interleaving: all pruning first, then all training; with an `amplitude` of 0
    all blocks lose alike.
    Source: Wang et al., "Adapt-Pruner: Adaptive Structural Pruning for Efficient Small Language Model Training", 2025 (arXiv 2502.03460), and the authors' code.
    Departures: that code counts shares from the widths at each round's beginning and rounds heads down, so that short rounds never delete one; here shares
    count from the model as it came.  A round's last step is shortened, so that sizes are met.  Text for calibration and training is the same; the paper reads
    512 rows of 64 tokens anew at every step, here the same rows.  Causal models without experts.
    Removes: heads and feed-forward channels.
    Cost: the budget, and at every step two forward passes and a backward one over the calibration tokens: about ratio / step times.
    """

    paper = "adapt-pruner"

    ratio: float = 0.5
    """Share of the blocks' parameters to delete, 0 < ratio < 1, met as nearly as whole heads and channels allow."""
    rounds: int = 20
    """How often pruning and training alternate, at least 1; 20 in the authors' scripts, which remove 20 to 60 %."""
    step: float = 0.02
    """Share of each block's heads and channels that goes between two measurements, on average, 0 < step < 1; the authors' scripts, 50 steps to nothing."""
    amplitude: float = 0.02
    """How much more than `step` the block goes that changes the hidden states least, or less the one that changes them most, at least 0; the authors' scripts."""
    tokens: int = 32768
    """Calibration tokens, at least 2, in rows of `length`; 512 rows of 64 in the authors' scripts."""
    schedule: str = "wsd"
    """Over the whole budget, not anew in each round; the authors' scripts."""
    warmup: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is a share of the blocks' parameters, more than 0 and less than 1, got {self.ratio}; for half pass 0.5")
        if self.rounds < 1:
            raise ValueError(f"rounds is at least 1, got {self.rounds}")
        if not 0 < self.step < 1:
            raise ValueError(f"step is a share of a block, more than 0 and less than 1, got {self.step}; for a fiftieth pass 0.02")
        if not self.amplitude >= 0:
            raise ValueError(f"amplitude is at least 0, got {self.amplitude}")
        if self.tokens < 2 or self.length < 3:
            raise ValueError(f"tokens is at least 2 and length at least 3, got {self.tokens} and {self.length}")

    def apply(self, model: Model, corpus: Corpus, budget: Budget, seed: int) -> Model:
        require_causal(model, "Adapt-Pruner")
        require_dense(model, "Adapt-Pruner")
        draft, documents = model.copy(), batch.Documents(model, corpus)
        rows = sample_rows(model, corpus, self.tokens, self.length)
        pruning = Pruning(draft, rows, self.step, self.amplitude)
        pruning.require(self.ratio)
        amounts = self._amounts(budget)
        for number, amount in enumerate(amounts):
            pruning.prune(self.ratio * (number + 1) / len(amounts))
            part = (sum(amounts[:number]) / budget.amount, amount / budget.amount)
            recipe = dataclasses.replace(self.recipe(), schedule=self._part(*part), warmup=0.0)
            train(draft, Packed(documents, self.length), recipe, Budget(amount, budget.unit), seed + number, note=f"training, round {number + 1} of {len(amounts)}")
        return draft

    def _amounts(self, budget: Budget) -> list[float]:
        """What each round may spend; steps are whole, and no round is without one."""
        if budget.unit != "steps":
            return [budget.amount / self.rounds] * self.rounds
        steps = max(1, round(budget.amount))
        ends = np.round(np.linspace(0, steps, min(self.rounds, steps) + 1))
        return [float(size) for size in np.diff(ends)]

    def _part(self, begin: float, size: float) -> Callable[[float], float]:
        """The learning rate's share of its peak within a round, as it would be at that place of the whole budget."""
        return lambda progress: scale(self.schedule, begin + size * progress, self.warmup)


@dataclass
class Pruning:
    """A draft that loses heads and channels step by step; shares and sizes count from the model as it was at the beginning."""

    draft: Model
    rows: list[np.ndarray]
    step: float
    amplitude: float
    original: dict[tuple[int, bool], Site] = field(init=False)
    """Sites at the beginning, by block and whether they are attention."""
    shares: np.ndarray = field(init=False)
    """What is to be gone of each block, (blocks,)."""

    def __post_init__(self) -> None:
        self.original = {(site.block, site.attention): site for site in sites(self.draft, "Adapt-Pruner")}
        self.shares = np.zeros(len(self.draft.anatomy.blocks))
        self.total = sum(parameter.numel() for block in self.draft.anatomy.blocks for parameter in block.module.parameters())

    def require(self, ratio: float) -> None:
        """Raises InputError unless so much of the blocks' parameters can go."""
        most = self.cost(np.full(len(self.shares), MOST)) / self.total
        if most < ratio:
            raise InputError(f"ratio {ratio} cannot be met: with {MOST:.0%} of the heads and channels of every block {most:.2f} of the blocks' parameters go")

    def prune(self, ratio: float) -> None:
        """Go on until this share of the blocks' parameters is gone, as nearly as whole units allow."""
        target, begun = ratio * self.total, self.cost(self.shares)
        while self.cost(self.shares) < target:
            with silent():
                ahead = self.ahead(block_changes(self.draft, self.rows))
            if np.array_equal(ahead, self.shares):
                raise InputError(f"no block may lose more before {ratio:.2f} of the blocks' parameters are gone", remedy="Set a smaller amplitude.")
            last = self.cost(ahead) >= target
            if last:
                ahead = self._shortened(ahead, target)
            self._delete(ahead)
            self.shares = ahead
            report("pruning", self.cost(ahead) - begun, target - begun)
            if last:
                return

    def ahead(self, changes: np.ndarray) -> np.ndarray:
        """The shares after a full step, from how far each block changes the hidden states, (blocks,)."""
        centred = changes - changes.mean()
        largest = np.abs(centred).max()
        level = centred / largest if largest > 0 else centred
        return np.clip(self.shares + self.step - self.amplitude * level, self.shares, MOST)

    def cost(self, shares: np.ndarray) -> float:
        """Parameters of the original that are gone at these shares."""
        return float(sum(site.costs[0] * count(site, shares[site.block]) for site in self.original.values()))

    def _shortened(self, ahead: np.ndarray, target: float) -> np.ndarray:
        """The part of a step at which the parameters that are gone come nearest to the target."""
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(self.shares + middle * (ahead - self.shares)) < target else (low, middle)
        less, more = (self.shares + part * (ahead - self.shares) for part in (low, high))
        return less if target - self.cost(less) <= self.cost(more) - target else more

    def _delete(self, ahead: np.ndarray) -> None:
        """Cut the least important units of every site, as many as the shares ask for more."""
        more = {key: count(site, ahead[site.block]) - count(site, self.shares[site.block]) for key, site in self.original.items()}
        places = [site for site in sites(self.draft, "Adapt-Pruner") if more[site.block, site.attention]]
        if not places:
            return
        with silent():
            scores = importance(self.draft, places, self.rows)
        least = [np.argsort(score, kind="stable")[: more[site.block, site.attention]] for site, score in zip(places, scores, strict=True)]
        cut(self.draft, places, [sorted(member for unit in chosen for member in site.units[unit]) for site, chosen in zip(places, least, strict=True)])


def count(site: Site, share: float) -> int:
    """Whole units of a site that a share takes, of which one stays."""
    return min(len(site.units) - 1, int(share * len(site.units) + 1e-9))
