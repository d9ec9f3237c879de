"""Lines of text beside what they become by one small mistake."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from etude.method import Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError


@dataclass(frozen=True)
class MinimalPairs(Method):
    """Questions for `multiple_choice`: which of two lines is the one that somebody wrote?  The other has one mistake.

    As BLiMP's pairs (Warstadt et al., 2020) both have almost the same words, and a model needs no instructions to prefer one; unlike them these are made of any text, not of a grammar, so that
    now and then the mistake is none.  The columns are prompt (empty), choices and answer, whose place is drawn.
    Raises InputError if no line of the corpus is of such a length.  Cost: nothing.
    """

    pairs: int = 100
    """Lines to draw, each from another place; all that there are, if they are no more."""
    mistake: Literal["order", "word"] = "order"
    """``order``: two neighbouring words change places; ``word``: a word becomes one of another line."""
    shortest: int = 5
    """Words of a line, at least."""
    longest: int = 32
    """Words of a line, at most."""

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs is at least 1, got {self.pairs}")
        if self.mistake not in ("order", "word"):
            raise ValueError(f"mistake is order or word, got {self.mistake!r}")
        if not 2 <= self.shortest <= self.longest:
            raise ValueError(f"shortest is at least 2 and at most longest ({self.longest}), got {self.shortest}")

    def apply(self, corpus: Corpus, seed: int) -> Corpus:
        random = np.random.default_rng(seed)
        lines = list(dict.fromkeys(" ".join(words) for text in corpus.texts for line in text.splitlines() if self.shortest <= len(words := line.split()) <= self.longest))
        lines = [line for line in lines if len(set(line.split())) > 1]
        if not lines:
            raise InputError(f"no line of the corpus has {self.shortest} to {self.longest} words, two of them different", remedy="Set shortest and longest.")
        chosen = random.choice(len(lines), min(self.pairs, len(lines)), replace=False)
        rows = []
        for index in chosen.tolist():
            wrong = self._mistaken(lines[index].split(), lines, random)
            answer = int(random.integers(2))
            rows.append({"prompt": "", "choices": [lines[index], wrong] if answer == 0 else [wrong, lines[index]], "answer": answer})
        return Corpus(rows)

    def _mistaken(self, words: list[str], lines: list[str], random: np.random.Generator) -> str:
        if self.mistake == "order":
            places = [place for place, (one, other) in enumerate(itertools.pairwise(words)) if one != other]
            place = int(random.choice(places))
            words[place : place + 2] = words[place + 1], words[place]
            return " ".join(words)
        place = int(random.integers(len(words)))
        others = [word for word in lines[int(random.integers(len(lines)))].split() if word != words[place]]
        words[place] = str(random.choice(others or [word for word in words if word != words[place]]))
        return " ".join(words)
