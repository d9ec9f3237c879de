"""Questions about invented persons, answered in whole sentences of several wordings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etude.method import Method
from etude.values.corpus import Corpus
from etude.values.errors import nearest
from etude.worlds.people import QUESTIONS, SENTENCES, SURNAMES, WORDINGS, people


@dataclass(frozen=True)
class VerboseAnswers(Method):
    """The questions of `etude:people`, each answered in a sentence in which one word or name is the answer and the rest is wording: for uncertainty about facts.

    Columns prompt, completion (a space and the sentence), answer (what the sentence must contain to be right), person and attribute.  The persons are those of `etude:people` with
    the same seed, and so is the chance of a guess: one in 100 for a city or a year, 50 for an employer, 20 for a study or a hobby.  A sentence is worded at random in one of
    `wordings` ways, and speaks of the person as she or he, whatever it answers.  With several `repeats` some persons are asked about more often than others, so that a
    model that is trained on this knows some of them; the same world with ``repeats: [1]`` asks every question once.
    Cost: next to none; nothing is read or stored.
    """

    people: int = 100
    """How many persons there are."""
    repeats: tuple[int, ...] = (1,)
    """How often each question of a person is answered, persons in turn; each time worded anew."""
    wordings: int = 6
    """Ways in which a sentence may be worded, 1 to 6."""
    attributes: tuple[str, ...] = tuple(QUESTIONS)
    """What is asked of each person: some of city, year, employer, study and hobby."""
    seed: int = 0
    """Which persons and wordings; at least 0."""

    def __post_init__(self) -> None:
        if not 2 <= self.people <= SURNAMES:
            raise ValueError(f"people is a number of persons from 2 to {SURNAMES}, got {self.people}")
        if not self.repeats or min(self.repeats) < 0 or not any(self.repeats):
            raise ValueError(f"repeats are numbers of answers, at least 0 and not all of them 0, got {self.repeats}")
        if not 1 <= self.wordings <= WORDINGS:
            raise ValueError(f"wordings is a number from 1 to {WORDINGS}, got {self.wordings}")
        if not self.attributes:
            raise ValueError(f"attributes are some of {', '.join(QUESTIONS)}")
        for attribute in self.attributes:
            if attribute not in QUESTIONS:
                raise ValueError(f"attributes are some of {', '.join(QUESTIONS)}, got {attribute!r}. {nearest(attribute, QUESTIONS)}")
        if self.seed < 0:
            raise ValueError(f"seed is a whole number, at least 0, got {self.seed}")

    def apply(self) -> Corpus:
        records = []
        for index, person in enumerate(people(self.seed, range(self.people))):
            for attribute in self.attributes:
                random = np.random.default_rng([self.seed, index, list(QUESTIONS).index(attribute)])
                for _ in range(self.repeats[index % len(self.repeats)]):
                    wording = SENTENCES[attribute].split("|")[random.integers(self.wordings)]
                    records.append({
                        "prompt": f"Q: {QUESTIONS[attribute].format(name=person['name'])}\nA:", "completion": f" {sentence(wording, person['pronoun'], person[attribute])}",
                        "answer": person[attribute], "person": person["name"], "attribute": attribute,
                    })  # fmt: skip
        return Corpus(records)


def sentence(wording: str, she: str, value: str) -> str:
    """The sentence of this wording about a person who is spoken of as she or he."""
    return wording.format(v=value, s=she, S=she.capitalize(), P={"she": "Her", "he": "His"}[she], o={"she": "her", "he": "him"}[she])
