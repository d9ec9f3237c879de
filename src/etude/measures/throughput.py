"""How fast a model reads and writes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from etude.engine.cost import spend
from etude.engine.progress import report
from etude.engine.score import require_causal
from etude.method import MEASUREMENTS, Method
from etude.values.lazy import lazy
from etude.values.measurement import HIGHER, Measurement
from etude.values.model import Model

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


@dataclass(frozen=True)
class Throughput(Method):
    """Tokens a second: reading a prompt (prefill), and writing with a cache, one sequence at a time (decode).

    All variants are measured in one sitting, in turn, round by round; the rounds are the items, so that a difference is paired within a round
    and the drift of a shared machine cancels.  One round before the counted ones warms up.
    """

    rounds: int = 7
    """Counted rounds."""
    prompt: int = 256
    """Tokens read in a round."""
    new: int = 16
    """Tokens written in a round."""

    def apply(self, models: list[Model]) -> MEASUREMENTS:
        prefill, decode = np.zeros((2, len(models), self.rounds))
        for model in models:
            require_causal(model, "throughput")
        for turn in range(-1, self.rounds):
            for place, model in enumerate(models):
                with torch.no_grad():
                    read, written = self._measure(model)
                if turn >= 0:
                    prefill[place, turn], decode[place, turn] = read, written
            report("timing", turn + 2, self.rounds + 1)
        names = tuple(f"round {turn + 1}" for turn in range(self.rounds))
        return tuple(
            Measurement(name, values[place], unit="tokens/s", better=HIGHER, item_names=names) for place in range(len(models)) for name, values in (("throughput", decode), ("prefill", prefill))
        )

    def _measure(self, model: Model) -> tuple[float, float]:
        network = model.network
        ids = torch.full((1, self.prompt), 11, dtype=torch.long, device=network.device)
        start = _now(network.device)
        output = network(input_ids=ids, use_cache=True)
        middle = _now(network.device)
        for _ in range(self.new):
            output = network(input_ids=output.logits[:, -1:].argmax(-1), past_key_values=output.past_key_values, use_cache=True)
        end = _now(network.device)
        spend(tokens=self.prompt + self.new)
        return self.prompt / (middle - start), self.new / (end - middle)


def _now(device: torch.device) -> float:
    """Seconds on a steady clock, once everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
