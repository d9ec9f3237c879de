"""Products of a few rows with a weight as linear layers hold it, (outputs, inputs): rows · weightᵀ, as torch's linear does, against (weight · rowsᵀ)ᵀ, as decoding does here.

    python benchmarks/few_rows.py [--rounds 7]

Prints and writes benchmarks/results/few_rows.json: microseconds, and the ratio of the two within a round; with as many threads as torch has, and with one.
Weights are changed with every product, as in a network, so that they do not stay in the cache.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from training import spread

from etude.study.environment import environment

SHAPES = ((192, 512), (448, 448), (448, 1216), (1216, 448), (448, 8192), (1024, 4096))
"""Inputs and outputs: of the 3M and the 25M network of these benchmarks, and of a larger one."""
ROWS = (1, 2, 4, 8, 16, 24, 32, 64)
HELD = 20_000_000
"""Numbers of all weights that are gone through."""


def seconds(product: Callable[[torch.Tensor], Any], weights: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    for weight in weights:
        product(weight)
    return (time.perf_counter() - start) / len(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for threads in dict.fromkeys((torch.get_num_threads(), 1)):
        torch.set_num_threads(threads)
        for inputs, outputs in SHAPES:
            weights = [torch.randn(outputs, inputs) for _ in range(max(2, min(30, HELD // (inputs * outputs))))]
            for count in ROWS:
                rows = torch.randn(count, inputs)
                pairs = [
                    (seconds(lambda weight: torch.nn.functional.linear(rows, weight), weights), seconds(lambda weight: torch.mm(weight, rows.t()).t().contiguous(), weights))  # noqa: B023
                    for _ in range(arguments.rounds)
                ]
                found[f"{threads} threads, {inputs} to {outputs}, {count} rows"] = {
                    "linear, us": spread([1e6 * one for one, _ in pairs]),
                    "turned, us": spread([1e6 * other for _, other in pairs]),
                    "linear / turned": spread([one / other for one, other in pairs]),
                }
                print(f"{threads} threads, {inputs} to {outputs}, {count} rows:", f"{found[f'{threads} threads, {inputs} to {outputs}, {count} rows']['linear / turned']['median']:.2f}", flush=True)
    path = Path(__file__).parent / "results" / "few_rows.json"
    path.write_text(json.dumps({"found": found, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
