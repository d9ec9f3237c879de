"""How well a model's frozen hidden states already tell the classes of a labelled corpus apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from etude.engine import hidden
from etude.measures._separability import h_score_items, logme_items, neighbour_items
from etude.method import MEASUREMENTS, Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.measurement import HIGHER, Measurement
from etude.values.model import Model

ESTIMATORS, LAYERS = ("logme", "h_score", "knn"), ("last", "mean", "best")


@dataclass(frozen=True)
class Transferability(Method):
    """TransformerRanker: estimates, without training, of how well a model will do once it is fine-tuned on a labelled corpus; models are ranked by them.

    Each text becomes a vector, the mean of its tokens' hidden states.  Three estimators say how well the classes can be told apart by these:
    ``logme``, the evidence of Bayesian linear regression on them, nats a text (You et al., 2021); ``h_score``, the covariance between classes in the metric of the
    whole, with shrinkage, from 0 to the classes less one (Bao et al., 2019; Ibrahim et al., 2022); ``knn``, the share of texts whose nearest others have their class.
    Each is given of three choices of layer: ``logme_last``, the last one; ``logme_mean``, the mean of all; ``logme_best``, the layer that scores highest; and so on.
    The embeddings are no layer here, as in the authors' library.  Each text is an item; what the items of `logme` and `h_score` are: `etude.measures._separability`.

    Reads the column text, and that of the labels, which may hold anything that can be written.
    Source: Garbas, Ploner and Akbik, "TransformerRanker", 2024, and the authors' library transformer-ranker 0.2.0; k = 3 is the library's.
    Departures: the library averages the tokens of a word, then words, and drops special ones, where all tokens that `hidden.states` pools count alike; LogME is
    iterated until it stands (the library: 11 rounds, from where the class before ended), and its determinant is whole where a vector is wider than there are texts;
    of neighbours' classes as frequent the nearest one's counts, the library's lowest, and of two classes it takes the second's F1.  Labels of tokens, and regression, are left out.
    Raises InputError for fewer than two classes or four texts, an empty text, or one that is longer than the model reads and than no `window` cuts.
    Cost: one forward pass over the texts, and a decomposition of (texts, width) a layer.
    """

    paper = "transformer-ranker"

    label: str = "label"
    """The column of the classes."""
    pool: str = "mean"
    """How a text's tokens become one vector: their ``mean``, the ``first`` or the ``last``."""
    k: int = 3
    """Neighbours that vote."""
    records: int | None = None
    """Use only so many texts, from the first; all of them by default."""
    window: int | None = None
    """Cut texts to so many tokens; by default none is cut."""

    def __post_init__(self) -> None:
        if self.pool not in hidden.POOLS:
            raise ValueError(f"pool is one of {', '.join(hidden.POOLS)}, got {self.pool!r}")
        if self.k < 1:
            raise ValueError(f"k is a number of neighbours, at least 1, got {self.k}")
        if self.records is not None and self.records < 4:
            raise ValueError(f"records is at least 4, got {self.records}; leave it out to use all")

    def apply(self, model: Model, corpus: Corpus) -> MEASUREMENTS:
        texts, labels = labelled(corpus[: self.records] if self.records else corpus, self.label)
        states = hidden.states(model, texts, pool=self.pool, window=self.window)
        paths = corpus.column("path") if "path" in corpus.columns else range(len(texts))
        names = tuple(map(str, paths[: len(texts)]))
        units = {"logme": "nats/text"}
        return tuple(Measurement(f"{name}_{layer}", items, unit=units.get(name, ""), better=HIGHER, item_names=names) for (name, layer), items in estimates(states, labels, self.k).items())


def labelled(corpus: Corpus, column: str) -> tuple[list[str], np.ndarray]:
    """Texts, and the numbers of their classes (texts,), which are ordered as their names are.  Raises InputError for fewer than two classes or four texts."""
    texts, written = corpus.texts, [str(one) for one in corpus.column(column)]
    classes = sorted(set(written))
    if len(classes) < 2 or len(texts) < 4:
        raise InputError(f"there are {len(texts)} texts of {len(classes)} classes in column {column!r}, and it takes four texts of two classes or more", remedy="Name the labels' column: `label`.")
    number = {name: place for place, name in enumerate(classes)}
    return texts, np.array([number[one] for one in written])


def estimates(states: np.ndarray, labels: np.ndarray, k: int) -> dict[tuple[str, str], np.ndarray]:
    """Items of every estimator with every choice of layer, (texts,) each; states (layers, texts, width), the embeddings first."""
    scorers: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "logme": lambda one: logme_items(one, labels),
        "h_score": lambda one: h_score_items(one, labels),
        "knn": lambda one: neighbour_items(one, labels, k),
    }
    found: dict[tuple[str, str], np.ndarray] = {}
    for name, scorer in scorers.items():
        layers = [scorer(one) for one in states[1:]]
        choices = {"last": layers[-1], "mean": scorer(states[1:].mean(0, dtype=np.float64)), "best": max(layers, key=lambda items: float(items.mean()))}
        found |= {(name, layer): choices[layer] for layer in LAYERS}
    return found
