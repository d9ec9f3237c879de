"""The papers as the page has them at hand: read again when they change, and searched by words until their meaning is known."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

from etude.papers import evidence, vectors
from etude.papers.catalogue import Paper
from etude.papers.search import Index
from etude.papers.shelf import Shelf
from etude.papers.status import as_data
from etude.study.store import Store

log = logging.getLogger("etude.serve")


class Library:
    """Papers, what became of each, and an index of them.  Threads may share one."""

    def __init__(self, store: Store):
        self.store, self.shelf = store, Shelf(store)
        self._lock = threading.Lock()
        self._known: tuple[Any, dict[str, dict[str, Any]]] | None = None
        self._index: tuple[Mapping[str, Paper], Index] | None = None

    def papers(self) -> Mapping[str, Paper]:
        return self.shelf.papers()

    def rows(self) -> dict[str, dict[str, Any]]:
        """Every paper with what became of it, as plain data; computed again when papers or evidence change."""
        papers = self.papers()
        stamp = evidence.FOLDER.stat().st_mtime_ns if evidence.FOLDER.exists() else 0
        with self._lock:
            if self._known is None or self._known[0][0] is not papers or self._known[0][1] != stamp:
                self._known = ((papers, stamp), {slug: as_data(paper) for slug, paper in papers.items()})
            return self._known[1]

    def index(self) -> Index:
        """An index of the papers.  One that must first read texts for their meaning is of words alone until it has."""
        papers = self.papers()
        with self._lock:
            if self._index is None or self._index[0] is not papers:
                self._index = (papers, Index(list(papers.values()), None, vectors.folder()))
                threading.Thread(target=self._learn, args=(papers,), daemon=True, name="vectors").start()
            return self._index[1]

    def _learn(self, papers: Mapping[str, Paper]) -> None:
        try:
            whole = vectors.index(list(papers.values()))
        except Exception:  # search goes on by words
            log.exception("the meaning of the papers could not be computed")
            return
        with self._lock:
            if self._index is not None and self._index[0] is papers:
                self._index = (papers, whole)
