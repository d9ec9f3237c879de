"""Shapes of a given size: how far a model narrows along some axes when so many of its parameters go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from etude.methods.compress._units import Site
from etude.values.errors import InputError
from etude.values.model import Model
from etude.values.width import places as stream_places
from etude.values.width import width

AXES = ("stream", "heads", "channels")
MULTIPLE = 8
"""Residual channels come in multiples of this, or of the number of heads where a config asks for it."""


@dataclass(frozen=True)
class Shape:
    """What is left: of the residual stream, of every block's heads and channels, and of the blocks."""

    stream: int
    full: int
    """Residual channels before."""
    heads: float
    """Share of each attention's units."""
    channels: float
    """Share of each feed-forward layer's units."""
    blocks: int

    def units(self, site: Site) -> int:
        """Units of a site that stay, at least one."""
        return max(1, round(len(site.units) * (self.heads if site.attention else self.channels)))


def shapes(model: Model, sites: Sequence[Site], candidates: Sequence[str], ratio: float) -> list[Shape]:
    """For each candidate the shape along its axes whose parameters come nearest to 1 - `ratio` of the model's; all axes of a candidate shrink by one factor.

    Raises InputError if a candidate cannot come within a tenth of the model.
    """
    total, count, size = model.parameters, len(model.anatomy.blocks), width(model)
    counter = _counter(model, sites)
    step = _multiple(model)
    found = []
    for candidate in candidates:
        if candidate == "depth":
            options = [Shape(size, size, 1.0, 1.0, blocks) for blocks in range(1, count)]
        else:
            axes = candidate.split("+")
            grid = [place / 512 for place in range(8, 512)]
            streams = {share: max(step, round(size * share / step) * step) for share in grid}
            options = [Shape(streams[share] if "stream" in axes else size, size, share if "heads" in axes else 1.0, share if "channels" in axes else 1.0, count) for share in grid]
        best = min(options, key=lambda shape: abs(counter(shape) - (1 - ratio) * total))
        if abs(counter(best) / total - (1 - ratio)) > 0.1:
            raise InputError(f"a ratio of {ratio} cannot be met by {candidate}: it comes no nearer than {1 - counter(best) / total:.2f}", remedy="Leave this candidate out, or name more axes.")
        found.append(best)
    return found


def _multiple(model: Model) -> int:
    heads = max((block.attention.heads for block in model.anatomy.blocks if block.attention), default=1)
    return heads if MULTIPLE % heads else MULTIPLE


def _counter(model: Model, sites: Sequence[Site]) -> Callable[[Shape], float]:
    """Parameters of a shape, counted parameter by parameter from the dimensions that each axis cuts."""
    network = model.network
    streamed = {f"{path}.{name}" if path else name for path, names in stream_places(model) for name, _ in names}
    seen: dict[int, tuple[str, int]] = {}
    for name, parameter in network.named_parameters():
        seen.setdefault(id(parameter), (name, parameter.numel()))
    owners: dict[str, int] = {}
    for block in model.anatomy.blocks:
        owners |= {f"{block.path}.{name}": block.index for name, _ in block.module.named_parameters()}
    kinds: dict[str, Site] = {}
    for site in sites:
        block = model.anatomy.blocks[site.block]
        inputs = (block.attention.rows if block.attention else {}) if site.attention else (block.feed_forward.inputs if block.feed_forward else {})
        for path in inputs:
            kinds |= {f"{path}.weight": site, f"{path}.bias": site}
        kinds[f"{site.output}.weight"] = site

    def count(shape: Shape) -> float:
        found = 0.0
        for name, size in seen.values():
            share = shape.stream / shape.full if name in streamed else 1.0
            if name in kinds:
                share *= shape.units(kinds[name]) / len(kinds[name].units)
            found += size * share * (shape.blocks / len(model.anatomy.blocks) if name in owners else 1.0)
        return found

    return count
