"""How many of a reference's words a model writes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etude.measures._asked import Asked, numbered, required
from etude.method import MEASUREMENTS
from etude.values.corpus import Corpus
from etude.values.measurement import HIGHER, Measurement
from etude.values.model import Model

VARIANTS = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Rouge(Asked):
    """ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004, sections 2 and 3) of greedy completions against the records' completions: F1, from 0 to 1, by the package rouge-score.

    Each record is an item; the value is their mean, as it is usually reported.  ROUGE-L takes a text as one sentence.  The package's tokenizer keeps
    the letters a to z and digits, in lower case: a text in another script has no words for it, and scores 0.
    Raises InputError without the extra ``text``.  Cost: a forward pass over the prompts, and one a new token.
    """

    stemmer: bool = False
    """Whether words of more than three letters are cut to their stems by Porter's rules; off, as in the package."""

    def apply(self, model: Model, corpus: Corpus) -> MEASUREMENTS:
        scorer = required("rouge_score.rouge_scorer", "text").RougeScorer(list(VARIANTS), use_stemmer=self.stemmer)
        answers = self.answers(model, corpus)
        scores = [scorer.score(target=answer.reference, prediction=answer.said) for answer in answers]
        return tuple(Measurement(name, np.array([score[name].fmeasure for score in scores]), better=HIGHER, item_names=numbered(answers)) for name in VARIANTS)
