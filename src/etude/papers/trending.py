"""What is new and talked about: papers by recency and by what was said under them."""

from __future__ import annotations

import calendar
import datetime
import re
from collections.abc import Iterable
from dataclasses import dataclass

from etude.papers.catalogue import Paper
from etude.values.errors import InputError

GRAVITY = 1.8
"""How fast a paper sinks: the points are divided by its age to this power, as on Hacker News (Graham, 2009)."""
COMMENT = 2.0
"""Votes that a comment is worth: writing one takes longer."""


@dataclass(frozen=True)
class Ranked:
    """A paper with how hot it is."""

    paper: Paper
    heat: float
    """Points over age: (1 + votes + 2 · comments) / (days + 2)^1.8."""
    days: int
    """Since it appeared."""


def trending(papers: Iterable[Paper], today: datetime.date, days: int | None = None, limit: int = 20) -> list[Ranked]:
    """The hottest papers first.  days: only those that appeared in so many days; those of no known date, or of a later one than today, are left out."""
    found = []
    for paper in papers:
        when = appeared(paper)
        if when is None or when > today or (days is not None and (today - when).days > days):
            continue
        age = (today - when).days
        points = 1 + (paper.upvotes or 0) + COMMENT * (paper.comments or 0)
        found.append(Ranked(paper, points / (age + 2) ** GRAVITY, age))
    return sorted(found, key=lambda one: (-one.heat, one.paper.slug))[:limit]


def appeared(paper: Paper) -> datetime.date | None:
    """The day on which a paper appeared; where only month or year are known their last day; None where nothing is, for a paper that was added here the day of that."""
    written = paper.date or (paper.added or "")[:10]
    if not written:
        return None
    year, month, day = (int(part) if part else None for part in (written + "--").split("-")[:3])
    try:
        if day:
            return datetime.date(year or 0, month or 0, day)
        return datetime.date(year or 0, month or 12, calendar.monthrange(year or 0, month or 12)[1])
    except ValueError:
        return None


def span(text: str) -> int:
    """Days in a span as people write it: 7d, 2w, 1m (30 days), 1y.  Raises InputError for anything else."""
    found = re.fullmatch(r"(\d{1,4})\s*([dwmy])(?:ays?|eeks?|onths?|ears?)?", text.strip().lower())
    if not found or not int(found[1]):
        raise InputError(f"{text!r} is no span of time", remedy="Write days, weeks, months or years: 7d, 2w, 1m, 1y.")
    return int(found[1]) * {"d": 1, "w": 7, "m": 30, "y": 365}[found[2]]
