"""What this machine can do: rates of matrix products, bandwidths, and what an operator costs beside its work."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude.engine.roofline import Heads, Layout, Linear, Machine, Pass, operators
from etude.values.lazy import lazy

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

SIDES = (96, 192, 384, 768)
"""Of the square products whose rates are measured."""
SETS = (1 << 20, 1 << 22, 1 << 24, 3 << 24, 3 << 26)
"""Bytes of the weights that are gone over: from the cache of a core to 192 MiB."""
STREAMS = (1 << 14, 1 << 18, 1 << 22, 1 << 24, 1 << 26)
"""Bytes that an addition writes; it reads twice as many."""
DEPTHS = (2, 8)
"""Blocks of the two small networks whose difference is what an operator takes beside its work."""
ROUNDS = 7


@functools.cache
def calibrate(device: str = "cpu") -> Machine:
    """Measure rates of products, bandwidths and overheads in float32, with the threads that torch has; kept for the process.

    All are measured in turn, round by round, and each is the median of its rounds: a shared machine is taken as it is.  Overheads are those of decoding
    with a small Llama of transformers.  Cost: 1 to 2 seconds once transformers is imported; 0.4 GB for that time.
    """
    with torch.random.fork_rng(devices=[]):
        networks = [_network(depth).to(device) for depth in DEPTHS]
    resident = _resident()
    probes = [_product(8, device), *(_product(side, device) for side in SIDES), *(_reading(size, device) for size in SETS), *(_adding(size, device) for size in STREAMS)]
    found: list[list[float]] = [[] for _ in [*probes, *networks]]
    with torch.no_grad():
        for turn in range(ROUNDS + 1):
            seconds = [*(_seconds(probe, device) for probe in probes), *(_decoding(network, device) for network in networks)]
            if turn:
                for place, value in enumerate(seconds):
                    found[place].append(value)
    call, *rest = (statistics.median(values) for values in found)
    rates = tuple((2.0 * side**3, 2.0 * side**3 / _beside(rest[place], call)) for place, side in enumerate(SIDES))
    bandwidths = tuple((float(size), size / _beside(rest[len(SIDES) + place], call * (size // WEIGHT))) for place, size in enumerate(SETS))
    streams = tuple((3.0 * size, 3 * size / _beside(rest[len(SIDES) + len(SETS) + place], call)) for place, size in enumerate(STREAMS))
    few, many = rest[-2:]
    own = [len(list(operators(_small_layout(depth), Pass(1, 1, 8)))) for depth in DEPTHS]
    overhead = max(0.0, (many - few) / (own[1] - own[0]))
    return Machine(rates, bandwidths, streams, overhead, max(0.0, few - own[0] * overhead), resident)


def _beside(seconds: float, calls: float) -> float:
    """What work took beside its calls; at least a fifth of it, where the clock is too coarse to tell."""
    return max(seconds - calls, seconds / 5)


def _network(depth: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig
    settings = config(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=depth, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    return LlamaForCausalLM(settings).eval()


def _small_layout(depth: int) -> Layout:
    """As many operators as the networks of the calibration have: seven linear layers, two norms and an activation a block."""
    linear = Linear("", 16, 16)
    return Layout(16, (linear,) * 7 * depth, (Heads("", 2, 1, 8),) * depth, (("", 16, 16),) * (2 * depth + 1), (("", 32, True),) * depth, Linear("head", 16, 64), 0)


def _ones(device: str, *shapes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.ones(shape, device=device) for shape in shapes]


WEIGHT, SIDE = 1 << 20, 512
"""Bytes and side of one of the matrices of a set."""


def _seconds(run: Callable[[], Any], device: str) -> float:
    """Seconds of one run; the mean of a hundred where a run is too short for the clock."""
    times = 1
    while True:
        start = time.perf_counter()
        for _ in range(times):
            run()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if seconds > 1e-4 or times > 1:
            return seconds / times
        times = 100


def _product(side: int, device: str) -> Callable[[], Any]:
    left, right = _ones(device, (side, side), (side, side))
    return lambda: torch.nn.functional.linear(left, right)


def _reading(size: int, device: str) -> Callable[[], Any]:
    """Products of one row with matrices of this size together, one after another: what decoding does."""
    row, *matrices = _ones(device, (1, SIDE), *[(SIDE, SIDE)] * (size // WEIGHT))

    def run() -> None:
        for matrix in matrices:
            torch.nn.functional.linear(row, matrix)

    return run


def _adding(size: int, device: str) -> Callable[[], Any]:
    left, right = _ones(device, (1, size // 4), (1, size // 4))
    return lambda: left + right


def _decoding(network: Any, device: str) -> float:
    """Median seconds of a decoding step; the cache grows by one token each."""
    ids = torch.full((1, 8), 5, device=device)
    output, found = network(input_ids=ids, use_cache=True), []
    for _ in range(4):
        start = time.perf_counter()
        output = network(input_ids=ids[:, :1], past_key_values=output.past_key_values, use_cache=True)
        if device != "cpu":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _resident() -> int:
    """Bytes of the process that lie in memory; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0
