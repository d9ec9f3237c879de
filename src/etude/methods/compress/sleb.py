"""Drop the transformer blocks that the calibration text misses least."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etude.engine.progress import report, silent
from etude.engine.score import mean_loss, require_causal, sample_rows
from etude.method import Method
from etude.values.corpus import Corpus
from etude.values.model import Model


@dataclass(frozen=True)
class SLEB(Method):
    """Greedy depth pruning: skip each remaining block in turn, and delete the one whose absence raises the loss least.

    Source: Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks",
    2024, algorithm 1 with the metric of equation 3 (the loss of the model without the block, measured anew after every deletion).
    Defaults: 128 calibration sequences in the paper (section 4.1), here as many tokens as 64 of 512.
    Removes: whole blocks.
    Cost: about blocks² · share forward passes over the calibration text.
    """

    paper = "sleb"

    blocks: float = 0.2
    """Share of the blocks to drop, 0 < blocks < 1; rounded to whole blocks.  The paper reports 0.1 and 0.2."""
    tokens: int = 32768
    """Calibration tokens."""
    length: int = 512
    """Longest row of calibration tokens."""

    def __post_init__(self) -> None:
        if not 0 < self.blocks < 1:
            raise ValueError(f"blocks is a share of the blocks, more than 0 and less than 1, got {self.blocks}; for a third pass 0.33")

    def apply(self, model: Model, calibration: Corpus) -> Model:
        require_causal(model, "SLEB")
        rows = sample_rows(model, calibration, self.tokens, self.length)
        pruned = model.copy()
        count = sum(pruned.anatomy.stacks.values())
        rounds = min(count - 1, round(self.blocks * count))
        for done in range(rounds):
            remaining = range(count - done)
            losses = []
            for block in remaining:
                with silent():
                    losses.append(mean_loss(pruned.skipping(block), rows, window=self.length))
                report("skipping blocks in turn", done + len(losses) / len(remaining), rounds)
            pruned.anatomy.drop([int(np.argmin(losses))])
        return pruned
