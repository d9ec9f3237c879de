"""Functions whose gradients are written out, with as few passes over memory as torch's operations allow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TINY = 1e-30
"""Below such a probability its logarithm is taken from the logits: it would be rounded off, or to nothing."""


class Norm(torch.autograd.Function):
    """x · (w + offset) / rms(x), rms over the last dimension; computed in float32."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, offset: float, epsilon: float) -> Tensor:
        ctx.dtype, states = states.dtype, states.float()
        scale = torch.linalg.vecdot(states, states).div_(states.shape[-1]).add_(epsilon).rsqrt_().unsqueeze(-1)
        unit, gain = states * scale, weight + offset if offset else weight
        ctx.save_for_backward(unit, scale, gain)
        return unit * gain

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        unit, scale, gain = ctx.saved_tensors
        by_weight = (slope * unit).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, by_weight, None, None
        inner = slope * gain
        along = torch.linalg.vecdot(inner, unit).div_(unit.shape[-1]).unsqueeze(-1)
        return inner.addcmul_(unit, along, value=-1).mul_(scale).to(ctx.dtype), by_weight, None, None


def turned(states: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Both halves of the first channels, as many as cos has, turned; the others stay."""
    half = cos.shape[-1] // 2
    a, b, rest = states.split((half, half, states.shape[-1] - 2 * half), -1)
    (c, d), (e, f) = cos.split(half, -1), sin.split(half, -1)
    found = torch.empty_like(states)
    first, second, others = found.split((half, half, rest.shape[-1]), -1)
    torch.mul(a, c, out=first).addcmul_(b, f if back else e, value=1 if back else -1)
    torch.mul(b, d, out=second).addcmul_(a, e if back else f, value=-1 if back else 1)
    others.copy_(rest)
    return found


class Rotation(torch.autograd.Function):
    """Queries or keys turned by their positions; a rotation's gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned(states, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return turned(slope, cos, sin, back=True), None, None


class Gate(torch.autograd.Function):
    """silu(gate) · up; the sigmoid is computed again for the gradient, so that one tensor less is kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        by_up = torch.nn.functional.silu(gate).mul_(slope)
        return torch.ops.aten.silu_backward(slope * up, gate), by_up


class LowRank(torch.autograd.Function):
    """x (W + s B A)ᵀ + b for a frozen W: one product of the large size forward and one backward, and the factors' gradients by products of their rank."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(states, weight, a, b)
        ctx.scale = scale
        return torch.nn.functional.linear(states, torch.addmm(weight, b, a, alpha=scale), bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        states, weight, a, b = ctx.saved_tensors
        flat, read = slope.flatten(0, -2), states.flatten(0, -2)
        by_states = slope @ torch.addmm(weight, b, a, alpha=ctx.scale) if ctx.needs_input_grad[0] else None
        by_a = ((flat @ b).T @ read).mul_(ctx.scale)
        by_b = (flat.T @ (read @ a.T)).mul_(ctx.scale)
        return by_states, None, None, by_a, by_b, None


class Attention(torch.autograd.Function):
    """Causal attention of documents that lie end to end, each by itself.

    Heads that share keys and values are the heads of one batch; so these are read where they lie, and not copied for every head.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, pieces: list[int], scaling: float | None) -> Tensor:
        rows, heads, length, width = query.shape
        ctx.groups, ctx.pieces, ctx.scaling = heads // key.shape[1], pieces, scaling
        flat = [_by_token(one, key.shape[1]) for one in (query, key, value)]
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        made = [attend(q, k, v, 0.0, True, scale=scaling) for q, k, v in zip(*(_documents(one, pieces, ctx.groups) for one in flat), strict=True)]
        found = torch.cat([one.permute(2, 0, 1, 3) for one, _ in made])
        ctx.save_for_backward(*flat, found, *(sums for _, sums in made))
        return found.view(rows, length, heads, width)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        saved = ctx.saved_tensors
        flat, found, sums = saved[:3], saved[3], saved[4:]
        rows, length, _, width = slope.shape
        inputs = zip(*(_documents(one, ctx.pieces, ctx.groups) for one in (slope.reshape(found.shape), *flat, found)), sums, strict=True)
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        made = zip(*[attend(*given, 0.0, True, scale=ctx.scaling) for given in inputs], strict=True)
        query, key, value = (torch.cat([one.permute(2, 0, 1, 3) for one in several]) for several in made)
        if ctx.groups > 1:
            key, value = key.sum(2), value.sum(2)
        return (*(one.view(rows, length, -1, width).transpose(1, 2) for one in (query, key, value)), None, None)


def _by_token(states: Tensor, shared: int) -> Tensor:
    """(rows, heads, length, width) as (tokens, shared, heads / shared, width); no copy where heads lie beside each other."""
    rows, heads, length, width = states.shape
    return states.transpose(1, 2).reshape(rows * length, shared, heads // shared, width)


def _documents(states: Tensor, pieces: list[int], groups: int) -> tuple[Tensor, ...]:
    """Each document's (shared, groups, its tokens, width) of (tokens, shared, groups or 1, width)."""
    turned = states.permute(1, 2, 0, 3)
    return (turned if turned.shape[1] == groups else turned.expand(-1, groups, -1, -1)).split(pieces, 2)


class CrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy of linear(states, weight, bias), chunk by chunk of so many logits, with the gradients at once."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, held: int) -> Tensor:
        low = torch.get_autocast_dtype(states.device.type) if torch.is_autocast_enabled(states.device.type) else states.dtype
        read, matrix = states.to(low), weight.to(low)
        wants = [ctx.needs_input_grad[place] for place in range(3)]
        by_states = torch.empty_like(read) if wants[0] else None
        by_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants[1] else None
        by_bias = torch.zeros_like(bias, dtype=torch.float32) if wants[2] and bias is not None else None
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        size = max(1, held // weight.shape[0])
        for at in range(0, len(labels), size):
            part, wanted = read[at : at + size], labels[at : at + size]
            scores = torch.nn.functional.linear(part, matrix, None if bias is None else bias.to(low)).float()
            if not any(wants):
                total -= scores.log_softmax(1).gather(1, wanted[:, None]).sum(dtype=torch.float64)
                continue
            slope = scores.softmax(1)  # torch's own kernel is thrice as fast as an exponential of one's own
            share = slope.gather(1, wanted[:, None])[:, 0]
            far = share < TINY
            total -= share.log().masked_fill_(far, 0).sum(dtype=torch.float64)
            if far.any():
                total -= scores[far].log_softmax(1).gather(1, wanted[far, None]).sum(dtype=torch.float64)
            slope[torch.arange(len(wanted), device=slope.device), wanted] -= 1
            narrow = slope.to(low)
            if by_states is not None:
                torch.mm(narrow, matrix, out=by_states[at : at + size])
            if by_weight is not None:
                by_weight.addmm_(narrow.T, part) if low == torch.float32 else by_weight.add_(narrow.T @ part)
            if by_bias is not None:
                by_bias += slope.sum(0)
        ctx.save_for_backward(by_states, by_weight, by_bias)
        ctx.dtypes = states.dtype, weight.dtype, None if bias is None else bias.dtype
        return total.float()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        found = [None if one is None else (one * slope).to(dtype) for one, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (*found, None, None)
