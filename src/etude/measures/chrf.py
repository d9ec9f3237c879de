"""How many n-grams of letters a model's text and a reference share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etude.measures._asked import Asked, numbered, required
from etude.method import MEASUREMENTS
from etude.values.corpus import Corpus
from etude.values.measurement import HIGHER, Measurement
from etude.values.model import Model


@dataclass(frozen=True)
class Chrf(Asked):
    """Sentence chrF (Popović, 2015) of greedy completions against the records' completions, from 0 to 100, by the package sacrebleu.

    n-grams of 1 to 6 letters without white space, with recall twice as important as precision (chrF2, the package's default).
    Each record is an item, and the value is the mean of the items, not the corpus's chrF, which adds the counts of all records up first.
    Raises InputError without the extra ``text``.  Cost: a forward pass over the prompts, and one a new token.
    """

    words: int = 0
    """Longest n-gram of words that counts too; 2 gives chrF++ (Popović, 2017)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.words < 0:
            raise ValueError(f"words is the length of an n-gram of words, at least 0, got {self.words}")

    def apply(self, model: Model, corpus: Corpus) -> MEASUREMENTS:
        sacrebleu = required("sacrebleu", "text")
        answers = self.answers(model, corpus)
        scores = [sacrebleu.sentence_chrf(answer.said, [answer.reference], word_order=self.words).score for answer in answers]
        return (Measurement("chrf", np.array(scores), unit="points", better=HIGHER, item_names=numbered(answers)),)
