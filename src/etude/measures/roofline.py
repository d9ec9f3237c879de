"""How well a roofline foretells the time that a model takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from etude.engine.calibrate import calibrate
from etude.engine.cost import spend
from etude.engine.progress import report
from etude.engine.roofline import Layout, Machine, Pass, Prediction, layout, predict
from etude.engine.score import require_causal
from etude.method import MEASUREMENTS, Method
from etude.values.checkpoint import embedding_rows
from etude.values.errors import InputError
from etude.values.lazy import lazy
from etude.values.measurement import HIGHER, Measurement
from etude.values.model import Model

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


@dataclass(frozen=True)
class Roofline(Method):
    """Seconds of prefill and of a decoding step, predicted from the model's operators and measured, over a grid of batch and length.

    A prediction adds up operators of which each attains min(peak, intensity · bandwidth) (Yuan et al., 2024, section 2), with the peak, bandwidth and
    overheads that a calibration of this machine found; see `etude.engine.roofline`.  The points of the grid are the items.  Parts of each model:

    - ``rank_correlation`` of predicted with measured seconds (Spearman), and ``rank_by_flops``, where the operations alone predict;
    - ``all_rank_correlation``, ``all_rank_by_flops``, ``all_rank_by_parameters``: the same over the points of all models together, given beside each;
    - ``predicted`` and ``measured`` seconds; ``log_error``, the |ln(predicted / measured)|, and ``log_error_flops`` of operations at the peak;
    - ``first_memory_bound``, ``last_memory_bound``: predicted share of a decoding step's time in which memory is the bound, at batch 1 and at the largest;
    - ``first_growth``, ``last_growth``: measured, how many times longer a step takes at twice the batch, as a power of two: 0 if the batch is free, 1 if
      it is paid in full.  The mean of the first two doublings of the batch, and of the last two.  Items of these four are the lengths.

    Points are timed in an order that the seed draws, and each is the median of `rounds` runs.
    Raises InputError if a model is not causal, reads fewer tokens than `prompt` and `new`, or has blocks that the roofline does not know.
    Cost: rounds + 1 prefills and decodings a point, and the calibration, 2 seconds once a process.
    """

    paper = "llm-viewer"

    prompt: int = 128
    """Longest prompt, in tokens; the others are halves, quarters and so on."""
    prompts: int = 3
    """Lengths of prompts."""
    batch: int = 32
    """Most rows at once; the others are halves, quarters and so on, down to 1."""
    new: int = 4
    """Decoding steps after a prompt; their median counts."""
    rounds: int = 3
    """Runs of a point whose median is its time; one more warms up."""

    def __post_init__(self) -> None:
        for name in ("prompt", "prompts", "new", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if self.prompt >> (self.prompts - 1) < 1:
            raise ValueError(f"a prompt of {self.prompt} tokens cannot be halved {self.prompts - 1} times")
        if self.batch < 2 or self.batch & (self.batch - 1):
            raise ValueError(f"batch is a power of two, 2 or more, got {self.batch}")

    def apply(self, models: list[Model], seed: int) -> MEASUREMENTS:
        for model in models:
            self._check(model)
        layouts, machine = [layout(model) for model in models], calibrate(str(models[0].network.device.type))
        measured = self._timed(models, seed)
        found = [self._foretold(model, one, machine) for model, one in zip(models, layouts, strict=True)]
        predicted = np.array([[one.seconds for one in row] for row in found])
        flops = np.array([[one.operations for one in row] for row in found])
        parameters = np.broadcast_to([[float(one.parameters)] for one in layouts], flops.shape)
        shared = self._all(measured, {"all_rank_correlation": predicted, "all_rank_by_flops": flops, "all_rank_by_parameters": parameters})
        return tuple(one for place in range(len(models)) for one in (*self._parts(measured[place], predicted[place], flops[place], machine.peak, found[place]), *shared))

    @property
    def _grid(self) -> list[tuple[str, int, int]]:
        """Phase, batch and length of every point."""
        batches = [1 << power for power in range(self.batch.bit_length())]
        return [(phase, rows, self.prompt >> power) for phase in ("prefill", "decode") for rows in batches for power in reversed(range(self.prompts))]

    def _names(self) -> tuple[str, ...]:
        return tuple(f"{phase}, batch {rows}, length {length}" for phase, rows, length in self._grid)

    def _tokens(self, point: tuple[str, int, int]) -> tuple[int, int, int]:
        """Batch, new tokens and context of a pass; of the decoding steps, the middle one."""
        phase, rows, length = point
        return (rows, length, 0) if phase == "prefill" else (rows, 1, length + self.new // 2)

    def _foretold(self, model: Model, one: Layout, machine: Machine) -> list[Prediction]:
        size = float(model.network.dtype.itemsize)
        return [predict(one, Pass(*self._tokens(point), size, size, size, appended=True), machine) for point in self._grid]

    def _check(self, model: Model) -> None:
        require_causal(model, "the roofline")
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and self.prompt + self.new > limit:
            raise InputError(f"the model reads {limit} tokens, and a prompt of {self.prompt} with {self.new} new ones is longer", remedy="Lower prompt or new.")

    def _timed(self, models: Sequence[Model], seed: int) -> np.ndarray:
        """Seconds (models, points); a prefill and the decoding after it are timed in one run."""
        half = len(self._grid) // 2
        runs = [(place, point) for place in range(len(models)) for point in range(half)]
        seconds = np.zeros((self.rounds + 1, len(models), 2, half))
        random = np.random.default_rng(seed)
        for turn in range(self.rounds + 1):
            for done, which in enumerate(random.permutation(len(runs))):
                place, point = runs[which]
                _, rows, length = self._grid[point]
                with torch.no_grad():
                    seconds[turn, place, :, point] = self._run(models[place], rows, length)
                report("timing", turn * len(runs) + done + 1, (self.rounds + 1) * len(runs))
        return np.median(seconds[1:], axis=0).reshape(len(models), -1)

    def _run(self, model: Model, rows: int, length: int) -> tuple[float, float]:
        """Seconds of a prefill, and of a decoding step after it."""
        network: Any = model.network
        ids = torch.full((rows, length), min(10, embedding_rows(network) - 1), device=network.device)
        start = _now(network.device)
        output = network(input_ids=ids, use_cache=True, logits_to_keep=1)
        prefill = _now(network.device) - start
        steps = []
        for _ in range(self.new):
            start = _now(network.device)
            output = network(input_ids=ids[:, :1], past_key_values=output.past_key_values, use_cache=True)
            steps.append(_now(network.device) - start)
        spend(tokens=rows * (length + self.new))
        return prefill, float(np.median(steps))

    def _parts(self, measured: np.ndarray, predicted: np.ndarray, flops: np.ndarray, peak: float, found: Sequence[Prediction]) -> list[Measurement]:
        names, lengths = self._names(), tuple(f"length {self.prompt >> power}" for power in reversed(range(self.prompts)))
        parts = [
            Measurement("rank_correlation", rank_products(predicted, measured), better=HIGHER, item_names=names),
            Measurement("rank_by_flops", rank_products(flops, measured), better=HIGHER, item_names=names),
            Measurement("predicted", predicted, unit="s", item_names=names),
            Measurement("measured", measured, unit="s", item_names=names),
            Measurement("log_error", np.abs(np.log(predicted / measured)), item_names=names),
            Measurement("log_error_flops", np.abs(np.log(flops / peak / measured)), item_names=names),
        ]
        decode = slice(len(names) // 2, None)
        bound = np.array([one.memory_bound for one in found])[decode].reshape(-1, self.prompts)
        growth = np.diff(np.log2(measured[decode]).reshape(-1, self.prompts), axis=0)
        pairs = (("first_memory_bound", bound[0]), ("last_memory_bound", bound[-1]), ("first_growth", growth[:2].mean(0)), ("last_growth", growth[-2:].mean(0)))
        return parts + [Measurement(name, values, item_names=lengths) for name, values in pairs]

    def _all(self, measured: np.ndarray, rivals: dict[str, np.ndarray]) -> list[Measurement]:
        names = tuple(f"model {place + 1}: {name}" for place in range(len(measured)) for name in self._names())
        return [Measurement(name, rank_products(values.ravel(), measured.ravel()), better=HIGHER, item_names=names) for name, values in rivals.items()]


def rank_products(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A number an item whose mean is Spearman's rank correlation ρ, and whose spread is its uncertainty to first order, the ranks taken as they are.

    Both (items,); ties share their mean rank.  With standardised ranks a and b: ab - ρ(a² + b²)/2 + ρ.  Zero everywhere if one side is constant: it says nothing.
    """
    from scipy.stats import rankdata

    a, b = (rankdata(values) for values in (one, other))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return np.zeros(len(a))
    a, b = ((ranks - ranks.mean()) / ranks.std() for ranks in (a, b))
    correlation = float(np.mean(a * b))
    return a * b - correlation * (a**2 + b**2) / 2 + correlation


def _now(device: torch.device) -> float:
    """Seconds on a steady clock, once everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
