"""Methods as a reader meets them: one as a card, a stage as a table."""

from __future__ import annotations

from typing import Any

from etude.method import discover, find, interface, names
from etude.papers.catalogue import catalogue
from etude.papers.status import status


def method_card(room: str, name: str) -> dict[str, Any]:
    """A method, measure or world with its documentation and parameters, as plain data.  Raises InputError if there is none of this name."""
    face = interface(find(room, name))
    return {**face.as_data(), "documentation": face.documentation}


def room_of(name: str) -> str:
    """In which room a name stands: measures, worlds, else methods."""
    return next((room for room in ("measures", "worlds") if name in names(room)), "methods")


def stages() -> dict[str, int]:
    """The stages that have methods, with how many."""
    found: dict[str, int] = {}
    for name in names("methods"):
        stage = name.partition(".")[0]
        found[stage] = found.get(stage, 0) + 1
    return found


def stage_rows(stage: str) -> list[dict[str, Any]]:
    """Of every method of a stage what it takes away, what it needs, what it costs, and what became of its paper here."""
    rows: list[dict[str, Any]] = []
    for name, cls in sorted(discover("methods").items()):
        if name.partition(".")[0] != stage:
            continue
        face = interface(cls)
        needs = [slot.name for slot in face.inputs if slot.name != "model"] + (["training"] if face.budgeted else [])
        paper = catalogue().get(face.cls.paper or "")
        found = status(paper) if paper else None
        verdict = "a baseline" if found is None else (found.verdict or "not tested yet")
        rows.append({"method": name, "removes": face.told("Removes"), "needs": needs, "cost": face.told("Cost"), "paper": face.cls.paper, "verdict": verdict, "summary": face.summary})
    return rows
