"""How much memory a model needs to read."""

from __future__ import annotations

import ctypes
import gc
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from etude.engine.cost import spend
from etude.engine.progress import report
from etude.method import MEASUREMENTS, Method
from etude.values.checkpoint import embedding_rows
from etude.values.errors import InputError
from etude.values.lazy import lazy
from etude.values.measurement import Measurement
from etude.values.model import Model

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Memory(Method):
    """Bytes that a forward pass needs at its peak, over what the process held before it: activations and logits, not the weights, which `size` counts.

    A pass reads `batch` rows of `length` tokens without gradients and without a cache, and gives the logits of every token.  On an accelerator it is the peak of the allocator
    of torch, without what the allocator holds in reserve; on a processor the peak of the process's resident memory, which Linux can be told to
    measure anew (``clear_refs``, ``VmHWM``; in pages, counted a little late, so to some 0.1 MiB a core), libraries' workspaces included.
    Rounds are the items; one before the counted ones loads and warms up.
    Raises InputError if the model reads fewer tokens, on a processor outside of Linux, and on accelerators other than CUDA's.
    Cost: rounds + 1 forward passes.
    """

    length: int = 512
    """Tokens of a row."""
    batch: int = 1
    """Rows."""
    rounds: int = 3
    """Counted rounds."""

    def __post_init__(self) -> None:
        for name in ("length", "batch", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")

    def apply(self, model: Model) -> MEASUREMENTS:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and self.length > limit:
            raise InputError(f"the model reads {limit} tokens, and length is {self.length}", remedy="Lower length.")
        network: Any = model.network
        peak = {"cuda": _cuda_peak, "cpu": _resident_peak}.get(network.device.type)
        if peak is None or (peak is _resident_peak and not RESET.exists()):
            raise InputError(f"peak memory cannot be measured on {network.device.type} here", remedy="Use CUDA, or a processor under Linux.")
        ids = torch.full((self.batch, self.length), min(10, embedding_rows(network) - 1), device=network.device)
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        given |= {} if model.kind == "masked" else {"use_cache": False}
        given |= {"decoder_input_ids": ids} if network.config.is_encoder_decoder else {}
        found = []
        with torch.no_grad():
            network(**given)
            for turn in range(self.rounds):
                found.append(peak(network, given))
                report("measuring", turn + 1, self.rounds)
        spend(tokens=(self.rounds + 1) * ids.numel())
        return (Measurement("memory", np.array(found, float), unit="bytes", item_names=tuple(f"round {turn + 1}" for turn in range(self.rounds))),)


def _cuda_peak(network: Any, given: dict[str, Any]) -> int:
    """Bytes that torch's allocator handed out at once during a pass, over those before."""
    device = network.device
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    network(**given)
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def _resident_peak(network: Any, given: dict[str, Any]) -> int:
    """Resident bytes of the process at their peak during a pass, over those before, once what is free has gone back to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: freed memory that it keeps would be used again without being seen
    if trim is not None:
        trim(0)
    RESET.write_text("5")
    before = _status("VmRSS")
    network(**given)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """One of the process's figures, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found
    return int(found.group(1)) * 1024
