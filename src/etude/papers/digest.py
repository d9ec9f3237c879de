"""The digest: what came in some days, and what was put to the test, as text and as HTML for a mail."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from etude.papers import status, trending
from etude.papers.catalogue import Paper
from etude.papers.claims import claims
from etude.papers.search import Index

MOST = 25
"""Papers in a digest; of more than that nobody reads."""
SHORT = 320
"""Characters of an abstract that are shown."""


@dataclass(frozen=True)
class Digest:
    """What happened in some days."""

    since: datetime.date
    until: datetime.date
    words: str
    """What it was narrowed to, nothing for everything."""
    papers: tuple[trending.Ranked, ...]
    """New papers, the hottest first."""
    more: int
    """How many new papers are not shown."""
    verdicts: tuple[dict[str, Any], ...]
    """Claims that were put to the test: name, slug, verdict, how many comparisons hold, and when."""

    @property
    def empty(self) -> bool:
        return not self.papers and not self.verdicts

    @property
    def subject(self) -> str:
        """The line that a mail is announced by."""
        parts = [f"{len(self.papers) + self.more} new paper{'s' if len(self.papers) + self.more != 1 else ''}"] if self.papers else []
        parts += [f"{len(self.verdicts)} claim{'s' if len(self.verdicts) != 1 else ''} tested"] if self.verdicts else []
        return f"Étude: {' and '.join(parts) or 'nothing new'}, {self.since:%d %b} to {self.until:%d %b %Y}"

    def as_text(self) -> str:
        return _templates().get_template("digest.txt.jinja").render(digest=self, short=_short, words=status.VERDICTS)

    def as_html(self) -> str:
        return _templates().get_template("digest.html.jinja").render(digest=self, short=_short, words=status.VERDICTS)


def build(papers: Mapping[str, Paper], since: datetime.date, until: datetime.date, words: str = "", index: Index | None = None) -> Digest:
    """The papers that appeared, or came to the shelf, after one day and up to another, and the claims that were tested then.

    words: only papers that a search for these finds among the new ones, and claims of papers that have all of them; needs the index of the papers.
    """
    new = [paper for paper in papers.values() if _within(paper, since, until)]
    tested = [claim for claim in claims().values() if (known := claim.evidence) and since.isoformat() < str(known.data["finished"])[:10] <= until.isoformat()]
    if words:
        assert index is not None
        chosen = {paper.slug for paper in new}
        meant = {hit.paper.slug for hit in index.search(words, limit=len(papers), among=lambda paper: paper.slug in chosen) if hit.words > 0 or hit.meaning > RELATED}
        new = [paper for paper in new if paper.slug in meant]
        tested = [claim for claim in tested if all(word in f"{claim.paper.title} {claim.paper.does} {claim.paper.stage}".lower() for word in words.lower().split())]
    ranked = trending.trending(new, until, limit=len(new))
    rows = []
    for claim in tested:
        known = claim.evidence
        assert known is not None
        hold = sum(row["verdict"] == "holds" for row in known.expectations)
        rows.append(
            {
                "name": claim.paper.name,
                "title": claim.paper.title,
                "slug": claim.paper.slug,
                "verdict": known.verdict,
                "hold": hold,
                "of": len(known.expectations),
                "when": str(known.data["finished"])[:10],
            }
        )
    rows.sort(key=lambda row: (row["when"], row["slug"]), reverse=True)
    return Digest(since, until, words, tuple(ranked[:MOST]), max(0, len(ranked) - MOST), tuple(rows))


RELATED = 0.6
"""How near in meaning a paper without any of the words must be, of 1 for the nearest of all papers."""


def _within(paper: Paper, since: datetime.date, until: datetime.date) -> bool:
    """Whether a paper came in these days: to the shelf, or else into the world."""
    when = paper.added[:10] if paper.added else paper.date if paper.date and len(paper.date) == 10 else None
    return when is not None and since.isoformat() < when <= until.isoformat()


def _short(text: str) -> str:
    """The beginning of a text, to the end of a word."""
    return text if len(text) <= SHORT else text[:SHORT].rsplit(" ", 1)[0].rstrip(",;:.") + " …"


@functools.cache
def _templates() -> Environment:
    how: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    return Environment(loader=PackageLoader("etude.papers", "templates"), autoescape=lambda name: bool(name and ".html" in name), **how)
