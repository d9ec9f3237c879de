"""How well the scores of whole benchmarks are told from the answers to a few of their questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from etude.engine import irt
from etude.engine.progress import report
from etude.engine.responses import Table, alike, tables
from etude.engine.smooth import ridge, smooth
from etude.measures._correlations import products
from etude.method import MEASUREMENTS, Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError, nearest
from etude.values.measurement import HIGHER, Measurement

Places = Mapping[str, np.ndarray]
"""By skill, the places of some questions in its table."""


class Told(NamedTuple):
    """What was told of some models from some questions."""

    scores: np.ndarray
    """(models, skills + 1) scores in per cent, that of all skills last."""
    factor: np.ndarray
    """(models,) the common factor of the abilities."""


@dataclass(frozen=True)
class ScoreReconstruction(Method):
    """Squared error, in percentage points squared, of the scores that are told of models from the questions chosen, those of as many random questions beside it.

    The answers of some models to all questions are what is learned from; those of other models to the chosen questions are given, and their scores on all questions are to be told.  Of the chosen
    questions each model has, by skill, an ability (a two-parameter logistic model, fitted to the first models), the mean, and a linear prediction of the score; a smooth additive regression
    tells each skill's score from its own linear prediction and mean, from those averaged over skills, and from the abilities in all skills; the total, the mean over
    skills, from the averages and the abilities.

    The items are the models that were held out.  Parts: ``squared_error``, the mean over skills, and ``total_squared_error`` of the total; ``random_…``, of as many questions of each skill drawn
    anew `repeats` times, by the same regression, the mean over draws; ``plain_…``, of the same draws, each score told from the mean alone, which is the paper's own comparison;
    ``absolute_error`` and ``total_absolute_error``; ``factor_correlation``, Spearman's, of the one common factor of the abilities with the total; ``share`` of the questions that were chosen.

    Responses are two corpora with the columns model, item, correct and skill: the models to learn from, and those held out.  One alone is parted: every fourth model is held out.
    Reads the columns item and skill of the chosen questions.
    Source: Kipnis et al., "metabench", 2024, sections 2.5 and 3, and the authors' code (meta.R).
    Departures: splines are penalised uniformly, not adaptively; the linear prediction is a ridge regression, and in training that of a model learned from the others only: the authors
    have many times more models than questions, and can do without both; one factor alone, by principal axes.  With few models to learn from, a hundred or two, the additive regression is unsteady:
    one model that is unlike all others may be told twenty points wrong, so look at ``plain_…`` beside ``random_…``.
    Raises InputError if the answers are no such tables, or a chosen question is none of theirs.
    Cost: 1 + repeats fits, each a second or so for six benchmarks of some hundred models.
    """

    paper = "metabench"

    repeats: int = 10
    """Draws of random questions; the paper draws 10 000 for its plain comparison."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats is a number of draws, at least 1, got {self.repeats}")

    def apply(self, chosen: Corpus, responses: list[Corpus], seed: int) -> MEASUREMENTS:
        known, heldout = _parted(responses)
        places = _places(chosen, known)
        known, heldout = ({skill: side[skill] for skill in places} for side in (known, heldout))
        wanted = _scores(heldout)
        told = reconstruct(known, heldout, places)
        names = next(iter(heldout.values())).models
        random, draws = np.random.default_rng(seed), []
        for turn in range(self.repeats):
            drawn = {skill: np.sort(random.choice(len(known[skill].items), len(own), replace=False)) for skill, own in places.items()}
            draws.append([(found - wanted) ** 2 for found in (reconstruct(known, heldout, drawn).scores, plainly(known, heldout, drawn))])
            report("random questions", turn + 1, self.repeats)
        errors = {"": (told.scores - wanted) ** 2} | dict(zip(("random_", "plain_"), np.mean(draws, 0), strict=True))
        found = []
        for name, error in errors.items():
            found += [Measurement(f"{name}{part}squared_error", items, unit="points²", item_names=names) for part, items in (("", error[:, :-1].mean(1)), ("total_", error[:, -1]))]
        apart = np.abs(told.scores - wanted)
        share = np.array([len(own) for own in places.values()]), np.array([len(table.items) for table in known.values()], float)
        return (
            *found,
            Measurement("absolute_error", apart[:, :-1].mean(1), unit="points", item_names=names),
            Measurement("total_absolute_error", apart[:, -1], unit="points", item_names=names),
            Measurement("factor_correlation", products(told.factor, wanted[:, -1], ranks=True), better=HIGHER, item_names=names),
            Measurement("share", share[0] / share[1], weights=share[1], exact=True, item_names=tuple(places)),
        )


