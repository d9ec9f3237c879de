"""What a recipe says of a search: which parameters, over which values, how many trials, and by what they are judged."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from etude.method import Parameter, interface

if TYPE_CHECKING:
    from etude.study.recipe import Measure

MOST_TRIALS = 1000
DECADE = 10
"""A range whose ends differ by this factor or more is searched on a logarithmic scale."""


@dataclass(frozen=True)
class Range:
    """Values that a parameter may take: from `low` to `high`, or one of `choices`."""

    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()
    whole: bool = False
    """Whether it is a whole number."""

    @classmethod
    def parse(cls, value: Any, parameter: Parameter) -> Range:
        """``[low, high]``, or ``{choices: […]}``.  Raises ValueError for anything else."""
        if isinstance(value, dict) and list(value) == ["choices"] and isinstance(value["choices"], list) and len(value["choices"]) > 1:
            return cls(choices=tuple(tuple(one) if isinstance(one, list) else one for one in value["choices"]))
        numbers = isinstance(value, list) and len(value) == 2 and all(isinstance(one, (int, float)) and not isinstance(one, bool) and math.isfinite(one) for one in value)
        if not numbers or not value[0] < value[1]:
            raise ValueError(f"{parameter.name} is searched over [low, high], two numbers, or over {{choices: […]}}, two or more of them; got {value!r}")
        kinds = {parameter.annotation, *typing.get_args(parameter.annotation)}
        return cls(value[0], value[1], whole=int in kinds and float not in kinds)

    @property
    def log(self) -> bool:
        return self.low > 0 and self.high / self.low >= DECADE

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that a method must accept: both ends, or all choices."""
        return self.choices or ((int(self.low), int(self.high)) if self.whole else (float(self.low), float(self.high)))

    def holds(self, value: Any) -> bool:
        """Whether a value is one that the search could try."""
        if self.choices:
            return value in self.choices
        return isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high

    def suggest(self, trial: Any, name: str) -> Any:
        """What this trial of Optuna's tries."""
        if self.choices:  # by place, since Optuna keeps plain values only
            return self.choices[trial.suggest_categorical(name, list(range(len(self.choices))))]
        low, high = self.ends
        return trial.suggest_int(name, low, high, log=self.log) if self.whole else trial.suggest_float(name, low, high, log=self.log)

    def asked(self, value: Any) -> Any:
        """A value as Optuna knows it."""
        return self.choices.index(value) if self.choices else value

    def as_data(self) -> Any:
        """As a recipe writes it."""
        return {"choices": list(self.choices)} if self.choices else list(self.ends)


@dataclass(frozen=True)
class Tune:
    """A search that every variant of a step is given, under each seed."""

    trials: int
    """Runs of the method, all of them charged to the variant."""
    over: Mapping[str, Range]
    """By parameter."""
    by: Measure
    """What judges a trial, on a corpus that nothing in the study reports."""
    name: str = ""
    """Of the measure."""
    part: str | None = None
    """Which of its parts; the first by default."""

    def as_data(self) -> dict[str, Any]:
        """As a recipe writes it, with what it left to defaults."""
        face = interface(type(self.by.method))
        fields: dict[str, Any] = {parameter.name: getattr(self.by.method, parameter.name) for parameter in face.parameters}
        more = {"part": self.part} if self.part else {}
        return {
            "trials": self.trials,
            "over": {name: one.as_data() for name, one in self.over.items()},
            "by": {face.name: {**fields, "on": [str(reference) for reference in self.by.on], **more}},
        }
