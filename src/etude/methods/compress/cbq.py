"""Round weights so that windows of several blocks, which overlap, give what they gave: the grid's steps and low-rank choices of rounding are learned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from etude.engine import fused
from etude.engine.cost import spend
from etude.engine.progress import report
from etude.engine.score import padded_batches, require_causal, sample_rows
from etude.engine.stream import Between, capture, groups_of, require_dense
from etude.method import Method
from etude.methods.compress._grid import check_grid, remember
from etude.methods.compress._outliers import scale_activations, truncate
from etude.methods.compress._rounding import ROUNDINGS, Rounded, undecided
from etude.values.anatomy import Block, weight_of
from etude.values.corpus import Corpus
from etude.values.errors import InputError, StepError
from etude.values.model import Model
from etude.values.trace import output_dim

WARM, STEEP, FLAT = 0.2, 20.0, 2.0
"""Share of a window's steps without the regularizer, and the powers with which it begins and ends (Nagel et al., 2020, section 5)."""


@dataclass(frozen=True)
class CBQ(Method):
    """Cross-block quantization: windows of consecutive blocks slide over the model, and in each the steps of the grids and the rounding learn to keep the window's output.

    First, outliers (`outliers`).  Weights of a layer beyond the largest that is none are cut off.  Input channels of a layer whose largest activation is an outlier are divided by
    √(largest / the largest that is none) where they are written, and the weights that read them multiplied.  What is an outlier: suspects lie above Q3 + coarse · (Q3 - Q1); of all ways to
    part them by size, that with the greatest gap² - fine · variance of what is kept.
    Then every weight is scale · (clip(⌊w / scale⌋ + h + zero) - zero), h of `_rounding`: rectified sigmoid of v, where v = v0 + A1 · A2 with thin matrices (LoRA-Rounding), or v0 + a whole matrix
    (`full`, AdaRound).  Scales, A1 and A2 learn by Adam over the calibration rows; blocks that the next window holds too go on from where they are.  The loss of a window, summed over two
    inputs, what the full-precision blocks before it give and what the quantized ones give: mean squared difference of the hidden states at its end from the full-precision ones, plus
    KL(softmax ‖ softmax) over the channels, plus the regularizer, the mean of 1 - |2h - 1|^β, β falling from 20 to 2.
    Grids as in `compress.round_to_nearest`; zeros stay as they are first found.
    Source: Ding et al., "CBQ: Cross-Block Quantization for Large Language Models", 2025 (arXiv 2312.07950); regularizer and rectified sigmoid of Nagel et al., "Up or Down? Adaptive Rounding for
    Post-Training Quantization", 2020 (arXiv 2004.10568).  Windows of two blocks that share one, three epochs, rank 5, coarse 1.5, fine 1.
    Departures: written from the abstract, reviews and a summary of the paper, whose text and code could not be had: learning rates, the regularizer's weight and which pairs of inputs the loss
    compares are this method's reading.  v0, with which weights are rounded to the nearest level, is kept beside A1 · A2: a product of few ranks cannot say by itself which way every weight
    is nearer.  The pass forward rounds outright, and the gradient is that of h: a product of few ranks cannot drive every h to 0 or 1 either, and what is
    learned with h between them would be lost when they are rounded; to the scales, rounding is the identity.  Scales are learned as the logarithm of their ratio to the first
    ones.  Weights alone are quantized: activations stay as they are, as
    nothing in a saved checkpoint would round them.  Outliers are scaled into what a norm's gain or a feed-forward layer's linear branch writes; not into norms that add
    one to their gain, not past other activation functions, and not into values, which several heads may share.
    Causal models without experts whose blocks follow each other.  Nothing runs faster here; `Model.export` writes the packed bits for transformers.
    Raises InputError for other models; StepError where the loss is not finite.
    Removes: bits of the weights.
    Cost: for every window, epochs · 2 passes forward and backward of the calibration text through its blocks; memory for their gradients, and for three hidden states of all rows.
    """

    paper = "cbq"

    bits: int = 4
    """Bits of a weight, 2 to 8."""
    group: int | None = 128
    """Consecutive inputs that share a scale; without a number (``null``) a whole output does."""
    symmetric: bool = False
    """The same levels on both sides of zero, and no zero point."""
    window: int = 2
    """Blocks that are reconstructed together, at least 1; all of them if the model has fewer.  1 is reconstruction block by block."""
    overlap: int = 1
    """Blocks that a window shares with the one before it, at least 0 and fewer than it has."""
    rounding: str = "lora"
    """``lora``: two thin matrices say where rounding departs from the nearest level; ``full``: a whole one does; ``nearest``: nothing does, and scales alone learn."""
    rank: int = 5
    """Columns of the first thin matrix, at least 1."""
    outliers: bool = True
    """Whether weights are cut off and activations are scaled first."""
    coarse: float = 1.5
    """Interquartile ranges above the upper quartile from which on a magnitude is suspect, at least 0; 1.5 is Tukey's."""
    fine: float = 1.0
    """Weight of the variance against the gap among the suspects, at least 0."""
    epochs: int = 3
    """Passes over the calibration rows for each window, at least 1."""
    scale_rate: float = 3e-2
    """Peak learning rate of the scales' logarithms; it falls to zero as a cosine.  Chosen on the testbed at two bits, as is the next."""
    rounding_rate: float = 3e-2
    """Peak learning rate of the rounding matrices; likewise."""
    regularizer: float = 0.01
    """Weight of the term that draws h to 0 or 1, at least 0; AdaRound's."""
    tokens: int = 32768
    """Calibration tokens, at least 2; the paper has 128 rows of 2048."""
    length: int = 512
    """Longest row of calibration tokens, at least 3."""
    batch_tokens: int = 512
    """Tokens of a step, at least as many as one row; the paper has one row of 2048."""

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group)
        if not 0 <= self.overlap < self.window:
            raise ValueError(f"a window has at least 1 block, and overlap is at least 0 and less than it, got window {self.window} and overlap {self.overlap}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding is one of {', '.join(ROUNDINGS)}, got {self.rounding!r}")
        if min(self.rank, self.epochs, self.batch_tokens) < 1:
            raise ValueError(f"rank, epochs and batch_tokens are at least 1, got {self.rank}, {self.epochs} and {self.batch_tokens}")
        if min(self.coarse, self.fine, self.regularizer) < 0 or min(self.scale_rate, self.rounding_rate) < 0:
            raise ValueError("coarse, fine, regularizer, scale_rate and rounding_rate are at least 0")
        if self.tokens < 2 or self.length < 3:
            raise ValueError(f"tokens is at least 2 and length at least 3, got {self.tokens} and {self.length}")

    def windows(self, blocks: int) -> list[range]:
        """The blocks of every window, in turn; the last ends with the last block."""
        size = min(self.window, blocks)
        starts = [*range(0, blocks - size, self.window - self.overlap), blocks - size]
        return [range(start, start + size) for start in starts]

    def apply(self, model: Model, calibration: Corpus, seed: int) -> Model:
        require_causal(model, "CBQ")
        require_dense(model, "CBQ")
        rows = sample_rows(model, calibration, self.tokens, self.length)
        if not rows:
            raise InputError("the calibration text has no row of tokens", remedy="Give texts of at least two tokens.")
        known, draft = model.sharing(), model.copy()
        asked = [(parameter, parameter.requires_grad) for parameter in draft.network.parameters()]
        draft.network.requires_grad_(False)
        with fused.fused(known.network), fused.fused(draft.network):
            groups, whole = groups_of(known, known.anatomy.blocks, rows)
            if self.outliers:
                for path in (path for block in draft.anatomy.blocks for path in block.parts.linears):
                    truncate(weight_of(draft.network.get_submodule(path)), self.coarse, self.fine)
                scale_activations(draft, rows, groups, self.coarse, self.fine)
            pairs = list(zip(known.anatomy.blocks, draft.anatomy.blocks, strict=True))
            random = torch.Generator().manual_seed(seed)
            layers = [self._put(draft, block, random) for _, block in pairs]
            with torch.no_grad():
                batches = [capture(known, known.anatomy.blocks, whole, *batch) for batch in padded_batches(known, rows, self.batch_tokens)]
            self._slide(pairs, layers, batches, random)
        for path, one in (item for several in layers for item in several.items()):
            parametrize.remove_parametrizations(draft.network.get_submodule(path), "weight")
            remember(draft, path, self.bits, self.group, one.grids())
        for parameter, wanted in asked:
            parameter.requires_grad_(wanted)
        return draft

    def _put(self, draft: Model, block: Block, random: torch.Generator) -> dict[str, Rounded]:
        """Let the linear layers of a block round their weights; by path."""
        found = {}
        for path in block.parts.linears:
            module: Any = draft.network.get_submodule(path)
            found[path] = Rounded(weight_of(module).detach(), self.bits, self.group, self.symmetric, self.rounding, self.rank, 1 - output_dim(module), random)
            parametrize.register_parametrization(module, "weight", found[path])
        return found

    def _slide(self, pairs: Sequence[tuple[Block, Block]], layers: Sequence[dict[str, Rounded]], batches: Sequence[Between], random: torch.Generator) -> None:
        """Learn window after window.  pairs: every block of the full-precision and of the quantized model; batches: the rows before the first."""
        theirs, mine = list(batches), list(batches)
        windows = self.windows(len(pairs))
        at = 0
        for place, window in enumerate(windows):
            theirs, mine = (_after(batches, [pair[side] for pair in pairs[at : window.start]]) for side, batches in enumerate((theirs, mine)))
            at = window.start
            wanted = [batch.hidden for batch in _after(theirs, [pairs[index][0] for index in window])]
            learned = [one for index in window for one in layers[index].values()]
            blocks = [pairs[index][1] for index in window]
            self._learn(blocks, learned, [theirs, mine], wanted, random, (place, len(windows)))

    def _learn(self, blocks: Sequence[Block], learned: Sequence[Rounded], sides: Sequence[Sequence[Between]], wanted: Sequence[Tensor], random: torch.Generator, turn: tuple[int, int]) -> None:
        """Learn one window: blocks that shall make of either side's hidden states what is wanted."""
        scales, corrections = [one.steps for one in learned], [parameter for one in learned for parameter in one.corrections()]
        rates = [(scales, self.scale_rate), (corrections, self.rounding_rate)]
        optimizer = torch.optim.Adam([{"params": several, "lr": rate, "peak": rate} for several, rate in rates if several])
        total = self.epochs * len(wanted)
        order = [place for _ in range(self.epochs) for place in torch.randperm(len(wanted), generator=random).tolist()]
        for step, place in enumerate(order):
            for some in optimizer.param_groups:
                some["lr"] = some["peak"] * 0.5 * (1 + math.cos(math.pi * step / total))
            real = sides[0][place].real
            with torch.enable_grad(), parametrize.cached():
                loss = torch.stack([apart(_run(side[place], blocks)[real], wanted[place][real]) for side in sides]).sum()
                if corrections and self.regularizer and step >= WARM * total:
                    power = FLAT + 0.5 * (STEEP - FLAT) * (1 + math.cos(math.pi * (step / total - WARM) / (1 - WARM)))
                    loss = loss + self.regularizer * torch.stack([undecided(one.values, power) for one in learned]).mean()
            if not bool(loss.isfinite()):
                raise StepError(f"the loss of the window of blocks {blocks[0].index} to {blocks[-1].index} is not finite at step {step}; lower scale_rate or rounding_rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            report("reconstructing windows", turn[0] * total + step + 1, turn[1] * total, f"loss {float(loss.detach()):.3g}")
        tokens = sum(int(batch.real.sum()) for batch in sides[0])
        weights = sum(one.count for one in learned)
        spend(tokens=2 * self.epochs * tokens, flops=2.0 * weights * tokens * (1 + 6 * self.epochs))  # matrix products: the pass that tells what is wanted, and both sides there and back


def apart(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared difference of hidden states (tokens, width), plus KL(softmax(wanted) ‖ softmax(found)) a token."""
    found, wanted = found.float(), wanted.float()
    divergence = torch.nn.functional.kl_div(found.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
    return (found - wanted).square().mean() + divergence


def _run(batch: Between, blocks: Sequence[Block]) -> Tensor:
    """What the blocks, one after another, make of a batch's hidden states."""
    for block in blocks:
        batch = dataclasses.replace(batch, hidden=dataclasses.replace(batch, hidden=batch.hidden.clone()).after(block))  # a block may write into what it reads
    return batch.hidden


@torch.no_grad()
def _after(batches: Sequence[Between], blocks: Sequence[Block]) -> list[Between]:
    """The batches behind these blocks."""
    with parametrize.cached():
        return [dataclasses.replace(batch, hidden=_run(batch, blocks)) for batch in batches]
