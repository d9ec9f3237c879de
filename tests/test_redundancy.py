"""Redundancy of benchmarks against scipy's correlations and planted duplicates."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from etude.engine.responses import tables
from etude.measures.redundancy import KINDS, Redundancy
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.worlds.examinees import Examinees

ANSWERS = Examinees(models=24, skills=4, items=30, common=0.6)()


def values(found):
    return {part.name: part.value for part in found}


def reference(one, other, kind):
    if kind == "srcc":
        return scipy.stats.spearmanr(one, other).statistic
    if kind == "plcc":
        return scipy.stats.pearsonr(one, other).statistic
    slope, constant = np.polyfit(one, other, 1)
    return 1 - ((other - slope * one - constant) ** 2).sum() / ((other - other.mean()) ** 2).sum()


def test_dimensions_are_the_mean_correlation_with_all_others():
    before = ANSWERS.digest
    found = Redundancy(repeats=1, extreme=9)(ANSWERS, seed=0)
    assert ANSWERS.digest == before
    value = values(found)
    scores = np.stack([table.scores for table in tables(ANSWERS).values()])
    order = np.argsort(scores.mean(0), kind="stable")
    for ending, rows in (("", np.arange(24)), ("_top", order[-9:]), ("_bottom", order[:9])):
        for kind in KINDS:
            matrix = np.array([[reference(one[rows], other[rows], kind) for other in scores] for one in scores])
            mean = (matrix.sum(1) - np.diag(matrix)) / 3
            for skill in range(4):
                assert value[f"{kind}_skill_{skill}{ending}"] == pytest.approx(mean[skill]), (kind, skill, ending)
            assert value[f"{kind}{ending}"] == pytest.approx(mean.mean())
    sizes = {part.name: len(part.items) for part in found}
    assert {size for name, size in sizes.items() if name.endswith(("_top", "_bottom"))} == {9}
    assert sizes["srcc"] == 24
    assert next(part for part in found if part.name == "plcc_top").item_names == tuple(f"model {row}" for row in sorted(order[-9:]))


def test_instances_are_random_subsets_against_all():
    value = values(Redundancy(repeats=40, shares=(0.1, 0.5, 1.0), extreme=12)(ANSWERS, seed=1))
    right = np.concatenate([table.right for table in tables(ANSWERS).values()], 1)
    random = np.random.default_rng(7)  # other draws: the mean is the same but for chance
    for share in (0.1, 0.5):
        drawn = [right[:, random.permutation(120)[: round(share * 120)]].mean(1) for _ in range(400)]
        for kind in KINDS:
            assert value[f"{kind}_at_{round(100 * share)}"] == pytest.approx(np.mean([reference(one, right.mean(1), kind) for one in drawn]), abs=0.03)
    assert value["srcc_at_100"] == pytest.approx(1)
    assert value["srcc_at_10"] < value["srcc_at_50"] < 1
    assert value["r2_at_50_top"] < value["r2_at_50"], "a narrow group is harder to rank"


def test_a_planted_duplicate_is_the_most_redundant():
    rows = list(Examinees(models=60, skills=5, items=80, common=0.5)())
    again = np.random.default_rng(0)
    ability = Examinees(models=60, skills=5, items=80, common=0.5).drawn().ability[:, 0]
    copy = [{"model": f"model {model}", "item": f"new {item}", "skill": "copy", "correct": int(again.normal() < ability[model])} for model in range(60) for item in range(80)]
    value = values(Redundancy(repeats=1)(Corpus(rows + copy), seed=0))
    singles = [value[f"srcc_skill_{skill}"] for skill in range(1, 5)]
    assert min(value["srcc_copy"], value["srcc_skill_0"]) > max(singles)


def test_benchmarks_are_compared_by_their_means():
    of = {"skill 0": "x/y", "skill 1": "x/y", "skill 2": "z", "skill 3": "w"}
    found = Redundancy(repeats=1, extreme=12)(ANSWERS.with_column("benchmark", [of[skill] for skill in ANSWERS.column("skill")]), seed=0)
    value, scores = values(found), [table.scores for table in tables(ANSWERS).values()]
    first = (scores[0] + scores[1]) / 2
    assert value["srcc_of_x_y"] == pytest.approx((reference(first, scores[2], "srcc") + reference(first, scores[3], "srcc")) / 2)
    assert value["plcc_skill_0"] == pytest.approx(reference(scores[0], scores[1], "plcc")), "a skill is compared within its benchmark"
    assert "plcc_skill_2" not in value
    assert value["plcc"] == value["plcc_skill_0"]


def test_one_skill_alone_has_no_dimensions():
    found = values(Redundancy(repeats=2)(Examinees(models=6, skills=1, items=9)(), seed=0))
    assert not any(name.split("_")[1:2] == ["skill"] for name in found)
    assert {"srcc_at_10", "srcc_at_25", "r2_at_50_bottom"} <= found.keys()


def test_influences_have_the_spread_of_the_correlation():
    """The standard error of a mean of influences, against the spread of correlations over many draws of models."""
    errors, drawn = [], []
    for seed in range(60):
        part = next(part for part in Redundancy(repeats=1)(Examinees(models=60, skills=2, items=40, common=0.8, seed=1 + seed)(), seed=0) if part.name == "plcc")
        errors.append(part.items.std() / np.sqrt(60))
        drawn.append(part.value)
    assert np.mean(errors) == pytest.approx(np.std(drawn), rel=0.3)


def test_what_cannot_be_measured_is_refused():
    for fields in ({"shares": (0.0,)}, {"shares": (0.1, 0.101)}, {"shares": (1.5,)}, {"repeats": 0}, {"extreme": 1}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            Redundancy(**fields)
    with pytest.raises(InputError, match="of 3 models"):
        Redundancy()(Examinees(models=3, skills=2, items=5)(), seed=0)
    with pytest.raises(InputError, match="is of two benchmarks"):
        Redundancy()(ANSWERS.with_column("benchmark", ["ab"[place % 2] for place in range(len(ANSWERS))]), seed=0)
    with pytest.raises(InputError, match="the same without signs"):
        Redundancy()(ANSWERS.with_column("skill", [skill.replace("skill 0", "a-b").replace("skill 1", "a b") for skill in ANSWERS.column("skill")]), seed=0)
