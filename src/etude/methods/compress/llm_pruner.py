"""Delete the heads and channels whose weights the loss would miss least, by its gradient."""

from __future__ import annotations

from dataclasses import dataclass

from etude.engine.score import require_causal, sample_rows
from etude.engine.stream import require_dense
from etude.method import Method
from etude.methods.compress._taylor import importance
from etude.methods.compress._units import cut, sites, threshold
from etude.methods.compress.drop_units import _share
from etude.values.corpus import Corpus
from etude.values.model import Model

IMPORTANCES = ("element", "vector")


@dataclass(frozen=True)
class LLMPruner(Method):
    """Structured pruning by first-order Taylor importance, the same share of heads and of channels in every block but the first and last ones.

    A head, or a channel, is coupled with the rows and columns that go with it in all layers: those of queries, keys, values and the output
    projection, or of gate, up and down.  It scores Σ |gradient · weight| over them, where the gradient is that of the mean loss over
    calibration text; the least go, in one step.  Heads that share keys and values go together.
    Source: Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models", 2023 (arXiv 2305.11627), sections 3.1 and 3.2: block-wise pruning
    with importance "Element¹" or "Vector", groups summed.  What comes out is not yet tuned: the paper goes on with LoRA, here a step of its own.
    Departures: no diagonal of the Hessian (the paper's "Element²", with which its code mixes its default; its tables find the first order as good).  The paper reads
    10 texts of 64 (its code) or 128 tokens, here as many tokens as 64 of 512, as its rivals do.  The share is the one with which `ratio` of all blocks'
    parameters go, spared blocks included in the count, so that methods are compared at equal size.  Causal models without experts.
    Removes: heads and feed-forward channels.
    Cost: a forward and a backward pass over the calibration text; memory for the blocks' gradient.
    """

    ratio: float = 0.2
    """Share of the blocks' parameters to delete, 0 < ratio < 1, met as nearly as whole heads and channels allow.  20 % is the lesser of the paper's two (20 and 50)."""
    importance: str = "element"
    """``element``: absolute values of single weights are summed; ``vector``: of whole rows and columns, whose elements may cancel out."""
    spared_first: float = 0.125
    """Share of the blocks, counted from the first and rounded to whole ones, in which nothing is deleted; the paper spares 4 of Llama's 32."""
    spared_last: float = 0.0625
    """The same, counted from the last; the paper spares 2 of 32."""
    tokens: int = 32768
    """Calibration tokens, at least 2."""
    length: int = 512
    """Longest row of calibration tokens, at least 3."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is a share of the blocks' parameters, more than 0 and less than 1, got {self.ratio}; for a fifth pass 0.2")
        if self.importance not in IMPORTANCES:
            raise ValueError(f"importance is one of {', '.join(IMPORTANCES)}, got {self.importance!r}")
        if not (self.spared_first >= 0 and self.spared_last >= 0 and self.spared_first + self.spared_last < 1):
            raise ValueError(f"spared_first and spared_last are shares of the blocks, at least 0 and together less than 1, got {self.spared_first} and {self.spared_last}")
        if self.tokens < 2 or self.length < 3:
            raise ValueError(f"tokens is at least 2 and length at least 3, got {self.tokens} and {self.length}")

    def apply(self, model: Model, calibration: Corpus) -> Model:
        require_causal(model, "LLM-Pruner")
        require_dense(model, "LLM-Pruner")
        count = len(model.anatomy.blocks)
        first, last = round(self.spared_first * count), count - round(self.spared_last * count)
        places = [site for site in sites(model, "LLM-Pruner") if first <= site.block < last]
        found = importance(model, places, sample_rows(model, calibration, self.tokens, self.length), vectors=self.importance == "vector")
        gone = threshold(model, places, [_share(scores) for scores in found], self.ratio)
        pruned = model.copy()
        cut(pruned, places, gone)
        return pruned
