"""The catalogue: one line a paper, facts and our own words.  What became of a paper is not in it; see `status`."""

from __future__ import annotations

import functools
import json
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etude.values.errors import InputError, nearest

FILE = Path(__file__).with_name("catalogue.jsonl")


@dataclass(frozen=True)
class Paper:
    """What is known of a paper."""

    slug: str
    name: str
    title: str
    arxiv: str | None
    """Its number there, None if it has none or we know of none."""
    date: str | None
    """Year and month, with the day where known; that of the arXiv number where nothing else is."""
    authors: int | None
    """How many, None where unknown."""
    kind: str
    """``method``, ``analysis``, ``model``, ``benchmark``, ``survey``, ``tool``, ``corpus`` or ``metric``."""
    stage: str
    """Where in the house it belongs; the folder of its method."""
    takes: str
    """What goes in and what comes out."""
    does: str
    claim: str
    """What it claims, with its figures."""
    check: str
    """The smallest experiment that could contradict the claim."""
    related: tuple[str, ...] = ()
    """Work it stands beside, by name."""
    covers: tuple[str, ...] | None = None
    """For one with nothing to run: slugs of the papers here on its subject."""
    abstract: str = ""
    """Of a paper from the user's shelf, as its source gave it; the catalogue keeps none."""
    comments: int | None = None
    """Under it, where it was found; None where unknown."""
    upvotes: int | None = None
    added: str | None = None
    """When it came to the shelf, in UTC; None for one of the catalogue alone."""

    @property
    def year(self) -> int | None:
        return int(self.date[:4]) if self.date else None

    @property
    def address(self) -> str | None:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None


@functools.cache
def catalogue() -> Mapping[str, Paper]:
    """Every paper by its slug, in the catalogue's order."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in FILE.read_text(encoding="utf8").splitlines()]
    return types.MappingProxyType({row["slug"]: Paper(**{**row, "related": tuple(row["related"]), "covers": tuple(row["covers"]) if "covers" in row else None}) for row in rows})


def find(slug: str, papers: Mapping[str, Paper] | None = None) -> Paper:
    """The paper of this slug or arXiv number, of the catalogue or of these.  Raises InputError with the nearest ones."""
    known = catalogue() if papers is None else papers
    if slug in known:
        return known[slug]
    number = arxiv_number(slug)
    for paper in known.values() if number else ():
        if paper.arxiv == number:
            return paper
    raise InputError(f"there is no paper {slug!r}", remedy=nearest(slug, known))


def arxiv_number(text: str) -> str | None:
    """The arXiv number in a text, without its version; None if there is none.

    >>> arxiv_number("https://arxiv.org/abs/2402.09025v2")
    '2402.09025'
    """
    found = re.search(r"(?<![\d.])(\d{2}(?:0[1-9]|1[0-2])\.\d{4,5})(?!\d)|(?<![a-z.-])([a-z]+(?:-[a-z]+)?(?:\.[A-Z]{2})?/\d{7})(?!\d)", text)
    return next(filter(None, found.groups())) if found else None
