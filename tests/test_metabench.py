"""Item response theory, smooth regression and the distilling of benchmarks, against other computations and simulated truth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats

from etude.engine import irt
from etude.engine.responses import tables
from etude.engine.smooth import ridge, smooth
from etude.measures._correlations import products
from etude.measures.score_reconstruction import ScoreReconstruction, plainly
from etude.methods.evaluate.metabench import Metabench, most_informative, set_aside, worst_fold, worth_asking
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.worlds.examinees import Examinees

SMALL = {"models": 160, "skills": 2, "items": 60}


def drawn(models: int, items: int, seed: int = 0):
    """Answers (models, items), abilities and questions of one skill, drawn here."""
    random = np.random.default_rng(seed)
    ability, slope, intercept = random.normal(size=models), random.uniform(0.5, 2, items), random.normal(0, 1.2, items)
    chance = 1 / (1 + np.exp(-(ability[:, None] * slope + intercept)))
    return (random.random(chance.shape) < chance).astype(float), ability, irt.Questions(slope, intercept)


def test_parameters_and_abilities_are_found_again():
    answers, ability, truth = drawn(1500, 40)
    found = irt.fit(answers)
    assert np.corrcoef(found.discrimination, truth.discrimination)[0, 1] > 0.9
    assert np.abs(found.discrimination - truth.discrimination).mean() < 0.12
    assert np.abs(found.intercept - truth.intercept).mean() < 0.1
    told = irt.abilities(answers, found)
    assert np.corrcoef(told, ability)[0, 1] > 0.93
    assert told.var() < 1 < told.var() + ((told - ability) ** 2).mean() + 0.15  # shrunken, as expectations are


def test_the_fit_is_the_maximum_of_the_marginal_likelihood():
    answers, _, _ = drawn(120, 4, seed=3)
    nodes, weights = np.polynomial.hermite_e.hermegauss(41)  # another quadrature
    weights = weights / weights.sum()

    def loss(values):
        slope, intercept = values[:4], values[4:]
        logits = nodes[:, None] * slope + intercept
        logs = answers @ -np.logaddexp(0, -logits).T + (1 - answers) @ -np.logaddexp(0, logits).T
        prior = (slope**2).sum() / (2 * irt.SLOPE_SPREAD**2) + (intercept**2).sum() / (2 * irt.INTERCEPT_SPREAD**2)
        return prior - np.log(np.exp(logs) @ weights).sum()

    best = scipy.optimize.minimize(loss, np.concatenate([np.ones(4), np.zeros(4)]), method="Powell", options={"xtol": 1e-6, "ftol": 1e-12, "maxiter": 20_000})
    found = irt.fit(answers, cycles=5000, tolerance=1e-8)
    assert loss(np.concatenate(found)) == pytest.approx(best.fun, abs=1e-4)
    assert np.concatenate(found) == pytest.approx(best.x, abs=0.03)


def test_abilities_are_expectations_and_information_is_curvature():
    answers, _, questions = drawn(5, 6, seed=1)
    for row, found in zip(answers, irt.abilities(answers, questions), strict=True):

        def density(at, row=row):
            chance = irt.chances(np.array([at]), questions)[0]
            return scipy.stats.norm.pdf(at) * np.prod(np.where(row == 1, chance, 1 - chance))

        total = scipy.integrate.quad(density, -8, 8)[0]
        assert found == pytest.approx(scipy.integrate.quad(lambda at: at * density(at), -8, 8)[0] / total, abs=1e-3)
    at, step = 0.3, 1e-4
    logs = [np.log(irt.chances(np.array([at + move]), questions)[0]) for move in (-step, 0, step)]
    losses = [np.log(1 - irt.chances(np.array([at + move]), questions)[0]) for move in (-step, 0, step)]
    chance = np.exp(logs[1])
    expected = -(chance * (logs[0] - 2 * logs[1] + logs[2]) + (1 - chance) * (losses[0] - 2 * losses[1] + losses[2])) / step**2
    assert irt.information(np.array([at]), questions)[0] == pytest.approx(expected, rel=1e-3)


def test_questions_that_split_perfectly_and_those_that_go_backwards_stay_finite():
    answers, ability, _ = drawn(200, 12, seed=2)
    answers = np.column_stack([answers, ability > 0, ability <= 0, np.ones(200)])
    found = irt.fit(answers)
    assert np.isfinite(np.concatenate(found)).all()
    assert found.discrimination[12] > 2
    assert found.discrimination[13] < -2
    assert irt.fit(answers[:, [12, 0, 1]]).discrimination.sum() > 0


def test_one_common_factor_has_its_loadings_back():
    random = np.random.default_rng(0)
    loadings = np.array([0.9, 0.7, 0.5, 0.8])
    common = random.normal(size=20_000)
    values = common[:, None] * loadings + random.normal(size=(20_000, 4)) * np.sqrt(1 - loadings**2)
    found, weights = irt.common_factor(values)
    assert found == pytest.approx(loadings, abs=0.03)
    least = np.linalg.lstsq(values, common, rcond=None)[0]
    assert weights == pytest.approx(least, abs=0.03)  # Thurstone's are the regression of the factor on the variables


def test_curves_are_found_and_go_on_straight():
    random = np.random.default_rng(0)
    terms = random.uniform(-2, 2, (400, 3))
    wanted = np.sin(2 * terms[:, 0]) + 0.5 * terms[:, 1] + random.normal(0, 0.1, 400)
    found = smooth(terms, wanted)
    fresh = random.uniform(-1.9, 1.9, (300, 3))
    error = found(fresh) - np.sin(2 * fresh[:, 0]) - 0.5 * fresh[:, 1]
    assert np.sqrt((error**2).mean()) < 0.08
    line = smooth(terms[:, [1]], 3 + 2 * terms[:, 1])
    assert line(np.array([[-4.0], [0.0], [5.0]])) == pytest.approx([-5, 3, 13], abs=0.05)
    assert smooth(terms[:, [2]], wanted)(fresh[:, [2]]).std() < 0.2, "nothing to be told was told"


def test_a_ridge_predicts_each_row_from_the_others():
    random = np.random.default_rng(0)
    answers = (random.random((30, 8)) < 0.5).astype(float)
    wanted = answers @ random.normal(size=8) + random.normal(size=30)
    others, weights, constant = ridge(answers, wanted)
    fits = {}
    for penalty in 30 * 10.0 ** np.arange(-5, 2.5, 0.5):
        told = []
        for row in range(30):
            kept = np.arange(30) != row
            # One penalty and one centre for all rows: the constant is not penalised, which a bordered system says exactly.
            bordered = np.column_stack([np.ones(29), answers[kept]])
            system = bordered.T @ bordered + np.diag([0] + [penalty] * 8)
            told.append(np.concatenate([[1], answers[row]]) @ np.linalg.solve(system, bordered.T @ wanted[kept]))
        fits[penalty] = np.array(told)
    best = min(fits, key=lambda penalty: ((fits[penalty] - wanted) ** 2).mean())
    assert others == pytest.approx(fits[best], abs=1e-8)
    bordered = np.column_stack([np.ones(30), answers])
    assert np.concatenate([[constant], weights]) == pytest.approx(np.linalg.solve(bordered.T @ bordered + np.diag([0] + [best] * 8), bordered.T @ wanted))


def test_correlations_have_an_item_each():
    random = np.random.default_rng(0)
    one, other = random.integers(0, 9, 40), random.integers(0, 9, 40)
    assert products(one, other).mean() == pytest.approx(np.corrcoef(one, other)[0, 1])
    assert products(one, other, ranks=True).mean() == pytest.approx(scipy.stats.spearmanr(one, other).statistic)
    assert products(np.ones(4), other[:4]).tolist() == [0.0] * 4


def test_the_first_steps_are_those_by_hand():
    answers, _, _ = drawn(60, 30, seed=5)
    answers = np.column_stack([answers, np.ones(60), np.zeros(60), np.arange(60) != 7])
    scores = answers.sum(1)
    by_hand = [0 < column.mean() <= 0.95 and abs(scipy.stats.pointbiserialr(column == 1, scores).statistic) >= 0.05 for column in answers.T]
    assert worth_asking(answers).tolist() == by_hand
    assert not any(by_hand[30:])
    folds = np.arange(60) % 5
    subsets = [[0, 3, 5, 9, 11], [1, 2, 3, 4, 30]]
    means = np.stack([answers[:, subset].mean(1) for subset in subsets])
    for mean, found in zip(means, worst_fold(means, scores, folds), strict=True):
        errors = []
        for fold in range(5):
            told = np.polyval(np.polyfit(mean[folds != fold], scores[folds != fold], 3), mean[folds == fold])
            errors.append(np.sqrt(((told - scores[folds == fold]) ** 2).mean()))
        assert found == pytest.approx(max(errors), rel=1e-4)
    aside = set_aside(scores, 0.1, np.random.default_rng(0))
    assert aside.sum() == 6
    assert all(aside[part].sum() == 1 for part in np.array_split(np.argsort(scores, kind="stable"), 6))


def test_each_bin_takes_the_free_question_that_tells_most():
    random = np.random.default_rng(0)
    at, facts = np.sort(random.normal(size=50)), random.random((50, 9))
    for bins, threshold in itertools.product((3, 6, 20), (0.0, 0.9, 0.99)):
        edges = np.quantile(at, np.linspace(0, 1, bins + 1))
        taken: list[int] = []
        for place in range(bins):
            rows = [row for row in range(50) if edges[place] <= at[row] < edges[place + 1] or (place == bins - 1 and at[row] == edges[-1])]
            ranked = sorted((max(facts[row, item] for row in rows), item) for item in range(9) if item not in taken) if rows else []
            if ranked and ranked[-1][0] >= threshold:
                taken.append(ranked[-1][1])
        assert most_informative(at, facts, edges, threshold).tolist() == sorted(taken)


def test_few_questions_tell_the_scores_of_other_models_better_than_random_ones():
    training, heldout = Examinees(**SMALL)(), Examinees(split="heldout", **SMALL | {"models": 80})()
    before = training.digest, heldout.digest
    chosen = Metabench(draws=50, bins=6)(training, seed=0)
    assert 4 <= len(chosen) <= 12
    assert chosen == Metabench(draws=50, bins=6)(training, seed=0)
    parts = {part.name: part for part in ScoreReconstruction(repeats=4)(chosen, [training, heldout], seed=0)}
    assert (training.digest, heldout.digest) == before
    value = {name: part.value for name, part in parts.items()}
    assert value["squared_error"] < 0.8 * value["random_squared_error"]
    assert value["random_squared_error"] < 1.1 * value["plain_squared_error"]
    assert value["total_squared_error"] < value["squared_error"]
    assert value["factor_correlation"] > 0.8
    assert value["share"] == len(chosen) / 120
    assert parts["share"].exact
    assert {len(part.items) for name, part in parts.items() if name != "share"} == {80}
    assert value["absolute_error"] ** 2 <= value["squared_error"]
    truth = Examinees(**SMALL).drawn()
    places = [int(record["item"].split()[1]) for record in chosen if record["skill"] == "skill 0"]
    assert truth.discrimination[0, places].mean() > truth.discrimination[0].mean(), "those that tell most discriminate most"


def test_all_questions_tell_everything():
    training, heldout = Examinees(**SMALL)(), Examinees(split="heldout", **SMALL)()
    everything = Corpus([{"item": f"question {item}", "skill": f"skill {skill}"} for skill in range(2) for item in range(60)])
    value = {part.name: part.value for part in ScoreReconstruction(repeats=1)(everything, [training, heldout], seed=0)}
    assert value["squared_error"] < 0.2
    assert value["plain_total_squared_error"] < 0.2
    assert value["share"] == 1
    known = tables(training)
    own = {skill: np.arange(0, 60, 6) for skill in known}
    told = plainly(known, tables(heldout), own)
    assert np.corrcoef(told[:, 0], tables(heldout)["skill 0"].scores)[0, 1] > 0.8


def test_what_cannot_be_distilled_is_refused():
    for fields in ({"subset": 0}, {"draws": 0}, {"folds": 1}, {"bins": 0}, {"penalty": -1.0}, {"validation": 1.0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            Metabench(**fields)
    with pytest.raises(ValueError, match="repeats"):
        ScoreReconstruction(repeats=0)
    training = Examinees(models=20, skills=2, items=10)()
    with pytest.raises(InputError, match="9 models are too few"):
        Metabench()(Examinees(models=9, skills=1, items=10)(), seed=0)
    with pytest.raises(InputError, match="no question of 'skill 0' is worth asking"):
        Metabench()(training.with_column("correct", [1] * len(training)), seed=0)
    chosen = Corpus([{"item": "question 3", "skill": "skill 1"}])
    with pytest.raises(InputError, match="got 3 corpora"):
        ScoreReconstruction()(chosen, [training] * 3, seed=0)
    with pytest.raises(InputError, match="no question 'question 10'"):
        ScoreReconstruction()(Corpus([{"item": "question 10", "skill": "skill 1"}]), [training], seed=0)
    with pytest.raises(InputError, match="no skill 'skill 2'"):
        ScoreReconstruction()(Corpus([{"item": "question 1", "skill": "skill 2"}]), [training], seed=0)
    with pytest.raises(InputError, match="lacks 5 of 10 questions of 'skill 0'"):
        ScoreReconstruction()(chosen, [training, training.keep(lambda record: record["item"] < "question 5")], seed=0)
    with pytest.raises(InputError, match="too few to hold some out"):
        ScoreReconstruction()(chosen, [Examinees(models=3, skills=2, items=10)()], seed=0)


def test_answers_are_read_as_tables_and_bad_ones_refused():
    rows = [{"model": model, "item": item, "skill": skill, "correct": model == item} for skill in "ab" for model in (2, 1) for item in (2, 1, 3)]
    found = tables(Corpus(rows))
    assert list(found) == ["a", "b"]
    assert found["a"].models == ("2", "1")
    assert found["a"].items == ("2", "1", "3")
    assert found["a"].right.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert found["a"].scores == pytest.approx([100 / 3, 100 / 3])
    assert list(tables(Corpus([{"model": "x", "item": 0, "correct": 1}]))) == ["all"]
    with pytest.raises(InputError, match="'2' answered question '2' of 'a' 0 times"):
        tables(Corpus(rows[1:]))
    with pytest.raises(InputError, match="2 times"):
        tables(Corpus([*rows, rows[-1]]))
    with pytest.raises(InputError, match=r"record 0 has 0\.5 as correct"):
        tables(Corpus([{"model": "x", "item": 0, "correct": 0.5}]))
    with pytest.raises(InputError, match="no column 'model'"):
        tables(Corpus([{"item": 0, "correct": 1}]))
    with pytest.raises(InputError, match="1 gaps"):
        tables(Corpus([{"model": "x", "item": 0, "correct": 1}, {"model": None, "item": 0, "correct": 1}]))
    with pytest.raises(InputError, match="is empty"):
        tables(Corpus(rows).select([]))


def test_simulated_examinees_follow_their_truth():
    corpus = Examinees(models=400, skills=2, items=50, guess=0.2, truth=True)()
    truth = Examinees(models=400, skills=2, items=50, guess=0.2).drawn()
    assert np.corrcoef(truth.ability.T)[0, 1] == pytest.approx(0.81, abs=0.06)
    chance = 0.2 + 0.8 / (1 + np.exp(-np.array(corpus.column("discrimination")) * (np.array(corpus.column("ability")) - np.array(corpus.column("difficulty")))))
    right = np.array(corpus.column("correct"))
    for low in np.arange(0.2, 1, 0.1):
        inside = (chance >= low) & (chance < low + 0.1)
        assert right[inside].mean() == pytest.approx(chance[inside].mean(), abs=0.03)
    few, other = Examinees(models=3, skills=2, items=50, guess=0.2)(), Examinees(split="heldout", models=3, skills=2, items=50, guess=0.2)()
    assert few.column("correct") == corpus[:300].column("correct"), "more models change those that were there"
    assert few.column("correct") != other.column("correct")
    assert (Examinees(models=3).drawn().difficulty == Examinees(models=3, split="heldout").drawn().difficulty).all()
    for fields in ({"split": "test"}, {"models": 0}, {"skills": 0}, {"items": 0}, {"common": 1.1}, {"guess": 1.0}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            Examinees(**fields)
