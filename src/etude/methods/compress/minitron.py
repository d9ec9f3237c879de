"""Prune to several shapes of one size, train each a little, and let the best one learn from the model that it was."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from etude.engine import batch, distil
from etude.engine.budget import Budget
from etude.engine.distil import Lesson, taught
from etude.engine.feed import Packed
from etude.engine.score import block_changes, mean_loss, require_causal, sample_rows
from etude.engine.stream import require_dense
from etude.engine.train import train
from etude.methods._training import Training
from etude.methods.compress._activations import Sizes, sizes
from etude.methods.compress._shapes import AXES, Shape, shapes
from etude.methods.compress._units import Site, cut, sites
from etude.values.corpus import Corpus
from etude.values.model import Model
from etude.values.width import drop_width

RULES = ("activations", "random", "scratch")


@dataclass(frozen=True)
class Minitron(Training):
    """Prune by the size of activations to candidate shapes of one size, train each briefly on the teacher's logits, and go on with the best.

    Residual channels, heads and feed-forward channels score the size of their activations in one forward pass over calibration text (mean magnitude over a row's tokens, norm over rows; of
    channels behind each norm, of heads at the output projection); blocks score how far they turn the hidden states.  A candidate takes the same from every block along some axes, so that about
    `ratio` of all parameters go.  The candidates share `search` of the budget; the one with the lowest loss on the calibration rows gets the rest.
    Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation", 2024 (arXiv 2407.14679): importance of section 2.2 with the aggregation (L2 over the batch, mean
    over the sequence), candidates and their brief training of section 2.3, distillation by forward KL on the logits alone, with hidden states where blocks went (sections 2.4 and 4).
    Defaults: 1024 calibration sequences there, here as many tokens as 64 of 512; half of the parameters as from 15 to 8 billion.
    Departures: heads that go leave nothing behind in those that stay; hidden states are compared for the blocks that stay, by their relative squared error, with a fixed weight, not one that follows
    the ratio of the two losses; a candidate has one factor for all its axes, where theirs come from a grid by hand; the best candidate goes on from its brief training.
    ``random`` draws what goes, and ``scratch`` draws new weights for the shape: the controls of the paper's tables; with `truth: 1, divergence: 0` the labels teach instead of the teacher.
    Causal models with one residual stream and without experts; raises InputError for others, and where no shape of this size can be made.
    Removes: residual channels, heads and feed-forward channels, or blocks.
    Cost: the budget, with a forward pass of the teacher over every row; two forward passes over the calibration text, and one a candidate.
    """

    paper = "minitron"

    ratio: float = 0.5
    """Share of all parameters to delete, embeddings included, 0 < ratio < 1, met as nearly as a common factor and blocks alike allow."""
    candidates: tuple[str, ...] = ("stream+channels", "heads+channels", "depth")
    """Shapes to try: axes joined by +, of ``stream``, ``heads`` and ``channels``, or ``depth``; one needs no search."""
    search: float = 0.3
    """Share of the budget in which the candidates are tried, 0 < search < 1."""
    choose: str = "activations"
    """``activations``, ``random`` or ``scratch``."""
    truth: float = 0.0
    """Weight of the cross-entropy with the labels."""
    divergence: float = 1.0
    """Weight of KL(teacher ‖ student)."""
    states: float = 1.0
    """Weight of the hidden states' error in candidates that lost blocks."""
    tokens: int = 32768
    """Calibration tokens, at least 2, in rows of `length`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Lesson(truth=self.truth, divergence=self.divergence, states=self.states)
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is a share of the parameters, more than 0 and less than 1, got {self.ratio}; for half pass 0.5")
        if not 0 < self.search < 1:
            raise ValueError(f"search is a share of the budget, more than 0 and less than 1, got {self.search}; for three tenths pass 0.3")
        if self.choose not in RULES:
            raise ValueError(f"choose is one of {', '.join(RULES)}, got {self.choose!r}")
        if not self.candidates or any(candidate != "depth" and not set(candidate.split("+")) <= set(AXES) for candidate in self.candidates):
            raise ValueError(f"a candidate is depth, or {', '.join(AXES)} joined by +; got {', '.join(self.candidates) or 'none'}")
        if self.tokens < 2 or self.length < 3:
            raise ValueError(f"tokens is at least 2 and length at least 3, got {self.tokens} and {self.length}")

    def apply(self, model: Model, corpus: Corpus, budget: Budget, seed: int) -> Model:
        require_causal(model, "Minitron")
        require_dense(model, "Minitron")
        places = sites(model, "Minitron")
        wanted = shapes(model, places, self.candidates, self.ratio)
        rows, random = sample_rows(model, corpus, self.tokens, self.length), np.random.default_rng(seed)
        known = sizes(model, places, rows) if self.choose == "activations" else None
        changes = block_changes(model, rows) if known and any(shape.blocks < len(model.anatomy.blocks) for shape in wanted) else None
        tried = []
        for place, shape in enumerate(wanted):
            draft, kept = self._pruned(model, places, shape, known, changes, random, seed)
            if len(wanted) > 1:
                part = Budget(_share(budget, self.search / len(wanted)), budget.unit)
                self._teach(draft, model, kept, corpus, part, seed, f"trying {self.candidates[place]}")
            tried.append((draft, kept))
        best, kept = min(tried, key=lambda one: mean_loss(one[0], rows, window=self.length)) if len(tried) > 1 else tried[0]
        rest = budget.amount - (_share(budget, self.search / len(wanted)) * len(wanted) if len(wanted) > 1 else 0)
        if rest > 0:
            self._teach(best, model, kept, corpus, Budget(rest, budget.unit), seed + 1, "distilling")
        return best

    def _pruned(self, model: Model, places: list[Site], shape: Shape, known: Sizes | None, changes: np.ndarray | None, random: np.random.Generator, seed: int) -> tuple[Model, list[int]]:
        """A draft of this shape, and which blocks of the model are left."""
        draft, count = model.copy(), len(model.anatomy.blocks)
        gone = []
        for place, site in enumerate(places):
            scores = known.units[place] if known else random.random(len(site.units))
            order = np.argsort(scores, kind="stable")[: len(site.units) - shape.units(site)]
            gone.append(sorted(member for unit in order for member in site.units[unit]))
        cut(draft, places, gone)
        stream = known.stream if known else random.random(shape.full)
        if shape.stream < shape.full:
            drop_width(draft, np.argsort(stream, kind="stable")[: shape.full - shape.stream].tolist())
        blocks = changes if changes is not None else random.random(count)
        dropped = set(np.argsort(blocks, kind="stable")[: count - shape.blocks].tolist())
        if dropped:
            draft.anatomy.drop(sorted(dropped))
        if self.choose == "scratch":
            torch.manual_seed(seed)
            for module in draft.network.modules():
                draft.network._init_weights(module)
        return draft, [index for index in range(count) if index not in dropped]

    def _teach(self, draft: Model, teacher: Model, kept: list[int], corpus: Corpus, budget: Budget, seed: int, note: str) -> None:
        """Train on the teacher, in place."""
        fewer = len(kept) < len(teacher.anatomy.blocks)
        lesson = Lesson(truth=self.truth, divergence=self.divergence, states=self.states if fewer and self.divergence else 0.0)
        feed = Packed(batch.Documents(draft, corpus), self.length)
        if not self.divergence:
            train(draft, feed, self.recipe(), budget, seed, note=note)
            return
        with taught(draft, teacher, lesson, distil.block_pairs(draft, teacher, kept)) as loss:
            train(draft, feed, self.recipe(), budget, seed, loss, note=note)


def _share(budget: Budget, share: float) -> float:
    """A part of a budget; steps are whole, and at least one."""
    return max(1.0, float(round(budget.amount * share))) if budget.unit == "steps" else budget.amount * share
