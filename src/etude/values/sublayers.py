"""Attentions and feed-forward layers as wholes: where each stands, and a model without some of them."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from etude.values.edits import Silence
from etude.values.errors import InputError

if TYPE_CHECKING:
    from etude.values.model import Model


@dataclass(frozen=True)
class Sublayer:
    """One attention or feed-forward layer that a block adds to the residual stream."""

    block: int
    attention: bool
    path: str
    parameters: int


def sublayers(model: Model) -> list[Sublayer]:
    """Those that are modules of their own, in order.  The attention of the first block is none: transformers reads there how long the cache is.

    Nor are layers of experts.  Raises InputError if there is none, as where a network holds a layer's parts directly in its blocks (OPT's feed-forward layers).
    """
    found = []
    for block in model.anatomy.blocks:
        attention, layer = block.attention, block.feed_forward
        for part, paths in ((attention, attention and [*attention.rows, attention.output]), (layer, layer and [*layer.inputs, layer.output])):
            if part is None or not paths or getattr(part, "experts", False) or (part is attention and block.place == 0):
                continue
            path = posixpath.commonpath([one.rpartition(".")[0].replace(".", "/") for one in paths]).replace("/", ".")
            if path.startswith(f"{block.path}."):
                module = model.network.get_submodule(path)
                found.append(Sublayer(block.index, part is attention, path, sum(parameter.numel() for parameter in module.parameters())))
    if not found:
        raise InputError(f"the blocks of this {model.base.model_type} have no attentions or feed-forward layers that can be taken away as wholes")
    return found


def silence(model: Model, chosen: Sequence[Sublayer]) -> None:
    """Take sublayers away from a draft: what they would add is nothing, and their parameters are gone.  Cost: one forward pass over a few tokens."""
    from etude.values import checkpoint

    model.require_draft()
    lengths: dict[str, int] = {}

    def look(path: str) -> Any:
        return lambda module, args, made: lengths.__setitem__(path, len(made) if isinstance(made, tuple) else 0)

    handles = [model.network.get_submodule(one.path).register_forward_hook(look(one.path)) for one in chosen]
    try:
        checkpoint.outputs(model.network, checkpoint.probe(model.network, 2))
    finally:
        for handle in handles:
            handle.remove()
    model.edit(*(Silence(one.path, lengths[one.path]) for one in chosen))
