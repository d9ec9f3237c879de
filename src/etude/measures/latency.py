"""How long a model makes one wait."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from etude.engine.cost import spend
from etude.engine.progress import report
from etude.engine.score import require_causal
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


@dataclass(frozen=True)
class Latency(Method):
    """Seconds to the first token, ``first_token``, and seconds a further token, ``further_token``, of a batch of prompts that are continued together.

    The first token is there when the whole prompt is read and the most probable token is chosen; each further one takes a pass over one token a row, with a cache.
    `throughput` counts tokens a second of one sequence alone; here a larger batch makes every token wait longer, even where more of them come a second.
    All variants are measured in one sitting, in turn, round by round.  A round runs `repeats` times, and its item is the median of them, so that a single
    interruption by the machine does not count; a difference is paired within a round.  One round before the counted ones warms up.
    Raises InputError if a model is not causal, or reads fewer tokens than prompt and new together.
    Cost: (rounds + 1) · repeats passes over the prompts and as many over each new token.
    """

    rounds: int = 5
    """Counted rounds."""
    repeats: int = 3
    """Runs whose median a round is."""
    prompt: int = 256
    """Tokens of a prompt."""
    batch: int = 1
    """Prompts that are read and continued together."""
    new: int = 16
    """Further tokens of a run; their mean time counts."""

    def __post_init__(self) -> None:
        for name in ("rounds", "repeats", "prompt", "batch", "new"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")

    def apply(self, models: list[Model]) -> MEASUREMENTS:
        for model in models:
            self._check(model)
        seconds = np.zeros((2, len(models), self.rounds))  # first or further
        for turn in range(-1, self.rounds):
            for place, model in enumerate(models):
                with torch.no_grad():
                    median = np.median([self._run(model) for _ in range(self.repeats)], axis=0)
                if turn >= 0:
                    seconds[:, place, turn] = median
            report("timing", turn + 2, self.rounds + 1)
        names = tuple(f"round {turn + 1}" for turn in range(self.rounds))
        return tuple(
            Measurement(name, values[place], unit=unit, item_names=names)
            for place in range(len(models))
            for name, unit, values in (("first_token", "s", seconds[0]), ("further_token", "s/token", seconds[1]))
        )

    def _check(self, model: Model) -> None:
        require_causal(model, "latency")
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and self.prompt + self.new > limit:
            raise InputError(f"the model reads {limit} tokens, and a prompt of {self.prompt} with {self.new} new ones is longer", remedy="Lower prompt or new.")

    def _run(self, model: Model) -> tuple[float, float]:
        """Seconds to the first token of all rows, and seconds a further one."""
        network: Any = model.network
        ids = torch.full((self.batch, self.prompt), min(10, embedding_rows(network) - 1), device=network.device)
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(network.forward).parameters else {}
        start = _now(network.device)
        output = network(input_ids=ids, use_cache=True, **last)
        chosen = output.logits[:, -1:].argmax(-1)
        middle = _now(network.device)
        cache = "cache_params" if "cache_params" in output else "past_key_values"  # the first is a recurrent network's
        for _ in range(self.new):
            output = network(input_ids=chosen, use_cache=True, **{cache: output[cache]}, **last)
            chosen = output.logits[:, -1:].argmax(-1)
        end = _now(network.device)
        spend(tokens=self.batch * (self.prompt + self.new))
        return middle - start, (end - middle) / self.new


def _now(device: torch.device) -> float:
    """Seconds on a steady clock, once everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
