"""How large activations are: the importance of residual channels, heads and feed-forward channels without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from etude.engine import losses
from etude.engine.cost import flops_per_token, spend
from etude.engine.progress import report
from etude.engine.score import COUNTED_LENGTH, padded_batches
from etude.methods.compress._units import Site
from etude.values.model import Model
from etude.values.width import width


@dataclass(frozen=True)
class Sizes:
    """Importance by activation size; over a row's tokens the mean magnitude, over rows the euclidean norm."""

    stream: np.ndarray
    """Of the residual channels, summed over the norms that read the stream, (width,)."""
    units: list[np.ndarray]
    """Of the units of every site, (units,): of a channel its magnitude, of a head the norm of its output; units of several heads have their sum."""


@torch.no_grad()
def sizes(model: Model, places: Sequence[Site], rows: Sequence[np.ndarray]) -> Sizes:
    """Run the rows through the model once, and look at what norms write and at what output projections read.

    Cost: one forward pass over the rows, without the head.
    """
    network, count = model.network, width(model)
    stream: list[Tensor] = []
    units: dict[str, Tensor] = {}
    real: Tensor

    def along(values: Tensor) -> Tensor:
        """(rows, length, n) of magnitudes: squares of the mean over each row's tokens, summed over the rows, (n,) float64."""
        weights = real[..., None] / real.sum(1)[:, None, None]
        return (values.float() * weights).sum(1).double().square().sum(0)

    def normed(module: nn.Module, args: Any, made: Tensor) -> None:
        stream.append(along(made.reshape(*real.shape, -1).abs()))

    def watching(site: Site) -> Any:
        def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            read = args[0].reshape(*real.shape, -1)
            found = along(read.unflatten(-1, (-1, site.width)).float().norm(dim=-1))
            units[site.output] = units.get(site.output, 0) + found

        return watch

    done, total = 0, sum(map(len, rows))
    with losses.headless(network), ExitStack() as stack:
        for module in network.modules():
            if not isinstance(module, (nn.Linear, nn.Embedding)) and getattr(getattr(module, "weight", None), "shape", None) == (count,):
                stack.callback(module.register_forward_hook(normed).remove)
        for site in places:
            stack.callback(network.get_submodule(site.output).register_forward_pre_hook(watching(site)).remove)
        squares = torch.zeros(0)
        for ids, real in padded_batches(model, rows):
            stream.clear()
            network(input_ids=ids, use_cache=False)
            found = torch.stack(stream)  # (norms, width)
            squares = squares + found if len(squares) else found
            done += int(real.sum())
            report("measuring activations", done, total)
    spend(tokens=total, flops=total * flops_per_token(network, COUNTED_LENGTH))
    by_member = [units[site.output].sqrt().cpu().numpy() for site in places]
    return Sizes(squares.sqrt().sum(0).cpu().numpy(), [np.array([scores[list(unit)].sum() for unit in site.units]) for site, scores in zip(places, by_member, strict=True)])
