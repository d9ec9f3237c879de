"""How much a model's classification hangs on the wording of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from etude.engine.answers import of_completions
from etude.engine.wording import check, fill
from etude.measures.roofline import rank_products
from etude.method import MEASUREMENTS, Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.measurement import HIGHER, LOWER, Measurement
from etude.values.model import Model

FRAMES = (
    "{prompt}",
    "Question: {prompt}\nAnswer:",
    "Q: {prompt}\nA:",
    "{prompt}\n\nAnswer:",
    "### Instruction:\n{prompt}\n### Response:\n",
    "Read this and answer. {prompt}\nThe answer is",
)
"""Rewordings of a prompt of which nothing is known but that it asks for one of its choices."""


class Question(NamedTuple):
    """A question in all its wordings."""

    name: str
    asked: list[tuple[str, list[str]]]
    """Of every wording the prompt and its choices."""
    right: int
    """Place of the right choice: the class."""


@dataclass(frozen=True)
class PromptSensitivity(Method):
    """Sensitivity: the entropy of a question's predicted labels over rewordings of its prompt, as a share of the largest; and consistency: how alike these predictions are within a class.

    For every question the model is asked in each wording, and predicts the likeliest choice.  The shares of the choices among its predictions are p; then, each question an item:

    - ``sensitivity``: H(p) / log C, 0 where all wordings give one label, 1 where each of C labels is predicted as often.  It needs no right answers.
    - ``consistency``: one minus the total variation distance between the p of two questions of one class, averaged over a question's partners.  An item is the question's influence,
      m + 2 (its own mean - m), m the mean over its class: the plain mean over items is the mean over questions of the mean over partners, and, since each question is also
      everybody else's partner, only so is the spread that of the mean (Hoeffding, 1948).  Items keep the order within a class; one alone may lie outside of 0 to 1.
      Questions without a partner are left out, and the whole part where there are no pairs.
    - ``accuracy``: share of the wordings in which the question is answered rightly; ``first_accuracy``: 1 where the first wording is.
    - ``accuracy_correlation``: Spearman's rank correlation of sensitivity with accuracy over questions, as items whose mean it is; -1 where the one says nothing that the other does
      not, and 0 everywhere where one of them is constant.

    Items are named by the record's number, or by `group`'s value, and where all records have the same choices by the class as well, as in ``17 (food)``: so the worst
    questions and classes can be found.  Reads the columns choices and answer (the place of the right one, which is the class), and those that the templates name.
    Departures: rewordings are templates or records, where the paper has a language model write them; labels are scored, not parsed from what is said, so that no answer is invalid.
    Raises InputError for a corpus without these columns, records with other numbers of choices, a question in one wording alone, and rewordings that differ in the right answer.
    Source: Errica et al., "What Did I Do Wrong? Quantifying LLMs' Sensitivity and Consistency to Prompt Engineering", 2024 (NAACL 2025).
    Cost: a forward pass over questions times wordings, what prompts begin with alike once, and one over the choices after each.
    """

    paper = "prompt-sensitivity-consistency"

    templates: tuple[str, ...] = ()
    """Wordings of the prompt, each with columns in braces, as in ``Text: {text}``.  By default six plain frames around the column prompt; with `group`, the prompt as it is."""
    group: str = ""
    """Column that says which question a record rewords: records with one value are wordings of one question.  By default every record is a question of its own."""
    records: int | None = None
    """Ask only so many questions, from the corpus's beginning; all of them by default."""

    def __post_init__(self) -> None:
        check(self.templates)
        if len(self.templates) == 1 and not self.group:
            raise ValueError(f"templates are two wordings or more, unless records are wordings, got {self.templates[0]!r} alone")
        if self.records is not None and self.records < 1:
            raise ValueError(f"records is a number of questions, at least 1, got {self.records}; leave it out to ask all")

    def apply(self, model: Model, corpus: Corpus) -> MEASUREMENTS:
        questions = self.questions(corpus)
        names, right = tuple(question.name for question in questions), np.array([question.right for question in questions])
        predicted = predictions(model, questions)
        classes = len(questions[0].asked[0][1])
        shares = np.stack([np.bincount(one, minlength=classes) / len(one) for one in predicted])
        sensitivity, accuracy = entropies(shares), shares[np.arange(len(right)), right]
        first = np.array([one[0] for one in predicted]) == right
        found = [
            Measurement("sensitivity", sensitivity, better=LOWER, item_names=names),
            Measurement("accuracy", accuracy, better=HIGHER, item_names=names),
            Measurement("first_accuracy", first.astype(float), better=HIGHER, item_names=names),
            Measurement("accuracy_correlation", rank_products(sensitivity, accuracy), better=HIGHER, item_names=names),
        ]
        items, kept = consistencies(shares, right)
        if len(kept):
            found.append(Measurement("consistency", items, better=HIGHER, item_names=tuple(names[place] for place in kept)))
        return tuple(found)

    def questions(self, corpus: Corpus) -> list[Question]:
        """Every question with its wordings, in the corpus's order.  Raises InputError as the class says."""
        rows = list(corpus)
        templates = self.templates or (("{prompt}",) if self.group else FRAMES)
        names = [str(name) for name in (corpus.column(self.group) if self.group else range(len(rows)))]
        for column in ("choices", "answer"):
            corpus.column(column)
        if not rows:
            raise InputError("the corpus is empty")
        gathered: dict[str, Question] = {}
        for place, (name, row) in enumerate(zip(names, rows, strict=True)):
            if name not in gathered and len(gathered) == self.records:
                continue
            choices, right = row["choices"], row["answer"]
            if not isinstance(choices, list) or len(choices) < 2 or not isinstance(right, int) or not 0 <= right < len(choices) or not all(choices):
                raise InputError(f"record {place} needs a list of two choices or more, none empty, and the place of the right one from 0; got {choices!r} and {right!r}")
            if len(choices) != len(rows[0]["choices"]):
                raise InputError(f"record {place} has {len(choices)} choices and record 0 has {len(rows[0]['choices'])}: classes are the places among them, and all records have as many")
            question = gathered.setdefault(name, Question(name, [], right))
            if question.right != right:
                raise InputError(f"record {place} rewords question {name}, whose answer is at {question.right}, and says {right}", remedy="Put the choices of all wordings into one order.")
            question.asked.extend((fill(template, row), choices) for template in templates)
        for question in gathered.values():
            if len(question.asked) < 2:
                raise InputError(f"question {question.name} has one wording, and there is nothing to compare it with", remedy="Give more records of this question, or templates.")
        alike = all(choices == rows[0]["choices"] for question in gathered.values() for _, choices in question.asked)
        return [question._replace(name=f"{question.name} ({rows[0]['choices'][question.right].strip()})") if alike else question for question in gathered.values()]


