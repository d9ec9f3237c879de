"""Budgets: how much a step may spend, in one unit."""

from __future__ import annotations

import re
from dataclasses import dataclass

UNITS = {"tokens": "tokens", "token": "tokens", "steps": "steps", "step": "steps", "seconds": "seconds", "second": "seconds", "s": "seconds", "flops": "flops", "flop": "flops"}
SCALES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15}
WRITTEN = re.compile(r"^\s*([0-9][0-9_,]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([kMGBTP]?)\s*([A-Za-z]+)\s*$")


@dataclass(frozen=True)
class Budget:
    """An amount of tokens, optimizer steps, seconds, or floating-point operations."""

    amount: float
    unit: str

    def __post_init__(self) -> None:
        if self.unit not in ("tokens", "steps", "seconds", "flops"):
            raise ValueError(f"a budget counts tokens, steps, seconds or FLOPs, got {self.unit!r}")
        if not 0 < self.amount < float("inf"):
            raise ValueError(f"a budget is more than nothing, got {self.amount}")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``200k tokens``, ``300 steps``, ``60 seconds`` or ``1e15 FLOPs``.  Raises ValueError for anything else."""
        match = WRITTEN.match(text)
        unit = UNITS.get(match[3].lower()) if match else None
        if not match or unit is None:
            raise ValueError(f"a budget reads like '200k tokens', '300 steps', '60 seconds' or '1e15 FLOPs', got {text!r}")
        return cls(float(re.sub("[_,]", "", match[1])) * SCALES[match[2]], unit)

    def __str__(self) -> str:
        for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if self.amount >= scale and self.unit in ("tokens", "flops"):
                return f"{self.amount / scale:g}{letter} {'FLOPs' if self.unit == 'flops' else self.unit}"
        return f"{self.amount:g} {self.unit}"
