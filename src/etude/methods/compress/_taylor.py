"""First-order importance of heads and channels: how much the loss would change without their weights, by its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from etude.engine.gradients import gradients
from etude.methods.compress._units import Site
from etude.values.anatomy import output_dim
from etude.values.model import Model


def importance(model: Model, places: Sequence[Site], rows: Sequence[np.ndarray], *, vectors: bool = False) -> list[np.ndarray]:
    """Σ |gradient · weight| of every unit of every site, (units,) float64: over all parameters that go with the unit, in every layer that it is cut from.

    rows: calibration rows, over whose tokens the loss is averaged before any absolute value is taken.  vectors: absolute values are those of whole
    rows, and of whole columns of the output projection, not of their elements.
    Cost: a forward and a backward pass over the rows.
    """
    known = dict(model.network.named_parameters(remove_duplicate=False))
    members = [coupled(model, site) for site in places]
    names = {f"{path}.{name}" for site, rows_of in zip(places, members, strict=True) for path in (site.output, *rows_of) for name in ("weight", "bias")}
    found = gradients(model, rows, sorted(names & known.keys()))

    def reduced(path: str, dim: int) -> np.ndarray:
        salience: Tensor = found[f"{path}.weight"].double() * known[f"{path}.weight"].detach().double()
        if output_dim(model.network.get_submodule(path)) == 1:
            salience = salience.T
        scores = salience.sum(dim).abs() if vectors else salience.abs().sum(dim)
        if dim == 1 and f"{path}.bias" in found:
            scores = scores + (found[f"{path}.bias"].double() * known[f"{path}.bias"].detach().double()).abs()
        return scores.cpu().numpy()

    scores = []
    for site, rows_of in zip(places, members, strict=True):
        columns = reduced(site.output, 0)
        total = np.array([columns[site.columns(unit)].sum() for unit in site.units])
        for path, by_unit in rows_of.items():
            outputs = reduced(path, 1)
            total += [outputs[chosen].sum() for chosen in by_unit]
        scores.append(total)
    return scores


def coupled(model: Model, site: Site) -> dict[str, list[list[int]]]:
    """The outputs that go with each unit of a site, by path of the layer and by unit; the unit's columns of the output projection aside."""
    block = model.anatomy.blocks[site.block]
    if site.attention:
        assert block.attention is not None
        return {path: [[row for row, users in enumerate(rows) if users and users <= set(unit)] for unit in site.units] for path, rows in block.attention.rows.items()}
    assert block.feed_forward is not None
    return {path: [[offset + channel for offset in offsets for channel in unit] for unit in site.units] for path, offsets in block.feed_forward.inputs.items()}
