"""How often a model finds the right one of several completions the likeliest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etude.measures._choices import Choices
from etude.method import MEASUREMENTS
from etude.values.corpus import Corpus
from etude.values.measurement import HIGHER, Measurement
from etude.values.model import Model


@dataclass(frozen=True)
class MultipleChoice(Choices):
    """Share of questions whose right choice is the likeliest after the prompt: by its log-probability (``accuracy``), and by that a byte (``accuracy_per_byte``), which does not favour short ones.

    These are ``acc`` and ``acc_norm`` of lm-eval.  ``right_probability`` is the right choice's share of the probability of all choices: it tells more of a model that is near chance.
    A masked model's log-probability is the pseudo-log-likelihood of the choice; an encoder–decoder writes the choice after it has read the prompt.  Where two are equally likely the first counts.
    Each question is an item.  Reads the columns prompt, choices and answer; a choice begins with the space that is to stand before it.
    Cost: a forward pass over the different prompts and choices; what questions begin with alike is read once.
    """

    def apply(self, model: Model, corpus: Corpus) -> MEASUREMENTS:
        questions = self.questions(model, corpus)
        names = self.names(questions)
        found = {
            "accuracy": [question.logs.argmax() == question.right for question in questions],
            "accuracy_per_byte": [(question.logs / question.sizes).argmax() == question.right for question in questions],
            "right_probability": [np.exp(question.logs - np.logaddexp.reduce(question.logs))[question.right] for question in questions],
        }
        return tuple(Measurement(name, np.array(items, float), better=HIGHER, item_names=names) for name, items in found.items())
