"""What measures have in common that ask a model every prompt and compare what it says with the right completion, one item a record."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple

from etude.engine.generate import generate
from etude.engine.prompted import pairs_of
from etude.method import Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.generator import Generator, Policy
from etude.values.model import Model


class Answer(NamedTuple):
    """What a model said to one prompt, and what is right; both without white space around them."""

    said: str
    reference: str


@dataclass(frozen=True)
class Asked(Method):
    """Base of a measure that asks every prompt of a corpus, greedily."""

    records: int | None = None
    """Ask only so many prompts, from the corpus's beginning; all of them by default."""
    new: int = 64
    """Tokens that a completion may have."""
    stop: tuple[str, ...] = ()
    """Strings at which a completion ends; they are not part of it."""

    def __post_init__(self) -> None:
        if self.records is not None and self.records < 1:
            raise ValueError(f"records is a number of prompts, at least 1, got {self.records}; leave it out to ask all")
        self.policy()

    def policy(self) -> Policy:
        """How the model decodes: the most probable token each time.  Raises ValueError for what no policy has."""
        if self.new < 1:
            raise ValueError(f"new is a number of tokens, at least 1, got {self.new}")
        return Policy(max_new_tokens=self.new, stop=self.stop)

    def answers(self, model: Model, corpus: Corpus) -> list[Answer]:
        """One answer a record, in the corpus's order.

        Reads the columns prompt and completion; a text without a prompt is a completion of nothing.
        Raises InputError if the corpus is empty, lacks the columns, or has a completion of nothing but white space, which there is no comparing with.
        """
        pairs = pairs_of(corpus)[: self.records]
        for place, (_, completion) in enumerate(pairs):
            if not completion.strip():
                raise InputError(f"the completion of record {place} is empty, so that no answer can be compared with it", remedy="Leave such records out.")
        said = generate(Generator(model, self.policy()), [prompt for prompt, _ in pairs])
        return [Answer(text.strip(), completion.strip()) for text, (_, completion) in zip(said, pairs, strict=True)]


def numbered(answers: list[Answer]) -> tuple[str, ...]:
    """Names of the items: the records' numbers."""
    return tuple(map(str, range(len(answers))))


def required(module: str, extra: str) -> Any:
    """A module of an optional extra.  Raises InputError that names the extra if it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise InputError(f"this measure needs the package {error.name}, which is not installed", remedy=f"pip install 'etude[{extra}]'") from error
