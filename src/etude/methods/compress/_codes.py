"""Binary codes: numbers as sums of a few scales with signs."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

ROUNDS = 15
"""Times that scales and signs are fitted to each other in turn (Xu et al., 2018, and LUT-GEMM's code)."""


def coded(values: Tensor, bits: int, *, powers: bool, rounds: int = ROUNDS) -> Tensor:
    """Each group of numbers as Σ scale_i · sign_i with `bits` scales of its own, nearly the closest in squares; the same shape.

    values: (groups, members) float32.  Scales and signs are fitted in turn (Xu et al., "Alternating Multi-bit Quantization", 2018, section 3): scales by least squares to the signs, signs by the
    nearest of the 2^bits sums, until nothing changes; begun greedily, each scale the mean magnitude of what the ones before it leave.
    powers: scales are rounded to powers of two at the end, and signs chosen again.
    Cost: rounds · members · 2^bits comparisons a group.
    """
    signs, rest = [], values.clone()
    for _ in range(bits):
        signs.append(torch.where(rest < 0, -1.0, 1.0))
        rest = rest - rest.abs().mean(1, keepdim=True) * signs[-1]
    code = torch.stack(signs, 2)  # (groups, members, bits)
    patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=bits)), device=values.device)
    before = None
    for _ in range(rounds):
        scales = fitted(values, code)
        chosen = nearest(values, scales @ patterns.T)
        if before is not None and torch.equal(chosen, before):
            break
        code, before = patterns[chosen], chosen
    else:
        scales = fitted(values, code)
    if powers:
        scales = scales.sign() * torch.exp2(scales.abs().clamp(min=torch.finfo(values.dtype).tiny).log2().round())
    sums = scales @ patterns.T
    return sums.gather(1, nearest(values, sums))


def fitted(values: Tensor, code: Tensor) -> Tensor:
    """Scales (groups, bits) for which Σ scale_i · code_i comes closest to the values; where codes are not independent, the least of the best.  code: (groups, members, bits)."""
    square = code.mT @ code + 1e-4 * torch.eye(code.shape[2], device=code.device)
    return torch.linalg.solve(square, (code.mT @ values[:, :, None]))[:, :, 0]


def nearest(values: Tensor, sums: Tensor) -> Tensor:
    """Which of a group's sums (groups, 2^bits) is nearest to each of its values, (groups, members)."""
    order = sums.argsort(1)
    ranked = sums.gather(1, order)
    edges = (ranked[:, 1:] + ranked[:, :-1]) / 2
    return order.gather(1, torch.searchsorted(edges.contiguous(), values.contiguous()))
