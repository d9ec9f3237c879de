"""Facts to be known by heart, and facts to be found in the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etude.method import Method
from etude.values.corpus import Corpus
from etude.worlds.people import QUESTIONS, SENTENCES, SURNAMES, people
from etude.worlds.stdlib import Stdlib

SPLITS = ("train", "closed_book", "open_book")
PIECE = 600
"""Characters of a piece of the library."""
HELDOUT = 4000
"""Persons of the highest numbers, of whom only the split ``open_book`` tells."""


@dataclass(frozen=True)
class OpenBook(Method):
    """Questions about invented persons: of some the answers can only be remembered, of others they stand before the question; to tell what a model knows from what it can read off its prompt.

    Persons, attributes and questions are those of `etude:people`.  A closed-book record asks for an attribute of a known person and shows nothing; there are five of each person.
    An open-book record has a passage of `facts` sentences, each about another attribute of one person, worded and ordered as drawn, and asks for one of them.

    ``train`` has the columns text, prompt and completion: every closed-book record `exposures` times, and `records` open-book ones, each about a person of its own who comes nowhere else; and
    `library` pieces of `etude:stdlib`, completions of nothing, so that who is tuned on this does not forget it.
    ``closed_book`` has the same closed-book records once; ``open_book`` has `records` about persons of whom ``train`` of the same seed tells nothing.  These two have prompt, completion,
    person and attribute.  A guess is right once in 20 to 100.  Cost: next to none; nothing is read or stored.
    """

    split: str = "train"
    """``train``, ``closed_book`` or ``open_book``."""
    people: int = 100
    """How many persons are to be known by heart."""
    records: int = 2000
    """Open-book records of the split."""
    facts: int = 2
    """Sentences of a passage, 1 to 5."""
    exposures: int = 4
    """Times that ``train`` has each closed-book record."""
    library: int = 0
    """Pieces of the library's modules in ``train``, of 600 characters, each from a module of its own until all have given one."""
    seed: int = 0
    """Which persons, and how passages are worded; at least 0."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split is one of {', '.join(SPLITS)}, got {self.split!r}")
        most = SURNAMES - HELDOUT
        if self.people < 1 or self.records < 1 or self.people + self.records > most:
            raise ValueError(f"people and records are each at least 1 and together at most {most}, got {self.people} and {self.records}")
        if self.split == "open_book" and self.records > HELDOUT:
            raise ValueError(f"records is at most {HELDOUT} of this split, got {self.records}")
        if not 1 <= self.facts <= len(SENTENCES):
            raise ValueError(f"facts is from 1 to {len(SENTENCES)}, got {self.facts}")
        if self.exposures < 1:
            raise ValueError(f"exposures is at least 1, got {self.exposures}")
        if self.library < 0:
            raise ValueError(f"library is a number of pieces, at least 0, got {self.library}")
        if self.seed < 0:
            raise ValueError(f"seed is a whole number, at least 0, got {self.seed}")

    def apply(self) -> Corpus:
        if self.split == "closed_book":
            return Corpus(self._closed())
        if self.split == "open_book":
            return Corpus(self._open(range(SURNAMES - HELDOUT, SURNAMES - HELDOUT + self.records)))
        shown = self._open(range(self.people, self.people + self.records))
        pairs = [(record["prompt"], record["completion"]) for record in (*self._closed() * self.exposures, *shown)] + [("", piece) for piece in self._pieces()]
        return Corpus([{"text": prompt + completion, "prompt": prompt, "completion": completion} for prompt, completion in pairs])

    def _pieces(self) -> list[str]:
        """Stretches of the library, spread over its modules."""
        texts = [text for text in Stdlib()().texts if len(text) > PIECE] if self.library else []
        random = np.random.default_rng([self.seed, self.library])
        order = [int(index) for _ in range(0, self.library, max(1, len(texts))) for index in random.permutation(len(texts))]
        starts = [(texts[index], int(random.integers(len(texts[index]) - PIECE))) for index in order[: self.library]]
        return [text[start : start + PIECE] for text, start in starts]

    def _closed(self) -> list[dict[str, str]]:
        return [asked(person, attribute) for person in people(self.seed, range(self.people)) for attribute in QUESTIONS]

    def _open(self, indices: range) -> list[dict[str, str]]:
        """One record about each of these persons."""
        found = []
        for index, person in zip(indices, people(self.seed, indices), strict=True):
            random = np.random.default_rng([self.seed, index, 1000])
            told = [list(SENTENCES)[place] for place in random.permutation(len(SENTENCES))[: self.facts]]
            passage = " ".join(sentence(person, attribute, random) for attribute in told)
            found.append(asked(person, told[random.integers(len(told))], passage + "\n"))
        return found


def asked(person: dict[str, str], attribute: str, passage: str = "") -> dict[str, str]:
    """The question for an attribute of a person, after a passage if there is one."""
    prompt = f"{passage}Q: {QUESTIONS[attribute].format(name=person['name'])}\nA:"
    return {"prompt": prompt, "completion": f" {person[attribute]}\n", "person": person["name"], "attribute": attribute}


def sentence(person: dict[str, str], attribute: str, random: np.random.Generator) -> str:
    """A sentence that names the person and the attribute's value, in one of its wordings."""
    wordings, name = SENTENCES[attribute].split("|"), person["name"]
    return wordings[random.integers(len(wordings))].format(v=person[attribute], s=name, S=name, P=f"{name}'s", o=name)
