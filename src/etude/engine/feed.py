"""What training reads: rows of tokens in the order of a seed, and how rows become a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from etude.engine import batch
from etude.engine.batch import IGNORED
from etude.values.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


class Row(NamedTuple):
    """One row of tokens, each array (length,)."""

    ids: np.ndarray
    labels: np.ndarray
    """What is to be predicted at each place, -100 where nothing counts."""
    positions: np.ndarray | None = None
    """Place in its document; None if the row is one document, or the beginning of one."""
    tag: Any = None
    """Whatever else a loss wants to know of the row."""


@dataclass
class Batch:
    """A micro-batch, each tensor (rows, length)."""

    ids: Tensor
    labels: Tensor
    positions: Tensor | None = None
    """Places in documents, for packed rows; None if each row is one document."""
    mask: Tensor | None = None
    """True for real tokens, for padded rows."""
    targets: Tensor | None = None
    """What a decoder reads, (rows, target length); the labels are then the decoder's."""
    masked: bool = False
    """Whether the network sees both sides, and keeps no cache."""
    tags: Sequence[Any] = ()
    progress: float = 0.0
    """Share of the budget that was spent when the step began."""

    @property
    def real(self) -> int:
        """Tokens that are no padding."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    def to(self, device: torch.device) -> Batch:
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return Batch(**{**vars(self), **moved})


class Feed:
    """Rows without end.  A feed is begun once, then asked for rows; the same seed and the same questions give the same rows."""

    even = False
    """Whether all rows have one length: only then is compiling a network for it worth its while."""

    def begin(self, seed: int) -> None:
        """Start from the first row of this seed's order."""
        raise NotImplementedError

    def take(self, count: int, progress: float) -> list[Row]:
        """The next rows.  progress: the share of the budget that is spent."""
        raise NotImplementedError

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Rows of one kind as a batch: padded on the right to the longest, with a mask if any is shorter."""
        length = max(len(row.ids) for row in rows)
        ids, labels = np.zeros((len(rows), length), np.int64), np.full((len(rows), length), IGNORED, np.int64)
        mask = np.zeros((len(rows), length), bool)
        for place, row in enumerate(rows):
            ids[place, : len(row.ids)], labels[place, : len(row.ids)], mask[place, : len(row.ids)] = row.ids, row.labels, True
        packed = any(row.positions is not None for row in rows)
        positions = np.stack([np.arange(length) if row.positions is None else row.positions for row in rows]) if packed else None
        return Batch(
            torch.from_numpy(ids), torch.from_numpy(labels), None if positions is None else torch.from_numpy(positions), None if mask.all() else torch.from_numpy(mask), tags=[row.tag for row in rows]
        )


class Packed(Feed):
    """Documents laid end to end in rows of one length, in which none sees another: positions begin anew with each."""

    even = True

    def __init__(self, documents: batch.Documents, length: int):
        self.documents, self.length = documents, length

    def begin(self, seed: int) -> None:
        self._rows = self._endless(seed)

    def take(self, count: int, progress: float) -> list[Row]:
        return [next(self._rows) for _ in range(count)]

    def _endless(self, seed: int) -> Iterator[Row]:
        for ids, labels, positions in batch.epochs(self.documents, self.length, seed):
            yield Row(ids, labels, positions if positions[-1] != len(positions) - 1 else None)


class Cut(Feed):
    """Each row a part of one document of at most `length` tokens, so that networks that see both sides never see two documents; in the order of
    a draw among so many rows that neighbours in a document seldom meet in a step.

    The labels are the tokens themselves; a loss that masks or corrupts chooses among them.
    """

    POOL = 2048

    def __init__(self, documents: batch.Documents, length: int, shortest: int = 8):
        self.documents, self.length, self.shortest = documents, length, shortest

    def begin(self, seed: int) -> None:
        self._rows = self._endless(seed)

    def take(self, count: int, progress: float) -> list[Row]:
        return [next(self._rows) for _ in range(count)]

    def _endless(self, seed: int) -> Iterator[Row]:
        random = np.random.default_rng(seed)
        pool: list[np.ndarray] = []
        while True:
            order = random.permutation(len(self.documents)).tolist()
            for begin in range(0, len(order), batch.POOL_DOCUMENTS):
                for document in self.documents.take(order[begin : begin + batch.POOL_DOCUMENTS]):
                    parts = [document[at : at + self.length] for at in range(0, len(document), self.length)]
                    pool += [part for part in parts if len(part) >= min(self.shortest, len(document))]
                if len(pool) >= self.POOL or (pool and begin + batch.POOL_DOCUMENTS >= len(order)):
                    for index in random.permutation(len(pool)):
                        yield Row(pool[index], pool[index])
                    pool = []


class Mixed(Feed):
    """Rows from several feeds, each row from one that is drawn with its share; the shares may depend on the progress."""

    def __init__(self, feeds: Sequence[Feed], shares: Sequence[float] | Any):
        self.feeds = list(feeds)
        self.even = all(feed.even for feed in self.feeds)
        self.shares = shares if callable(shares) else lambda progress: shares

    def begin(self, seed: int) -> None:
        self._random = np.random.default_rng([seed, 1])
        for place, feed in enumerate(self.feeds):
            feed.begin(seed + 7919 * place)

    def take(self, count: int, progress: float) -> list[Row]:
        shares = np.asarray(self.shares(progress), float)
        chosen = self._random.choice(len(self.feeds), count, p=shares / shares.sum())
        return [self.feeds[place].take(1, progress)[0] for place in chosen]

    def collate(self, rows: Sequence[Row]) -> Batch:
        return self.feeds[0].collate(rows)
