"""Distil benchmarks to the few questions from which their scores can be told."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from etude.engine import irt
from etude.engine.progress import report
from etude.engine.responses import Table, tables
from etude.engine.smooth import smooth
from etude.method import Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError

VARIES, EASY, TELLS = 0.01, 0.95, 0.05
"""Questions are dropped whose answers vary less (standard deviation), that more models answer rightly (share), that go less with the score (|point-biserial correlation|): the authors' limits."""
LEAST = 10
"""Fewer questions than these are not chosen, unless there are no more: the authors' limit."""
STEPS = 6
"""Thresholds that are tried."""


class Choice(NamedTuple):
    """Questions that were chosen, and how well the score is told from them."""

    places: np.ndarray
    objective: float


@dataclass(frozen=True)
class Metabench(Method):
    """The questions that tell most about models' abilities, a few of each benchmark, with their parameters.

    For each skill (a benchmark) of a table of right and wrong answers:

    1. Questions without variance, that are too easy, or that do not go with the score, are dropped.
    2. Of `draws` random subsets of `subset` questions the one is kept whose mean tells the score best: least root mean square error in the worst of `folds` folds.
    3. A two-parameter logistic model is fitted to it; each model has an ability.
    4. The abilities are cut into `bins`, by their quantiles or at equal distances, and each bin takes the free question with the most Fisher information anywhere in it, if that
       exceeds a threshold.  Cut and threshold are those that minimise, on models set aside, the error of a smooth regression of the score on the abilities of a model fitted to the chosen
       questions anew, plus `penalty` for each question.

    Reads the columns model, item, correct and, if there is one, skill, as `evaluate.responses` gives them.  Gives a record for each chosen question: item, skill, discrimination, difficulty
    (the ability at which the chance is one half) and intercept; the parameters are those of the last fit.  What is told from these questions is measured by `score_reconstruction`.

    Source: Kipnis et al., "metabench", 2024, section 2, and the authors' code (preprocess.R, random.R, reduce.R).
    Departures: the regression in step 2 is a cubic polynomial, not an adaptive spline (the relation is almost a line); in step 3 there are weak priors, for the authors had 5000 models and here are
    hundreds, and neither guessing nor slipping (the authors try three and four parameters as well); abilities are expected a posteriori; six thresholds are tried in place of a Bayesian
    search; the highest bin holds its upper edge.  Models with the lowest 0.1 % of scores are not dropped.
    Raises InputError if the answers are no such table, or a skill has no question that is worth asking.
    Cost: draws · models · folds small regressions and about a dozen fits of the model, each models · questions · 61 operations a cycle: seconds a benchmark.
    """

    paper = "metabench"

    subset: int = 350
    """Questions of each benchmark that are kept in step 2; all if there are no more.  The paper's."""
    draws: int = 10_000
    """Random subsets that are compared.  The paper's."""
    folds: int = 5
    """Folds of the comparison.  The paper's."""
    bins: int = 250
    """Bins of ability, and so the most questions that are chosen of a benchmark.  The paper's."""
    penalty: float = 0.005
    """What one more question must save of the root mean square error, in percentage points.  The paper's."""
    validation: float = 0.1
    """Share of the models that are set aside in step 4.  The paper's."""

    def __post_init__(self) -> None:
        for name, least in (("subset", 1), ("draws", 1), ("folds", 2), ("bins", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}, got {getattr(self, name)}")
        if self.penalty < 0:
            raise ValueError(f"penalty is at least 0, got {self.penalty}")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation is a share of the models, more than 0 and less than 1, got {self.validation}")

    def apply(self, responses: Corpus, seed: int) -> Corpus:
        found, known = [], tables(responses)
        for place, (skill, table) in enumerate(known.items()):
            if len(table.models) < 2 * self.folds:
                raise InputError(f"{len(table.models)} models are too few to be parted into {self.folds} folds", remedy=f"Give the answers of {2 * self.folds} or more, or lower folds.")
            found += self._distilled(skill, table, np.random.default_rng([seed, place]))
            report("distilling", place + 1, len(known))
        return Corpus(found)

    def _distilled(self, skill: str, table: Table, random: np.random.Generator) -> list[dict[str, object]]:
        kept = np.flatnonzero(worth_asking(table.right))
        if not len(kept):
            raise InputError(f"no question of {skill!r} is worth asking: each is answered alike by nearly all models, or does not go with the score")
        kept = self._subset(table, kept, random)
        places = kept[self._informative(table.right[:, kept], table.scores, random)]
        questions = irt.fit(table.right[:, places])
        return [
            {"item": table.items[place], "skill": skill, "discrimination": float(slope), "difficulty": float(-intercept / slope) if slope else 0.0, "intercept": float(intercept)}
            for place, slope, intercept in zip(places.tolist(), *questions, strict=True)
        ]

    def _subset(self, table: Table, kept: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Of the kept questions' places, those of the best random subset, in order."""
        if len(kept) <= self.subset:
            return kept
        folds = random.permutation(np.arange(len(table.models)) % self.folds)
        drawn = np.stack([random.choice(kept, self.subset, replace=False) for _ in range(self.draws)])
        chosen = np.zeros((self.draws, len(table.items)))
        np.put_along_axis(chosen, drawn, 1.0, 1)
        errors = worst_fold(chosen @ table.right.T / self.subset, table.scores, folds)
        return np.sort(drawn[errors.argmin()])

    def _informative(self, right: np.ndarray, scores: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Places of the questions that are most informative, a bin each."""
        full = irt.fit(right)
        ability = irt.abilities(right, full)
        aside = set_aside(scores, self.validation, random)
        low, high = ability.min(), ability.max()
        cuts = {
            "quantiles": (ability, np.quantile(ability, np.linspace(0, 1, self.bins + 1))),
            "distances": (np.linspace(low, high, 4 * self.bins + 1), np.linspace(low, high, self.bins + 1)),
        }
        best: Choice | None = None
        for at, edges in cuts.values():
            facts = irt.information(at, full)
            for threshold in np.quantile(facts.max(0), np.arange(STEPS) / STEPS) * (np.arange(STEPS) > 0):
                places = most_informative(at, facts, edges, threshold)
                if len(places) < min(LEAST, self.bins, right.shape[1]) and best is not None:
                    continue
                error = validation_error(right[:, places], scores, aside)
                if best is None or error + self.penalty * len(places) < best.objective:
                    best = Choice(places, error + self.penalty * len(places))
        assert best is not None
        return best.places


def worth_asking(right: np.ndarray) -> np.ndarray:
    """Which questions vary, are not too easy, and go with the score (or against it), (items,) bool; right (models, items)."""
    scores = right.sum(1)
    spread = right.std(0, ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = ((right - right.mean(0)) * (scores - scores.mean())[:, None]).sum(0) / (len(right) - 1) / (spread * scores.std(ddof=1))
    return (spread > VARIES) & (right.mean(0) <= EASY) & (np.abs(np.nan_to_num(correlation)) >= TELLS)


def worst_fold(means: np.ndarray, scores: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """For each subset the greatest root mean square error over the folds of a cubic polynomial that tells the score from the subset's mean.

    means: (subsets, models); scores, folds: (models,).  Returns (subsets,).
    """
    centred = means - means.mean(1, keepdims=True)
    centred /= np.maximum(np.abs(centred).max(1, keepdims=True), 1e-9)
    errors = []
    for part in _blocks(len(means)):
        powers = centred[part, :, None] ** np.arange(4)
        one = []
        for fold in np.unique(folds):
            inside, outside = powers[:, folds != fold], powers[:, folds == fold]
            gram = np.einsum("smp,smq->spq", inside, inside) + 1e-9 * np.eye(4)
            target = np.einsum("smp,m->sp", inside, scores[folds != fold])
            told = np.einsum("smp,sp->sm", outside, np.linalg.solve(gram, target[..., None])[..., 0])
            one.append(np.sqrt(((told - scores[folds == fold]) ** 2).mean(1)))
        errors.append(np.max(one, 0))
    return np.concatenate(errors)


def _blocks(count: int, size: int = 500) -> Iterator[slice]:
    """Some subsets at a time, for memory's sake."""
    for begin in range(0, count, size):
        yield slice(begin, begin + size)


def set_aside(scores: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """Which models are set aside, (models,) bool: one drawn from each stretch of neighbours by score, so that all levels are among them."""
    order = np.argsort(scores, kind="stable")
    found = np.zeros(len(scores), bool)
    for stretch in np.array_split(order, max(1, round(share * len(scores)))):
        found[random.choice(stretch)] = True
    return found


def most_informative(at: np.ndarray, facts: np.ndarray, edges: np.ndarray, threshold: float) -> np.ndarray:
    """From the lowest bin to the highest, each takes the free question with the most information anywhere in it, if that reaches the threshold.

    at: (points,) abilities; facts: (points, items) information there; edges: (bins + 1,).  The last bin holds its upper edge.  Returns the places of those taken, in order.
    """
    free = np.ones(facts.shape[1], bool)
    for place, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = (at >= low) & ((at < high) | ((place == len(edges) - 2) & (at <= high)))
        if inside.any() and free.any():
            most = np.where(free, facts[inside].max(0), -np.inf)
            if most.max() >= threshold:
                free[most.argmax()] = False
    return np.flatnonzero(~free)


def validation_error(right: np.ndarray, scores: np.ndarray, aside: np.ndarray) -> float:
    """Root mean square error, percentage points, of the scores of the models set aside, told from their abilities; all is fitted to the other models."""
    questions = irt.fit(right[~aside])
    curve = smooth(irt.abilities(right[~aside], questions)[:, None], scores[~aside])
    told = curve(irt.abilities(right[aside], questions)[:, None])
    return float(np.sqrt(((np.clip(told, 0, 100) - scores[aside]) ** 2).mean()))
