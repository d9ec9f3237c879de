"""What two encoders make of the same tokens, block by block: hidden states and attention maps, and how far these are apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from etude.engine.eager import eager
from etude.engine.feed import Batch
from etude.values.errors import InputError

MAPS = "_latent_maps"
"""Name under which a student carries its linear maps to the teachers' widths while it is taught."""
LEAST = 1e-9
"""Attention that counts as none, so that its logarithm is a number."""


class Seen(NamedTuple):
    """What a network makes of a batch."""

    said: Tensor
    """Logits, or what the head would read, (rows, length, …)."""
    states: tuple[Tensor, ...]
    """Behind each block, (rows, length, width); the last one behind the final norm, where there is one."""
    attentions: tuple[Tensor, ...]
    """Attention maps of each block, (rows, heads, length, length)."""


def look(network: nn.Module, part: Batch, deep: bool = True) -> Seen:
    """A forward pass; deep: with the states and, inside `eager.eager`, the attention maps."""
    more = {"output_hidden_states": True, "output_attentions": True} if deep else {}
    found = network(input_ids=part.ids, attention_mask=torch.ones_like(part.ids) if part.mask is None else part.mask.long(), **more)
    return Seen(found.logits, tuple(found.hidden_states[1:]), tuple(found.attentions)) if deep else Seen(found.logits, (), ())


def spread(few: int, many: int) -> list[int]:
    """For each of some blocks the place of the one among more that it should resemble: evenly, the last one standing for the last."""
    return [(place + 1) * many // few - 1 for place in range(few)]


def check(network: nn.Module, blocks: int, what: str) -> tuple[int, int]:
    """Width of the states and heads of a network whose attention can be seen.  Raises InputError if it cannot.  Cost: a pass over two tokens."""
    ids = torch.zeros((1, 2), dtype=torch.long, device=next(network.parameters()).device)
    with torch.no_grad(), eager(network):
        found = network(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, output_attentions=True)
    if len(found.hidden_states or ()) != blocks + 1 or len(found.attentions or ()) != blocks or any(one is None for one in found.attentions):
        raise InputError(f"{what} compares attention maps, and this {network.config.model_type} does not show those of every block", remedy="Set maps to 0.")  # type: ignore[union-attr]
    return found.hidden_states[-1].shape[-1], found.attentions[0].shape[1]


@contextmanager
def widened(network: nn.Module, blocks: int, narrow: int, wide: Sequence[int]) -> Iterator[None]:
    """Inside, a student carries a linear map of every block's states to each of these widths that is not its own, so that the loop trains it; at first a cut of the identity."""
    others = sorted(set(wide) - {narrow})
    if others:
        maps = nn.ModuleDict()
        for block in range(blocks):
            for width in others:
                linear = nn.Linear(narrow, width, bias=False)
                nn.init.eye_(linear.weight)
                maps[f"{block}/{width}"] = linear
        network.add_module(MAPS, maps.to(next(network.parameters()).device))
    try:
        yield
    finally:
        network._modules.pop(MAPS, None)


def mapped(network: nn.Module, block: int, states: Tensor, width: int) -> Tensor:
    """A student's states at a teacher's width."""
    maps: Any = getattr(network, MAPS, {})
    return maps[f"{block}/{width}"](states) if states.shape[-1] != width else states


def states_apart(mine: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared difference over the tokens that are real, divided by the mean square of the teacher's states."""
    mine, theirs = (one.float() if mask is None else one[mask].float() for one in (mine, theirs))
    return (mine - theirs).square().mean() / theirs.square().mean().clamp(min=1e-12)


def attentions_apart(mine: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    """KL(teacher ‖ student) of the distributions over what is attended to, in nats, a mean over heads and the tokens that are real; of unlike numbers of heads their means are compared."""
    if mine.shape[1] != theirs.shape[1]:
        mine, theirs = mine.mean(1, keepdim=True), theirs.mean(1, keepdim=True)
    theirs = theirs.float()
    found = (theirs * (theirs.clamp(min=LEAST).log() - mine.float().clamp(min=LEAST).log())).sum(-1).mean(1)  # (rows, length)
    return found.mean() if mask is None else found[mask].mean()
