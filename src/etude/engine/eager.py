"""Attention step by step, in plain products: slower than torch's kernels, but its maps can be seen, and its operations counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def eager(network: nn.Module) -> Iterator[None]:
    """Inside, a network computes attention as transformers' ``eager`` does, wherever its architecture leaves the choice."""
    configs: dict[int, Any] = {id(config): config for module in network.modules() if hasattr(config := getattr(module, "config", None), "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
