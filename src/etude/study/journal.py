"""What a run is doing, for whoever looks from outside: one small file in the store, written again while it runs."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from etude.study.store import Store, write_atomically

if TYPE_CHECKING:
    from etude.engine.progress import Progress
    from etude.study.plan import Plan
    from etude.study.run import Event

RUNNING, FINISHED, STOPPED = "running", "finished", "stopped"
EVERY = 0.5
"""Seconds between two writings."""
FINAL = ("computed", "cached", "failed", "skipped")


class Journal:
    """Notes of one run, at ``live/<study>.json``; a second run of the study writes its own over them.

    A disk that takes no notes does not stop a run.
    """

    def __init__(self, plan: Plan, store: Store, folder: Path):
        self.path = store.root / "live" / f"{plan.study.name}.json"
        nodes = [node for node in plan.nodes if node.kind != "given"]
        self.steps: dict[str, dict[str, Any]] = {node.key: {"label": node.label, "kind": node.kind, "state": "waiting", "seconds": None, "error": ""} for node in nodes}
        self.notes: dict[str, Any] = {
            "study": plan.study.name, "question": plan.study.question, "recipe": plan.study.text, "folder": str(folder.absolute()), "host": platform.node(), "pid": os.getpid(),
            "started": time.time(), "ended": None, "state": RUNNING, "doing": None, "verdict": "",
        }  # fmt: skip
        self.written = 0.0

    def __enter__(self) -> Journal:
        self._write()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.notes |= {"ended": time.time(), "state": STOPPED if kind else FINISHED, "doing": None}
        if error and not isinstance(error, KeyboardInterrupt):
            self.notes["verdict"] = str(error) or type(error).__name__
        self._write()

    def event(self, event: Event) -> None:
        """Note what happened to a node of the plan; trials of a search are none of its nodes."""
        row = self.steps.get(event.node.key)
        if row is not None and event.state in (*FINAL, "started"):
            row |= {"state": event.state, "seconds": event.seconds if event.state in FINAL else None, "error": event.error}
        self.notes["doing"] = {"label": event.node.label, "what": "", "share": 0.0, "note": ""} if event.state == "started" else self.notes["doing"]
        self._write(event.state in ("failed", "started"))

    def progress(self, report: Progress) -> None:
        """Note how far the step at hand is."""
        if self.notes["doing"]:
            self.notes["doing"] |= {"what": report.doing, "share": min(1.0, report.done / report.total) if report.total else 0.0, "note": report.note}
        self._write(False)

    def ended(self, verdict: str) -> None:
        """Note what came out."""
        self.notes["verdict"] = verdict

    def _write(self, now: bool = True) -> None:
        if not now and time.time() - self.written < EVERY:
            return
        self.written = time.time()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps({**self.notes, "updated": self.written, "steps": list(self.steps.values())}) + "\n")
        except OSError:
            pass


@dataclass(frozen=True)
class Entry:
    """What a journal says of a run."""

    notes: Mapping[str, Any]

    @property
    def state(self) -> str:
        """Running, finished, or stopped: by an error, by hand, or by a kill that left no note."""
        return STOPPED if self.notes["state"] == RUNNING and not self._alive() else str(self.notes["state"])

    @property
    def seconds(self) -> float:
        """How long it has run, or ran."""
        return float((self.notes["ended"] or (time.time() if self.state == RUNNING else self.notes["updated"])) - self.notes["started"])

    @property
    def done(self) -> int:
        return sum(step["state"] in FINAL for step in self.notes["steps"])

    def _alive(self) -> bool:
        """Whether its process is there; on another machine, whether it wrote in the last ten minutes."""
        if self.notes["host"] != platform.node():
            return time.time() - float(self.notes["updated"]) < 600
        try:
            os.kill(int(self.notes["pid"]), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True


def entries(store: Store) -> Iterator[Entry]:
    """Every run that left notes, the latest first."""
    found = []
    for path in (store.root / "live").glob("*.json"):
        entry = read(path)
        if entry:
            found.append(entry)
    yield from sorted(found, key=lambda entry: -float(entry.notes["started"]))


def read(path: Path) -> Entry | None:
    """What one journal says; None if there is none, or it is none of ours."""
    try:
        notes = json.loads(path.read_text(encoding="utf8"))
        entry = Entry(notes)
        entry.state, entry.seconds, entry.done  # noqa: B018, whatever is missing is found now
        return entry
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
