"""Questions with several choices on several skills, of which a small model has some."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from etude.method import Method
from etude.values.corpus import Corpus
from etude.values.errors import nearest
from etude.worlds.instructions import Instructions
from etude.worlds.language import Language, prose
from etude.worlds.people import CHOICES, People
from etude.worlds.stdlib import Stdlib

MODULES = 60
"""Held-out modules from which gaps are taken."""


class Gap(NamedTuple):
    """A kind of word that is left out of a line and to be found again."""

    pattern: str
    """The word with the space before it, if one is there."""
    holds: Callable[[str], bool]
    """Whether a match is of this kind."""
    text: str = "code"
    """``code``, ``prose`` or ``cipher``: where it is looked for."""


GAPS = {
    "keyword": Gap(r"(?<=[\w)\]:,]) [a-z]+\b", lambda word: keyword.iskeyword(word.strip())),
    "attribute": Gap(r"(?<=\w\.)[a-z_]+\b", lambda word: len(word) > 2),
    "argument": Gap(r"(?<=[(\[])[a-z_]+\b", lambda word: len(word) > 1),
    "sign": Gap(r"(?<=\w)[^\w\s]+(?=\s|\w|$)", lambda word: True),
    "prose": Gap(r"(?<=[a-z,]) [a-z]+\b", lambda word: True, "prose"),
    "cipher": Gap(r"(?<=\w) [a-z]+\b|(?<=\w\.)[a-z_]+\b", lambda word: len(word) > 2, "cipher"),
}
TASKS = ("last_item", "largest", "length", "first_letters", "item")
SKILLS = (*GAPS, *TASKS, *CHOICES)


@dataclass(frozen=True)
class Exam(Method):
    """A bank of questions for `multiple_choice` and for the study of benchmarks themselves: many skills, as many questions of each.

    - ``keyword``, ``attribute``, ``argument`` and ``sign``: what comes next in a line of a held-out module of `etude:stdlib`, a Python keyword, a name after a dot or a bracket, punctuation;
      ``prose``: the next word in its comments and docstrings; ``cipher``: in `etude:language` with seed 1.  The wrong choices are of the same kind, from other places.
    - ``last_item``, ``largest``, ``length``, ``first_letters``, ``item``: held-out records of `etude:instructions`, the wrong choices from other records.
    - ``city``, ``year``, ``employer``, ``study``, ``hobby``: facts of `etude:people`'s first persons (those of seed 0); the wrong choices are other values of the attribute.

    A model that was trained on the library alone knows some of the first six; the others are learned from their worlds' training splits.  A skill that is named twice comes again with other
    questions, under the name ``prose_2``: a planted duplicate, which measures what the first one does.

    Columns prompt, choices, answer and skill, skill after skill.  A choice brings the space before it.  The right one's place is drawn.
    Cost: the library is read, and enciphered for ``cipher``, anew each time; nothing is stored.
    """

    skills: tuple[str, ...] = ("keyword", "attribute", "argument", "sign", "prose")
    """Names of skills; one named again comes with further questions."""
    items: int = 50
    """Questions of each skill."""
    choices: int = 4
    """Choices of each question, the right one included."""
    context: int = 48
    """Characters before a gap that are shown, at most; fewer at the beginning of a text."""
    seed: int = 0
    """Which questions are drawn; at least 0."""

    def __post_init__(self) -> None:
        if not self.skills:
            raise ValueError(f"skills names at least one of {', '.join(SKILLS)}")
        for skill in self.skills:
            if skill not in SKILLS:
                raise ValueError(f"skills are some of {', '.join(SKILLS)}, got {skill!r}. {nearest(skill, SKILLS)}")
        for name, least in (("items", 1), ("choices", 2), ("context", 8), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}, got {getattr(self, name)}")
        if self.choices > 8:
            raise ValueError(f"choices are at most 8, got {self.choices}")

    def apply(self) -> Corpus:
        sources: dict[str, list[str]] = {}
        records = []
        for place, skill in enumerate(self.skills):
            again = self.skills[:place].count(skill)
            random = np.random.default_rng([self.seed, SKILLS.index(skill), again])
            if skill in GAPS:
                kind = GAPS[skill].text
                if kind not in sources:
                    sources[kind] = texts(kind)
                drawn = self._gaps(GAPS[skill], sources[kind], random)
            else:
                drawn = self._tasks(skill, again, random) if skill in TASKS else self._facts(skill, again, random)
            name = skill if not again else f"{skill}_{again + 1}"
            for prompt, right, wrong in drawn:
                answer = int(random.integers(self.choices))
                records.append({"prompt": prompt, "choices": [*wrong[:answer], right, *wrong[answer:]], "answer": answer, "skill": name})
        return Corpus(records)

    def _gaps(self, gap: Gap, among: Sequence[str], random: np.random.Generator) -> list[tuple[str, str, list[str]]]:
        """Prompt, right choice and wrong ones of each question."""
        pattern = re.compile(gap.pattern, re.MULTILINE)
        found: list[tuple[str, str, list[str]]] = []

        def place() -> re.Match[str]:
            while True:
                text = among[int(random.integers(len(among)))]
                match = pattern.search(text, int(random.integers(len(text))))
                if match and gap.holds(match[0]):
                    return match

        while len(found) < self.items:
            match = place()
            before = match.string[max(0, match.start() - self.context) : match.start()]
            before = before[before.find(" ") + 1 :] if match.start() > self.context else before
            if len(before) < self.context // 2:
                continue
            wrong: list[str] = []
            while len(wrong) < self.choices - 1:
                other = place()[0]
                if other not in (match[0], *wrong):
                    wrong.append(other)
            found.append((before, match[0], wrong))
        return found

    def _tasks(self, skill: str, again: int, random: np.random.Generator) -> list[tuple[str, str, list[str]]]:
        records = list(Instructions("heldout", self.items, (skill,), self.seed + 1000 * again)())
        answers = [record["completion"] for record in list(Instructions("heldout", 200, (skill,), self.seed + 1000 * again + 1)())]
        return [(record["prompt"], record["completion"], _others(record["completion"], answers, self.choices - 1, random)) for record in records]

    def _facts(self, skill: str, again: int, random: np.random.Generator) -> list[tuple[str, str, list[str]]]:
        asked = [record for record in People(max(200, (again + 1) * self.items), split="all_questions")() if record["attribute"] == skill][again * self.items :][: self.items]
        values = [f" {value}" for value in CHOICES[skill]]
        return [(record["prompt"], record["completion"], _others(record["completion"], values, self.choices - 1, random)) for record in asked]


def texts(kind: str) -> list[str]:
    """Where gaps are looked for: held-out modules, their English, or the modules enciphered."""
    corpus = Language("heldout", seed=1)() if kind == "cipher" else Stdlib("heldout")()
    modules = [text for text in corpus.texts if len(text) > 2000][:MODULES]
    if kind != "prose":
        return modules
    return [text for text in ("\n\n".join(prose(module)) for module in modules) if len(text) > 500]


def _others(right: str, among: Sequence[str], count: int, random: np.random.Generator) -> list[str]:
    """So many different values that are not the right one."""
    values = sorted(set(among) - {right})
    return [values[place] for place in random.permutation(len(values))[:count]]
