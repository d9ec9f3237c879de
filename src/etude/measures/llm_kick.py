"""What compression takes from a model beside its perplexity: what it knows, and what it can still read off its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from etude.engine.score import require_causal
from etude.measures._asked import Answer, Asked
from etude.measures.exact_match import first_line
from etude.measures.perplexity import Perplexity
from etude.method import MEASUREMENTS
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.measurement import HIGHER, LOWER, Measurement
from etude.values.model import Model


@dataclass(frozen=True)
class LLMKick(Asked):
    """LLM-KICK: how much a compressed model lost of recall and of reading in context, relative to the dense model, next to what its perplexity says.

    The first model is the dense one, every further one is compared with it: ``of: [dense, pruned]``, ``on: closed_book``, ``inputs: {open_book: …, text: …}``.  `corpus` holds
    questions whose answers only the weights can tell, `open_book` such as have the answer in their prompt, both with the columns prompt and completion; `text` is held-out text.
    A question is answered rightly if the greedy completion's first line that says anything is the completion's.  Parts of each model:

    - ``closed_book`` and ``open_book``: share of right answers, each question an item; ``perplexity`` of the text, each document an item;
    - ``closed_book_drop`` and ``open_book_drop``: 1 - the model's share over the dense one's: 0 where nothing is lost, 1 where nothing is left, below 0 where something was won.  An item
      is the question's influence, drop - (right - (1 - drop) · right of the dense) / share of the dense, so that the plain mean is exactly the drop and the interval is that of a ratio.
      Left out, with what follows from them, where the dense model has no right answer at all;
    - ``perplexity_rise``: the perplexity over the dense model's, less 1; and ``text_drop``: 1 - the dense model's perplexity over this one's, which is the relative drop of the probability that
      a token is given (its geometric mean), and so on the scale of the other drops.  Items are influences as well;
    - ``closed_book_broken`` and ``open_book_broken``: 1 where the drop is more than `tolerance`, else 0, and ``perplexity_broken`` where the rise is: what is within the tolerance
      counts as a match with the dense model.  ``unseen``: 1 where recall is broken and perplexity is not.

    The dense model beside itself has lost nothing.  Over a grid of sparsities or bits these show where each falls.
    Departures: the paper's tasks on real knowledge (FreebaseQA, MMLU, TriviaQA with and without its document) become two corpora of the user's, answers are compared by their first
    lines, not by whether they occur in what is said, and its summaries and free answers, which another model judges, are left out.
    Raises InputError for a model that is not causal, and for a corpus without the columns or without records, or with an answer of nothing.
    Source: Jaiswal et al., "Compressing LLMs: The Truth is Rarely Pure and Never Simple", 2024 (arXiv 2310.01382), sections 2 and 3; a match within 5% of the dense model is theirs.
    Cost: for every model a forward pass over the prompts, one a new token, and one over the text.
    """

    paper = "llm-kick"

    tolerance: float = 0.05
    """Relative drop, or rise of perplexity, up to which a model counts as a match, at least 0; the paper's 5%."""
    new: int = 16
    """Tokens that an answer may have."""
    tokens: int | None = None
    """Score only so many tokens of each document of the text, from its beginning; all of them by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tolerance < 0:
            raise ValueError(f"tolerance is a share, at least 0, got {self.tolerance}; for 5% pass 0.05")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens is at least 1, got {self.tokens}; leave it out to score all")

    def apply(self, models: list[Model], corpus: Corpus, open_book: Corpus, text: Corpus) -> MEASUREMENTS:
        if not models:
            raise InputError("a comparison needs a dense model, and perhaps compressed ones", remedy="As in `of: [dense, pruned]`.")
        for model in models:
            require_causal(model, "LLM-KICK")
        books = {"closed_book": corpus, "open_book": open_book}
        right = {name: [judged(self.answers(model, book)) for model in models] for name, book in books.items()}
        perplexities = [Perplexity(tokens=self.tokens)(model, text)[0] for model in models]
        found: list[Measurement] = []
        for place, perplexity in enumerate(perplexities):
            rise = rises(perplexity, perplexities[0])
            lost = -rises(perplexities[0], perplexity)
            found += [perplexity, *(Measurement(name, items, item_names=perplexity.item_names) for name, items in (("perplexity_rise", rise), ("text_drop", lost)))]
            found.append(self._broken("perplexity", rise))
            for name, answers in right.items():
                found += self._book(name, answers[place], answers[0])
            if right["closed_book"][0].any():
                recall = drops(right["closed_book"][place], right["closed_book"][0]).mean()
                found.append(Measurement("unseen", np.array([float(recall > self.tolerance >= rise.mean())])))
        return tuple(found)

    def _book(self, name: str, right: np.ndarray, dense: np.ndarray) -> list[Measurement]:
        names = tuple(map(str, range(len(right))))
        found = [Measurement(name, right, better=HIGHER, item_names=names)]
        if dense.any():
            lost = drops(right, dense)
            found += [Measurement(f"{name}_drop", lost, better=LOWER, item_names=names), self._broken(name, lost)]
        return found

    def _broken(self, name: str, lost: np.ndarray) -> Measurement:
        return Measurement(f"{name}_broken", np.array([float(lost.mean() > self.tolerance)]))


def judged(answers: Sequence[Answer]) -> np.ndarray:
    """Which answers are right by their first line, (answers,) of 1 and 0."""
    return np.array([first_line(answer.said) == first_line(answer.reference) for answer in answers], float)


def drops(right: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """Influences on the relative drop of a mean, whose plain mean is the drop; both (items,), the dense one's mean not 0."""
    drop = 1 - right.mean() / dense.mean()
    return drop - (right - (1 - drop) * dense) / dense.mean()


def rises(perplexity: Measurement, dense: Measurement) -> np.ndarray:
    """Influences on the relative rise of a perplexity, (documents,), whose plain mean is the rise; both of the same documents and tokens, or of other tokenizers' tokens."""
    ratio = perplexity.value / dense.value
    return ratio * (1 + perplexity.influence / perplexity.value - dense.influence / dense.value) - 1
