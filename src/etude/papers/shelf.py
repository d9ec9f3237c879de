"""The shelf: papers that the user synced, added or imported, kept in the store beside the catalogue."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import time
import types
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from etude.papers.catalogue import Paper, catalogue
from etude.study.store import Store, write_atomically, writing
from etude.values.errors import InputError

NAME_WORDS = 3
"""Up to so many words before a title's colon are the paper's name."""
SLUG_WORDS = 6


@dataclass(frozen=True)
class Listing:
    """What a source says of a paper."""

    title: str
    abstract: str = ""
    arxiv: str | None = None
    date: str | None = None
    """Year, with month and day where known: 2024, 2024-02 or 2024-02-14."""
    authors: int | None = None
    """How many."""
    comments: int | None = None
    upvotes: int | None = None

    def __post_init__(self) -> None:
        if not normalised(self.title):
            raise ValueError("a paper has a title")

    def merged(self, newer: Listing) -> Listing:
        """The same paper after another source spoke of it: new counts replace old ones, and of a text or a date the fuller one stays."""
        fuller = {name: max(getattr(self, name) or "", getattr(newer, name) or "", key=len) or None for name in ("abstract", "date")}
        counts = {name: getattr(self, name) if getattr(newer, name) is None else getattr(newer, name) for name in ("authors", "comments", "upvotes")}
        return dataclasses.replace(self, arxiv=self.arxiv or newer.arxiv, abstract=fuller["abstract"] or "", date=fuller["date"], **counts)


@dataclass(frozen=True)
class Changed:
    """What a sync or an import did."""

    added: tuple[str, ...]
    """Slugs of papers that are new here."""
    updated: tuple[str, ...]
    """Slugs of papers, on the shelf or in the catalogue, of which more is known now."""
    known: int
    """How many there were of which nothing new was said."""


@dataclass(frozen=True)
class Shelf:
    """Papers in a store: ``papers/papers.jsonl``, one a line.  A paper of the catalogue may stand there too, with what the catalogue does not keep: abstract and counts."""

    store: Store

    @property
    def folder(self) -> Path:
        return self.store.root / "papers"

    @property
    def path(self) -> Path:
        return self.folder / "papers.jsonl"

    def rows(self) -> dict[str, dict[str, Any]]:
        """Listings by slug, with when they were added."""
        try:
            lines = self.path.read_text(encoding="utf8").splitlines() if self.path.exists() else []
            return {row["slug"]: row for row in map(json.loads, lines)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} cannot be read: {error}", remedy="It is JSON Lines; mend the line, or delete the file and sync again.") from error

    def papers(self) -> Mapping[str, Paper]:
        """Every paper by its slug: the catalogue's in its order, then the shelf's, the newest first.  Read again only when the file has changed."""
        stamp = self.path.stat() if self.path.exists() else None
        return _papers(self, (stamp.st_mtime_ns, stamp.st_size) if stamp else None)

    def put(self, listings: Iterable[Listing]) -> Changed:
        """Add papers; one that is here already, by its arXiv number or else by its title, is merged with what is known."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.store.locks / "papers.lock"):
                rows = self.rows()
                known = _Known(rows)
                added: list[str] = []
                updated: list[str] = []
                same = 0
                for listing in listings:
                    slug = known.find(listing)
                    new = slug is None
                    slug = slug or _slug(listing, {*catalogue(), *rows})
                    before = _listing(rows[slug]) if slug in rows else None
                    after = before.merged(listing) if before else listing
                    if after == before or (before is None and not new and not _says_more(listing, catalogue()[slug])):
                        same += 1
                        continue
                    rows[slug] = {"slug": slug, **dataclasses.asdict(after), "added": rows[slug]["added"] if before else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
                    known.add(slug, after)
                    if slug not in added:
                        (added if new else updated).append(slug)
                if added or updated:
                    write_atomically(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))
        return Changed(tuple(added), tuple(dict.fromkeys(updated)), same)


