"""Linear layers that use another's weight, with a small correction of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from etude.values.trace import is_linear, output_dim

if TYPE_CHECKING:
    from collections.abc import Iterator

DOWN, UP, GAIN = "shared_down", "shared_up", "shared_gain"


@dataclass(frozen=True)
class Shared:
    """Let a linear layer use the weight of another of the same shape, plus an update of low rank and, if `gain`, a factor a output channel, both its own; its bias stays its own.

    The weight is one parameter under two names: it is counted, saved and trained once.
    """

    module: str
    donor: str
    rank: int
    gain: bool

    def apply(self, network: nn.Module) -> None:
        module, donor = network.get_submodule(self.module), network.get_submodule(self.donor)
        if not (is_linear(module) and type(module) is type(donor) and module.weight.shape == donor.weight.shape):  # type: ignore[union-attr, operator]
            raise ValueError(f"{self.module} cannot use the weight of {self.donor}: they are of different kinds or shapes")
        module.weight = donor.weight
        weight: Any = donor.weight
        outputs, inputs = weight.shape if output_dim(module) == 0 else weight.shape[::-1]
        made = {DOWN: weight.new_zeros(self.rank, inputs), UP: weight.new_zeros(outputs, self.rank)} | ({GAIN: weight.new_ones(outputs)} if self.gain else {})
        for name, value in made.items():
            module.register_parameter(name, nn.Parameter(value.detach()))
        module.__class__ = _kind(type(module))


class _Shares:
    """What a layer with a borrowed weight computes: gain · (W x + up · down · x) + bias."""

    def forward(self: Any, states: Tensor) -> Tensor:
        bare = nn.functional.linear(states, self.weight if output_dim(self) == 0 else self.weight.T)
        made = bare + nn.functional.linear(nn.functional.linear(states, getattr(self, DOWN)), getattr(self, UP))
        if hasattr(self, GAIN):
            made = made * getattr(self, GAIN)
        return made if self.bias is None else made + self.bias


class SharedLinear(_Shares, nn.Linear):
    """Torch's Linear with a borrowed weight."""


def _kind(known: type) -> type:
    """The class of a layer with a borrowed weight, for a kind of layer."""
    if known is nn.Linear:
        return SharedLinear
    return type("Conv1D", (_Shares, known), {})  # by this name it is known as transposed


def corrections(network: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that layers with a borrowed weight have for themselves."""
    for module in network.modules():
        if isinstance(module, _Shares):
            yield from (parameter for name, parameter in module.named_parameters(recurse=False) if name != "weight")  # type: ignore[attr-defined]


@torch.no_grad()
def fill(module: nn.Module, weight: Tensor, rank: int) -> None:
    """Let the update be the best of its rank for a weight (outputs, inputs) to come back, and the gain give each output the norm that it had."""
    owned: Any = module
    borrowed = owned.weight if output_dim(module) == 0 else owned.weight.T
    left, values, right = torch.linalg.svd(weight.float() - borrowed.float(), full_matrices=False)
    root = values[:rank].sqrt()
    getattr(module, UP).copy_(left[:, :rank] * root)
    getattr(module, DOWN).copy_(root[:, None] * right[:rank])


@torch.no_grad()
def level(module: nn.Module, weight: Tensor) -> None:
    """Let the gain give every output the norm that it has in a weight (outputs, inputs)."""
    owned: Any = module
    borrowed = (owned.weight if output_dim(module) == 0 else owned.weight.T) + getattr(module, UP) @ getattr(module, DOWN)
    getattr(module, GAIN).copy_(weight.norm(dim=1) / borrowed.norm(dim=1).clamp(min=1e-8))


@torch.no_grad()
def distance(weight: Tensor, other: Tensor, rank: int) -> float:
    """What is left of the difference of two weights after its best approximation of a rank, as a share of the first's norm."""
    values = torch.linalg.svdvals(weight.float() - other.float())
    return float(values[rank:].norm() / weight.float().norm().clamp(min=1e-12))
