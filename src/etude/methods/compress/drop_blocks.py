"""Drop transformer blocks by a simple rule: the baselines of every depth-pruning paper."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etude.engine.score import block_changes, sample_rows
from etude.method import Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

RULES = ("random", "first", "last", "cosine")


@dataclass(frozen=True)
class DropBlocks(Method):
    """Depth pruning in one shot: blocks drawn at random, the first, the last, or those that turn the residual stream least.

    ``cosine`` drops the blocks with the smallest block influence, one minus the cosine between what enters a block and
    what leaves it, averaged over the calibration tokens (Men et al., "ShortGPT", 2024, equation 1).  An encoder–decoder loses
    the same share of each stack.
    Removes: whole blocks.
    Cost: for ``cosine`` one forward pass over the calibration text, otherwise nothing.
    """

    blocks: float = 0.2
    """Share of the blocks to drop, 0 < blocks < 1; rounded to whole blocks."""
    choose: str = "last"
    """``random``, ``first``, ``last`` or ``cosine``."""
    tokens: int = 32768
    """Calibration tokens that ``cosine`` reads."""
    length: int = 512
    """Longest row of calibration tokens."""

    def __post_init__(self) -> None:
        if not 0 < self.blocks < 1:
            raise ValueError(f"blocks is a share of the blocks, more than 0 and less than 1, got {self.blocks}; for a third pass 0.33")
        if self.choose not in RULES:
            raise ValueError(f"choose is one of {', '.join(RULES)}, got {self.choose!r}")

    def draws_random(self) -> bool:
        return self.choose == "random"

    def apply(self, model: Model, seed: int, calibration: Corpus | None = None) -> Model:
        if self.choose == "cosine":
            if calibration is None:
                raise InputError("choosing blocks by cosine needs calibration text", remedy="Add `calibration:` to the step's inputs.")
            changes = block_changes(model, sample_rows(model, calibration, self.tokens, self.length))
        random = np.random.default_rng(seed)
        dropped: list[int] = []
        begin = 0
        for count in model.anatomy.stacks.values():
            stack = np.arange(begin, begin + count)
            some = min(count - 1, round(self.blocks * count))
            match self.choose:
                case "random":
                    chosen = random.choice(stack, some, replace=False)
                case "first":
                    chosen = stack[:some]
                case "last":
                    chosen = stack[count - some :]
                case _:
                    chosen = stack[np.argsort(changes[stack], kind="stable")[:some]]
            dropped += chosen.tolist()
            begin += count
        pruned = model.copy()
        pruned.anatomy.drop(dropped)
        return pruned
