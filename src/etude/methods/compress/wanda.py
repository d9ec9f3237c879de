"""Zero the weights that matter least for what the layers really read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from etude.engine.score import require_causal, sample_rows
from etude.engine.stream import reached, require_dense, through_blocks
from etude.method import Method
from etude.methods.compress.magnitude import check, least
from etude.values.anatomy import weight_of
from etude.values.corpus import Corpus
from etude.values.model import Model


@dataclass(frozen=True)
class Wanda(Method):
    """Zero the weights with the smallest |weight| · norm of the input channel, compared within each output.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024 (arXiv 2306.11695), equation 1 and
    algorithm 1: the norm is the euclidean one over all calibration tokens, and layers are pruned one after another, so that each
    is judged by what the pruned layers before it write (the paper: by what the pruned blocks before its own write).  Defaults: 50 % as there; 128 sequences of 2048 tokens in the paper, here as
    many tokens as 64 of 512.  Departures: rows start with the start token and texts are not joined; padding does not count; the number of
    zeros in a row is rounded, not cut off.  Causal models without experts.
    Removes: single weights, which become zero.
    Cost: one forward pass over the calibration text through the blocks, and memory for its hidden states.
    """

    sparsity: float = 0.5
    """Share of each output's weights that become zero, 0 < sparsity < 1."""
    pattern: str = "unstructured"
    """``unstructured``, or ``n:m``: of every m consecutive inputs of an output n become ZERO, as the paper's code reads it (hardware's 2:4 keeps two, which
    is the same; 1:4 zeroes one and keeps three).  `sparsity` must then say n / m."""
    tokens: int = 32768
    """Calibration tokens, at least 2."""
    length: int = 512
    """Longest row of calibration tokens, at least 3."""

    def __post_init__(self) -> None:
        check(self.sparsity, self.pattern)
        if self.tokens < 2 or self.length < 3:
            raise ValueError(f"tokens is at least 2 and length at least 3, got {self.tokens} and {self.length}")

    def apply(self, model: Model, calibration: Corpus) -> Model:
        require_causal(model, "Wanda")
        require_dense(model, "Wanda")
        rows = sample_rows(model, calibration, self.tokens, self.length)
        pruned = model.copy()
        for block, squares in through_blocks(pruned, rows, _squares):
            for path, module in pruned.anatomy.linears(block).items():
                weight = weight_of(module).detach()
                scores = weight.abs().float() * reached(squares, path).sqrt()
                weight.masked_fill_(least(scores, self.sparsity, self.pattern, path, across=False), 0)
        return pruned


def _squares(tokens: Tensor) -> Tensor:
    """Sum of squares of every channel, (channels,)."""
    return tokens.square().sum(0)
