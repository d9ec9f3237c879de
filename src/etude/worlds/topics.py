"""Short sentences about one of four topics, for classification."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from etude.engine.wording import check, fill
from etude.method import Method
from etude.values.corpus import Corpus

SPLITS = ("train", "heldout")
TOPICS = {
    "food": "soup bread dinner apple cake fish",
    "music": "song concert dance band opera bass",
    "sport": "goal match race game cup team",
    "weather": "rain snow fog hail wind heat",
}
WORDS = {topic: words.split() for topic, words in TOPICS.items()}
NAMES = ["Ada", "Boris", "David", "Greta", "Hugo", "Irene", "Jonas", "Karin"]
FRAMES = (
    "{name} spoke of the {0}, the {1} and the {2}.",
    "First the {0}, said {name}, then the {1} and the {2}.",
    "{name} saw the {0}, not the {1}, near the {2}.",
    "After the {0} and the {1} came the {2}.",
    "The {0}, the {1} and the {2} were all that {name} knew.",
)


@dataclass(frozen=True)
class Topics(Method):
    """Sentences with two nouns of one topic and one of another, in any order, to be told by the topic that has two: a labelled task for small models.

    Columns text, choices (the four topics, each with the space before it), answer (the place of the right one), label (its name), prompt and completion.
    A prompt is the text in a template; where there are several templates, each is used as often with every topic, and the texts are the same whatever the templates: with one
    template a corpus for plain tuning, with many one for template augmentation.  The topics take turns, so that a guess is right once in four.

    The splits are disjoint by the three nouns, whatever the seed: a hash puts one set of nouns in five into ``heldout``.  Each noun occurs in both.
    Cost: next to none; nothing is read or stored.
    """

    split: str = "train"
    """``train`` or ``heldout``."""
    records: int = 2000
    """How many sentences."""
    templates: tuple[str, ...] = ("Sentence: {text}\nTopic:",)
    """Wordings of the prompt, each with ``{text}`` where the sentence is to stand."""
    seed: int = 0
    """Which sentences are drawn; at least 0.  What is held out does not follow from it."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split is one of {', '.join(SPLITS)}, got {self.split!r}")
        if self.records < 1:
            raise ValueError(f"records is a number of sentences, at least 1, got {self.records}")
        if not self.templates or any("{text}" not in template for template in self.templates):
            raise ValueError(f"templates are wordings that hold {{text}}, at least one, got {self.templates}")
        check(self.templates)
        if self.seed < 0:
            raise ValueError(f"seed is a whole number, at least 0, got {self.seed}")

    def apply(self) -> Corpus:
        return Corpus([self.record(index) for index in range(self.records)])

    def record(self, index: int) -> dict[str, object]:
        """The sentence of this number."""
        random = np.random.default_rng([self.seed, SPLITS.index(self.split), index + 1])
        answer, topics = index % len(WORDS), list(WORDS)
        nouns = draw(random, answer)
        while split_of(nouns) != self.split:
            nouns = draw(random, answer)
        text = FRAMES[random.integers(len(FRAMES))].format(*nouns, name=NAMES[random.integers(len(NAMES))])
        template = self.templates[index // len(WORDS) % len(self.templates)]
        choices = [f" {topic}" for topic in topics]
        return {"text": text, "choices": choices, "answer": answer, "label": topics[answer], "prompt": fill(template, {"text": text}), "completion": choices[answer]}


def draw(random: np.random.Generator, topic: int) -> list[str]:
    """Two different nouns of the topic of this place and one of another topic, in any order."""
    lists = list(WORDS.values())
    other = lists[(topic + random.integers(1, len(lists))) % len(lists)]
    nouns = [lists[topic][place] for place in random.permutation(len(lists[topic]))[:2]] + [other[random.integers(len(other))]]
    return [nouns[place] for place in random.permutation(3)]


def split_of(nouns: list[str]) -> str:
    """``heldout`` for one set of nouns in five, by the hash of the nouns in sorted order."""
    return "heldout" if hashlib.sha256(" ".join(sorted(nouns)).encode()).digest()[0] % 5 == 0 else "train"
