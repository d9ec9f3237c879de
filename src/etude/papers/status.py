"""What became of a paper here: computed from the methods, the claims and the evidence, never written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from etude.method import by_paper
from etude.papers import evidence
from etude.papers.catalogue import Paper

PLANNED, RUNS, CHECKED, SURVEY, NEW = "planned", "runs", "checked", "survey", "new"
STATUSES = {
    PLANNED: "nothing of it runs here yet",
    RUNS: "a method carries its slug",
    CHECKED: "its claim was put to the test, and the evidence is here",
    SURVEY: "there is nothing to run; it covers other papers",
    NEW: "synced, added or imported here, and not in the catalogue",
}
VERDICTS = {"holds": "holds here", "contradicted": "contradicted here", "undecided": "undecided here"}


@dataclass(frozen=True)
class Status:
    """What became of one paper."""

    status: str
    methods: tuple[str, ...]
    """Dotted names of the methods that carry its slug."""
    verdict: str | None = None
    """``holds``, ``contradicted`` or ``undecided``, of the model and text that the evidence names; None without evidence."""

    @property
    def words(self) -> str:
        """Status and verdict as a reader meets them."""
        return f"{self.status}: {VERDICTS[self.verdict]}" if self.verdict else self.status


def status(paper: Paper) -> Status:
    """Read from the sources and the evidence.  Cost: once some milliseconds for all methods, then one small file a paper."""
    methods = by_paper().get(paper.slug, ())
    if not paper.stage:
        return Status(NEW, methods)
    if paper.covers is not None:
        return Status(SURVEY, methods)
    known = evidence.read(paper.slug)
    if known and methods:
        return Status(CHECKED, methods, known.verdict)
    return Status(RUNS if methods else PLANNED, methods)


def as_data(paper: Paper) -> dict[str, Any]:
    """A paper and what became of it, as plain data."""
    found = status(paper)
    row = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(paper).items()}
    return {**row, "status": found.status, "verdict": found.verdict, "methods": list(found.methods)}
