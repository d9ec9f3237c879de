"""From text to token rows: encoding, packing, windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.lazy import lazy
from etude.values.model import Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase
else:
    torch = lazy("torch")

IGNORED = -100
"""The label that counts in no loss, as torch and transformers have it."""


class Rows(NamedTuple):
    """Packed token rows, each array of shape (rows, length)."""

    ids: np.ndarray
    labels: np.ndarray
    """The next token, or -100 where the next token belongs to another document."""
    positions: np.ndarray
    """Position in its document's part of the row; every return to 0 begins a document."""


def padded(rows: Sequence[np.ndarray], pad: int = 0, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token rows as one tensor, and a mask that is 1 for what is no padding; each (rows, longest), int64."""
    ids = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, real in enumerate(rows):
        place = slice(ids.shape[1] - len(real), None) if left else slice(0, len(real))
        ids[row, place] = torch.from_numpy(real)
        mask[row, place] = 1
    return ids, mask


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before a document: the beginning-of-text token, else the end-of-text one."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id):
        if token is not None:
            return token
    raise InputError("the tokenizer has neither a beginning- nor an end-of-text token", remedy="Set bos_token or eos_token in tokenizer_config.json.")


def encode(model: Model, corpus: Corpus) -> list[np.ndarray]:
    """Token ids of every text, with the start token before and nothing after.  Raises InputError on an empty corpus."""
    if not len(corpus):
        raise InputError("the corpus is empty")
    return _encode(model.tokenizer, corpus.texts)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    start = start_token(tokenizer)
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.array([start, *ids], dtype=np.int64) for ids in encoded]


class Documents:
    """A corpus as token ids, encoded when they are first asked for: a short training run reads little of a large corpus."""

    def __init__(self, model: Model, corpus: Corpus):
        """Raises InputError on an empty corpus, or one without texts."""
        if not len(corpus):
            raise InputError("the corpus is empty")
        self._tokenizer, self._texts = model.tokenizer, corpus.texts
        self._encoded: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def take(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Some documents, those that are new encoded together."""
        new = [index for index in dict.fromkeys(indices) if index not in self._encoded]
        if new:
            self._encoded.update(zip(new, _encode(self._tokenizer, [self._texts[index] for index in new]), strict=True))
        return [self._encoded[index] for index in indices]


class Listed(Documents):
    """Documents that are token ids already."""

    def __init__(self, documents: Sequence[np.ndarray]):
        self._texts = [""] * len(documents)
        self._encoded = dict(enumerate(documents))


def pack(documents: Sequence[np.ndarray], length: int) -> Rows:
    """Lay documents end to end and cut the stream into rows of `length`; what is left over is dropped.

    A document's last token predicts the start token, which every tokenizer here also uses as the end of text.
    """
    end = int(documents[0][0])
    stream = np.concatenate([np.append(document, end) for document in documents])
    owner = np.repeat(np.arange(len(documents)), [len(document) + 1 for document in documents])
    count = (len(stream) - 1) // length
    ids = stream[: count * length].reshape(count, length)
    following, same = stream[1 : count * length + 1], owner[1 : count * length + 1] == owner[: count * length]
    labels = np.where(same, following, IGNORED).reshape(count, length)
    place = np.arange(count * length) % length
    begins = np.concatenate([[True], ~same[:-1]]) | (place == 0)
    positions = place - np.maximum.accumulate(np.where(begins, np.arange(count * length), 0)) % length
    return Rows(ids, labels, positions.reshape(count, length))


POOL_ROWS, POOL_DOCUMENTS = 256, 16
"""Rows are shuffled in pools of at least so many; documents are encoded so many at once."""


def epochs(documents: Documents, length: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Endless packed rows, one at a time.

    Each epoch takes the documents in a new order, a pool after another; a pool is packed, and its rows are shuffled.
    """
    random = np.random.default_rng(seed)
    pool: list[np.ndarray] = []
    while True:
        order = random.permutation(len(documents)).tolist()
        for begin in range(0, len(order), POOL_DOCUMENTS):
            pool += documents.take(order[begin : begin + POOL_DOCUMENTS])
            last = begin + POOL_DOCUMENTS >= len(order)
            size = sum(len(document) + 1 for document in pool)
            if size > POOL_ROWS * length or (last and size > length):
                rows = pack(pool, length)
                pool = []
                for index in random.permutation(len(rows.ids)):
                    yield rows.ids[index], rows.labels[index], rows.positions[index]


class Window(NamedTuple):
    """Part of a document: tokens [start, stop), of which those from `scored` on are to be predicted."""

    document: int
    start: int
    scored: int
    stop: int


def windows(lengths: Sequence[int], size: int, stride: int) -> list[Window]:
    """Cover documents by windows of at most `size` tokens, so that every token after the first is predicted once.

    Each later window predicts `stride` tokens with the `size - stride` before them as context.
    """
    found = []
    for document, length in enumerate(lengths):
        stop = min(size, length)
        found.append(Window(document, 0, 1, stop))
        while stop < length:
            following = min(stop + stride, length)
            found.append(Window(document, max(0, following - size), stop, following))
            stop = following
    return found


def by_length(sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Group items, longest first, so that padded to the longest of its group a batch has at most `budget` tokens."""
    batch: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if batch and sizes[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