def predictions(model: Model, questions: Sequence[Question]) -> list[np.ndarray]:
    """Places of the likeliest choice, the first of several that are as likely: (wordings,) int64 of every question."""
    scored = iter(of_completions(model, [(prompt, choice) for question in questions for prompt, choices in question.asked for choice in choices]))
    return [np.array([np.argmax([next(scored).logs.sum(dtype=np.float64) for _ in choices]) for _, choices in question.asked]) for question in questions]


def entropies(shares: np.ndarray) -> np.ndarray:
    """Entropy of each row of shares (questions, classes) as a share of the largest, (questions,)."""
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.abs((shares * logs).sum(1)) / np.log(shares.shape[1])


def consistencies(shares: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Influences on the mean consistency of the questions that have partners, and which questions these are.

    shares (questions, labels); classes (questions,).  Both results are (kept questions,).  Cost: the questions of a class, squared.
    """
    items, kept = np.zeros(len(classes)), np.zeros(len(classes), bool)
    for which in np.unique(classes):
        places = np.flatnonzero(classes == which)
        if len(places) < 2:
            continue
        own = shares[places]
        # each question's distance to itself is 0, so that the sum is over its partners
        means = np.array([1 - np.abs(own - one).sum() / 2 / (len(own) - 1) for one in own])
        items[places], kept[places] = means.mean() + 2 * (means - means.mean()), True
    return items[kept], np.flatnonzero(kept)
