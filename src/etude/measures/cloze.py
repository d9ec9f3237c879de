"""How often a masked model fills in the right one of several choices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etude.engine import cloze
from etude.method import MEASUREMENTS, Method
from etude.values.corpus import Corpus
from etude.values.measurement import HIGHER, Measurement
from etude.values.model import Model


@dataclass(frozen=True)
class Cloze(Method):
    """Share of questions whose right choice a masked model finds the likeliest in the place of masks behind the prompt (``accuracy``); ``right_probability`` is that choice's share.

    All masks are filled in at once, as in training by `adapt.cloze_tuning`; `multiple_choice` hides one token of a choice at a time and shows the others, which tell a good part of a
    label of two tokens.  A choice's score is the mean of its tokens' logits.  Each question is an item.
    Reads the columns prompt, choices and answer; a choice begins with the space that is to stand before it.  Raises InputError for models that are not masked.
    Cost: one forward pass over the questions.
    """

    records: int | None = None
    """Ask only so many questions, from the first; all of them by default."""
    length: int | None = None
    """Cut prompts at their beginning to so many tokens with the masks; by default to what the model reads."""

    def __post_init__(self) -> None:
        for name in ("records", "length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}; leave it out for all")

    def apply(self, model: Model, corpus: Corpus) -> MEASUREMENTS:
        asked = cloze.questions(model, corpus[: self.records] if self.records else corpus, self.length)
        logs, right = cloze.answers(model, asked), np.array([one.right for one in asked])
        names = tuple(map(str, range(len(asked))))
        found = {"accuracy": logs.argmax(1) == right, "right_probability": np.exp(logs[np.arange(len(asked)), right])}
        return tuple(Measurement(name, items.astype(float), better=HIGHER, item_names=names) for name, items in found.items())
