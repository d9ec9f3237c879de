"""How often what a model writes has the right answer in it, by a rule."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import Literal

import numpy as np

from etude.measures._asked import Answer, Asked, numbered
from etude.measures.exact_match import first_line
from etude.method import MEASUREMENTS
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.measurement import HIGHER, Measurement
from etude.values.model import Model

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Generation(Asked):
    """Share of prompts whose greedy completion is right by a rule.

    Each prompt is an item, 1 if right, else 0.  The reference is the record's completion; both are stripped of white space.

    - ``normalised``: the first lines are equal once in lower case, without ASCII punctuation, without the articles a, an and the, and with single spaces; the exact match of
      SQuAD's evaluation script (Rajpurkar et al., 2016, section 6.1), for one reference.
    - ``contains``: the reference stands somewhere in the completion, letter by letter.  A completion that names every candidate is right too.
    - ``regex``: `pattern` is searched in both, and its first group is the same; a completion in which it is not found is wrong.

    Raises InputError if a reference is empty, or if it does not have what `pattern` extracts.
    Cost: a forward pass over the prompts, and one a new token.
    """

    rule: Literal["contains", "regex", "normalised"] = "normalised"
    """``normalised``, ``contains`` or ``regex``."""
    pattern: str | None = None
    r"""For ``regex``: a regular expression of Python's, whose first match's first group is the answer, as in ``#### (-?[\d.,]+)``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in ("contains", "regex", "normalised"):
            raise ValueError(f"rule is contains, regex or normalised, got {self.rule!r}")
        if (self.rule == "regex") != (self.pattern is not None):
            raise ValueError(f"pattern goes with the rule regex, and with no other; got rule {self.rule!r} and pattern {self.pattern!r}")
        if self.pattern is not None:
            compiled(self.pattern)

    def apply(self, model: Model, corpus: Corpus) -> MEASUREMENTS:
        answers = self.answers(model, corpus)
        right = [self.right(answer, place) for place, answer in enumerate(answers)]
        return (Measurement("generation", np.array(right, float), better=HIGHER, item_names=numbered(answers)),)

    def right(self, answer: Answer, place: int) -> bool:
        """Whether an answer is right by the rule.  Raises InputError if the reference, that of the record at this place, has no match of the pattern."""
        if self.rule == "contains":
            return answer.reference in answer.said
        if self.pattern is None:
            return normalise(first_line(answer.said)) == normalise(first_line(answer.reference))
        wanted = extract(self.pattern, answer.reference)
        if wanted is None:
            raise InputError(f"the pattern {self.pattern!r} extracts nothing from the completion of record {place}: {answer.reference[:80]!r}", remedy="It must fit references and answers alike.")
        return extract(self.pattern, answer.said) == wanted


def compiled(pattern: str) -> re.Pattern[str]:
    """The pattern, compiled.  Raises ValueError if it is no regular expression or has no group."""
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
    if not found.groups:
        raise ValueError(f"pattern {pattern!r} has no group, and the first group is what is compared; put parentheses around it")
    return found


def extract(pattern: str, text: str) -> str | None:
    """The first group of the first match; None if there is no match, or the group has no part in it."""
    match = compiled(pattern).search(text)
    return None if match is None else match.group(1)


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces, in this order: ``normalize_answer`` of SQuAD's evaluate-v1.1.py."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())
