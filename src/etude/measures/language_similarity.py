"""How close a model's states of a sentence are to those of the same sentence in a reference language."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etude.engine import hidden
from etude.engine.batch import encode
from etude.engine.score import log_probabilities
from etude.measures._correlations import products
from etude.method import MEASUREMENTS, Method
from etude.values.corpus import Corpus, bytes_of
from etude.values.errors import InputError
from etude.values.measurement import HIGHER, Measurement
from etude.values.model import Model


@dataclass(frozen=True)
class LanguageSimilarity(Method):
    """Language Ranker: the cosine of a sentence's last hidden state with that of its counterpart in the reference language, by which languages are ranked.

    Reads the columns text, language and sentence: the texts of one sentence, in each language one, say the same.  The state is that of a text's last token; cosines are averaged
    over layers, then over sentences.  Parts:

    - ``similarity`` over all languages but the reference, and ``similarity_NAME`` of each; a sentence in a language is an item, of the others a sentence;
    - of a causal model ``bits_per_byte_NAME`` of each language, the reference too, a sentence an item, and ``rank_by_loss``: Spearman's correlation of a language's
      similarity with how little it loses, in bits a byte;
    - with a column share, of each language in what the model was trained on, ``rank_by_share``: the same with the share, and of a causal model ``loss_rank_by_share``.

    The items of correlations are the languages, the reference left out; `_correlations.products` says what they are.
    Source: Li et al., "Language Ranker", 2024 (arXiv:2404.11553).  Departures: the paper takes some of the layers of models of 32; here they are all blocks unless
    `layers` chooses.  Losses stand for its performance on tasks.
    Raises InputError for fewer than two languages, a sentence that is not there once in each, an empty text or one that the model cannot read, and a layer that is not there.
    Cost: a forward pass over the texts, and of a causal model a second one for the losses.
    """

    paper = "language-ranker"

    reference: str | None = None
    """The language that the others are compared with; by default the corpus's first."""
    layers: tuple[int, ...] | None = None
    """Layers whose cosines are averaged: 0 the embeddings, 1 the first block, -1 the last; by default all blocks."""

    window: int | None = None
    """Cut texts to so many tokens, for the states; by default none is cut."""

    def __post_init__(self) -> None:
        if self.layers is not None and not self.layers:
            raise ValueError("layers are one or more; leave them out for all blocks")

    def apply(self, model: Model, corpus: Corpus) -> MEASUREMENTS:
        names, places, sentences = self._laid(corpus)
        texts = [corpus.texts[place] for row in places for place in row]
        found = hidden.states(model, texts, pool="last", layers=self.layers, window=self.window).astype(np.float64)
        states = (found if self.layers else found[1:]).reshape(-1, len(names), len(sentences), found.shape[-1])
        norms = np.maximum(np.linalg.norm(states, axis=-1), np.finfo(np.float64).tiny)
        cosines = ((states[:, 1:] * states[:, :1]).sum(-1) / norms[:, 1:] / norms[:, :1]).mean(0)  # (languages, sentences)
        every = tuple(f"{name}, {one}" for name in names[1:] for one in sentences)
        parts = [Measurement("similarity", cosines.ravel(), better=HIGHER, item_names=every)]
        parts += [Measurement(f"similarity_{name}", row, better=HIGHER, item_names=sentences) for name, row in zip(names[1:], cosines, strict=True)]
        score, ranked = cosines.mean(1), {}
        shares = self._shares(corpus, places) if "share" in corpus.columns else None
        if shares is not None:
            ranked["rank_by_share"] = products(score, shares, ranks=True)
        if model.kind == "causal":
            parts += (losses := self._losses(model, texts, names, sentences))
            lost = np.array([part.value for part in losses[1:]])
            ranked["rank_by_loss"] = products(score, -lost, ranks=True)
            if shares is not None:
                ranked["loss_rank_by_share"] = products(-lost, shares, ranks=True)
        return (*parts, *(Measurement(name, items, better=HIGHER, item_names=tuple(names[1:])) for name, items in ranked.items()))

    def _laid(self, corpus: Corpus) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
        """Names of the languages, the reference first; the record of each language and sentence; and the sentences' names."""
        if not len(corpus):
            raise InputError("the corpus is empty")
        spoken, told = [str(one) for one in corpus.column("language")], [str(one) for one in corpus.column("sentence")]
        names, sentences = list(dict.fromkeys(spoken)), tuple(dict.fromkeys(told))
        reference = names[0] if self.reference is None else self.reference
        if reference not in names or len(names) < 2:
            raise InputError(f"there is no language {reference!r} with others beside it, only {', '.join(names)}", remedy="Set `reference` to one of the column language.")
        names = [reference, *(name for name in names if name != reference)]
        at = {pair: place for place, pair in enumerate(zip(spoken, told, strict=True))}
        missing = [(name, one) for name in names for one in sentences if (name, one) not in at]
        if missing or len(at) < len(corpus):
            raise InputError(f"each sentence is there once in each language, and {f'sentence {missing[0][1]!r} is not in {missing[0][0]!r}' if missing else 'one is there twice'}")
        return names, np.array([[at[name, one] for one in sentences] for name in names]), sentences

    def _shares(self, corpus: Corpus, places: np.ndarray) -> np.ndarray:
        """Of each language but the reference."""
        column = np.array(corpus.column("share"), np.float64)[places[1:]]
        if not (np.isfinite(column).all() and (column == column[:, :1]).all()):
            raise InputError("the column share is one number for each language")
        shares: np.ndarray = column[:, 0]
        return shares

    def _losses(self, model: Model, texts: list[str], names: list[str], sentences: tuple[str, ...]) -> list[Measurement]:
        """Bits a byte of each language's sentences."""
        window = min(512, getattr(model.config.get_text_config(), "max_position_embeddings", None) or 512)
        nats = np.array([-one.sum(dtype=np.float64) for one in log_probabilities(model, encode(model, Corpus(texts)), window=window, stride=window // 2)])
        sizes = np.array([bytes_of([text]) for text in texts], float)
        bits, sizes = (nats / sizes / np.log(2)).reshape(len(names), -1), sizes.reshape(len(names), -1)
        return [Measurement(f"bits_per_byte_{name}", row, unit="bits/byte", weights=size, item_names=sentences) for name, row, size in zip(names, bits, sizes, strict=True)]
