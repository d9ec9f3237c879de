"""How many of a model's n-grams of words a reference has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etude.measures._asked import Asked, numbered, required
from etude.method import MEASUREMENTS
from etude.values.corpus import Corpus
from etude.values.measurement import HIGHER, Measurement
from etude.values.model import Model


@dataclass(frozen=True)
class Bleu(Asked):
    """Sentence BLEU (Papineni et al., 2002) of greedy completions against the records' completions, from 0 to 100, by the package sacrebleu.

    Each record is an item, and the value is the mean of the items.  That is *not* the corpus's BLEU, which takes the counts of all records together before
    it divides, and is what papers report; the mean of sentences can be compared only with another such mean.  Smoothing is sacrebleu's default ``exp`` (the
    n-th precision without a match, counting only those without, becomes 1 / 2ⁿ of one match; Chen and Cherry, 2014, smoothing 3), n-grams longer than a
    completion do not count (``effective_order``, its default for sentences), and words are those of its tokenizer ``13a``.
    Raises InputError without the extra ``text``.  Cost: a forward pass over the prompts, and one a new token.
    """

    def apply(self, model: Model, corpus: Corpus) -> MEASUREMENTS:
        sacrebleu = required("sacrebleu", "text")
        answers = self.answers(model, corpus)
        scores = [sacrebleu.sentence_bleu(answer.said, [answer.reference]).score for answer in answers]
        return (Measurement("bleu", np.array(scores), unit="points", better=HIGHER, item_names=numbered(answers)),)
