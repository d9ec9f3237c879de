"""How much of a benchmark says again what the rest of it, or another benchmark, has said."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from etude.engine.progress import report
from etude.engine.responses import Table, tables
from etude.measures._correlations import products
from etude.method import MEASUREMENTS, Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.measurement import HIGHER, Measurement

KINDS = ("srcc", "plcc", "r2")
"""Spearman's rank correlation, Pearson's, and the square of Pearson's."""


@dataclass(frozen=True)
class Redundancy(Method):
    """Correlations between models' scores on the parts of a benchmark: high where parts order the models alike, so that one tells what the other does.

    Of a table of right and wrong answers, with X for ``srcc`` (Spearman's rank correlation), ``plcc`` (Pearson's) and ``r2`` (what a line explains, the square of Pearson's); in names all but
    letters and digits becomes _:

    - dimension redundancy ``X_skill``: the mean correlation of a skill's scores with each other skill of its benchmark; ``X``, the mean over all skills;
    - instance redundancy ``X_at_50``: the correlation of the score on a random half of all questions with that on all of them, the mean over `repeats` draws; of each of `shares`;
    - cross-benchmark redundancy ``X_of_benchmark``: the mean correlation of a benchmark's score, the mean over its skills, with each other benchmark's.

    Each stands for all models, and with ``_top`` or ``_bottom`` behind it for the `extreme` best and worst by the mean over skills alone: the same models for all parts.
    The items are the models, each with its influence on the correlation, whose mean is the correlation.

    A correlation between skills is lowered by the error of the scores, so that skills with few questions seem less redundant; the diagonal of the matrix of correlations is not counted.
    Reads the columns model, item, correct, and if there are any skill and benchmark; without the latter all skills are of one benchmark.
    Source: Zhang et al., "Redundancy principles for MLLMs benchmarks", 2025, section 3, and the authors' code.
    Departures: skills count alike in the score that ranks models, however many questions they have; the paper's heat maps of all pairs are not given.
    Raises InputError if the answers are no such table, a skill is of two benchmarks, two names have the same letters, or there are fewer than four models.
    Cost: next to none.
    """

    paper = "benchmark-redundancy"

    shares: tuple[float, ...] = (0.1, 0.25, 0.5)
    """Shares of the questions that are drawn, each above 0 and at most 1; the paper goes from 0.1 to 0.9."""
    repeats: int = 100
    """Draws of each share.  The paper's."""
    extreme: int = 50
    """Models that are the best, and the worst; half of all at most.  The paper's."""

    def __post_init__(self) -> None:
        if not all(0 < share <= 1 for share in self.shares) or len({round(100 * share) for share in self.shares}) < len(self.shares):
            raise ValueError(f"shares are different whole per cents of the questions, more than 0 and at most 1, got {self.shares}; for a half pass 0.5")
        for name, least in (("repeats", 1), ("extreme", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}, got {getattr(self, name)}")

    def apply(self, responses: Corpus, seed: int) -> MEASUREMENTS:
        known = tables(responses)
        models = next(iter(known.values())).models
        if len(models) < 4:
            raise InputError(f"the answers are of {len(models)} models, and their order says little", remedy="Give those of four models or more.")
        order = np.argsort(np.mean([table.scores for table in known.values()], 0), kind="stable")
        count = min(self.extreme, len(models) // 2)
        scores = self._scores(known, benchmarks_of(responses, known), seed)
        found = []
        for ending, rows in (("", np.arange(len(models))), ("_top", np.sort(order[-count:])), ("_bottom", np.sort(order[:count]))):
            names = tuple(models[row] for row in rows)
            for name, pairs in scores.items():
                for kind in KINDS:
                    items = np.mean([correlation(one[rows], other[rows], kind) for one, other in pairs], 0)
                    found.append(Measurement(f"{kind}{name}{ending}", items, better=HIGHER, item_names=names))
        return tuple(found)

    def _scores(self, known: Mapping[str, Table], benchmarks: Mapping[str, list[str]], seed: int) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
        """By the rest of a part's name, the pairs of scores, (models,) each, whose correlations it is the mean of."""
        scores = {skill: table.scores for skill, table in known.items()}
        found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for skills in benchmarks.values():
            for skill in skills if len(skills) > 1 else ():
                found[f"_{plain(skill)}"] = [(scores[skill], scores[other]) for other in skills if other != skill]
        if found:
            found[""] = [pair for pairs in list(found.values()) for pair in pairs]
        totals = {name: np.mean([scores[skill] for skill in skills], 0) for name, skills in benchmarks.items()}
        for name in totals if len(totals) > 1 else ():
            found[f"_of_{plain(name)}"] = [(totals[name], totals[other]) for other in totals if other != name]
        right = np.concatenate([table.right for table in known.values()], 1)
        random, whole = np.random.default_rng(seed), right.mean(1)
        for share in self.shares:
            drawn = [random.choice(right.shape[1], max(1, round(share * right.shape[1])), replace=False) for _ in range(self.repeats)]
            found[f"_at_{round(100 * share)}"] = [(right[:, places].mean(1), whole) for places in drawn]
            report("random questions", len(found), len(found))
        return found


def correlation(one: np.ndarray, other: np.ndarray, kind: str) -> np.ndarray:
    """A number an item whose mean is the correlation of this kind; both (items,)."""
    items = products(one, other, ranks=kind == "srcc")
    if kind != "r2":
        return items
    mean = items.mean()
    return mean**2 + 2 * mean * (items - mean)


def benchmarks_of(responses: Corpus, known: Mapping[str, Table]) -> dict[str, list[str]]:
    """The skills of each benchmark.  Raises InputError if a skill is of two, or names cannot be told apart once they are plain."""
    found: dict[str, list[str]] = {}
    if "benchmark" not in responses.columns:
        found["all"] = list(known)
    else:
        skills = responses.column("skill") if "skill" in responses.columns else list(known) * len(responses)
        seen = dict.fromkeys(zip(map(str, responses.column("benchmark")), map(str, skills), strict=True))
        for benchmark, skill in seen:
            if any(skill in others for others in found.values()):
                raise InputError(f"the skill {skill!r} is of two benchmarks", remedy="Name it differently in each, as in `maths/sums`.")
            found.setdefault(benchmark, []).append(skill)
    for names in (list(known), list(found)):
        if len({plain(name) for name in names}) < len(names):
            raise InputError(f"some of {', '.join(names)} are the same without signs and spaces", remedy="Give skills and benchmarks names that differ in letters or digits.")
    return found


def plain(name: str) -> str:
    """A name as part of a measurement's: letters and digits, and _ for all else."""
    return re.sub(r"\W", "_", name)
