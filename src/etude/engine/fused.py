"""Cheaper equals of what networks compute, between their matrix products and where these have few rows, on a processor.

There a pass over memory is what an elementwise operation costs, and plain autograd makes many: a dozen for a norm, as many for a rotation of queries or keys.
Each of these has its gradient written out, with as few passes as torch's operations allow.  Nothing is looked up in a table of architectures: a norm or a
rotation is replaced where it is tried out and gives what its equal gives.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from etude.values.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from etude.engine import functions
else:
    torch, functions = lazy("torch"), lazy("etude.engine.functions")

ROTATION = "apply_rotary_pos_emb"
"""What transformers' modelling files call the function that rotates queries and keys."""


@contextmanager
def fused(network: nn.Module) -> Iterator[None]:
    """Inside, norms, gates, rotations and adapters of the network are computed by their equals; with float32 weights on a processor only.  Cost: a few small tensors."""
    if any(parameter.device.type != "cpu" or parameter.dtype != torch.float32 for parameter in network.parameters()):
        yield
        return
    with ExitStack() as stack:
        for module in network.modules():
            offset = _offset(module)
            if offset is not None:
                stack.enter_context(instead(module, "forward", functools.partial(_norm, module, offset)))
            elif _is_low_rank(module):
                stack.enter_context(instead(module, "forward", functools.partial(_low_rank, module)))
            elif _is_gated(module):
                stack.enter_context(instead(module, "forward", functools.partial(_gated, module)))
        for name in {type(module).__module__ for module in network.modules()}:
            if _rotates(getattr(sys.modules[name], ROTATION, None)):
                stack.enter_context(instead(sys.modules[name], ROTATION, rotate))
        yield


@contextmanager
def instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an attribute of a module has another value."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


# Products of few rows.

FEW, MANY, LARGE = 4, 32, 1 << 17
"""Rows from which, and to which, a product with a weight of at least so many numbers takes half the time the other way round, where several threads share it."""


@contextmanager
def narrow(network: nn.Module) -> Iterator[None]:
    """Inside, linear layers that read a few rows, as decoding does, multiply weight · rows instead of rows · weight; with float32 on a processor only.

    Numbers are summed in another order.  Measured with MKL on two cores (benchmarks/few_rows.py): with 4 to 32 rows its product with a weight as
    linear layers hold it is slower by two threads than by one.
    """
    with ExitStack() as stack:
        if torch.get_num_threads() > 1:
            for module in network.modules():
                if type(module) is torch.nn.Linear and "forward" not in vars(module) and module.weight.numel() >= LARGE and module.weight.dtype == torch.float32 and module.weight.device.type == "cpu":
                    stack.enter_context(instead(module, "forward", functools.partial(_turned, module)))
        yield


def _turned(module: Any, states: Tensor) -> Tensor:
    return turned(states, module.weight, module.bias)


