"""What each page shows, as plain data for its template."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from etude import console
from etude.method import interface, names
from etude.papers import rooms
from etude.papers.catalogue import Paper, find
from etude.papers.claims import claims
from etude.papers.evidence import CURRENT, OLDER_ENGINE, STALE, Evidence
from etude.papers.status import CHECKED, NEW, RUNS, STATUSES, VERDICTS
from etude.serve.library import Library
from etude.study import journal
from etude.study.report import plots
from etude.study.report.plots import Point, finite
from etude.study.results import SCHEMA
from etude.study.store import Store
from etude.values.errors import InputError, nearest

A_PAGE = 500
"""Rows of a page; the catalogue fits on one."""
FOUND = 60
"""Papers that a search shows."""
STATES = {CURRENT: "it speaks of what is here now", OLDER_ENGINE: "what its methods stand on has changed since", STALE: "its study or a method in it has changed since, and it should run again"}


# Papers.


def chosen(library: Library, query: str, filters: Mapping[str, str]) -> list[dict[str, Any]]:
    """Papers that a search finds, best first, or all of them, those first of which most is known here; of those that pass the filters."""
    rows = library.rows()
    kept = {slug: row for slug, row in rows.items() if all(not value or _value(row, name) == value for name, value in filters.items())}
    if not query:
        order = (NEW, CHECKED, RUNS)
        return sorted(kept.values(), key=lambda row: (order.index(row["status"]) if row["status"] in order else len(order), row["name"].casefold()))
    return [kept[hit.paper.slug] for hit in library.index().search(query, FOUND, lambda paper: paper.slug in kept)]


def papers(library: Library, query: str, filters: Mapping[str, str], page: int) -> dict[str, Any]:
    """The list, with how many papers each filter would leave."""
    found, rows = chosen(library, query, filters), library.rows()
    choices = {name: _choices(rows, name) for name in filters}
    begin = (page - 1) * A_PAGE
    shown = found[begin : begin + A_PAGE]
    pages = max(1, -(-len(found) // A_PAGE))
    return {"query": query, "filters": dict(filters), "choices": choices, "rows": shown, "found": len(found), "total": len(rows), "page": page, "pages": pages, "words": VERDICTS}


def _value(row: Mapping[str, Any], name: str) -> str:
    return (row["date"] or "")[:4] if name == "year" else str(row[name] or "")


def _choices(rows: Mapping[str, Mapping[str, Any]], name: str) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for row in rows.values():
        if value := _value(row, name):
            counts[value] = counts.get(value, 0) + 1
    order = {"status": list(STATUSES), "verdict": list(VERDICTS)}.get(name)
    return [(value, counts[value]) for value in (order or sorted(counts, reverse=name == "year")) if value in counts]


def paper(library: Library, slug: str) -> dict[str, Any]:
    """One paper: what it does and claims, our evidence, its methods, a study to copy, and what is like it."""
    one = find(slug, library.papers())
    row, claim = library.rows()[one.slug], claims().get(one.slug)
    known = claim.evidence if claim else None
    return {
        "paper": one,
        "row": row,
        "words": VERDICTS,
        "claim": claim,
        "evidence": known,
        "state": STATES[claim.state or CURRENT] if claim and known else None,
        "plots": _plots(known.path, known.path.stat().st_mtime_ns) if known else [],
        "methods": [rooms.method_card(rooms.room_of(name), name) for name in row["methods"]],
        "covers": [library.papers()[other] for other in one.covers or () if other in library.papers()],
        "like": _like(library, one),
    }


def _like(library: Library, one: Paper) -> list[dict[str, Any]]:
    rows = library.rows()
    return [rows[other.slug] for other in library.index().like(one)]


@functools.lru_cache(maxsize=256)
def _plots(path: Path, stamp: int) -> list[dict[str, Any]]:
    """The charts of some evidence, drawn once for each state of its file."""
    return list(_charts(Evidence(json.loads(path.read_text(encoding="utf8")), path)))


def _charts(known: Evidence) -> Iterator[dict[str, Any]]:
    """A chart for every measure that the expectations speak of: each value's mean, its interval, and its seeds."""
    places = dict.fromkeys((place["measure"], place["part"]) for row in known.expectations for place in row["terms"])
    for measure, part in places:
        rows = [row for row in known.data["measured"] if (row["measure"], row["part"]) == (measure, part)]
        points = [_point(row) for row in rows if finite(row["estimate"]["value"]) is not None]
        if points:
            steps = [step for step in dict.fromkeys(point.step for point in points) if step != points[0].step]
            unit = f" ({rows[0]['unit']})" if rows[0]["unit"] else ""
            title = f"{part.replace('_', ' ')}{unit}, {rows[0]['better']} is better" if rows[0]["better"] else f"{part.replace('_', ' ')}{unit}"
            yield {"title": part.replace("_", " "), "svg": Markup(plots.dots(points, title, steps, points[0].name))}


def _point(row: Mapping[str, Any]) -> Point:
    estimate = row["estimate"]
    seeds = tuple(value for one in row["by_seed"] if one["seed"] is not None and (value := finite(one["value"])) is not None)
    return Point(row["of"], row["of"], row["of"].partition("[")[0], 0.0, float(estimate["value"]), finite(estimate["low"]), finite(estimate["high"]), seeds)


# Methods.


def others() -> dict[str, Any]:
    """Measures and worlds, with a line each."""
    from etude.method import discover

    return {room: [interface(cls).as_data() for cls in discover(room).values()] for room in ("measures", "worlds")}


