"""Papers on a saved page that lists them: titles and abstracts one after the other, with counts and dates about them.

Nothing is known of any site's markup.  A page is read as lines; a long one is an abstract, and the short one before it its title.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from etude.papers.catalogue import arxiv_number
from etude.papers.shelf import Listing
from etude.values.errors import InputError

LONG = 30
"""From so many words on a line is an abstract; a title of so many is unheard of."""
BLOCKS = ("h1", "h2", "h3", "h4", "h5", "h6", "p", "li", "td", "dt", "dd", "div", "section", "article", "blockquote", "time", "button", "label")
AUTHORS = re.compile(r"(?<!\d)(\d{1,4}) authors?\b", re.I)
COMMENTS = re.compile(r"(?<!\d)(\d{1,5}) comments?\b", re.I)
UPVOTES = re.compile(r"(?<!\d)(\d{1,6}) (?:up)?votes?\b|\bupvotes? (\d{1,6})(?!\d)", re.I)
WORDS_DATE = re.compile(
    r"\b(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.? (\d{1,2}),? ((?:19|20)\d\d)\b|\b(\d{1,2}) (jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?,? ((?:19|20)\d\d)\b", re.I
)
PLAIN_DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])(?!\d)")
LABEL = re.compile(r"(abstract|summary|title)[:.]?\s*", re.I)


@dataclass
class _Paper:
    """A paper as far as it was read."""

    title: str
    abstract: list[str]
    arxiv: str | None = None
    date: str | None = None
    authors: int | None = None
    comments: int | None = None
    upvotes: int | None = None
    closed: bool = field(default=False)
    """Whether something else came after the abstract, so that the next long line is another paper's."""

    def know(self, said: dict[str, str | int]) -> None:
        """Take what was not known before."""
        for name, value in said.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def listing(self) -> Listing:
        return Listing(self.title, " ".join(self.abstract), self.arxiv, self.date, self.authors, self.comments, self.upvotes)


def from_html(text: str) -> Iterator[Listing | str]:
    """The papers of a page that was saved as HTML; nothing of it is run or fetched."""
    try:
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise InputError("reading a saved page needs the package beautifulsoup4", remedy="pip install 'etude[papers]'") from error
    page = BeautifulSoup(text, "html.parser")
    for unseen in page(["script", "style", "template", "noscript", "svg", "head"]):
        unseen.decompose()
    for words in page.find_all(string=True):
        words.replace_with(re.sub(r"\s+", " ", words))
    for link in page("a"):
        number = arxiv_number(str(link.get("href") or ""))
        if number:
            link.append(f"\x1f{number}\x1f")  # travels with the line that the link stands in
    for stamp in page("time"):
        if stamp.get("datetime"):
            stamp.string = str(stamp["datetime"])
    for block in page([*BLOCKS, "br"]):
        block.insert_before("\n")
        block.insert_after("\n")
    yield from _papers(line for line in page.get_text().split("\n") if line.strip())


def from_lines(text: str) -> Iterator[Listing | str]:
    """The papers of a page that was saved as text: paragraphs by empty lines, or a line each."""
    yield from _papers(_paragraphs(text))


def _papers(lines: Iterable[str]) -> Iterator[Listing | str]:
    """The papers of a page's paragraphs; numbers of links stand in them between two separators."""
    page = _Page()
    for line in lines:
        linked = re.findall(r"\x1f(.+?)\x1f", line)
        plain = " ".join(re.sub(r"\x1f.*?\x1f", " ", line).split()).strip("#*•·|-– \t")
        number = linked[0] if linked else arxiv_number(plain)
        if len(plain.split()) >= LONG:
            if not page.abstract(LABEL.sub("", plain, count=1) if LABEL.match(plain) else plain):
                yield f"an abstract without a title: {plain[:60]}…"
            continue
        facts = _facts(plain)
        if facts or (number and not linked and len(plain.split()) < 4):
            page.facts({**facts, **({"arxiv": number} if number else {})})
        elif len(plain.split()) >= 2 or (linked and plain):
            page.title(LABEL.sub("", plain, count=1) if re.match(r"title[:.]", plain, re.I) else plain, number)
    page.title("", None)
    for paper in page.found:
        try:
            yield paper.listing()
        except ValueError as error:
            yield f"{paper.title!r}: {error}"


class _Page:
    """A page as far as it was read."""

    def __init__(self) -> None:
        self.found: list[_Paper] = []
        self.pending = ""
        self.number: str | None = None
        self.held: dict[str, str | int] = {}
        """What was said since the pending line: of the paper that it is the title of if an abstract comes, else of the one before."""

    def title(self, line: str, number: str | None) -> None:
        """A short line, which may be a title."""
        if self.found:
            self.found[-1].closed = True
            self.found[-1].know(self.held)
        self.pending, self.number, self.held = line, number, {}

    def facts(self, said: dict[str, str | int]) -> None:
        if self.pending:
            self.held |= said
        elif self.found:
            self.found[-1].closed = True
            self.found[-1].know(said)

    def abstract(self, text: str) -> bool:
        """A long line; returns whether there was a paper that it can be of."""
        if self.pending:
            self.found.append(_Paper(self.pending, [text], self.number))
            self.found[-1].know(self.held)
            self.pending, self.number, self.held = "", None, {}
        elif self.found and not self.found[-1].closed:
            self.found[-1].abstract.append(text)
        else:
            return False
        return True


def _paragraphs(text: str) -> Iterable[str]:
    """Lines that were folded are put together again, where a page separates its paragraphs by empty lines."""
    lines = text.splitlines()
    folded = sum(not line.strip() for line in lines) * 4 >= len(lines)
    if not folded:
        return [line for line in lines if line.strip()]
    return [part.replace("\n", " ") for part in re.split(r"\n\s*\n", "\n".join(lines)) if part.strip()]


def _facts(line: str) -> dict[str, str | int]:
    """What a short line says of the paper above it: its authors' number, comments, votes, date."""
    found: dict[str, str | int] = {}
    for name, pattern in (("authors", AUTHORS), ("comments", COMMENTS), ("upvotes", UPVOTES)):
        if match := pattern.search(line):
            found[name] = int(next(filter(None, match.groups()), 0))
    if match := PLAIN_DATE.search(line):
        found["date"] = match[0]
    elif match := WORDS_DATE.search(line):
        month, day, year, other_day, other_month, other_year = match.groups()
        try:
            stamp = datetime.datetime.strptime(f"{(month or other_month)[:3].title()} {day or other_day} {year or other_year}", "%b %d %Y")
            found["date"] = stamp.date().isoformat()
        except ValueError:
            pass
    return found
