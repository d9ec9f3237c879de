"""Whether a model has seen a benchmark, told from how its samples gather around its greedy answer, and its score without those that do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from etude.engine.generate import generate
from etude.engine.prompted import pairs_of
from etude.engine.score import require_causal
from etude.measures.exact_match import first_line
from etude.measures.membership import auroc_items
from etude.method import MEASUREMENTS, Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.generator import Generator, Policy
from etude.values.measurement import HIGHER, LOWER, Measurement
from etude.values.model import Model


class Answers(NamedTuple):
    """What a model said to one prompt."""

    greedy: str
    samples: list[str]


@dataclass(frozen=True)
class Contamination(Method):
    """CDD and TED: how much of a model's sampled answers lies within a few edits of its greedy one, and how often the others are right.

    Each prompt is an item.  CDD: ``peakedness`` is the share of samples whose edit distance to the greedy answer, in tokens, is at most alpha · l, l the length of the longest of all
    these answers; ``contaminated`` is 1 where it is above `xi`.  TED: ``ted`` is the share of right ones among the samples that are more than `tau` edits away from
    the greedy answer, each different one once, and 0 for a prompt with none left; ``sampled_match`` is the same of all samples, so that the difference is the correction;
    ``kept`` is how many were left, as a share of all samples.  Right is as in `exact_match`: by the first line.

    Two corpora are the suspected benchmark and prompts that the model never read; then ``auroc_peakedness`` says how often a prompt of the first is the more peaked one, with items as
    in `membership`, so that both can be compared prompt by prompt.  All else is of the first corpus.

    Reads the columns prompt and completion; CDD looks at prompts alone.  Answers are stripped of white space and compared by their first `length` tokens; for TED a sample is cut to the
    greedy answer's length first, as in the authors' code, so that one which begins with it lies in the peak.
    Departures: exact match in place of the paper's tests of programs; a causal model in place of any that can be asked, whose tokenizer counts the edits.  With answers shorter than
    1 / alpha = 20 tokens the peak is the greedy answer alone, and with answers of `tau` tokens no sample is more than `tau` edits away, so that TED is 0.
    Raises InputError for a model that is not causal, for more than two corpora, and as `generate` does.
    Source: Dong et al., "Generalization or Memorization", 2024, as the authors' code has it (CDD.py, TED.py), which is also where the defaults are from.
    Cost: for every prompt of all corpora 1 + samples completions, and as many edit distances.
    """

    paper = "cdd-ted"

    samples: int = 50
    """Samples a prompt, at least 1."""
    temperature: float = 0.8
    """Of the samples, above 0."""
    alpha: float = 0.05
    """How far the peak reaches, as a share of the longest answer's tokens, from 0 to 1."""
    xi: float = 0.01
    """The peakedness above which a prompt counts as contaminated, from 0 to 1."""
    tau: int = 2
    """How far the peak reaches that TED leaves out, in edits; at least 0."""
    length: int = 100
    """Tokens of an answer that are compared, at least 1."""
    new: int = 100
    """Tokens that an answer may have; ours, since no more than `length` are compared."""
    stop: tuple[str, ...] = ()
    """Strings at which an answer ends; they are not part of it."""
    records: int | None = None
    """Ask only so many prompts of each corpus, from its beginning; all of them by default."""
    seed: int = 0
    """Which samples are drawn."""

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("tau", 0), ("length", 1), ("new", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is a whole number, at least {least}, got {getattr(self, name)}")
        for name in ("alpha", "xi"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, from 0 to 1, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature is above 0, else all samples are the greedy answer, got {self.temperature}")
        if self.records is not None and self.records < 1:
            raise ValueError(f"records is a number of prompts, at least 1, got {self.records}; leave it out to ask all")

    def apply(self, model: Model, corpora: list[Corpus]) -> MEASUREMENTS:
        require_causal(model, "contamination")
        if not 1 <= len(corpora) <= 2:
            raise InputError(f"contamination takes the benchmark and perhaps a corpus of other prompts, got {len(corpora)} corpora", remedy="As in `on: [benchmark, others]`.")
        pairs, *rest = [pairs_of(corpus)[: self.records] for corpus in corpora]
        answers = self._ask(model, [prompt for prompt, _ in pairs])
        peaks = np.array([self._peakedness(model, one) for one in answers])
        corrected = [self._ted(model, one, completion) for one, (_, completion) in zip(answers, pairs, strict=True)]
        plain = np.array([np.mean([first_line(text) == first_line(completion) for text in one.samples]) for one, (_, completion) in zip(answers, pairs, strict=True)])
        names = tuple(map(str, range(len(pairs))))
        found = [
            Measurement("peakedness", peaks, better=LOWER, item_names=names),
            Measurement("contaminated", (peaks > self.xi).astype(float), better=LOWER, item_names=names),
            Measurement("sampled_match", plain, better=HIGHER, item_names=names),
            Measurement("ted", np.array([score for score, _ in corrected]), better=HIGHER, item_names=names),
            Measurement("kept", np.array([share for _, share in corrected]), better=HIGHER, item_names=names),
        ]
        for others in rest:
            unread = np.array([self._peakedness(model, one) for one in self._ask(model, [prompt for prompt, _ in others])])
            items = (*(f"member {name}" for name in names), *(f"other {name}" for name in range(len(others))))
            found.append(Measurement("auroc_peakedness", auroc_items(peaks, unread), better=HIGHER, item_names=items))
        return tuple(found)

    def _ask(self, model: Model, prompts: list[str]) -> list[Answers]:
        """The greedy answer and the samples of every prompt, without white space around them."""
        greedy = generate(Generator(model, Policy(max_new_tokens=self.new, stop=self.stop)), prompts)
        policy = Policy(temperature=self.temperature, max_new_tokens=self.new, stop=self.stop)
        drawn = generate(Generator(model, policy), [prompt for prompt in prompts for _ in range(self.samples)], self.seed)
        return [Answers(text.strip(), [one.strip() for one in drawn[place * self.samples : (place + 1) * self.samples]]) for place, text in enumerate(greedy)]

    def _tokens(self, model: Model, texts: Sequence[str]) -> list[np.ndarray]:
        """The first tokens of each text, (at most `length`,) each."""
        ids = model.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [np.array(one[: self.length], np.int64) for one in ids]

    def _peakedness(self, model: Model, answers: Answers) -> float:
        greedy, *samples = self._tokens(model, [answers.greedy, *answers.samples])
        reach = self.alpha * max(map(len, [greedy, *samples]))
        return float(np.mean([edit_distance(greedy, one) <= reach for one in samples]))

    def _ted(self, model: Model, answers: Answers, completion: str) -> tuple[float, float]:
        """Share of right ones among the samples that are kept, and the share of samples that these are."""
        different = list(dict.fromkeys(answers.samples))
        greedy, *samples = self._tokens(model, [answers.greedy, *different])
        kept = [text for text, one in zip(different, samples, strict=True) if edit_distance(greedy, one[: len(greedy)]) > self.tau]
        right = [first_line(text) == first_line(completion) for text in kept]
        return float(np.mean(right)) if kept else 0.0, len(kept) / len(answers.samples)


def edit_distance(one: np.ndarray, other: np.ndarray) -> int:
    """The least number of tokens inserted, removed or replaced that turns one into the other (Levenshtein, 1966).

    one (m,), other (n,): token ids.  Cost: m steps over n numbers.
    """
    places = np.arange(len(other) + 1)
    row = places
    for removed, token in enumerate(one, 1):
        best = np.concatenate([[removed], np.minimum(row[1:] + 1, row[:-1] + (other != token))])
        row = np.minimum.accumulate(best - places) + places  # an insertion is one more than the place before
    return int(row[-1])
