"""The matrices of a model's blocks, one by one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from etude.values.anatomy import weight_of
from etude.values.model import Model


def matrices(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Views (output, input) of every matrix of the blocks, without gradient, each expert's one by one."""
    for block in model.anatomy.blocks:
        for path, module in model.anatomy.linears(block).items():
            yield path, weight_of(module).detach()
        layer = block.feed_forward
        if layer is not None and layer.experts:
            for path in (*layer.inputs, layer.output):
                for expert in model.network.get_parameter(path):
                    yield path, expert.detach()
