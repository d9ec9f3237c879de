"""Weights on a grid whose steps are learned, and for each weight whether it takes the level below it or the one above."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from etude.methods.compress._grid import Grid, grid

STRETCH, REACH = 1.1, -0.1
"""ζ and γ of the rectified sigmoid, which reaches 0 and 1 (Nagel et al., "Up or Down? Adaptive Rounding", 2020, equation 23)."""
ROUNDINGS = ("nearest", "full", "lora")


def rectified(values: Tensor) -> Tensor:
    """clip(σ(v) · (ζ - γ) + γ, 0, 1)."""
    return (values.sigmoid() * (STRETCH - REACH) + REACH).clamp(0, 1)


def unrectified(shares: Tensor) -> Tensor:
    """The v with rectified(v) = share, of shares in [0, 1]."""
    return ((shares - REACH) / (STRETCH - REACH)).logit()


def rectified_slope(values: Tensor) -> Tensor:
    """The derivative of `rectified`."""
    sigmoid = values.sigmoid()
    soft = sigmoid * (STRETCH - REACH) + REACH
    return (STRETCH - REACH) * sigmoid * (1 - sigmoid) * ((soft > 0) & (soft < 1))


def undecided(values: Tensor, power: float) -> Tensor:
    """Mean of 1 - |2h - 1|^power for h = rectified(values): 1 where h is one half, 0 where it is 0 or 1."""
    return (1 - (2 * rectified(values) - 1).abs().pow(power)).mean()


class _Level(torch.autograd.Function):
    """scale · (clip(level + zero) - zero), where level follows weight / scale as if it were not rounded, and what is added to v with the slope of the rectified sigmoid.

    The same as torch's own derivatives of `level = ratio + (level - ratio).detach()` and the like, in a third of the passes over memory.
    """

    @staticmethod
    def forward(ctx: Any, scale: Tensor, shift: Tensor | None, ratio: Tensor, level: Tensor, slope: Tensor | None, zero: Tensor, ends: tuple[int, int]) -> Tensor:
        raised = level + zero
        clipped = raised.clamp(*ends)
        inside = clipped == raised
        clipped -= zero
        ctx.save_for_backward(clipped - ratio * inside, None if slope is None else slope.mul_(inside).mul_(scale))
        return scale * clipped

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Any:  # type: ignore[override]
        by_scale, by_shift = ctx.saved_tensors
        return given * by_scale, None if by_shift is None else given * by_shift, None, None, None, None, None


class Rounded(nn.Module):
    """A frozen weight as it stands on a grid, for `torch.nn.utils.parametrize`: scale · (clip(⌊w / scale⌋ + up + zero) - zero), up 0 or 1.

    Learned are the scales, by the logarithm of their ratio to those of `compress._grid`, and what is added to the v of every weight, from which up is read:
    up is whether rectified(v) is at least one half; its gradient with respect to v is that of rectified(v), and with respect to w / scale as if nothing were
    rounded.  At first v is such that rectified(v) is the part of w / scale above the level below, so that weights are rounded to the nearest level.
    """

    def __init__(self, weight: Tensor, bits: int, group: int | None, symmetric: bool, rounding: str, rank: int, along: int, random: torch.Generator):
        """weight: (outputs, inputs); along: the dimension of the module's own weight that holds the inputs; random: for the first of two factors of `rank`."""
        super().__init__()
        outputs, inputs = weight.shape
        self.count = weight.numel()
        self.size, self.along = min(group or inputs, inputs), along
        grids = [grid(part.float(), bits, symmetric) for part in weight.split(self.size, 1)]
        self.low, self.high = grids[0].low, grids[0].high
        self.scale: Tensor
        self.zero: Tensor
        self.register_buffer("scale", torch.cat([one.scale for one in grids], 1), persistent=False)
        self.register_buffer("zero", torch.cat([one.zero for one in grids], 1), persistent=False)
        self.steps = nn.Parameter(torch.zeros_like(self.scale))
        if rounding == "full":
            self.shift = nn.Parameter(torch.zeros(outputs, inputs, device=weight.device))
        elif rounding == "lora":
            self.left = nn.Parameter((torch.randn(outputs, rank, generator=random) / rank**0.5).to(weight.device))
            self.right = nn.Parameter(torch.zeros(rank, inputs, device=weight.device))
        self.rounding = rounding
        self.values = torch.zeros(0)
        """The v of every weight, (outputs, inputs), as of the last pass."""

    def _wide(self, values: Tensor, inputs: int) -> Tensor:
        """A number a group for every input."""
        return values.repeat_interleave(self.size, 1)[:, :inputs]

    def _shift(self) -> Tensor:
        return self.shift if self.rounding == "full" else self.left @ self.right

    def corrections(self) -> list[nn.Parameter]:
        """What is learned beside the scales."""
        return [parameter for parameter in self.parameters() if parameter is not self.steps]

    def forward(self, original: Tensor) -> Tensor:
        weight = (original if self.along == 1 else original.T).float()
        scale, zero = (self._wide(one, weight.shape[1]) for one in (self.scale * self.steps.exp(), self.zero))
        ratio = weight / scale.detach()
        if self.rounding == "nearest":
            level, slope, shift = ratio.round(), None, None
        else:
            level, shift = ratio.floor(), self._shift()
            self.values = unrectified(ratio - level) + shift
            level = level + (self.values.detach() >= 0)
            slope = rectified_slope(self.values.detach())
        found = _Level.apply(scale, shift, ratio, level, slope, zero, (self.low, self.high)).to(original.dtype)  # type: ignore[no-untyped-call]
        return found if self.along == 1 else found.T.contiguous()

    def grids(self) -> list[Grid]:
        """The grids as they are now, those of the groups of inputs in turn."""
        scale = (self.scale * self.steps.exp()).detach()
        return [Grid(scale[:, place : place + 1], self.zero[:, place : place + 1], self.low, self.high) for place in range(scale.shape[1])]