def reconstruct(known: Mapping[str, Table], heldout: Mapping[str, Table], places: Places) -> Told:
    """Scores of the models held out, told from these questions alone; all is learned from the known models."""
    described: tuple[list[tuple[np.ndarray, ...]], ...] = ([], [])
    for skill, own in places.items():
        right = known[skill].right[:, own], heldout[skill].right[:, own]
        questions = irt.fit(right[0])
        others, weights, constant = ridge(right[0], known[skill].scores)
        for side, answers, line in zip(described, right, (others, right[1] @ weights + constant), strict=True):
            side.append((line, 100 * answers.mean(1), irt.abilities(answers, questions)))
    wanted = _scores(known)
    terms = [np.array(side).transpose(1, 2, 0) for side in described]  # each (3, models, skills): linear predictions, means, abilities
    scores = np.stack([smooth(_terms(terms[0], place), wanted[:, place])(_terms(terms[1], place)) for place in range(wanted.shape[1])], 1)
    centre, spread = terms[0][2].mean(0), np.maximum(terms[0][2].std(0), 1e-9)
    _, weights = irt.common_factor(terms[0][2])
    return Told(np.clip(scores, 0, 100), (terms[1][2] - centre) / spread @ weights)


def plainly(known: Mapping[str, Table], heldout: Mapping[str, Table], places: Places) -> np.ndarray:
    """The same scores, each told from the mean of its own questions alone, the total from the mean of these means."""
    means = [np.stack([100 * side[skill].right[:, own].mean(1) for skill, own in places.items()], 1) for side in (known, heldout)]
    means = [np.column_stack([one, one.mean(1)]) for one in means]
    wanted = _scores(known)
    return np.clip(np.stack([smooth(means[0][:, [place]], wanted[:, place])(means[1][:, [place]]) for place in range(wanted.shape[1])], 1), 0, 100)


def _terms(described: np.ndarray, place: int) -> np.ndarray:
    """What a score is told from; the place after the last skill is the total."""
    lines, means, abilities = described
    skills = lines.shape[1]
    own = [lines[:, [place]], means[:, [place]]] if place < skills else []
    averages = [lines.mean(1, keepdims=True), means.mean(1, keepdims=True)] if skills > 1 or not own else []
    return np.concatenate([*own, *averages, abilities], 1)


def _scores(known: Mapping[str, Table]) -> np.ndarray:
    """(models, skills + 1), the mean over skills last."""
    scores = np.stack([table.scores for table in known.values()], 1)
    return np.column_stack([scores, scores.mean(1)])


def _parted(responses: list[Corpus]) -> tuple[Mapping[str, Table], Mapping[str, Table]]:
    """The tables of the models to learn from and of those held out, with the same skills and questions.  Raises InputError if there are not one or two corpora."""
    if not 1 <= len(responses) <= 2:
        raise InputError(f"score_reconstruction takes the answers of models to learn from and of others, got {len(responses)} corpora", remedy="As in `on: [training, heldout]`.")
    known = tables(responses[0])
    if len(responses) == 2:
        return known, alike(known, tables(responses[1]), "the held-out models' answers")
    out = np.arange(len(next(iter(known.values())).models)) % 4 == 3
    if not out.any():
        raise InputError(f"{len(out)} models are too few to hold some out", remedy="Give the answers of other models as a second corpus.")
    sides = ({skill: Table(tuple(np.array(table.models)[rows]), table.items, table.right[rows]) for skill, table in known.items()} for rows in (~out, out))
    first, second = sides
    return first, second


def _places(chosen: Corpus, known: Mapping[str, Table]) -> Places:
    """Where the chosen questions stand in the tables, by skill.  Raises InputError if one stands nowhere."""
    skills = chosen.column("skill") if "skill" in chosen.columns else [next(iter(known))] * len(chosen)
    wanted: dict[str, set[int]] = {}
    numbers = {skill: {item: place for place, item in enumerate(table.items)} for skill, table in known.items()}
    for item, skill in zip(map(str, chosen.column("item")), skills, strict=True):
        if skill not in known:
            raise InputError(f"the answers have no skill {skill!r}", remedy=nearest(skill, known))
        if item not in numbers[skill]:
            raise InputError(f"the answers have no question {item!r} of {skill!r}, which was chosen")
        wanted.setdefault(skill, set()).add(numbers[skill][item])
    if not wanted:
        raise InputError("no question was chosen")
    return {skill: np.array(sorted(wanted[skill])) for skill in known if skill in wanted}
