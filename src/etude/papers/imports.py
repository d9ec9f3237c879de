"""Papers from files: BibTeX, JSON Lines, or a saved page that lists papers."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etude.papers.catalogue import arxiv_number
from etude.papers.listing import from_html, from_lines
from etude.papers.shelf import Listing
from etude.values.errors import InputError

MONTHS = {name: place for place, name in enumerate(("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"), 1)}


@dataclass(frozen=True)
class Imported:
    """What a file held."""

    listings: tuple[Listing, ...]
    left_out: tuple[str, ...]
    """What could not be read as a paper, a line each: where, and why."""


def read(path: Path) -> Imported:
    """The papers in a file, by its name: ``.bib``; ``.jsonl``, ``.ndjson`` or ``.json``; ``.html`` or ``.htm``, ``.txt`` or ``.md`` for a saved page.

    An entry that is no paper is left out, and said.  Raises InputError if the file cannot be read, is of another kind, or holds no paper at all.
    """
    readers: dict[str, Callable[[str], Iterator[Listing | str]]] = {
        ".bib": bibtex, ".jsonl": json_lines, ".ndjson": json_lines, ".json": json_lines,
        ".html": from_html, ".htm": from_html, ".txt": from_lines, ".md": from_lines,
    }  # fmt: skip
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} is of no kind that papers are read from", remedy="Give BibTeX (.bib), JSON Lines (.jsonl, .json), or a saved page (.html, .txt, .md).")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", remedy="Give a text file in UTF-8.") from error
    found = list(reader(text))
    listings, left_out = tuple(one for one in found if isinstance(one, Listing)), tuple(one for one in found if isinstance(one, str))
    if not listings:
        why = f": {left_out[0]}" if left_out else ""
        raise InputError(f"there is no paper in {path}{why}", remedy="A paper has a title at least; on a saved page a title stands before an abstract.")
    return Imported(listings, left_out)


def bibtex(text: str) -> Iterator[Listing | str]:
    """The papers of a BibTeX file, or what is wrong with an entry."""
    try:
        import bibtexparser
        from bibtexparser import middlewares
    except ImportError as error:
        raise InputError("reading BibTeX needs the package bibtexparser", remedy="pip install 'etude[papers]'") from error
    logging.getLogger("bibtexparser").setLevel(logging.ERROR)
    library = bibtexparser.parse_string(text, append_middleware=[middlewares.LatexDecodingMiddleware()])
    for block in library.failed_blocks:
        raw = getattr(block, "ignore_error_block", None)
        if isinstance(block, bibtexparser.model.DuplicateBlockKeyBlock) and raw is not None:  # the same key twice is no reason to lose a paper
            yield _entry(raw)
        else:
            yield f"line {(block.start_line or 0) + 1}: {str(block.error).splitlines()[0] if str(block.error) else type(block.error).__name__}"
    for entry in library.entries:
        yield _entry(entry)


def _entry(entry: Any) -> Listing | str:
    fields = {field.key.lower(): str(field.value) for field in entry.fields}

    def clean(name: str) -> str:
        return " ".join(fields.get(name, "").replace("{", "").replace("}", "").split())

    if not clean("title"):
        return f"line {(entry.start_line or 0) + 1}: {entry.key} has no title"
    where = [fields.get("eprint", ""), *(fields.get(name, "") for name in ("arxivid", "arxiv", "url", "doi", "journal", "note", "howpublished"))]
    authors = len(re.split(r"\s+and\s+", clean("author"))) if clean("author") else None
    number = next(filter(None, map(arxiv_number, where)), None)
    return Listing(clean("title"), clean("abstract"), number, _bibtex_date(clean("year") or clean("date"), clean("month")), authors)


def _bibtex_date(year: str, month: str) -> str | None:
    if known := plain_date(year):
        if len(known) > 4 or not month:
            return known
        number = MONTHS.get(month[:3].lower()) or (int(month) if month.isdigit() and 1 <= int(month) <= 12 else None)
        return f"{known}-{number:02}" if number else known
    return None


NAMES = {
    "title": ("title",),
    "abstract": ("abstract", "summary"),
    "arxiv": ("arxiv", "arxiv_id", "arxivId", "id", "url"),
    "date": ("date", "publishedAt", "published_at", "published", "year"),
    "authors": ("authors", "author"),
    "comments": ("comments", "numComments", "num_comments"),
    "upvotes": ("upvotes", "likes"),
}
"""Under which names a record may say each thing, the first that it has."""


def json_lines(text: str) -> Iterator[Listing | str]:
    """The papers of JSON Lines, or of one JSON list; records as Étude, the Hub or arXiv's dumps write them."""
    stripped = text.lstrip()
    if stripped.startswith("["):
        try:
            rows = [(f"record {place}", row) for place, row in enumerate(json.loads(stripped), 1)]
        except ValueError as error:
            yield f"no JSON: {error}"
            return
        yield from (_record(where, row) for where, row in rows)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            yield f"line {number}: no JSON: {error}"
            continue
        yield _record(f"line {number}", row)


def _record(where: str, row: Any) -> Listing | str:
    if not isinstance(row, dict):
        return f"{where}: no record but {type(row).__name__}"
    inner = row.get("paper")
    flat = {**inner, **{key: value for key, value in row.items() if value is not None}} if isinstance(inner, dict) else row

    def first(what: str) -> Any:
        return next((flat[name] for name in NAMES[what] if flat.get(name) not in (None, "")), None)

    title = first("title")
    if not isinstance(title, str) or not title.strip():
        return f"{where}: no title"
    authors = first("authors")
    count = authors if isinstance(authors, int) and not isinstance(authors, bool) else len(authors) if isinstance(authors, list) else len(authors.split(",")) if isinstance(authors, str) else None
    abstract = first("abstract")
    try:
        return Listing(
            " ".join(title.split()), " ".join(abstract.split()) if isinstance(abstract, str) else "", arxiv_number(str(first("arxiv") or "")),
            plain_date(str(first("date") or "")), count, _count(first("comments")), _count(first("upvotes")),
        )  # fmt: skip
    except ValueError as error:
        return f"{where}: {error}"


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def plain_date(text: str) -> str | None:
    """The year, month and day with which a text begins, as far as it says them: 2024, 2024-02 or 2024-02-14."""
    found = re.match(r"\s*((?:19|20)\d\d)(?:[-/](0[1-9]|1[0-2])(?:[-/](0[1-9]|[12]\d|3[01]))?)?(?!\d)", text)
    return "-".join(filter(None, found.groups())) if found else None