class _Known:
    """What is here, by arXiv number and by title."""

    def __init__(self, rows: Mapping[str, dict[str, Any]]):
        self.numbers: dict[str, str] = {}
        self.titles: dict[str, tuple[str, str | None]] = {}
        for slug, paper in catalogue().items():
            self._note(slug, paper.title, paper.arxiv)
        for slug, row in rows.items():
            self.add(slug, _listing(row))

    def add(self, slug: str, listing: Listing) -> None:
        self._note(slug, listing.title, listing.arxiv)

    def _note(self, slug: str, title: str, arxiv: str | None) -> None:
        if arxiv:
            self.numbers.setdefault(arxiv, slug)
        self.titles[normalised(title)] = (slug, arxiv)

    def find(self, listing: Listing) -> str | None:
        """Its slug here.  Two that share a title and have different arXiv numbers are two papers."""
        if listing.arxiv in self.numbers:
            return self.numbers[listing.arxiv]  # type: ignore[index]
        slug, arxiv = self.titles.get(normalised(listing.title), (None, None))
        return None if listing.arxiv and arxiv else slug


def normalised(title: str) -> str:
    """A title without what two listings of it may differ in: case, accents, punctuation, spaces.

    >>> normalised("SLEB:  Streamlining L.L.M.s") == normalised("Sleb - Streamlining LLMs")
    True
    """
    plain = unicodedata.normalize("NFKD", title).casefold()
    return "".join(character for character in plain if character.isalnum())


@functools.lru_cache(maxsize=4)
def _papers(shelf: Shelf, stamp: tuple[int, int] | None) -> Mapping[str, Paper]:
    found = dict(catalogue())
    rows = shelf.rows() if stamp else {}
    for slug, row in sorted(rows.items(), key=lambda item: item[1]["added"], reverse=True):
        listing = _listing(row)
        more: dict[str, Any] = {"abstract": listing.abstract, "comments": listing.comments, "upvotes": listing.upvotes}
        if slug in found:
            paper = found[slug]
            known: dict[str, Any] = {"arxiv": paper.arxiv or listing.arxiv, "date": max(paper.date or "", listing.date or "", key=len) or None, "authors": paper.authors or listing.authors}
            found[slug] = dataclasses.replace(paper, **more, **known)
        else:
            found[slug] = Paper(
                slug, _name(listing.title) or listing.title, listing.title, listing.arxiv, listing.date, listing.authors,
                kind="paper", stage="", takes="", does="", claim="", check="", added=row["added"], **more,
            )  # fmt: skip
    return types.MappingProxyType(found)


def _listing(row: Mapping[str, Any]) -> Listing:
    return Listing(**{field.name: row[field.name] for field in dataclasses.fields(Listing) if field.name in row})


def _says_more(listing: Listing, paper: Paper) -> bool:
    """Whether a listing has something that the catalogue has not."""
    return bool(listing.abstract or listing.comments is not None or listing.upvotes is not None or (listing.arxiv and not paper.arxiv) or len(listing.date or "") > len(paper.date or ""))


def _name(title: str) -> str | None:
    """What a title calls the paper before its colon, if it does."""
    name, colon, _ = title.partition(":")
    return name.strip() if colon and 0 < len(name.split()) <= NAME_WORDS else None


def _slug(listing: Listing, taken: set[str]) -> str:
    """A short name in small letters, digits and hyphens that nothing has yet."""
    begin = listing.title.partition(":")[0].split()
    words = begin if len(begin) <= SLUG_WORDS else listing.title.split()[:SLUG_WORDS]
    plain = unicodedata.normalize("NFKD", " ".join(words)).encode("ascii", "ignore").decode().lower()
    base = re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or (f"arxiv-{listing.arxiv}".replace(".", "-").replace("/", "-") if listing.arxiv else "paper")
    return next(slug for count in range(1, len(taken) + 2) if (slug := base if count == 1 else f"{base}-{count}") not in taken)
