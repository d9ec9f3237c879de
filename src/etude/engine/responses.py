"""Right and wrong answers of many models to many questions, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from etude.values.corpus import Corpus
from etude.values.errors import InputError, nearest

ONLY = "all"
"""The skill of questions that name none."""


class Table(NamedTuple):
    """What models answered to the questions of one skill."""

    models: tuple[str, ...]
    items: tuple[str, ...]
    right: np.ndarray
    """(models, items) float64, 1 where the answer was right, else 0."""

    @property
    def scores(self) -> np.ndarray:
        """Right answers of each model, per cent, (models,)."""
        return 100 * self.right.mean(1)

    def of_items(self, items: tuple[str, ...]) -> Table:
        """The same with these items alone, in this order."""
        places = {item: place for place, item in enumerate(self.items)}
        return Table(self.models, items, self.right[:, [places[item] for item in items]])


def tables(corpus: Corpus) -> Mapping[str, Table]:
    """A table for each skill, by name in the order in which they first occur; all have the same models, in the order in which those first occur.

    Reads the columns model, item and correct (0 or 1, or a truth value), and skill, if there is one.
    Raises InputError if a column is missing, an answer is neither, or some model did not answer each question exactly once.
    """
    models, names = _coded(corpus, "model")
    items, questions = _coded(corpus, "item")
    skills, kinds = _coded(corpus, "skill") if "skill" in corpus.columns else (np.zeros(len(corpus), int), (ONLY,))
    answers = np.array([-1 if answer not in (0, 1) else answer for answer in corpus.column("correct")], np.float64)
    if (wrong := np.flatnonzero(answers < 0)).size:
        raise InputError(f"record {wrong[0]} has {corpus[int(wrong[0])]['correct']!r} as correct", remedy="An answer is 1 if it is right, else 0.")
    found = {}
    for place, kind in enumerate(kinds):
        rows = np.flatnonzero(skills == place)
        own, columns = np.unique(items[rows], return_inverse=True)
        right, times = np.zeros((len(names), len(own))), np.zeros((len(names), len(own)), int)
        right[models[rows], columns] = answers[rows]
        np.add.at(times, (models[rows], columns), 1)
        if (times != 1).any():
            model, item = np.argwhere(times != 1)[0]
            raise InputError(
                f"model {names[model]!r} answered question {questions[own[item]]!r} of {kind!r} {times[model, item]} times", remedy="Every model answers every question of a skill exactly once."
            )
        found[kind] = Table(names, tuple(questions[one] for one in own), right)
    return found


def alike(one: Mapping[str, Table], other: Mapping[str, Table], what: str) -> Mapping[str, Table]:
    """The other's tables with the first one's skills and items, in their order.  Raises InputError if some are missing."""
    found = {}
    for skill, table in one.items():
        if skill not in other:
            raise InputError(f"{what} has no skill {skill!r}", remedy=nearest(skill, other))
        lost = set(table.items) - set(other[skill].items)
        if lost:
            raise InputError(f"{what} lacks {len(lost)} of {len(table.items)} questions of {skill!r}, {min(lost)!r} among them", remedy="Ask all models the same questions.")
        found[skill] = other[skill].of_items(table.items)
    return found


def _coded(corpus: Corpus, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """A column as numbers, and what each stands for, in the order in which they first occur.  Raises InputError if it is missing, empty or has gaps."""
    if not len(corpus):
        raise InputError("the corpus of answers is empty")
    if name not in corpus.columns:
        raise InputError(f"the corpus has no column {name!r}", remedy=nearest(name, corpus.columns))
    column = pa.chunked_array(corpus.table.column(name)).combine_chunks()
    if column.null_count:
        raise InputError(f"the column {name!r} has {column.null_count} gaps", remedy="Every record names its model and its question.")
    coded = (column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column).dictionary_encode()
    return coded.indices.to_numpy(zero_copy_only=False), tuple(str(value) for value in coded.dictionary.to_pylist())
