"""Whether adapted models answer questions better than the model they came from, each with its own best prompt, and with an interval."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from etude.engine.answers import of_completions
from etude.engine.wording import check, fill
from etude.method import MEASUREMENTS, Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.measurement import HIGHER, LOWER, Measurement
from etude.values.model import Model

logger = logging.getLogger(__name__)

FORMATS = (
    "{prompt}",
    "Question: {prompt}\nAnswer:",
    "Q: {prompt}\nA:",
    "QUESTION: {prompt}\nANSWER:",
    "### Question\n{prompt}\n### Answer\n",
    "Question: {prompt} Answer:",
    "Query: {prompt}\nResponse:",
    "{prompt}\nAnswer:",
    "{prompt} The answer is",
    "question: {prompt} || answer:",
    "Choose the best answer. {prompt}\nThe best answer is",
)
"""The prompt as it is, and ten frames that differ in header, case, separator and space, as those do that the paper's grammar draws."""

Score = Callable[["Candidate", np.ndarray], np.ndarray]
"""Right or wrong, (records,) float64 of 1 and 0, of records in the wording of a candidate."""


class Candidate(NamedTuple):
    """A way to ask: a format, and the records that stand before the question with their answers."""

    format: str
    shown: tuple[int, ...]


class Split(NamedTuple):
    """Records of a task by what they are for."""

    draws: list[tuple[int, ...]]
    """Examples, a draw at a time; one empty draw where none are shown."""
    validation: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Result:
    """What became of one model on one task, beside the base; each array is (test records,)."""

    own: np.ndarray
    """Right with the prompt that was chosen for it."""
    base: np.ndarray
    """The base's, with the base's own prompt."""
    shared: np.ndarray
    """The base's, with this model's prompt."""
    same: bool
    """Whether both were given one prompt."""
    interval: tuple[float, float]
    """Of the mean of own - base."""
    shared_interval: tuple[float, float]
    """Of the mean of own - shared."""

    def verdicts(self) -> dict[str, bool]:
        """Win, tie and loss, and what the ways of comparing that the paper warns of say."""
        gap, naive = float(self.own.mean() - self.base.mean()), float(self.own.mean() - self.shared.mean())
        return {
            "win": self.interval[0] > 0,
            "tie": self.interval[0] <= 0 <= self.interval[1],
            "loss": self.interval[1] < 0,
            "naive_win": naive > 0,
            "naive_loss": naive < 0,
            "pointwise_win": gap > 0,
            "shared_win": self.shared_interval[0] > 0,
        }


VERDICTS = ("win", "tie", "loss", "naive_win", "naive_loss", "pointwise_win", "shared_win")


