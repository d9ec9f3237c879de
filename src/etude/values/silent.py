"""What stands where a part of a block was taken away."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Silent(nn.Module):
    """Zeros of the shape of the hidden states that it is given, in a tuple of some length, or alone."""

    def __init__(self, outputs: int):
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        made = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return (made, *(None,) * (self.outputs - 1)) if self.outputs else made
