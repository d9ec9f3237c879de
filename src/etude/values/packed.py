"""Weights on a grid of few bits: how a model remembers the grid, and how it is written so that plain transformers loads it packed."""

from __future__ import annotations

import contextlib
import copy
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude.values import checkpoint
from etude.values.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig

    from etude.values.model import Model

SCALE, ZERO = "weight_scale", "weight_zero_point"
"""Buffers of a layer, (outputs, groups): the step of the grid, and the integer that stands for 0."""


@dataclass(frozen=True)
class Quantized:
    """A linear layer whose weights lie on a grid: scale · (q - zero), q an integer of so many bits, a scale and a zero for every group of inputs of an output.

    The weight itself stays as a product needs it; scales and zeros stand beside it as buffers.
    """

    module: str
    bits: int
    group: int | None
    """Consecutive inputs that share a scale; None if a whole output does."""
    symmetric: bool
    """Whether every zero is 0."""

    def apply(self, network: nn.Module) -> None:
        import torch

        module: Any = network.get_submodule(self.module)
        outputs, inputs = _matrix(module).shape
        shape = (outputs, -(-inputs // (self.group or inputs)))
        for name in (SCALE,) if self.symmetric else (SCALE, ZERO):
            module.register_buffer(name, torch.zeros(shape, dtype=torch.float32, device=module.weight.device))

    def integers(self, network: nn.Module) -> Tensor:
        """The weight as integers, (outputs, inputs) int8, counted from the middle of their range.

        Raises InputError if it does not lie on its grid, as after training.
        """
        import torch

        module: Any = network.get_submodule(self.module)
        weight = _matrix(module).detach().float()
        size = self.group or weight.shape[1]
        scale, zero = (one.repeat_interleave(size, 1)[:, : weight.shape[1]] for one in (module.weight_scale, getattr(module, ZERO, torch.zeros_like(module.weight_scale))))
        q = (weight / scale).round()
        if not torch.allclose(q * scale, weight, rtol=1e-2 if module.weight.dtype != torch.float32 else 1e-4, atol=0):
            raise InputError(f"the weights of {self.module} have left their grid", remedy="Quantize after training, not before.")
        q += zero
        if q.min() < -(1 << (self.bits - 1)) or q.max() >= 1 << (self.bits - 1):
            raise InputError(f"the weights of {self.module} are beyond {self.bits} bits")
        return q.to(torch.int8)


def _matrix(module: Any) -> torch.Tensor:
    from etude.values.anatomy import weight_of

    return weight_of(module)


def export(model: Model, folder: Path) -> None:
    """Write a folder in the format of compressed-tensors that plain transformers loads with the same logits.

    Symmetric grids are packed into so many bits (``pack-quantized``); others take a byte a weight (``int-quantized``), since transformers cannot load packed zero points.

    Raises InputError if the package is missing, if layers have grids of different kinds or the format has no place for one, or if the config cannot say what other edits did.
    """
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    except ImportError as error:
        raise InputError("writing packed weights needs the package compressed-tensors", remedy="pip install 'etude[quantized]'") from error
    grids = [edit for edit in model.edits if isinstance(edit, Quantized)]
    config = _config(model, grids)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
    for grid in grids:
        q = grid.integers(model.network).cpu()
        if grid.symmetric:
            del state[f"{grid.module}.weight"]
            state |= {f"{grid.module}.weight_packed": pack_to_int32(q, grid.bits).contiguous(), f"{grid.module}.weight_shape": _shape(q)}
        else:
            state |= {f"{grid.module}.weight": q, f"{grid.module}.{ZERO}": state[f"{grid.module}.{ZERO}"].to(q.dtype)}
    import huggingface_hub

    huggingface_hub.save_torch_state_dict(state, folder)
    config.save_pretrained(folder)
    if model.has_tokenizer:
        model.tokenizer.save_pretrained(folder)
    with contextlib.redirect_stderr(io.StringIO()):  # the package draws bars of its own
        again = checkpoint.network_class(config).from_pretrained(folder, dtype=model.network.dtype, local_files_only=True)
        checkpoint.outputs(again, checkpoint.probe(again))
    checkpoint.compare(model.network, again, folder)


def _shape(q: Tensor) -> Tensor:
    import torch

    return torch.tensor(q.shape)


def _config(model: Model, grids: list[Quantized]) -> PretrainedConfig:
    """What transformers reads the packed weights by."""
    from torch import nn

    kinds = {(grid.bits, grid.group, grid.symmetric) for grid in grids}
    if len(kinds) > 1:
        raise InputError(f"this model's layers lie on {len(kinds)} kinds of grids, and are exported on one")
    ((bits, group, symmetric),) = kinds
    for grid in grids:
        module: Any = model.network.get_submodule(grid.module)
        if not isinstance(module, nn.Linear):
            raise InputError(f"compressed-tensors packs torch's Linear alone, and {grid.module} is a {type(module).__name__}", remedy="Load the saved folder with Étude.")
        if group and module.in_features % group:
            raise InputError(
                f"compressed-tensors wants whole groups, and the {module.in_features} inputs of {grid.module} are no multiple of {group}",
                remedy=f"Quantize with a group that divides {module.in_features}.",
            )
    bare = model.copy()
    for grid in grids:
        for name in (SCALE, ZERO):
            bare.network.get_submodule(grid.module)._buffers.pop(name, None)
    bare.replace_edits([edit for edit in model.edits if not isinstance(edit, Quantized)])
    found = checkpoint.folded(bare)
    if found is None:
        raise InputError(f"no plain {model.base.model_type} checkpoint can express this model's other edits", remedy="Load the saved folder with Étude.")
    config = copy.deepcopy(found)
    packed = {grid.module for grid in grids}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel", "group_size": group, "dynamic": False}
    config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if symmetric else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None, "format": "pack-quantized" if symmetric else "int-quantized"}},
        "ignore": [path for path, module in model.network.named_modules() if isinstance(module, nn.Linear) and path not in packed],
    }
    return config
