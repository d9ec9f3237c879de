"""What the feed-forward layers of a network hold between their two sides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from etude.values.errors import InputError
from etude.values.model import Model

if TYPE_CHECKING:
    from torch import Tensor, nn


def outputs(model: Model, what: str) -> list[str]:
    """Path of the projection, in every block, that reads the feed-forward layer's channels.  Raises InputError if a block has none, or experts."""
    found = []
    for block in model.anatomy.blocks:
        if block.feed_forward is None or block.feed_forward.experts:
            raise InputError(f"{what} needs a feed-forward layer without experts in every block, and block {block.index} of this {model.base.model_type} has none")
        found.append(block.feed_forward.output)
    return found


@contextmanager
def watched(network: nn.Module, paths: list[str]) -> Iterator[list[Tensor]]:
    """A list to which every forward pass adds what these layers read, in the order in which they are reached; whoever reads it empties it.

    Each is (rows, length, channels), or (rows · length, channels) where the network lays its rows end to end.
    """
    seen: list[Tensor] = []
    handles = [network.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0])) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
