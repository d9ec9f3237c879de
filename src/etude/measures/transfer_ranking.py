"""How well estimates of transferability rank models by what they reach when they are fine-tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from etude.engine import classify, hidden
from etude.engine.batch import encode
from etude.engine.progress import report, silent
from etude.engine.score import log_probabilities
from etude.engine.train import Recipe
from etude.measures._separability import kendall_items
from etude.measures.transferability import ESTIMATORS, LAYERS, estimates, labelled
from etude.method import MEASUREMENTS, Method
from etude.values.corpus import Corpus, bytes_of
from etude.values.errors import InputError
from etude.values.measurement import HIGHER, Measurement
from etude.values.model import Model


@dataclass(frozen=True)
class TransferRanking(Method):
    """Kendall's τ-b between what candidate models reach by fine-tuning and what was foretold of them, by transferability, size or perplexity.

    Takes the candidates, and the labelled texts to train on; a second corpus is the one on which they are judged, else the last fifth of the first.  Each candidate is
    fine-tuned whole, with a linear head on its pooled last states (`engine.classify`), all by one recipe.  Given beside each candidate:

    - ``accuracy`` of the fine-tuned one, each text that it is judged on an item; ``chance``, that of the commonest class of the training texts;
    - ``bits_per_byte`` of the training texts before fine-tuning, if all candidates are causal, a text an item;
    - ``tau_logme_mean`` and so on, for every estimator and choice of layer of `transferability`, computed on the training texts; ``tau_parameters`` (more is better) and
      ``tau_perplexity`` (by bits a byte, which tokenizers do not change; less is better).  These rank all candidates: they are the same for each, and their items
      are the candidates, as influences whose mean is τ-b (`kendall_items`).

    Raises InputError for more than two corpora, for classes that were not trained on, and as `transferability` does.
    Source: the protocol of Garbas, Ploner and Akbik, "Choose Your Transformer", 2024, on which TransformerRanker stands; it has Pearson's and a weighted Kendall's
    coefficient and a search of the learning rate, here it is the plain one and a single recipe.
    Cost: for each candidate the epochs, a forward pass over the training texts for the states and one for the perplexity, and one over those it is judged on.
    """

    paper = "transformer-ranker"

    label: str = "label"
    """The column of the classes."""
    pool: str = "mean"
    """How a text's tokens become one vector: their ``mean``, the ``first`` or the ``last``."""
    k: int = 3
    """Neighbours that vote."""
    window: int | None = None
    """Cut texts to so many tokens; by default none is cut."""
    epochs: float = 10.0
    """Passes over the training texts."""
    batch: int = 16
    """Texts in an optimizer step."""
    learning_rate: float = 1e-3
    """Peak of a rate that rises over a tenth of the steps and falls linearly."""

    def __post_init__(self) -> None:
        if self.pool not in hidden.POOLS:
            raise ValueError(f"pool is one of {', '.join(hidden.POOLS)}, got {self.pool!r}")
        for name in ("k", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        for name in ("epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is more than 0, got {getattr(self, name)}")

    def apply(self, models: list[Model], corpora: list[Corpus], seed: int) -> MEASUREMENTS:
        texts, labels, judged, right = self._texts(corpora)
        rows, foretold = [], []
        for place, model in enumerate(models):
            report("ranking", place, len(models), "estimating and fine-tuning")
            with silent():
                states = hidden.states(model, texts, pool=self.pool, window=self.window)
                guesses = {f"{name}_{layer}": float(items.mean()) for (name, layer), items in estimates(states, labels, self.k).items()}
                found = self._tuned(model, texts, labels, judged, seed) == right
                rows.append([Measurement("accuracy", found.astype(float), better=HIGHER, item_names=tuple(map(str, range(len(judged)))))])
                if all(one.kind == "causal" for one in models):
                    rows[-1].append(self._bits(model, texts))
                    guesses["perplexity"] = -rows[-1][-1].value
                foretold.append(guesses | {"parameters": float(model.parameters)})
        common = float(np.bincount(labels).argmax())
        shared = [Measurement("chance", (right == common).astype(float), better=HIGHER, item_names=rows[0][0].item_names)]
        truth, names = np.array([row[0].value for row in rows]), tuple(f"model {place + 1}" for place in range(len(models)))
        for name in (*(f"{one}_{layer}" for one in ESTIMATORS for layer in LAYERS), "parameters", *(["perplexity"] if "perplexity" in foretold[0] else [])):
            items = kendall_items(np.array([one[name] for one in foretold]), truth)
            shared.append(Measurement(f"tau_{name}", items, better=HIGHER, item_names=names))
        return tuple(part for row in rows for part in (*row, *shared))

    def _texts(self, corpora: Sequence[Corpus]) -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
        """Texts to train on with their classes, and those to judge on with theirs."""
        if not 1 <= len(corpora) <= 2:
            raise InputError(f"the ranking takes a corpus to train on and perhaps one to judge on, got {len(corpora)} corpora", remedy="As in `on: [train, heldout]`.")
        train = corpora[0]
        if len(corpora) == 1:
            cut = max(4, len(train) * 4 // 5)
            corpora = [train[:cut], train[cut:]]
        texts, labels = labelled(corpora[0], self.label)
        classes = sorted({str(one) for one in corpora[0].column(self.label)})
        written = [str(one) for one in corpora[1].column(self.label)]
        if not written or set(written) - set(classes):
            raise InputError(f"there are {len(written)} texts to judge on, of classes {', '.join(sorted(set(written)))}, and these were trained on: {', '.join(classes)}")
        return texts, labels, corpora[1].texts, np.array([classes.index(one) for one in written])

    def _tuned(self, model: Model, texts: list[str], labels: np.ndarray, judged: list[str], seed: int) -> np.ndarray:
        """The class that the fine-tuned model gives each text that it is judged on."""
        length = max(map(len, hidden.encoded(model, texts, self.window)))
        recipe = Recipe(learning_rate=self.learning_rate, schedule="linear", warmup=0.1, length=max(2, length), batch_tokens=self.batch * max(2, length), weight_decay=0.01)
        tuned = classify.tune(model, texts, labels, recipe, self.epochs, seed, pool=self.pool, window=self.window)
        return classify.classes(tuned, judged, pool=self.pool, window=self.window)

    def _bits(self, model: Model, texts: list[str]) -> Measurement:
        """Bits a byte of each text."""
        window = min(512, getattr(model.config.get_text_config(), "max_position_embeddings", None) or 512)
        nats = np.array([-one.sum(dtype=np.float64) for one in log_probabilities(model, encode(model, Corpus(texts)), window=window, stride=window // 2)])
        sizes = np.array([bytes_of([text]) for text in texts], float)
        return Measurement("bits_per_byte", nats / sizes / np.log(2), unit="bits/byte", weights=sizes, item_names=tuple(map(str, range(len(texts)))))
