"""Zeros that stay: the matrices in which pruning leaves them, and training that does not fill them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from etude.engine.train import Step
from etude.values.errors import InputError
from etude.values.model import Model


def matrices(model: Model) -> dict[str, nn.Parameter]:
    """Weights of the blocks' linear layers, and of their experts (an expert a slice), by path; shared ones once.  Raises InputError if there are none."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for block in model.anatomy.blocks:
        paths = [f"{path}.weight" for path in model.anatomy.linears(block)]
        layer = block.feed_forward
        if layer is not None and layer.experts:
            paths += [*layer.inputs, layer.output]
        for path in paths:
            matrix = model.network.get_parameter(path)
            found.setdefault(id(matrix), (path, matrix))
    if not found:
        raise InputError(f"the blocks of this {model.base.model_type} have no linear layers")
    return dict(found.values())


@torch.no_grad()
def hold(step: Step, masked: Mapping[nn.Parameter, Tensor]) -> None:
    """Before an optimizer step, take from these weights all that would move them: their gradients, and AdamW's memory of earlier ones.

    masked: for each parameter, True where it is zero and stays so.  Decay leaves zeros alone.
    """
    for optimizer in step.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in masked:
                    memory = [value for value in optimizer.state.get(parameter, {}).values() if value.shape == parameter.shape]
                    for tensor in (*memory, *([] if parameter.grad is None else [parameter.grad])):
                        tensor.masked_fill_(masked[parameter], 0)
