"""How far a long computation is.  The engine reports, whoever listens draws; methods themselves never print."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Progress(NamedTuple):
    """One report: what is being done, how much of it, of how much, and a few words on how it goes."""

    doing: str
    done: float
    total: float
    note: str = ""


_listener: ContextVar[Callable[[Progress], None] | None] = ContextVar("etude_progress", default=None)


def report(doing: str, done: float, total: float, note: str = "") -> None:
    """Tell whoever listens.  Costs nothing when nobody does."""
    listener = _listener.get()
    if listener is not None:
        listener(Progress(doing, done, total, note))


@contextmanager
def listening(listener: Callable[[Progress], None]) -> Iterator[None]:
    """Hear the reports of everything that runs inside."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def silent() -> Iterator[None]:
    """Let nothing inside report: for whoever reports on the whole that this is a part of."""
    token = _listener.set(None)
    try:
        yield
    finally:
        _listener.reset(token)
