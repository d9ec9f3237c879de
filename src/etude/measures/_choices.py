"""What measures have in common that let a model choose between completions, one item a question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from etude.engine.answers import of_completions
from etude.method import Method
from etude.values.corpus import Corpus, bytes_of
from etude.values.errors import InputError
from etude.values.model import Model


class Question(NamedTuple):
    """A question that was put to a model."""

    logs: np.ndarray
    """(choices,) natural log-probability of each choice after the prompt."""
    sizes: np.ndarray
    """(choices,) UTF-8 bytes of each."""
    right: int
    """Place of the right one."""


@dataclass(frozen=True)
class Choices(Method):
    """Base of a measure that reads the columns prompt, choices (a list of texts) and answer (the place of the right one, from 0)."""

    records: int | None = None
    """Ask only so many questions, after those that are shown as examples; all of them by default."""
    shots: int = 0
    """So many of the corpus's first records stand before every question with their right answers, an empty line between them, and are not asked."""

    def __post_init__(self) -> None:
        if self.records is not None and self.records < 1:
            raise ValueError(f"records is a number of questions, at least 1, got {self.records}; leave it out to ask all")
        if self.shots < 0:
            raise ValueError(f"shots is a number of examples, at least 0, got {self.shots}")

    def questions(self, model: Model, corpus: Corpus) -> list[Question]:
        """Every question, in the corpus's order.

        Raises InputError if the corpus lacks the columns, has no question left, or a record whose answer is none of its choices, of which it has at least two.
        """
        rows = list(zip(corpus.column("prompt"), corpus.column("choices"), corpus.column("answer"), strict=True))
        for place, (_, choices, answer) in enumerate(rows):
            if not isinstance(choices, list) or len(choices) < 2 or not isinstance(answer, int) or not 0 <= answer < len(choices) or not all(choices):
                raise InputError(f"record {place} needs a list of two choices or more, none empty, and the place of the right one from 0; got {choices!r} and {answer!r}")
        header = "".join(f"{prompt}{choices[answer]}\n\n" for prompt, choices, answer in rows[: self.shots])
        asked = rows[self.shots :][: self.records]
        if not asked:
            raise InputError(f"the corpus has {len(rows)} records, of which {self.shots} are examples: there is nothing to ask", remedy="Lower shots.")
        scored = iter(of_completions(model, [(header + prompt, choice) for prompt, choices, _ in asked for choice in choices]))
        return [
            Question(np.array([next(scored).logs.sum(dtype=np.float64) for _ in choices]), np.array([bytes_of([choice]) for choice in choices], float), answer)
            for _, choices, answer in asked
        ]  # fmt: skip

    def names(self, questions: list[Question]) -> tuple[str, ...]:
        """Names of the items: the records' numbers."""
        return tuple(str(self.shots + place) for place in range(len(questions)))
