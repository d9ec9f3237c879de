"""Whether a text was in a model's training data, told from the probabilities of its tokens."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from etude.engine.prompted import Pair, encode, pairs_of
from etude.engine.score import log_probabilities, require_causal
from etude.method import MEASUREMENTS, Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.measurement import HIGHER, LOWER, Measurement
from etude.values.model import Model

SCORES = {"min_k_prob": ("nats/token", HIGHER), "loss": ("nats/token", LOWER), "zlib": ("nats/token/bit", LOWER), "lowercase": ("", HIGHER)}
"""Each score's unit, and whether a member's is the higher or the lower one."""


@dataclass(frozen=True)
class Membership(Method):
    """Min-K% Prob: the mean log-probability of the k per cent of a text's tokens that the model finds least probable, and how well it tells members from others.

    Beside ``min_k_prob`` (nats a token, at most 0) stand the scores of the paper's baselines that need no second model: ``loss``, nats a token (Yeom et al., 2018);
    ``zlib``, that loss a bit of the text as zlib packs it, and ``lowercase``, the loss of the lowercased text over that of the text (both Carlini et al., 2021).
    Their values are means over the first corpus, each text an item.  The loss in ``zlib`` is the mean a token, as in the authors' code.

    Two corpora are the members and texts that the model never read; then there is an AUROC of each score too, ``auroc_min_k_prob`` and so on: the probability that a
    member looks more like one than another text does, ties counting half (0.5 by chance).  All texts of both are its items, the same for every score, so that scores are compared
    text by text.  An item is the text's influence, whose plain mean is exactly the AUROC: AUROC + (N / n) · (share of the other kind on the right side of it - AUROC), N texts, n
    of its kind (DeLong et al., 1988).  So the interval covers the draw of both kinds; an item alone may lie outside of 0 to 1.

    Reads the column text, else prompt and completion together; with `completion_only` a completion is the text, and its prompt is given.  A text without tokens has no score and is left out.
    Departures: at least one token is taken of a short text, where the authors' code takes the mean of none; every token is predicted, the first one from the start token;
    texts longer than `window` are read through overlapping windows.  The paper's other baselines, the neighbourhood attack and the smaller reference model, need a second
    model (one that rewrites the text, one of the same data) and are left out.
    Raises InputError for a model that is not causal, for more than two corpora, and for a corpus without tokens.
    Source: Shi et al., "Detecting Pretraining Data from Large Language Models", 2023, and the authors' code (run.py); k = 20 is the paper's, chosen there on
    texts of its own.
    Cost: two forward passes over all texts, their own letters and lowercased; more where windows overlap.
    """

    paper = "min-k-prob"

    k: float = 20.0
    """Per cent of the tokens that are taken, above 0 and at most 100, where it is the loss."""
    window: int = 512
    """Longest stretch of tokens that the model sees at once."""
    stride: int = 256
    """Tokens that each later window predicts."""
    completion_only: bool = False
    """Score the completions alone, each after its prompt, which is how instruction tuning reads them; else whole texts."""

    def __post_init__(self) -> None:
        if not 0 < self.k <= 100:
            raise ValueError(f"k is a percentage of the tokens, above 0 and at most 100, got {self.k}")
        if not 1 <= self.stride < self.window:
            raise ValueError(f"stride is at least 1 and less than window ({self.window}), got {self.stride}")

    def apply(self, model: Model, corpora: list[Corpus]) -> MEASUREMENTS:
        require_causal(model, "membership")
        if not 1 <= len(corpora) <= 2:
            raise InputError(f"membership takes the members' corpus and perhaps one of others, got {len(corpora)} corpora", remedy="As in `on: [members, others]`.")
        (names, suspects), *rest = [self._scores(model, corpus) for corpus in corpora]
        found = [Measurement(name, suspects[name], unit=unit, better=better, item_names=names) for name, (unit, better) in SCORES.items()]
        for others, unread in rest:
            items = (*(f"member {name}" for name in names), *(f"other {name}" for name in others))
            for name, (_, better) in SCORES.items():
                sign = 1 if better == HIGHER else -1
                found.append(Measurement(f"auroc_{name}", auroc_items(sign * suspects[name], sign * unread[name]), better=HIGHER, item_names=items))
        return tuple(found)

    def _scores(self, model: Model, corpus: Corpus) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
        """Names of the texts that have tokens, and each score of them, (texts,) float64."""
        pairs = pairs_of(corpus) if self.completion_only else [("", text) for text in texts_of(corpus)]
        encoded = encode(model, pairs)
        kept = [index for index, pair in enumerate(encoded) if len(pair.completion)]
        if not kept:
            raise InputError("no text of the corpus has a token, so that there is nothing to score")
        pairs = [pairs[index] for index in kept]
        logs = self._logs(model, [encoded[index] for index in kept])
        loss = np.array([-one.mean(dtype=np.float64) for one in logs])
        lowered = self._logs(model, encode(model, [(prompt, text.lower()) for prompt, text in pairs]))
        scores = {
            "min_k_prob": np.array([min_k(one, self.k) for one in logs]),
            "loss": loss,
            "zlib": loss / np.array([8 * len(zlib.compress(text.encode())) for _, text in pairs]),
            "lowercase": np.array([-one.mean(dtype=np.float64) for one in lowered]) / np.maximum(loss, np.finfo(np.float32).tiny),
        }
        names = corpus.column("path") if "path" in corpus.columns else range(len(corpus))
        return tuple(str(names[index]) for index in kept), scores

    def _logs(self, model: Model, pairs: Sequence[Pair]) -> list[np.ndarray]:
        """Log-probabilities of every completion's tokens, (tokens,) each."""
        found = log_probabilities(model, [np.concatenate(pair) for pair in pairs], window=self.window, stride=self.stride)
        return [one[len(pair.prompt) - 1 :] for one, pair in zip(found, pairs, strict=True)]


def texts_of(corpus: Corpus) -> list[str]:
    """The column text, else prompt and completion together.  Raises InputError on an empty corpus."""
    if "text" in corpus.columns and len(corpus):
        return corpus.texts
    return [prompt + completion for prompt, completion in pairs_of(corpus)]


def min_k(logs: np.ndarray, k: float) -> float:
    """Mean of the lowest k per cent of some log-probabilities, (tokens,): rounded down to whole tokens, but at least one."""
    count = max(1, int(len(logs) * k / 100))
    return float(np.sort(logs)[:count].mean(dtype=np.float64))


def auroc_items(members: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The AUROC as influences, members first, whose mean it is.

    members (n,), others (m,): scores, of which a member's should be the higher.  Returns (n + m,) float64.
    """
    below = _shares_below(members, others)
    above = 1 - _shares_below(others, members)
    value, total = below.mean(), len(members) + len(others)
    return np.concatenate([value + total / len(one) * (one - value) for one in (below, above)])


def _shares_below(scores: np.ndarray, among: np.ndarray) -> np.ndarray:
    """For each score the share of the others that are less, those that are equal counting half."""
    ordered = np.sort(among)
    return (np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")) / (2 * len(among))
