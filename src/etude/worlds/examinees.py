"""Answers of examinees who never lived, whose abilities are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from etude.method import Method
from etude.values.corpus import Corpus

SPLITS = ("train", "heldout")


class Truth(NamedTuple):
    """What the answers were drawn from."""

    ability: np.ndarray
    """(models, skills)."""
    discrimination: np.ndarray
    """(skills, items)."""
    difficulty: np.ndarray
    """(skills, items)."""


@dataclass(frozen=True)
class Examinees(Method):
    """Right and wrong answers of simulated models to the questions of several benchmarks: for what is said of benchmarks, where the truth is known.

    A model answers a question rightly with probability g + (1 - g) / (1 + exp(-a·(θ - b))): g is `guess`, θ its ability in that skill, a the question's discrimination and b its
    difficulty.  Abilities are standard normal, and those of one model correlate by `common`², for each is the common ability times `common` and one of its own.  Difficulties are
    normal with a standard deviation of 1.5; discriminations log-normal about 1, with a standard deviation of their logarithm of 0.5.

    Columns model, item, skill and correct, and with `truth` ability, discrimination and difficulty.  Both splits have the same questions; their models are others.  All follows from the
    seed and the numbers of model, skill and question: with more of any, the others stay.
    Cost: next to none; nothing is read or stored.
    """

    split: str = "train"
    """``train`` or ``heldout``: which models."""
    models: int = 300
    """How many models."""
    skills: int = 4
    """How many benchmarks."""
    items: int = 200
    """Questions of each."""
    common: float = 0.9
    """What each ability has of the common one, in [0, 1]: its loading on the one factor."""
    guess: float = 0.0
    """Probability of a right answer by chance, in [0, 1)."""
    truth: bool = False
    """Whether the columns ability, discrimination and difficulty stand beside the answers."""
    seed: int = 0
    """Which questions and models; at least 0."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split is one of {', '.join(SPLITS)}, got {self.split!r}")
        for name in ("models", "skills", "items"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if not 0 <= self.common <= 1:
            raise ValueError(f"common is a loading, from 0 to 1, got {self.common}")
        if not 0 <= self.guess < 1:
            raise ValueError(f"guess is a probability, from 0 up to less than 1, got {self.guess}")
        if self.seed < 0:
            raise ValueError(f"seed is a whole number, at least 0, got {self.seed}")

    def apply(self) -> Corpus:
        known = self.drawn()
        luck = np.stack([np.random.default_rng([self.seed, 3, SPLITS.index(self.split), model]).random((self.skills, self.items)) for model in range(self.models)])
        right = luck < self.guess + (1 - self.guess) / (1 + np.exp(-known.discrimination * (known.ability[:, :, None] - known.difficulty)))
        shape = right.shape
        model, skill, item = (np.broadcast_to(np.arange(count).reshape(-1, *[1] * after), shape).ravel() for count, after in zip(shape, (2, 1, 0), strict=True))
        columns = {"model": _named("model", model), "item": _named("question", item), "skill": _named("skill", skill), "correct": pa.array(right.ravel().astype(np.int8))}
        if self.truth:
            wide = {"ability": known.ability[:, :, None], "discrimination": known.discrimination, "difficulty": known.difficulty}
            columns |= {name: pa.array(np.broadcast_to(values, shape).ravel()) for name, values in wide.items()}
        return Corpus(pa.table(columns))

    def drawn(self) -> Truth:
        """Abilities and questions."""
        stream = SPLITS.index(self.split)
        normal = np.stack([np.random.default_rng([self.seed, 1, stream, model]).standard_normal(1 + self.skills) for model in range(self.models)])
        ability = self.common * normal[:, :1] + np.sqrt(1 - self.common**2) * normal[:, 1:]
        questions = np.stack([np.random.default_rng([self.seed, 2, skill]).standard_normal((self.items, 2)) for skill in range(self.skills)])
        return Truth(ability, np.exp(0.5 * questions[:, :, 0]), 1.5 * questions[:, :, 1])


def _named(what: str, numbers: np.ndarray) -> pa.Array:
    """Each number as a name: ``skill 3``."""
    names = pa.array([f"{what} {number}" for number in range(int(numbers.max()) + 1)])
    return names.take(pa.array(numbers))
