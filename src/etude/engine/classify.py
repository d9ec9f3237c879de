"""Fine-tuning for classification: a linear head on a network's pooled states, trained with all of the network's own parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from etude.engine import hidden
from etude.engine.budget import Budget
from etude.engine.feed import Batch, Feed, Row
from etude.engine.losses import Lost
from etude.engine.train import Recipe, train
from etude.values.lazy import lazy
from etude.values.model import Model

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = lazy("torch")

HEAD = "classification_head"
"""What the head is called in the draft's network; no saved model ever has it."""


class Labelled(Feed):
    """Texts with their classes, each text a row; every epoch in an order of its own."""

    def __init__(self, rows: Sequence[np.ndarray], labels: np.ndarray):
        self._rows, self._labels = rows, labels

    def begin(self, seed: int) -> None:
        self._order = self._endless(seed)

    def take(self, count: int, progress: float) -> list[Row]:
        chosen = [next(self._order) for _ in range(count)]
        return [Row(self._rows[index], self._rows[index], tag=int(self._labels[index])) for index in chosen]

    def _endless(self, seed: int) -> Iterator[int]:
        random = np.random.default_rng(seed)
        while True:
            yield from random.permutation(len(self._rows)).tolist()


def tune(model: Model, texts: Sequence[str], labels: np.ndarray, recipe: Recipe, epochs: float, seed: int, *, pool: str = "mean", window: int | None = None) -> Model:
    """A copy of the model, trained to tell the classes apart: cross-entropy of a linear head, drawn by the seed, on the last layer's pooled states.

    labels (texts,): classes from 0.  recipe: its length is that of the longest row that counts towards a step's tokens, so that a step has batch_tokens / length texts.
    The draft that comes back is for `classes` alone: its network carries the head.  Raises InputError as `hidden.states` does.  Cost: the epochs.
    """
    rows, draft = hidden.encoded(model, texts, window), model.copy()
    reader, skipped = hidden.reader_of(draft), hidden.unpooled(draft)
    width = hidden.states(model, texts[:1], pool=pool, layers=[-1], window=window).shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = torch.nn.Linear(width, int(labels.max()) + 1)
        torch.nn.init.normal_(head.weight, std=0.02)
    torch.nn.init.zeros_(head.bias)
    draft.network.add_module(HEAD, head.to(draft.network.device))

    def loss(network: nn.Module, part: Batch) -> Lost:
        real = torch.ones_like(part.ids) if part.mask is None else part.mask.long()
        last = hidden.read(draft, reader, part.ids, real)[-1].float()
        scores = head(hidden.pooled(last, hidden.counting(real, skipped), pool))
        wanted = torch.tensor(part.tags, device=scores.device)
        return Lost(torch.nn.functional.cross_entropy(scores, wanted, reduction="sum"), counted=len(wanted))

    texts_a_step = max(1, recipe.batch_tokens // recipe.length)
    train(draft, Labelled(rows, labels), recipe, Budget(max(1, round(epochs * len(rows) / texts_a_step)), "steps"), seed, loss, note="fine-tuning")
    return draft


def classes(tuned: Model, texts: Sequence[str], *, pool: str = "mean", window: int | None = None) -> np.ndarray:
    """The class that a tuned draft gives each text, (texts,).  Cost: one forward pass over them."""
    (states,) = hidden.states(tuned, texts, pool=pool, layers=[-1], window=window)
    head = getattr(tuned.network, HEAD)
    with torch.no_grad():
        found: np.ndarray = head(torch.from_numpy(states).to(head.weight.device)).argmax(1).cpu().numpy()
    return found
