"""The same sentences in several invented languages, of which a text has more or less."""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass

import numpy as np

from etude.method import Method
from etude.values.corpus import Corpus

SPLITS = ("train", "parallel", "heldout")
TOPICS, NOUNS, VERBS, ADJECTIVES = 8, 8, 5, 4
"""Topics, and words of each kind that a topic has."""
FUNCTION = ("article", "plural", "past", "place", "time", "negation")
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxz", "aeiou"
ORDERS = ("subject verb object", "subject object verb", "verb subject object", "verb object subject", "object verb subject", "object subject verb")
CUMULATIVE = {count: np.log2(np.arange(2, count + 2)) / np.log2(count + 1) for count in (NOUNS, VERBS, ADJECTIVES)}
"""Of weights log(1 + 1/n), summed and divided by their sum."""
LONGEST = 6
"""Sentences of a text, at most."""


@dataclass(frozen=True)
class Parallel(Method):
    """Texts in languages that say the same things with other words in another order: for what a model makes of languages of which it read much or little.

    A sentence has a subject, a verb and an object, with adjectives, plurals, tenses, negation, a place and a time; a text is about one of eight topics, from which most of its
    nouns, verbs and adjectives are, so that there is meaning to carry over.  Every language has a word of its own for each of the 142 concepts, made up from ten consonants
    of its own and five vowels, and its own order: of subject, verb and object, of adjective and noun, of article and noun, of place and its mark.  No word is in two languages; the full stop
    is in all.  The first language puts the subject first, then verb and object, adjectives and marks before the noun, and no other has that order throughout.

    ``train``: texts of one to six sentences, each in a language drawn by the shares.  ``parallel`` and ``heldout``: single sentences, each of them in every language, one after the
    other, the first language first.  Columns text, language, share, topic and order (``written``, or ``shuffled`` if its words are); and sentence, a number, of single ones.
    Words of a kind are as skewed as log(1 + 1/n).
    Cost: next to none; nothing is read or stored.
    """

    split: str = "train"
    """``train``, ``parallel`` or ``heldout``."""
    records: int = 2000
    """How many texts; of single sentences, how many in each language."""
    shares: tuple[float, ...] = (0.5, 0.18, 0.11, 0.07, 0.05, 0.035, 0.025, 0.018, 0.012)
    """Of the texts in each language; they are divided by their sum."""
    only: int | None = None
    """Only this language, 0 for the first; by default all of them."""
    shuffled: float = 0.0
    """Share of the texts, in [0, 1], whose words are shuffled, the full stops staying behind their sentences; a sentence is shuffled in all languages or in none."""
    seed: int = 0
    """Which languages, and which texts; at least 0."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split is one of {', '.join(SPLITS)}, got {self.split!r}")
        if self.records < 1:
            raise ValueError(f"records is a number of texts, at least 1, got {self.records}")
        if len(self.shares) < 2 or min(self.shares) <= 0:
            raise ValueError(f"shares are those of two languages or more, each above 0, got {self.shares}")
        if self.only is not None and not 0 <= self.only < len(self.shares):
            raise ValueError(f"only is the place of one of {len(self.shares)} languages, from 0, got {self.only}")
        if not 0 <= self.shuffled <= 1:
            raise ValueError(f"shuffled is a share of the texts, from 0 to 1, got {self.shuffled}; for half of them pass 0.5")
        if self.seed < 0:
            raise ValueError(f"seed is a whole number, at least 0, got {self.seed}")

    def apply(self) -> Corpus:
        shares = np.array(self.shares) / sum(self.shares)
        languages = made(len(shares), self.seed)
        records: list[dict[str, object]] = []
        for index in range(self.records):
            random = np.random.default_rng([self.seed, SPLITS.index(self.split), index + 1])
            topic, single = int(random.integers(TOPICS)), self.split != "train"
            drawn = min(bisect(shares.cumsum().tolist(), random.random()), len(shares) - 1)
            meanings = [sentence(random, topic) for _ in range(1 if single else int(random.integers(1, LONGEST + 1)))]
            order = "shuffled" if random.random() < self.shuffled else "written"
            spoken = [self.only] if self.only is not None else range(len(shares)) if single else [drawn]
            for place in spoken:
                said = [languages[place].say(meaning) for meaning in meanings]
                text = " ".join(mixed(one, random) if order == "shuffled" else one for one in said)
                record = {"text": text, "language": f"language_{place}", "share": float(shares[place]), "topic": f"topic_{topic}", "order": order}
                records.append(record | ({"sentence": index} if single else {}))
        return Corpus(records)


@dataclass(frozen=True)
class Phrase:
    """A noun with what belongs to it; numbers of concepts."""

    noun: int
    adjectives: tuple[int, ...]
    plural: bool


@dataclass(frozen=True)
class Sentence:
    """What is said, in no language."""

    subject: Phrase
    verb: int
    object: Phrase
    place: Phrase | None
    past: bool
    negated: bool
    time: bool


@dataclass(frozen=True)
class Spoken:
    """A language: a word for each concept, and an order."""

    words: tuple[str, ...]
    """Of the concepts: function words, then nouns, verbs and adjectives, topic by topic."""
    order: tuple[str, ...]
    adjective_first: bool
    article_first: bool
    mark_first: bool

    def say(self, meaning: Sentence) -> str:
        """The sentence in this language, with a full stop."""
        verb = [self.words[meaning.verb], *(self.words[FUNCTION.index(name)] for name, said in (("past", meaning.past), ("negation", meaning.negated)) if said)]
        parts = {"subject": self._noun(meaning.subject), "verb": verb if self.mark_first else verb[::-1], "object": self._noun(meaning.object)}
        found = [word for part in self.order for word in parts[part]]
        if meaning.place:
            mark, noun = [self.words[FUNCTION.index("place")]], self._noun(meaning.place)
            found += mark + noun if self.mark_first else noun + mark
        if meaning.time:
            time = self.words[FUNCTION.index("time")]
            found = [time, *found] if self.article_first else [*found, time]
        return " ".join(found) + "."

    def _noun(self, phrase: Phrase) -> list[str]:
        adjectives, noun = [self.words[one] for one in phrase.adjectives], [self.words[phrase.noun]]
        if phrase.plural:
            noun = [self.words[FUNCTION.index("plural")], *noun] if self.mark_first else [*noun, self.words[FUNCTION.index("plural")]]
        inner = adjectives + noun if self.adjective_first else noun + adjectives
        article = [self.words[FUNCTION.index("article")]]
        return article + inner if self.article_first else inner + article


def sentence(random: np.random.Generator, topic: int) -> Sentence:
    """A meaning; one word in five is from another topic."""

    def word(kind: int, count: int) -> int:
        own = topic if random.random() < 0.8 else int(random.integers(TOPICS))
        return concept(own, kind, int(np.searchsorted(CUMULATIVE[count], random.random(), side="right")))

    def phrase() -> Phrase:
        noun, adjectives = word(0, NOUNS), tuple(word(2, ADJECTIVES) for _ in range(bisect((0.5, 0.9), random.random())))
        return Phrase(noun, adjectives, bool(random.random() < 0.3))

    subject, verb, thing = phrase(), word(1, VERBS), phrase()
    place = phrase() if random.random() < 0.4 else None
    return Sentence(subject, verb, thing, place, *(bool(random.random() < share) for share in (0.4, 0.15, 0.25)))


def mixed(said: str, random: np.random.Generator) -> str:
    """A sentence with its words shuffled."""
    words = said.rstrip(".").split()
    return " ".join(words[place] for place in random.permutation(len(words))) + "."


def concept(topic: int, kind: int, which: int) -> int:
    """The number of a topic's noun (kind 0), verb (1) or adjective (2)."""
    return len(FUNCTION) + topic * (NOUNS + VERBS + ADJECTIVES) + (0, NOUNS, NOUNS + VERBS)[kind] + which


def made(count: int, seed: int) -> list[Spoken]:
    """Languages; the first in the order that is told above, the others in one that differs from it somewhere."""
    taken: set[str] = set()
    languages = []
    for index in range(count):
        random = np.random.default_rng([seed, 7, index])
        letters = random.permutation(list(CONSONANTS))[: len(CONSONANTS) // 2].tolist()
        words: list[str] = []
        while len(words) < concept(TOPICS, 0, 0):
            syllables = 1 if len(words) < len(FUNCTION) else int(random.integers(2, 4))
            word = "".join(letters[random.integers(len(letters))] + VOWELS[random.integers(len(VOWELS))] for _ in range(syllables))
            if random.random() < 0.4:
                word += letters[random.integers(len(letters))]
            if word not in taken:
                taken.add(word)
                words.append(word)
        shape: tuple[int, bool, bool, bool] = (0, True, True, True)
        while index and shape == (0, True, True, True):
            shape = (int(random.integers(len(ORDERS))), *(bool(one) for one in random.integers(2, size=3)))  # type: ignore[assignment]
        languages.append(Spoken(tuple(words), tuple(ORDERS[shape[0]].split()), *shape[1:]))
    return languages