def method(name: str) -> dict[str, Any]:
    """One method, measure or world, with a step to copy."""
    room = rooms.room_of(name)
    if room == "methods" and name not in names("methods"):
        raise InputError(f"there is no method {name!r}", remedy=nearest(name, [*names("methods"), *names("measures"), *names("worlds")]))
    card = rooms.method_card(room, name)
    summary, _, rest = card["documentation"].partition("\n")
    return {"card": card, "room": room, "summary": summary, "paragraphs": paragraphs(rest), "step": _step(card, room)}


def paragraphs(text: str) -> list[list[str]]:
    """A docstring's paragraphs, each as its lines: labels such as ``Cost:`` begin one of their own."""
    found: list[list[str]] = []
    for part in re.split(r"\n\s*\n", text.strip()):
        lines: list[str] = []
        for line in part.splitlines():
            if not lines or re.match(r"[A-Z][A-Za-z ]{2,18}: ", line):
                lines.append(line.strip())
            else:
                lines[-1] += f" {line.strip()}"
        found.append(lines)
    return [lines for lines in found if lines and lines[0]]


def _step(card: Mapping[str, Any], room: str) -> str:
    """How a study writes it."""
    if room == "worlds":
        return f"given:\n  made: {{{card['output']}: etude:{card['name']}}}\n"
    if room == "measures":
        more = [slot for slot in list(card["inputs"])[1:]]
        on = ", on: heldout" if more else ""
        return f"measure:\n  {card['name']}: {{of: [base]{on}}}\n"
    inputs = ", ".join(f"{slot}: {'base' if kind.startswith('model') else 'text'}" for slot, kind in card["inputs"].items())
    lines = ["steps:", "  made:", *([f"    inputs: {{{inputs}}}"] if inputs else []), f"    use: {{{card['name']}: {{}}}}", *(["    budget: 50k tokens"] if card["takes_budget"] else [])]
    return "\n".join(lines) + "\n"


# Studies.


def studies(store: Store) -> dict[str, Any]:
    """Every run that left notes, and studies that the store remembers without."""
    runs = list(journal.entries(store))
    noted = {str(entry.notes["study"]) for entry in runs}
    earlier = sorted(path.stem for path in store.runs.glob("*.json") if path.stem not in noted)
    return {"runs": runs, "earlier": earlier, "running": any(entry.state == journal.RUNNING for entry in runs)}


def study(store: Store, name: str) -> dict[str, Any]:
    """One run: how far it is, or how it ended."""
    entry = _entry(store, name)
    return {"entry": entry, "name": str(entry.notes["study"]), "report": (Path(entry.notes["folder"]) / "report.html").is_file() and entry.state != journal.RUNNING}


def _entry(store: Store, name: str) -> journal.Entry:
    """Notes of a run; its name is compared with those that are there, and never becomes a path."""
    known = {str(entry.notes["study"]): entry for entry in journal.entries(store)}
    if name not in known:
        raise InputError(f"no run of a study {name!r} left notes in {store.root}", remedy=nearest(name, known))
    return known[name]


def results(store: Store, name: str) -> Path:
    """The results of a finished run."""
    path = Path(_entry(store, name).notes["folder"]) / "results.json"
    if not path.is_file():
        raise InputError(f"the results of {name} are not at {path.parent} any more", remedy="Run the study again: what is in the store is not computed twice.")
    return path


def report(store: Store, name: str) -> str:
    """The report of a finished run, drawn from its results: no file that somebody else may have written is handed on as a page."""
    path = results(store, name)
    return _rendered(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _rendered(path: Path, stamp: int) -> str:
    from etude.study.report import render

    try:
        data = json.loads(path.read_text(encoding="utf8"))
        if data["schema"] != SCHEMA:
            raise ValueError(f"its schema is {data['schema']}")
        return render(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no results: {error}", remedy="Run the study again: what is in the store is not computed twice.") from error


# The store.


def objects(store: Store, page: int) -> dict[str, Any]:
    """What the store holds, the newest first."""
    rows = sorted((_object(store, key) for key in store.digests()), key=lambda row: str(row["finished"]), reverse=True)
    pages = max(1, -(-len(rows) // A_PAGE))
    return {"rows": rows[(page - 1) * A_PAGE : page * A_PAGE], "count": len(rows), "bytes": sum(row["bytes"] for row in rows), "root": store.root, "page": page, "pages": pages}


@functools.lru_cache(maxsize=100_000)
def _object(store: Store, key: str) -> dict[str, Any]:
    """An object's line; an object never changes."""
    record = store.record(key)
    size = sum(file["bytes"] for file in record["files"].values())
    return {"key": key, **{name: record[name] for name in ("kind", "method", "name", "finished")}, "seconds": record["cost"]["seconds"], "bytes": size}


def record(store: Store, key: str) -> dict[str, Any]:
    """What is known of an object; its digest is compared with those that are there, and never becomes a path."""
    if key not in store.digests():
        raise InputError(f"the store holds no object {key!r}")
    return store.record(key)


# How things are written.


def today() -> datetime.date:
    """The day, in UTC."""
    return datetime.datetime.now(datetime.UTC).date()


def number(value: Any) -> str:
    """A number to four digits, or a dash."""
    return plots.plain(value) if value is not None else "–"


def interval(margin: Mapping[str, Any]) -> str:
    """A value with its interval."""
    return console.interval(margin) if margin["value"] is not None else "–"  # type: ignore[arg-type]


def duration(seconds: float) -> str:
    """Seconds as one would say them."""
    return plots.duration(seconds)


def size(count: float) -> str:
    """Bytes with their prefix."""
    return plots.plain(count, "bytes")


def when(stamp: float | str | None) -> str:
    """A point in time, in UTC, as one would write it."""
    if stamp is None:
        return "–"
    if isinstance(stamp, str):
        return stamp.replace("T", " ").removesuffix("Z")
    return datetime.datetime.fromtimestamp(stamp, datetime.UTC).strftime("%Y-%m-%d %H:%M")