@dataclass(frozen=True)
class HeadToHead(Method):
    """Head-to-head audit of adapted models: each against the exact model it came from, each with the prompt that suits it best, a win only where the interval of the paired difference excludes zero.

    The first model is the base, every further one is compared with it: ``of: [base, adapted]``, ``on: [exam, notes]``.  Each corpus is a task, a record a question with the columns
    prompt, choices (texts, each with the space before it) and answer (the place of the right one, from 0); a question is answered by the choice that is likeliest after the prompt.
    For every model and task the format and the few-shot examples are chosen by accuracy on `validation` records, which are asked for nothing else; of equally good ones the first
    is taken.  The other records are the test.  Resampling its questions gives the interval of the paired difference of accuracies.  Parts of each model:

    - ``accuracy``, and ``difference`` from the base's: each test question an item; ``naive_difference`` where the base is given this model's prompt, not its own;
    - ``win``, ``tie`` and ``loss``, 1 or 0, each task an item; ``low`` and ``high``, the interval itself; ``same_prompt``, whether the base chose the same prompt;
    - ``naive_win`` and ``naive_loss``: one prompt for both, chosen for the adapted model, and no interval.  And what each half of that does: ``pointwise_win``, prompts of
      their own without an interval, and ``shared_win``, the shared prompt with one.

    ``win_rate``, ``tie_rate`` and so on are the same over all adapted models, each with each task an item: they are given beside every model, the base too, and are left out where there
    is no adapted model.  The base beside itself ties, with differences of zero.

    Which records are for validation follows from their number alone, so that seeds and models have the same test; the seed draws which of them are examples, and the resamples.
    Departures: formats are a list, where the paper draws ten from a grammar and tries them with several system prompts; examples come from the validation side, each draw's its own, not from
    a training split; choices are scored, as in the paper's second way, not parsed from what is said.  The paper's comparison after supervised tuning is this measure of tuned models.
    Raises InputError for a corpus that lacks the columns, a record whose answer is none of its two or more choices, and a corpus that is too short for examples, validation and test.
    Source: Jeong et al., "The Limited Impact of Medical Adaptation of Large Language and Vision-Language Models", 2024 (arXiv 2411.08870), extending 2411.04118 (EMNLP 2024), section 3,
    and the authors' code (eval-config.yaml): 10 formats beside the plain one, 10 draws of examples, the first of the best; a 95% percentile bootstrap of 10,000 resamples.
    Cost: for every model formats · draws passes over the validation questions, and at most models + 1 over the test; what questions begin with alike is read once.
    """

    paper = "dapt-head-to-head-audit"

    formats: tuple[str, ...] = FORMATS
    r"""The pool of prompts, each with columns in braces, as in ``Q: {prompt}\nA:``; of equally good ones the first is chosen.  By default the prompt as it is, and ten frames for it."""
    shots: int = 0
    """Examples before the question with their right answers, an empty line after each; the paper has 0 and 3."""
    draws: int = 10
    """Sets of examples that are tried with each format, where there are any; the paper's 10."""
    validation: float = 0.5
    """Share of each corpus's records, in (0, 1), by which prompts are chosen and from which examples come; they are never reported."""
    resamples: int = 10_000
    """Resamples of the test questions."""
    level: float = 0.95
    """Probability of the interval, in (0, 1)."""
    records: int | None = None
    """Use only so many records of each corpus, from its beginning; all of them by default."""

    def __post_init__(self) -> None:
        if not self.formats:
            raise ValueError("formats are prompts to choose from, at least one, got none")
        check(self.formats)
        for name, least in (("shots", 0), ("draws", 1), ("resamples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}, got {getattr(self, name)}")
        for name in ("validation", "level"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is a share, more than 0 and less than 1, got {getattr(self, name)}")
        if self.records is not None and self.records < 2:
            raise ValueError(f"records is at least 2, one for validation and one for the test, got {self.records}; leave it out to use all")

    def apply(self, models: list[Model], corpora: list[Corpus], seed: int) -> MEASUREMENTS:
        if not models or not corpora:
            raise InputError(f"a comparison needs models and corpora, got {len(models)} and {len(corpora)}", remedy="As in `of: [base, adapted]`, `on: [exam]`.")
        found: list[list[Result]] = [[] for _ in models]
        questions: list[str] = []
        for place, corpus in enumerate(corpora):
            rows = self._rows(corpus, place)
            split = self._split(len(rows), np.random.default_rng([seed, place, 1]), place)
            for model, result in zip(found, self._task(models, rows, split, [seed, place, 2]), strict=True):
                model.append(result)
            questions += [f"task {place + 1}: {record}" for record in split.test]
        rates = _rates(found[1:])
        return tuple(one for results in found for one in (*_parts(results, tuple(questions)), *rates))

    def _rows(self, corpus: Corpus, place: int) -> list[dict[str, Any]]:
        """The corpus's records.  Raises InputError if one is no question."""
        rows = list(corpus[: self.records] if self.records else corpus)
        for column in ("prompt", "choices", "answer"):
            corpus.column(column)
        for record, row in enumerate(rows):
            choices, answer = row["choices"], row["answer"]
            if not isinstance(choices, list) or len(choices) < 2 or not isinstance(answer, int) or not 0 <= answer < len(choices) or not all(choices):
                raise InputError(f"record {record} of task {place + 1} needs a list of two choices or more, none empty, and the place of the right one from 0; got {choices!r} and {answer!r}")
        return rows

    def _split(self, count: int, random: np.random.Generator, place: int) -> Split:
        """Records by what they are for.  Only which of the validation side are examples is drawn."""
        order = np.random.default_rng(count).permutation(count)
        side = round(self.validation * count)
        test, rest = np.sort(order[side:]), order[:side]
        draws = self.draws if self.shots else 1
        if not len(test) or len(rest) <= self.shots * draws:
            raise InputError(
                f"task {place + 1} has {count} records, {side} of them for validation: too few for {draws} draws of {self.shots} examples, a question to choose by, and a test",
                remedy="Give more records, lower shots or draws, or change validation.",
            )
        mixed = random.permutation(rest).tolist() if self.shots else rest.tolist()
        examples, validation = mixed[: self.shots * draws], mixed[self.shots * draws :]
        return Split([tuple(examples[self.shots * draw :][: self.shots]) for draw in range(draws)], np.sort(validation), test)

    def _task(self, models: Sequence[Model], rows: Sequence[Mapping[str, Any]], split: Split, seed: list[int]) -> list[Result]:
        """What became of every model on one task, the base first."""
        pool = [Candidate(template, shown) for template in self.formats for shown in split.draws]
        scores = [_scorer(model, rows) for model in models]
        chosen = [_best(score, pool, split.validation) for score in scores]
        for place, candidate in enumerate(chosen):
            logger.info("model %d was given the format %r after the records %s", place, candidate.format, list(candidate.shown))
        first = {candidate: scores[0](candidate, split.test) for candidate in dict.fromkeys(chosen)}
        base, found = first[chosen[0]], []
        for place, candidate in enumerate(chosen):
            own = scores[place](candidate, split.test) if place else base
            shared, random = first[candidate], np.random.default_rng([*seed, place])
            intervals = [bootstrap(own - other, self.resamples, self.level, random) for other in (base, shared)]
            found.append(Result(own, base, shared, candidate == chosen[0], intervals[0], intervals[1]))
        return found


def _scorer(model: Model, rows: Sequence[Mapping[str, Any]]) -> Score:
    """How this model answers records of these rows."""

    def score(candidate: Candidate, asked: np.ndarray) -> np.ndarray:
        header = "".join(f"{fill(candidate.format, rows[place])}{rows[place]['choices'][rows[place]['answer']]}\n\n" for place in candidate.shown)
        chosen = [rows[place] for place in asked]
        pairs = [(header + fill(candidate.format, row), choice) for row in chosen for choice in row["choices"]]
        scored = iter(of_completions(model, pairs))
        return np.array([np.argmax([next(scored).logs.sum(dtype=np.float64) for _ in row["choices"]]) == row["answer"] for row in chosen], float)

    return score


def _best(score: Score, pool: Sequence[Candidate], validation: np.ndarray) -> Candidate:
    """The first of the candidates with the highest accuracy; one alone need not be tried."""
    return pool[0] if len(pool) == 1 else pool[int(np.argmax([score(candidate, validation).mean() for candidate in pool]))]


def bootstrap(items: np.ndarray, resamples: int, level: float, random: np.random.Generator) -> tuple[float, float]:
    """Percentile interval of the mean of some items (items,), each resample of as many, with replacement.

    How often each value comes in a resample is multinomial, so that this is drawn, and no indices are.  Cost: resamples · different values.
    """
    values, counts = np.unique(items, return_counts=True)
    means = random.multinomial(len(items), counts / len(items), size=resamples) @ values / len(items)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _parts(results: Sequence[Result], questions: tuple[str, ...]) -> list[Measurement]:
    """What is said of one model: over the questions of all tasks, then a task an item."""
    tasks = tuple(f"task {place + 1}" for place in range(len(results)))
    by_question = {
        "accuracy": [one.own for one in results],
        "difference": [one.own - one.base for one in results],
        "naive_difference": [one.own - one.shared for one in results],
    }
    found = [Measurement(name, np.concatenate(items), better=HIGHER, item_names=questions) for name, items in by_question.items()]
    for name in VERDICTS:
        found.append(Measurement(name, np.array([one.verdicts()[name] for one in results], float), better=_better(name), item_names=tasks))
    ends = {"low": [one.interval[0] for one in results], "high": [one.interval[1] for one in results], "same_prompt": [one.same for one in results]}
    return found + [Measurement(name, np.array(items, float), better=HIGHER, item_names=tasks) for name, items in ends.items()]


def _rates(results: Sequence[Sequence[Result]]) -> list[Measurement]:
    """Verdicts over all adapted models and tasks, each pair of them an item."""
    names = tuple(f"model {model + 1}, task {place + 1}" for model, tasks in enumerate(results) for place in range(len(tasks)))
    if not names:
        return []
    verdicts = [one.verdicts() for tasks in results for one in tasks]
    return [Measurement(f"{name}_rate", np.array([one[name] for one in verdicts], float), better=_better(name), item_names=names) for name in VERDICTS]


def _better(name: str) -> str:
    return LOWER if "loss" in name else HIGHER
