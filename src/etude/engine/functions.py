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
        head = _Head(ctx, states, weight, bias)
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        size = max(1, held // weight.shape[0])
        for at in range(0, len(labels), size):
            wanted, scores = labels[at : at + size], head.scores(at, size)
            if not head.wanted:
                total -= scores.log_softmax(1).gather(1, wanted[:, None]).sum(dtype=torch.float64)
                continue
            slope = scores.softmax(1)  # torch's own kernel is thrice as fast as an exponential of one's own
            share = slope.gather(1, wanted[:, None])[:, 0]
            far = share < TINY
            total -= share.log().masked_fill_(far, 0).sum(dtype=torch.float64)
            if far.any():
                total -= scores[far].log_softmax(1).gather(1, wanted[far, None]).sum(dtype=torch.float64)
            slope[torch.arange(len(wanted), device=slope.device), wanted] -= 1
            head.add(at, slope)
        head.keep(ctx)
        return total.float()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return (*_Head.slopes(ctx, slope), None, None)


class Taught(torch.autograd.Function):
    """truth · cross-entropy + divergence · KL(teacher ‖ student) at a temperature, of linear(states, weight, bias) and summed over the tokens, chunk by chunk of so many logits.

    told: (tokens, the teacher's width), which the teacher's own head reads.  Where one of them knows more tokens than the other, padded beyond their common tokenizer, the teacher
    speaks of those that both have.  Gives that sum, with its gradients at once, and the two terms without their weights.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, told: Tensor, own: Tensor, own_bias: Tensor | None, labels: Tensor, terms: tuple[float, float, float], held: int) -> Any:
        (truth, divergence, temperature), head = terms, _Head(ctx, states, weight, bias)
        known = [None if one is None else one.to(head.read.dtype) for one in (told, own, own_bias)]
        sums, common = torch.zeros(2, dtype=torch.float64, device=states.device), min(len(weight), len(own))
        size = max(1, held // max(len(weight), len(own)))
        for at in range(0, len(labels), size):
            wanted, scores = labels[at : at + size], head.scores(at, size)
            log_q = scores.log_softmax(1)
            sums[0] -= log_q.gather(1, wanted[:, None]).sum(dtype=torch.float64)
            log_p = (torch.nn.functional.linear(known[0][at : at + size], known[1], known[2])[:, :common].float() / temperature).log_softmax(1)  # type: ignore[index, arg-type]
            cool = log_q if temperature == 1 else (scores / temperature).log_softmax(1)
            p = log_p.exp()
            sums[1] += torch.linalg.vecdot(p, log_p.sub_(cool[:, :common])).sum(dtype=torch.float64)
            if head.wanted:
                slope = cool.exp().mul_(divergence / temperature)
                slope[:, :common].sub_(p, alpha=divergence / temperature)
                if truth:
                    slope.add_(log_q.exp(), alpha=truth)
                    slope[torch.arange(len(wanted), device=slope.device), wanted] -= truth
                head.add(at, slope)
        head.keep(ctx)
        terms_apart = sums[0].float(), sums[1].float()
        ctx.mark_non_differentiable(*terms_apart)
        return truth * terms_apart[0] + divergence * terms_apart[1], *terms_apart

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *others: Tensor) -> Any:
        return (*_Head.slopes(ctx, slope), *(None,) * 6)


class _Head:
    """A linear layer that is applied a chunk of tokens at a time, and the gradients by what it reads, its weight and its bias."""

    def __init__(self, ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None):
        low = torch.get_autocast_dtype(states.device.type) if torch.is_autocast_enabled(states.device.type) else states.dtype
        self.read, self.matrix, self.bias = states.to(low), weight.to(low), None if bias is None else bias.to(low)
        wants = [ctx.needs_input_grad[place] for place in range(3)]
        self.wanted = any(wants)
        self.by_states = torch.empty_like(self.read) if wants[0] else None
        self.by_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants[1] else None
        self.by_bias = torch.zeros_like(bias, dtype=torch.float32) if wants[2] and bias is not None else None
        self.dtypes = states.dtype, weight.dtype, None if bias is None else bias.dtype

    def scores(self, at: int, size: int) -> Tensor:
        """What it gives for these tokens, (tokens, outputs) float32."""
        return torch.nn.functional.linear(self.read[at : at + size], self.matrix, self.bias).float()

    def add(self, at: int, slope: Tensor) -> None:
        """slope: of the sum by what it gave, (tokens, outputs) float32, from this token on."""
        narrow, part = slope.to(self.read.dtype), self.read[at : at + len(slope)]
        if self.by_states is not None:
            torch.mm(narrow, self.matrix, out=self.by_states[at : at + len(slope)])
        if self.by_weight is not None:
            self.by_weight.addmm_(narrow.T, part) if narrow.dtype == torch.float32 else self.by_weight.add_(narrow.T @ part)
        if self.by_bias is not None:
            self.by_bias += slope.sum(0)

    def keep(self, ctx: Any) -> None:
        ctx.save_for_backward(self.by_states, self.by_weight, self.by_bias)
        ctx.dtypes = self.dtypes

    @staticmethod
    def slopes(ctx: Any, slope: Tensor) -> list[Tensor | None]:
        return [None if one is None else (one * slope).to(dtype) for one, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
