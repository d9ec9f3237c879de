"""How well a model predicts text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from etude.engine import batch
from etude.engine.score import log_probabilities, require_causal
from etude.method import MEASUREMENTS, Method
from etude.values.corpus import Corpus, bytes_of
from etude.values.measurement import Measurement
from etude.values.model import Model


@dataclass(frozen=True)
class Perplexity(Method):
    """Perplexity a token, and bits a byte, which alone can be compared between tokenizers.

    Each document is an item.  A token is predicted from the tokens before it in its window; windows overlap, so that
    every token after the first window has at least `window - stride` tokens of context.
    Cost: about window / stride forward passes over the text.
    """

    window: int = 512
    """Longest stretch of tokens that the model sees at once."""
    stride: int = 256
    """Tokens that each later window predicts; smaller gives more context and costs more."""
    tokens: int | None = None
    """Score only so many tokens of each document, from its beginning; all of them by default."""

    def __post_init__(self) -> None:
        if not 1 <= self.stride < self.window:
            raise ValueError(f"stride is at least 1 and less than window ({self.window}), got {self.stride}")

    def apply(self, model: Model, corpus: Corpus) -> MEASUREMENTS:
        require_causal(model, "perplexity")
        documents = [document[: self.tokens + 1] if self.tokens else document for document in batch.encode(model, corpus)]
        kept = [index for index, document in enumerate(documents) if len(document) > 1]
        scores = log_probabilities(model, [documents[index] for index in kept], window=self.window, stride=self.stride)
        texts = corpus.texts
        if self.tokens:
            texts = [str(model.tokenizer.decode(document[1:])) for document in documents]
        names = tuple(str(name) for name in corpus.column("path")) if "path" in corpus.columns else tuple(map(str, range(len(corpus))))
        nats = np.array([-score.sum(dtype=np.float64) for score in scores])
        counts = np.array([len(score) for score in scores], float)
        sizes = np.array([bytes_of([texts[index]]) for index in kept], float)
        items = tuple(names[index] for index in kept)
        return (
            Measurement("perplexity", nats / counts, unit="", weights=counts, scale="exp", item_names=items),
            Measurement("bits_per_byte", nats / sizes / math.log(2), unit="bits/byte", weights=sizes, item_names=items),
        )
