"""Which questions of a bank each of some models answers rightly."""

from __future__ import annotations

from dataclasses import dataclass

from etude.engine.progress import report
from etude.method import Method
from etude.methods.evaluate._bank import Bank
from etude.values.corpus import Corpus
from etude.values.model import Model


@dataclass(frozen=True)
class Responses(Method):
    """Ask some models all questions of a bank: a record for each model and question, with the columns model (its number in the list), item (the question's in the bank), skill and correct.

    An answer is right if the right choice is the likeliest one after the prompt, as in `multiple_choice`.  Reads the columns prompt, choices and answer, and skill if there is one; without it
    all questions are of one skill.  Models of any kind.
    Raises InputError for a bank without questions, or with one whose answer is none of its choices.
    Cost: a forward pass of every model over the different prompts and choices.
    """

    def apply(self, models: list[Model], bank: Corpus) -> Corpus:
        questions = Bank.of(bank)
        right = []
        for place, model in enumerate(models):
            right.append(questions.right(model))
            report("asking", place + 1, len(models))
        return questions.records([str(place) for place in range(len(models))], right)
