"""Banks of questions, and which of them a model answers rightly."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from etude.engine.answers import of_completions
from etude.engine.responses import ONLY
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model


class Bank(NamedTuple):
    """Questions with several choices, of which one is right."""

    prompts: list[str]
    choices: list[list[str]]
    answers: list[int]
    skills: list[str]

    @classmethod
    def of(cls, corpus: Corpus) -> Bank:
        """Read the columns prompt, choices, answer, and skill if there is one.

        Raises InputError if a column is missing, there is no question, or a record's answer is none of its choices, of which it has at least two.
        """
        bank = cls(corpus.column("prompt"), corpus.column("choices"), corpus.column("answer"), corpus.column("skill") if "skill" in corpus.columns else [ONLY] * len(corpus))
        if not bank.prompts:
            raise InputError("the bank of questions is empty")
        for place, (choices, answer) in enumerate(zip(bank.choices, bank.answers, strict=True)):
            if not isinstance(choices, list) or len(choices) < 2 or not isinstance(answer, int) or not 0 <= answer < len(choices) or not all(choices):
                raise InputError(f"record {place} needs a list of two choices or more, none empty, and the place of the right one from 0; got {choices!r} and {answer!r}")
        return bank

    def right(self, model: Model) -> np.ndarray:
        """Whether the right choice of each question is the likeliest after its prompt, (questions,) 0 or 1; where two are equally likely the first counts."""
        pairs = [(prompt, choice) for prompt, choices in zip(self.prompts, self.choices, strict=True) for choice in choices]
        logs = iter([scored.logs.sum(dtype=np.float64) for scored in of_completions(model, pairs)])
        return np.array([int(np.argmax([next(logs) for _ in choices])) == answer for choices, answer in zip(self.choices, self.answers, strict=True)], np.int8)

    def records(self, names: list[str], right: list[np.ndarray]) -> Corpus:
        """A record for each model and question: model, item (the question's number in the bank), skill, correct."""
        count = len(self.prompts)
        table = {
            "model": pa.array(np.repeat(names, count)),
            "item": pa.array(np.tile([str(place) for place in range(count)], len(names))),
            "skill": pa.array(self.skills * len(names), pa.string()),
            "correct": pa.array(np.concatenate(right)),
        }
        return Corpus(pa.table(table))
