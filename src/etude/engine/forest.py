"""Texts that begin alike, laid out so that what they share is computed once.

Token sequences, sorted, are the leaves of a prefix tree.  A long stretch that many of them share becomes part of a *trunk*, whose keys and values are kept
while they are scored; what hangs from it is cut into *pieces*, small trees whose tokens see their own ancestors, and many pieces lie side by side in one row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

PIECE = 1024
"""Tokens of a tree in one piece at most; its attention is computed as a square of so many."""
WORTH = 256
"""Tokens that must be saved for a stretch to go into the trunk: it costs a pass of its own."""


class Piece(NamedTuple):
    """A small tree of tokens in depth-first order, or one text's part."""

    ids: np.ndarray
    """(tokens,) int64."""
    positions: np.ndarray
    """(tokens,) place of each token in its text."""
    seen: np.ndarray | None
    """(tokens, tokens), which others a token sees; None for a text's part, in which it sees all before it."""
    places: np.ndarray
    """(reads,) the token whose prediction is wanted."""
    wanted: np.ndarray
    """(reads, 2) what for: which text, and which token of it comes next."""


@dataclass
class Branch:
    """A part of the trunk, the pieces that grow from its end, and the branches that go on."""

    run: Piece | None
    """What it adds to the trunk; None at the root."""
    pieces: list[Piece] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """All tokens that are computed."""
        own = sum(len(piece.ids) for piece in self.pieces) + (len(self.run.ids) if self.run else 0)
        return own + sum(branch.tokens for branch in self.branches)


def shared(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens with which two texts begin alike."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size


class _Sorted:
    """What is read of each text, in the order of tokens, and how far each begins like the one before it."""

    def __init__(self, texts: Sequence[np.ndarray], given: Sequence[int]):
        read = [text[:-1] for text in texts]  # nothing is predicted from a last token
        self.order = sorted(range(len(texts)), key=lambda index: read[index].astype(">u4").tobytes())
        self.texts = [read[index] for index in self.order]
        self.given = [given[index] for index in self.order]
        self.alike = np.array([0, *(shared(one, other) for one, other in itertools.pairwise(self.texts))], np.int64)
        self._lengths = np.cumsum([0, *map(len, self.texts)])
        self._alike = np.cumsum([0, *self.alike])

    def tokens(self, low: int, high: int, depth: int) -> int:
        """Different tokens of these texts from a depth on that all of them share."""
        return int(self._lengths[high] - self._lengths[low] - depth - (self._alike[high] - self._alike[low + 1]))

    def common(self, low: int, high: int) -> int:
        """Tokens with which all of these begin."""
        return int(self.alike[low + 1 : high].min()) if high - low > 1 else len(self.texts[low])

    def children(self, low: int, high: int, depth: int) -> list[tuple[int, int]]:
        """The parts of a range that differ right after this depth."""
        cuts = [low, *(low + 1 + np.flatnonzero(self.alike[low + 1 : high] == depth)).tolist(), high]
        return list(itertools.pairwise(cuts))

    def reads(self, index: int, begin: int, end: int) -> np.ndarray:
        """Depths from begin to end whose next token is to be predicted."""
        return np.arange(max(self.given[index] - 1, begin), min(end, len(self.texts[index])))

    def run(self, low: int, high: int, begin: int, end: int) -> Piece:
        """What all of these share between two depths."""
        depths = [self.reads(index, begin, end) for index in range(low, high)]
        return Piece(self.texts[low][begin:end], np.arange(begin, end), None, np.concatenate(depths) - begin, self._wanted(low, high, depths))

    def tree(self, low: int, high: int, depth: int) -> Piece:
        """Everything below a depth."""
        count = self.tokens(low, high, depth)
        seen = np.zeros((count, count), bool) if high - low > 1 else None
        ids, positions, path = np.empty(count, np.int64), np.empty(count, np.int64), np.zeros(max(map(len, self.texts[low:high])) - depth, np.int64)
        places, depths, at = [], [], 0
        for index in range(low, high):
            text = self.texts[index]
            begin = int(self.alike[index]) if index > low else depth
            end = at + len(text) - begin
            ids[at:end], positions[at:end] = text[begin:], np.arange(begin, len(text))
            if seen is not None:
                seen[at:end, path[: begin - depth]] = True
                seen[at:end, at:end] = np.tri(end - at, dtype=bool)
            path[begin - depth : len(text) - depth] = np.arange(at, end)
            depths.append(self.reads(index, depth, len(text)))
            places.append(path[depths[-1] - depth])
            at = end
        return Piece(ids, positions, seen, np.concatenate(places), self._wanted(low, high, depths))

    def _wanted(self, low: int, high: int, depths: list[np.ndarray]) -> np.ndarray:
        """(reads, 2): the text as the caller counts them, and the place of the token that is predicted."""
        owners = np.repeat([self.order[index] for index in range(low, high)], [len(one) for one in depths])
        return np.stack([owners, np.concatenate(depths) + 1], 1).astype(np.int64)


def plan(texts: Sequence[np.ndarray], given: Sequence[int]) -> Branch:
    """How to compute the predictions of every text's tokens after the first `given` ones, each different token in its place once, or nearly so.

    texts: token ids, none empty; given: at least 1 each.  Does not depend on the order of the texts, but for names.
    """
    root = Branch(None)
    if not len(texts):
        return root
    these = _Sorted(texts, given)
    waiting = [(0, len(texts), 0, root)]
    while waiting:
        low, high, depth, branch = waiting.pop()
        if these.tokens(low, high, depth) == 0:
            continue
        if high - low == 1 or these.tokens(low, high, depth) <= PIECE:
            branch.pieces.append(these.tree(low, high, depth))
            continue
        common = these.common(low, high)
        children = these.children(low, high, common)
        if (common - depth) * (len(children) - 1) >= WORTH:
            branch.branches.append(Branch(these.run(low, high, depth, common)))
            branch, depth = branch.branches[-1], common
        waiting += [(begin, end, depth, branch) for begin, end in reversed(children)]
    return root


def rows(pieces: Sequence[Piece], tokens: int) -> Iterator[list[Piece]]:
    """Pieces side by side in rows of at most so many tokens, or one piece; those of one length next to each other."""
    row: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: (-len(piece.ids), piece.seen is not None, piece.ids.tobytes())):
        if row and sum(len(one.ids) for one in row) + len(piece.ids) > tokens:
            yield row
            row = []
        row.append(piece)
    if row:
        yield row


def side_by_side(row: Sequence[Piece]) -> Piece:
    """A row's tokens and reads as those of one piece; who sees whom stays with the pieces."""
    begins = np.cumsum([0, *(len(piece.ids) for piece in row[:-1])])
    places = np.concatenate([piece.places + begin for piece, begin in zip(row, begins, strict=True)])
    return Piece(np.concatenate([piece.ids for piece in row]), np.concatenate([piece.positions for piece in row]), None, places, np.concatenate([piece.wanted for piece in row]))
