"""Whether a model's confidence in its choices means what it says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etude.measures._choices import Choices
from etude.measures.membership import auroc_items
from etude.method import MEASUREMENTS
from etude.values.corpus import Corpus
from etude.values.measurement import HIGHER, Measurement
from etude.values.model import Model


@dataclass(frozen=True)
class Calibration(Choices):
    """Confidence in the likeliest choice, its share of the probability of all choices, against how often that choice is right.

    - ``ece``: expected calibration error, in `bins` of equal width (Guo et al., 2017, section 2).  An item is its confidence less 1 or 0, with the sign of its
      bin's gap, so that the mean over items is the error.  It is biased upwards for few items.
    - ``brier``: squared error of the choices' probabilities, summed over choices (Brier, 1950): from 0 to 2.
    - ``auroc``: how often a right answer is more confident than a wrong one, ties half; items are DeLong's influences.  Left out if all answers are right, or none.
    - ``selective_risk``: the area under the curve of risk against coverage (Geifman and El-Yaniv, 2017): the mean error rate among the most confident, over all coverages.

    Each question is an item.  Reads the columns prompt, choices and answer.  Cost: that of `multiple_choice`.
    """

    bins: int = 15
    """As in Guo et al., table 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bins < 1:
            raise ValueError(f"bins is at least 1, got {self.bins}")

    def apply(self, model: Model, corpus: Corpus) -> MEASUREMENTS:
        questions = self.questions(model, corpus)
        names = self.names(questions)
        shares = [np.exp(question.logs - np.logaddexp.reduce(question.logs)) for question in questions]
        confidence = np.array([share.max() for share in shares])
        right = np.array([share.argmax() == question.right for share, question in zip(shares, questions, strict=True)], float)
        brier = np.array([np.square(share - np.eye(len(share))[question.right]).sum() for share, question in zip(shares, questions, strict=True)])
        found = [
            Measurement("ece", gaps(confidence, right, self.bins), item_names=names),
            Measurement("brier", brier, item_names=names),
            Measurement("selective_risk", risks(confidence, right), item_names=names),
        ]
        if 0 < right.sum() < len(right):
            items = np.empty(len(right))
            items[right > 0], items[right == 0] = np.split(auroc_items(confidence[right > 0], confidence[right == 0]), [int(right.sum())])
            found.append(Measurement("auroc", items, better=HIGHER, item_names=names))
        return tuple(found)


def gaps(confidence: np.ndarray, right: np.ndarray, bins: int) -> np.ndarray:
    """One number an item whose mean is the expected calibration error; confidence (items,) in [0, 1], right (items,) 0 or 1.  A bin holds its upper edge."""
    of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = confidence - right
    return gap * np.sign(np.bincount(of, gap, bins))[of]


def risks(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """One number an item whose mean is the area under the risk–coverage curve.  Equally confident items share their places."""
    order = np.argsort(-confidence, kind="stable")
    places = np.cumsum(1 / np.arange(len(order), 0, -1))[::-1]  # of the i-th most confident: the sum of 1/k over all coverages k that hold it
    _, group = np.unique(-confidence[order], return_inverse=True)
    shared = (np.bincount(group, places) / np.bincount(group))[group]
    found = np.empty(len(order))
    found[order] = (1 - right[order]) * shared
    return found