def turned(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear`, by the product that suits the number of rows."""
    rows = states.shape[:-1].numel()
    if not FEW <= rows <= MANY or weight.numel() < LARGE or torch.get_num_threads() == 1 or states.device.type != "cpu" or states.dtype != torch.float32:
        return torch.nn.functional.linear(states, weight, bias)
    flat = states.reshape(rows, -1).t()
    found = torch.mm(weight, flat) if bias is None else torch.addmm(bias[:, None], weight, flat)
    return found.t().contiguous().view(*states.shape[:-1], -1)


# Root-mean-square norms.


def _norm(module: Any, offset: float, states: Tensor) -> Tensor:
    return functions.Norm.apply(states, module.weight, offset, _epsilon(module))


def _epsilon(module: Any) -> float | None:
    return next((value for name in ("variance_epsilon", "eps") if isinstance(value := getattr(module, name, None), float)), None)


def _offset(module: Any) -> float | None:
    """0 if the module is x · w / rms(x), 1 if it is x · (1 + w) / rms(x), None if it is neither."""
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or len(list(module.parameters())) != 1 or weight is None or weight.ndim != 1 or _epsilon(module) is None:
        return None
    states = torch.linspace(-2.0, 3.0, 3 * len(weight)).sin().view(3, -1) * torch.tensor([[1.0], [1e-3], [40.0]])
    with torch.no_grad():
        try:
            expected = module(states)
        except (RuntimeError, TypeError):
            return None
        fits = (offset for offset in (0.0, 1.0) if torch.allclose(functions.Norm.apply(states, weight, offset, _epsilon(module)), expected, rtol=1e-5, atol=1e-6))
        return next(fits, None)


# Rotations by position.


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Queries (rows, heads, length, width) and keys rotated by their positions; cos and sin (rows, length, width)."""
    turn, cos, sin = functions.Rotation.apply, cos.unsqueeze(unsqueeze_dim).to(q), sin.unsqueeze(unsqueeze_dim).to(q)
    return turn(q, cos, sin), turn(k, cos, sin)


@functools.cache
def _rotates(function: Any) -> bool:
    """Whether this is the function that `rotate` equals: halves, not pairs; of the first channels, if it turns fewer than all."""
    draw = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(2, *shape, generator=draw) for shape in ((4, 5, 8), (2, 5, 8), (5, 8), (5, 8)))

    def same(width: int) -> bool:
        given = (q, k, cos[..., :width], sin[..., :width])
        return all(torch.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in zip(function(*given), rotate(*given), strict=True))

    try:
        if function is None or not same(8):
            return False
    except (RuntimeError, TypeError, ValueError):
        return False
    try:
        return same(4)
    except (RuntimeError, TypeError, ValueError):
        return True  # it never turns fewer


# Gated feed-forward layers.


def _gated(module: Any, states: Tensor) -> Tensor:
    return module.down_proj(functions.Gate.apply(module.gate_proj(states), module.up_proj(states)))  # type: ignore[no-any-return]


def _is_gated(module: Any) -> bool:
    """Whether the module is down(silu(gate(x)) · up(x)), and no more."""
    names = {name for name, _ in module.named_children()}
    if not {"gate_proj", "up_proj", "down_proj"} <= names or getattr(module.gate_proj, "in_features", None) is None:
        return False
    states = torch.linspace(-2.0, 3.0, 3 * module.gate_proj.in_features).sin().view(1, 3, -1)
    mode = module.training
    module.eval()
    try:
        with torch.no_grad():
            return torch.allclose(module(states), _gated(module, states), rtol=1e-5, atol=1e-6)
    except (RuntimeError, TypeError):
        return False
    finally:
        module.train(mode)


# LoRA, as peft computes it.


def _low_rank(module: Any, states: Tensor) -> Tensor:
    base, a, b = module.get_base_layer(), module.lora_A["default"].weight, module.lora_B["default"].weight
    return functions.LowRank.apply(states, base.weight, base.bias, a, b, module.scaling["default"])  # type: ignore[no-any-return]


def _is_low_rank(module: Any) -> bool:
    """Whether the module is a frozen linear layer with one plain adapter of peft's, without dropout."""
    if type(module).__module__ != "peft.tuners.lora.layer" or list(getattr(module, "lora_A", ())) != ["default"] or type(module.get_base_layer()) is not torch.nn.Linear or module.merged:
        return False
    if not isinstance(module.lora_dropout["default"], torch.nn.Identity) or any(one.requires_grad for one in module.get_base_layer().parameters()):
        return False
    states = torch.linspace(-2.0, 3.0, 3 * module.in_features).sin().view(1, 3, -1)
    with torch.no_grad():
        return torch.allclose(module(states), _low_rank(module, states), rtol=1e-5, atol=1e-6)


# Causal attention, a document at a time.


def attend(query: Tensor, key: Tensor, value: Tensor, pieces: list[int], scaling: float | None) -> Tensor:
    """Each document's causal attention by itself; query (rows, heads, length, width), keys and values of as many heads or fewer; gives (rows, length, heads, width).

    pieces: tokens of each document, row after row.
    """
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (one.to(torch.get_autocast_dtype("cpu")) for one in (query, key, value))
    return functions.Attention.apply(query, key, value, pieces, scaling)
