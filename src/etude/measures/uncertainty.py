"""How well a model's uncertainty, read from several sampled answers, tells its right answers from its wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from etude.engine import batch, hidden
from etude.engine.generate import complete
from etude.engine.score import likelihoods, require_causal
from etude.measures.exact_match import first_line
from etude.measures.membership import auroc_items
from etude.method import MEASUREMENTS, Method
from etude.values.corpus import Corpus
from etude.values.digest import digest
from etude.values.errors import InputError
from etude.values.generator import Policy
from etude.values.measurement import HIGHER, LOWER, Measurement
from etude.values.model import Model

SCORES = ("sar", "token_sar", "sentence_sar", "length_normalised_entropy", "predictive_entropy", "semantic_entropy")
"""In nats; the higher, the less certain."""


class Said(NamedTuple):
    """An answer that was sampled."""

    text: str
    logs: np.ndarray
    """(tokens,) log-probability of each of its tokens."""
    without: tuple[str, ...]
    """For each token the answer's text without it."""


@dataclass(frozen=True)
class Uncertainty(Method):
    """SAR: the uncertainty of a model about a question, from the log-probabilities of sampled answers with the weight shifted to the tokens and the answers that are relevant.

    ``accuracy`` is the share of questions whose greedy answer is right.  Each score of a question is made of the same `samples` answers s, with p(s) the product of its
    tokens' probabilities, g the similarity of two texts, and x the question:

    - ``predictive_entropy``: the mean of -log p(s); ``length_normalised_entropy``: the mean of -log p(s) a token.
    - ``token_sar``: the mean of E(s), the sum of the tokens' -log p weighted by relevance, 1 - |g(x + s, x + s without the token)|, normalised within the answer.
    - ``sentence_sar``: the mean of -log(p(s) + sum over the other answers r of g(x + s, x + r) p(r) / t).
    - ``sar``: the same with exp(-E(s)) for p(s).
    - ``semantic_entropy``: the answers are put into clusters that mean the same; the mean over clusters of -log of their probability, the sum of exp of the mean log-probability a
      token, as the authors' code has this baseline (Kuhn et al., 2023).

    ``auroc_sar`` and so on: the probability that a wrong question has the higher score than a right one, ties half (0.5 by chance).  Each question is an item of every part; those of
    an AUROC are influences, as in `membership`, so that scores are compared question by question.  The AUROCs are left out if all questions are answered rightly, or none.

    g is the cosine of an encoder's mean last states (below 0 taken as 0 between answers).  Reads the columns prompt and completion, and those named by `key` and `question`.
    Departures: an encoder's cosine in place of a cross-encoder's score, and in place of entailment for the clusters, into which an answer comes whose cosine with the first of a cluster is
    `alike` or more, or whose text is the same; right is by `key` or exact match, where the paper takes ROUGE-L above 0.5, which an answer with another value in the same words
    would pass; a token is deleted where it stands, where the authors' code deletes its letters wherever they occur; the token that ends an answer does not count.  Where no token
    of an answer is relevant, all are alike; an answer without tokens has a probability of 1.
    Raises InputError for a model that is not causal, and for a corpus that is empty or lacks a column.
    Source: Duan et al., "Shifting Attention to Relevance", 2023 (ACL 2024), and the authors' code (compute_uncertainty.py), which is where t and the temperature are from.
    Cost: a question's greedy answer and its samples, a forward pass over them, and one of the encoder for each different answer and each of its tokens.
    """

    paper = "sar-uncertainty"

    samples: int = 5
    """Answers sampled a question, at least 2, as in the paper's main experiments."""
    temperature: float = 0.5
    """Of the samples, above 0; probabilities are those at 1.  From the authors' scripts."""
    t: float = 0.001
    """How much the other answers count: their probabilities are divided by it; above 0."""
    alike: float = 1.0
    """Cosine from which two answers to a question mean the same, for the semantic entropy alone.  By default only equal texts do; what else is fitting depends on the encoder."""
    key: str = ""
    """Column of a text that a right answer contains, whatever its case.  By default its first line must be the completion's."""
    question: str = "prompt"
    """Column that is x in similarities: the question alone, if the prompt has examples as well."""
    new: int = 32
    """Tokens that an answer may have."""
    stop: tuple[str, ...] = ()
    """Strings at which an answer ends; they are not part of it."""
    records: int | None = None
    """Ask only so many questions, from the corpus's beginning; all of them by default."""
    seed: int = 0
    """Which answers are drawn."""

    def __post_init__(self) -> None:
        for name, least in (("samples", 2), ("new", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is a whole number, at least {least}, got {getattr(self, name)}")
        for name in ("temperature", "t"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is above 0, got {getattr(self, name)}")
        if not -1 <= self.alike <= 1:
            raise ValueError(f"alike is a cosine, from -1 to 1, got {self.alike}")
        if self.records is not None and self.records < 1:
            raise ValueError(f"records is a number of questions, at least 1, got {self.records}; leave it out to ask all")
        Policy(stop=self.stop)

    def apply(self, model: Model, corpus: Corpus, encoder: Model) -> MEASUREMENTS:
        require_causal(model, "uncertainty")
        prompts, asked, answers = (corpus.column(name)[: self.records] for name in ("prompt", self.question, self.key or "completion"))
        if not prompts:
            raise InputError("the corpus is empty")
        names = tuple(map(str, range(len(prompts))))
        right = self._right(model, prompts, answers)
        scores = {name: np.array(values) for name, values in zip(SCORES, zip(*self._scores(encoder, asked, self._sampled(model, prompts)), strict=True), strict=True)}
        found = [Measurement("accuracy", right.astype(float), better=HIGHER, item_names=names)]
        found += [Measurement(name, values, unit="nats", better=LOWER, item_names=names) for name, values in scores.items()]
        if 0 < right.sum() < len(right):
            for name, values in scores.items():
                items = np.empty(len(right))
                items[~right], items[right] = np.split(auroc_items(values[~right], values[right]), [int((~right).sum())])
                found.append(Measurement(f"auroc_{name}", items, better=HIGHER, item_names=names))
        return tuple(found)

    # What the model says.

    def _right(self, model: Model, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """Whether the greedy answer to each question is right, (questions,) bool."""
        said = [self._text(model, ids) for ids in self._complete(model, prompts, 0.0, [0] * len(prompts))]
        if self.key:
            return np.array([str(key).casefold() in text.casefold() for text, key in zip(said, answers, strict=True)])
        return np.array([first_line(text) == first_line(completion) for text, completion in zip(said, answers, strict=True)])

    def _sampled(self, model: Model, prompts: Sequence[str]) -> list[list[Said]]:
        """The sampled answers to every question; a sample depends on the seed, the prompt and its number alone."""
        encoded = batch.encode(model, Corpus(list(prompts)))
        seeds = [int(digest(self.seed, prompt, number)[:7], 16) for prompt in prompts for number in range(self.samples)]
        drawn = self._complete(model, [prompt for prompt in prompts for _ in range(self.samples)], self.temperature, seeds)
        different = list(dict.fromkeys((place // self.samples, tuple(ids)) for place, ids in enumerate(drawn) if ids))
        scored = likelihoods(model, [np.array([*encoded[place], *ids], np.int64) for place, ids in different], [len(encoded[place]) for place, _ in different])
        known = {(place, ()): Said("", np.zeros(0), ()) for place in range(len(prompts))} | {
            (place, ids): Said(self._text(model, ids), one.logs.astype(np.float64), tuple(self._text(model, [*ids[:at], *ids[at + 1 :]]) for at in range(len(ids))))
            for (place, ids), one in zip(different, scored, strict=True)
        }
        return [[known[place, tuple(ids)] for ids in drawn[place * self.samples : (place + 1) * self.samples]] for place in range(len(prompts))]

    def _complete(self, model: Model, prompts: Sequence[str], temperature: float, seeds: Sequence[int]) -> list[list[int]]:
        """Tokens of an answer to every prompt, without those of a string that ended it."""
        policy = Policy(temperature=temperature, max_new_tokens=self.new, stop=self.stop)
        found = complete(model, policy, batch.encode(model, Corpus(list(prompts))), seeds)
        if not self.stop:
            return found
        for ids in found:  # a token belongs to the answer if it begins before the stop string does
            end = len(self._cut(self._decoded(model, ids)))
            while ids and len(self._decoded(model, ids[:-1])) >= end:
                ids.pop()
        return found

    def _text(self, model: Model, ids: Sequence[int]) -> str:
        """What tokens say, up to a stop string, without white space around it."""
        return self._cut(self._decoded(model, ids)).strip()

    def _decoded(self, model: Model, ids: Sequence[int]) -> str:
        return str(model.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _cut(self, text: str) -> str:
        return text[: min([text.find(stop) for stop in self.stop if stop in text], default=len(text))]

    # What it is worth.

    def _scores(self, encoder: Model, asked: Sequence[str], answers: Sequence[Sequence[Said]]) -> list[tuple[float, ...]]:
        """Every score of every question, in the order of SCORES."""
        wholes = [f"{question} {text}".strip() for question, several in zip(asked, answers, strict=True) for said in several for text in (said.text, *said.without)]
        places = {text: place for place, text in enumerate(dict.fromkeys(filter(None, wholes)))}
        vectors = hidden.states(encoder, list(places), pool="mean", layers=[-1])[0].astype(np.float64)
        vectors = np.concatenate([vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.zeros((1, vectors.shape[1]))])  # the last is of no text
        seen, found = iter(wholes), []
        for several in answers:
            mine = [vectors[[places.get(next(seen), -1) for _ in range(1 + len(said.without))]] for said in several]
            similarity = np.array([[min(1.0, float(one[0] @ other[0])) for other in mine] for one in mine])
            weighted = np.array([relevant(said.logs, 1 - np.abs(one[1:] @ one[0])) for said, one in zip(several, mine, strict=True)])
            total = np.array([-said.logs.sum() for said in several])
            mean = total / np.array([max(1, len(said.logs)) for said in several])
            clusters = clustered([said.text for said in several], similarity, self.alike)
            values = shared(weighted, similarity, self.t).mean(), weighted.mean(), shared(total, similarity, self.t).mean(), mean.mean(), total.mean(), over_clusters(mean, clusters)
            found.append(tuple(float(value) for value in values))
        return found


def relevant(logs: np.ndarray, relevance: np.ndarray) -> float:
    """Negative log-probability of an answer with its tokens weighted by relevance; both (tokens,).  A sum of weights of zero counts all alike."""
    if not len(logs):
        return 0.0
    relevance = relevance.clip(0)
    weights = relevance / relevance.sum() if relevance.sum() > 0 else np.full(len(logs), 1 / len(logs))
    return float(-(weights * logs).sum())


def shared(nats: np.ndarray, similarity: np.ndarray, t: float) -> np.ndarray:
    """Negative log-probability of each answer raised by those of the others, (answers,), by similarity (answers, answers) over t."""
    from scipy.special import logsumexp

    weights = similarity.clip(0) / t
    np.fill_diagonal(weights, 1.0)
    return -np.asarray(logsumexp(np.broadcast_to(-nats, weights.shape), b=weights, axis=1))


def clustered(texts: Sequence[str], similarity: np.ndarray, alike: float) -> np.ndarray:
    """The cluster of each answer: the first whose first answer has the same text or is alike, else a new one; alike of 1 asks for the same text."""
    firsts: list[int] = []
    found = []
    for place, text in enumerate(texts):
        same = [which for which, first in enumerate(firsts) if texts[first] == text or (alike < 1 and similarity[place, first] >= alike)]
        found.append(same[0] if same else len(firsts))
        if not same:
            firsts.append(place)
    return np.array(found)


def over_clusters(nats: np.ndarray, clusters: np.ndarray) -> float:
    """Mean over clusters of the negative log of their probability, the sum of its answers'; nats and clusters (answers,)."""
    return float(np.mean([-np.logaddexp.reduce(-nats[clusters == which]) for which in np.unique(clusters)]))
