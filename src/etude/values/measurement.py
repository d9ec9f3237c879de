"""A measurement: a number an item, and what the numbers together say."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

FILE = "measurement.json"
HIGHER, LOWER = "higher", "lower"


@dataclass(frozen=True, eq=False)
class Measurement:
    """One quantity, measured on each of some items.

    The mean is weighted: with a document's nats a token as items and its tokens as weights, it is the corpus's nats a token.
    ``scale`` says how it is read: ``identity``, or ``exp`` for the exponential of the mean (perplexity).
    """

    name: str
    items: np.ndarray
    """float64, one a item."""
    unit: str = ""
    better: str = LOWER
    """``lower`` or ``higher``."""
    weights: np.ndarray | None = None
    scale: str = "identity"
    exact: bool = False
    """True for a quantity that is counted, not sampled: it has no interval."""
    item_names: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", np.asarray(self.items, np.float64))
        if self.weights is not None:
            object.__setattr__(self, "weights", np.asarray(self.weights, np.float64))
        if self.items.ndim != 1 or not len(self.items):
            raise ValueError(f"{self.name} needs one number an item and at least one item, got shape {self.items.shape}")
        if self.weights is not None and self.weights.shape != self.items.shape:
            raise ValueError(f"{self.name} has {len(self.items)} items and {len(self.weights)} weights")

    @property
    def value(self) -> float:
        """The weighted mean, on the scale on which it is read."""
        mean = float(np.average(self.items, weights=self.weights))
        return math.exp(mean) if self.scale == "exp" else mean

    @property
    def influence(self) -> np.ndarray:
        """One number an item whose plain mean is `value` and whose spread is its uncertainty, to first order.

        For a ratio of sums and for the exponential this is the delta method: value + f'(mean) · n·w/Σw · (item − mean).
        """
        weights = np.ones_like(self.items) if self.weights is None else self.weights
        mean = np.average(self.items, weights=weights)
        slope = self.value if self.scale == "exp" else 1.0
        return self.value + slope * weights / weights.mean() * (self.items - mean)

    def save(self, folder: str | Path) -> None:
        """Write the measurement as JSON into a folder."""
        save_all([self], folder)

    @classmethod
    def load(cls, folder: str | Path) -> Measurement:
        """Read the first measurement of a folder."""
        return load_all(folder)[0]

    def as_data(self) -> dict[str, object]:
        return {
            "name": self.name, "unit": self.unit, "better": self.better, "scale": self.scale, "exact": self.exact,
            "items": self.items.tolist(), "weights": None if self.weights is None else self.weights.tolist(), "item_names": list(self.item_names),
        }  # fmt: skip


def save_all(measurements: Sequence[Measurement], folder: str | Path) -> None:
    """Write what a measure gave into a folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / FILE).write_text(json.dumps([one.as_data() for one in measurements]) + "\n")


def load_all(folder: str | Path) -> list[Measurement]:
    """Read back what `save_all` wrote."""
    rows = json.loads((Path(folder) / FILE).read_text())
    return [Measurement(**{**row, "item_names": tuple(row["item_names"])}) for row in rows]
