"""Low-rank updates of chosen linear layers, each of a rank of its own, computed by ``peft``."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from etude.values.errors import InputError
from etude.values.model import Model

if TYPE_CHECKING:
    from torch import nn


def inject(draft: Model, ranks: Mapping[str, int], scale: float, seed: int) -> None:
    """Put an update scale · B · A around each of these layers of a draft, with the rank that stands by its path; afterwards only the updates ask for gradients.

    A (rank, inputs) is drawn by the seed, B (outputs, rank) is zero.  Raises InputError if ``peft`` does not know a layer.
    """
    import peft
    import torch

    exactly = {re.escape(path): rank for path, rank in ranks.items()}
    config = peft.LoraConfig(
        r=1, lora_alpha=1, target_modules="|".join(exactly), rank_pattern=exactly, alpha_pattern={path: scale * rank for path, rank in exactly.items()}
    )  # fmt: skip
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft sets it by itself where a layer is transposed
            peft.inject_adapter_in_model(config, draft.network)
    except ValueError as error:
        raise InputError(f"peft does not adapt this {draft.base.model_type}: {error}") from error


def merge(network: nn.Module) -> None:
    """Add every update to the weight that it belongs to, and take the adapters away, in place."""
    from peft.tuners.lora import LoraLayer

    for path, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()  # type: ignore[attr-defined]
            network.set_submodule(path, module.get_base_layer())
    del network.peft_config
