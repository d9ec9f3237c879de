"""Keep a few weights, and of all others only the sign."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from etude.engine.score import require_causal, sample_rows
from etude.engine.stream import require_dense
from etude.method import Method
from etude.methods.compress._grid import grid
from etude.methods.compress._second_order import Fix, groups, inverse_factor, sweep
from etude.values.corpus import Corpus
from etude.values.model import Model

RULES = ("hessian", "magnitude", "random")


@dataclass(frozen=True)
class PBLLM(Method):
    """Partial binarization after training: a share of salient weights stays in 8 bits, every other becomes plus or minus one scale, and later inputs make up for the error.

    Source: Shang et al., "PB-LLM: Partially Binarized Large Language Models", 2023 (arXiv 2310.00034), the post-training part (section 3.2): salient are the weights with the largest magnitude,
    or the largest w² / [H⁻¹]cc² of second order (section 3.1); the scale of an output's binary weights is their mean magnitude, which is optimal for signs; layers are solved column
    by column as in GPTQ.  Masks, scales and 8-bit grids are chosen anew for every `group` of inputs.  Defaults: a tenth salient, groups of 128 inputs; 128 sequences of 2048 tokens in the
    paper, here as many tokens as 64 of 512.
    Departures: those of `compress.gptq` (one pass, layers that read the same solved at once); a zero counts as positive.  `salient: 0` is plain binarization.  Causal models without experts.
    The weights keep the dtype and the shape of the model: nothing shrinks here.  Packed, a weight would take 1 + 7 · salient bits, without masks and scales.
    Raises InputError for other models, and where a layer's second moments cannot be inverted.
    Removes: bits of the weights.
    Cost: one pass over the calibration text; for every layer inputs³ + outputs · inputs² multiplications; memory for the hidden states of the text.
    """

    paper = "pb-llm"

    salient: float = 0.1
    """Share of each layer's weights that keep 8 bits, 0 <= salient < 1; the paper tries 5 to 50 %."""
    choose: str = "hessian"
    """Which: ``hessian``, ``magnitude`` or ``random``."""
    compensate: bool = True
    """Whether later inputs make up for the error of earlier ones."""
    group: int = 128
    """Inputs for which masks, scales and grids are chosen at once, at least 1."""
    damp: float = 0.01
    """What is added to the diagonal of the second moments, as a share of its mean, more than 0."""
    tokens: int = 32768
    """Calibration tokens, at least 2."""
    length: int = 512
    """Longest row of calibration tokens, at least 3."""

    def __post_init__(self) -> None:
        if not 0 <= self.salient < 1:
            raise ValueError(f"salient is a share of the weights, at least 0 and less than 1, got {self.salient}; for a tenth pass 0.1")
        if self.choose not in RULES:
            raise ValueError(f"choose is one of {', '.join(RULES)}, got {self.choose!r}")
        if self.group < 1 or not self.damp > 0:
            raise ValueError(f"group is at least 1 and damp more than 0, got {self.group} and {self.damp}")
        if self.tokens < 2 or self.length < 3:
            raise ValueError(f"tokens is at least 2 and length at least 3, got {self.tokens} and {self.length}")

    def draws_random(self) -> bool:
        return self.choose == "random" and self.salient > 0

    def apply(self, model: Model, calibration: Corpus, seed: int) -> Model:
        require_causal(model, "PB-LLM")
        require_dense(model, "PB-LLM")
        binarized, random = model.copy(), torch.Generator().manual_seed(seed)
        for weights, moments in groups(binarized, sample_rows(model, calibration, self.tokens, self.length)):
            sizes = [len(weight) for weight in weights.values()]
            factor = inverse_factor(moments, self.damp, next(iter(weights)))
            if not self.compensate:
                factor = torch.diag(factor.diagonal())  # an error reaches no other column
            whole = sweep(torch.cat(list(weights.values())), factor, functools.partial(self._plan, sizes, random), self.group)
            for weight, part in zip(weights.values(), whole.split(sizes), strict=True):
                weight.copy_(part)
        return binarized

    def _plan(self, sizes: list[int], random: torch.Generator, first: int, live: Tensor, roots: Tensor) -> Fix:
        match self.choose:
            case "hessian":
                scores = (live / roots[:, None]).square()
            case "magnitude":
                scores = live.abs()
            case _:
                scores = torch.rand(live.shape, generator=random).to(live)
        kept = torch.cat([highest(one, self.salient) for one in scores.split(sizes, 1)], 1)
        binary = ~kept
        scale = (live.abs() * binary).sum(0) / binary.sum(0).clamp(min=1)
        levels = grid(live.T, 8, symmetric=False)

        def fix(place: int, column: Tensor) -> Tensor:
            return torch.where(kept[place], levels.nearest(column[:, None])[:, 0], torch.where(column < 0, -scale, scale))

        return fix


def highest(scores: Tensor, share: float) -> Tensor:
    """True for this share of the scores, the highest; of equal ones the first.  Any shape."""
    flat = scores.flatten()
    found = torch.zeros_like(flat, dtype=torch.bool)
    found[flat.argsort(descending=True, stable=True)[: round(share * len(flat))]] = True
    return found.view(scores.shape)
