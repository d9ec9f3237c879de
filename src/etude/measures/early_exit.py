"""Accuracy against operations, for a masked model that may stop early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from etude.engine import cloze
from etude.method import MEASUREMENTS, Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.lazy import lazy
from etude.values.measurement import HIGHER, LOWER, Measurement
from etude.values.model import Model

if TYPE_CHECKING:
    from etude.engine import exits
else:
    exits = lazy("etude.engine.exits")


@dataclass(frozen=True)
class EarlyExit(Method):
    """Accuracy of the first exit whose prediction's entropy is below a threshold, with the threshold at which so large a share of the operations is spent on average.

    For every share, in per cent: ``accuracy_25`` and ``flops_25``, the share that was really spent, of those that the reference (by default the model itself) spends until its last exit.
    The threshold is one for all exits, the lowest that keeps to the share on the questions asked; it needs no labels.  If even the first exit costs more, all questions leave there.
    ``accuracy`` and ``flops`` are those of the last exit, the model's own head, for all questions; a model without other exits says the same at every share.  Each question is an item.
    Operations: those of the blocks, of every exit on the way at the masks, and of the choices' words; see `engine.exits`.
    Reads the columns prompt, choices and answer as `cloze` does.  Raises InputError for models that are not masked, or have several stacks.
    Source: exits by entropy as in COST-EFF and DeeBERT (Xin et al., 2020, section 3.3).
    Cost: one forward pass over the questions, and one row of each length.
    """

    shares: tuple[float, ...] = (0.25, 0.5)
    """Shares of the reference's operations, each more than 0 and at most 1."""
    records: int | None = None
    """Ask only so many questions, from the first; all of them by default."""
    length: int | None = None
    """Cut prompts at their beginning to so many tokens with the masks; by default to what the model reads."""

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"shares are of the operations, more than 0 and at most 1; got {self.shares}")
        for name in ("records", "length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}; leave it out for all")

    def apply(self, model: Model, corpus: Corpus, reference: Model | None = None) -> MEASUREMENTS:
        asked = cloze.questions(model, corpus[: self.records] if self.records else corpus, self.length)
        if reference is not None and reference.tokenizer.get_vocab() != model.tokenizer.get_vocab():
            raise InputError("the reference has another tokenizer than the model, and reads other tokens")
        logs, right = exits.answers(model, asked), np.array([one.right for one in asked])
        spent = exits.costs(model, asked)
        spent /= (spent if reference is None else exits.costs(reference, asked))[-1].mean()
        hits, every, names = logs.argmax(2) == right, np.arange(len(asked)), tuple(map(str, range(len(asked))))
        found = {"accuracy": hits[-1], "flops": spent[-1]}
        for share in self.shares:
            taken = leaving(entropies(logs[:-1]), spent, share)
            found |= {f"accuracy_{100 * share:.0f}": hits[taken, every], f"flops_{100 * share:.0f}": spent[taken, every]}
        return tuple(Measurement(name, items.astype(float), better=HIGHER if name.startswith("accuracy") else LOWER, item_names=names) for name, items in found.items())


def entropies(logs: np.ndarray) -> np.ndarray:
    """Entropy in nats of distributions given by logarithms along the last axis."""
    finite = np.where(np.isneginf(logs), 0.0, logs)
    return -np.where(np.isneginf(logs), 0.0, np.exp(logs) * finite).sum(-1)


def leaving(unsure: np.ndarray, spent: np.ndarray, share: float) -> np.ndarray:
    """The exit that each question takes, (questions,), at the lowest threshold that keeps the mean of what is spent within the share; if none does, the first.

    unsure: entropies at every exit but the last, (exits - 1, questions); spent: until each exit, (exits, questions).
    """
    every = np.arange(spent.shape[1])

    def taken(threshold: float) -> np.ndarray:
        sure = np.concatenate([unsure < threshold, np.ones((1, spent.shape[1]), bool)])
        return np.asarray(sure.argmax(0))

    thresholds = np.concatenate([[0.0], np.unique(unsure), [np.inf]])
    low, high = 0, len(thresholds) - 1
    while low < high:  # what is spent falls as the threshold rises
        middle = (low + high) // 2
        if spent[taken(thresholds[middle]), every].mean() <= share:
            high = middle
        else:
            low = middle + 1
    return taken(thresholds[low])
