"""How well a masked model restores text, each token hidden in turn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etude.engine.answers import pseudo_likelihoods
from etude.method import MEASUREMENTS, Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.measurement import Measurement
from etude.values.model import Model


@dataclass(frozen=True)
class PseudoPerplexity(Method):
    """Pseudo-perplexity: the exponential of the mean negative log-probability of a token given all others of its text (Salazar et al., 2020, section 2.3).

    Each token is hidden by itself, so that it is seen from both sides; the sum over a text is its pseudo-log-likelihood, by which `multiple_choice` lets a masked model choose.  It is no
    perplexity: the probabilities of a text's tokens do not multiply to that of the text, and it must not be compared with a causal model's.
    Departs from the paper: its model that is trained to say the whole sum in one pass, without masks (section 2.4), and the rescoring of speech and translation are not here.
    Each document is an item.  Raises InputError for a model that is no masked one, or if no document has a token.
    Cost: a forward pass over a document for each of its tokens.
    """

    paper = "mlm-scoring"

    tokens: int = 64
    """Score only so many tokens of each document, from its beginning: the cost grows with their square."""
    records: int | None = None
    """Score only so many documents, from the first; all of them by default."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens is at least 1, got {self.tokens}")
        if self.records is not None and self.records < 1:
            raise ValueError(f"records is at least 1, got {self.records}; leave it out to score all documents")

    def apply(self, model: Model, corpus: Corpus) -> MEASUREMENTS:
        texts = corpus.texts[: self.records]
        if not texts:
            raise InputError("the corpus is empty")
        framed = [self._beginning(model, np.array(ids, np.int64)) for ids in model.tokenizer(texts)["input_ids"]]
        scored = pseudo_likelihoods(model, framed)
        kept = [index for index, one in enumerate(scored) if len(one.logs)]
        if not kept:
            raise InputError("no document has a token")
        paths = corpus.column("path") if "path" in corpus.columns else range(len(corpus))
        counts = np.array([len(scored[index].logs) for index in kept], float)
        nats = np.array([-scored[index].logs.sum(dtype=np.float64) for index in kept])
        return (Measurement("pseudo_perplexity", nats / counts, weights=counts, scale="exp", item_names=tuple(str(paths[index]) for index in kept)),)

    def _beginning(self, model: Model, ids: np.ndarray) -> np.ndarray:
        """The first tokens, framed as the whole is; the tokenizer's own truncation would change its state."""
        inner = np.flatnonzero(~np.isin(ids, model.tokenizer.all_special_ids))
        return ids if len(inner) <= self.tokens else np.concatenate([ids[: inner[self.tokens - 1] + 1], ids[inner[-1] + 1 :]])
