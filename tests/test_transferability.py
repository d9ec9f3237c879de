"""Estimators against closed forms, brute force and their authors' library; rankings against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import texts

from etude.engine import classify, hidden
from etude.engine.train import Recipe
from etude.measures._separability import h_score_items, kendall_items, logme_items, neighbour_items, shrinkage
from etude.measures.transfer_ranking import TransferRanking
from etude.measures.transferability import ESTIMATORS, LAYERS, Transferability
from etude.values import checkpoint
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model


def blobs(count: int = 60, width: int = 7, classes: int = 3, apart: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around a mean of their own for each class, columns of unequal size."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    return (random.normal(size=(classes, width)) * apart)[labels] + random.normal(size=(count, width)) * np.linspace(0.3, 3, width), labels


def evidence(states, y, alpha, beta, weights=None):
    """Log-evidence as the density of one Gaussian; each text's likelihood to the power of its weight."""
    weights = np.ones(len(y)) if weights is None else weights
    covariance = np.diag(1 / (beta * weights)) + states @ states.T / alpha
    powers = ((weights - 1) / 2 * np.log(beta / (2 * np.pi)) - np.log(weights) / 2).sum()
    return scipy.stats.multivariate_normal(np.zeros(len(y)), covariance).logpdf(y) + powers


def largest(states, y, weights=None):
    """The largest log-evidence over both precisions, by a general optimizer."""
    found = scipy.optimize.minimize(lambda logs: -evidence(states, y, *np.exp(logs), weights), [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000})
    return -found.fun


@pytest.mark.parametrize(("count", "width"), [(60, 7), (18, 30)])  # more texts than width, and fewer
def test_logme_is_the_largest_evidence(count, width):
    states, labels = blobs(count, width)
    by_hand = np.mean([largest(states, (labels == one).astype(float)) / count for one in range(3)])
    assert logme_items(states, labels).mean() == pytest.approx(by_hand, abs=1e-5)


def test_logme_items_are_its_derivatives_by_the_weights_of_the_texts():
    states, labels = blobs(24, 4)
    items, slopes, step = logme_items(states, labels), [], 1e-3
    for text in range(24):
        weights = [np.ones(24), np.ones(24)]
        weights[0][text] -= step
        weights[1][text] += step
        low, high = (np.mean([largest(states, (labels == one).astype(float), some) for one in range(3)]) for some in weights)
        slopes.append((high - low) / (2 * step))
    slopes = np.array(slopes)
    assert items - items.mean() == pytest.approx(slopes - slopes.mean(), abs=2e-4)


def test_logme_does_not_depend_on_scale_or_rotation_and_rises_with_separation():
    states, labels = blobs()
    turn = scipy.stats.ortho_group.rvs(7, random_state=0)
    assert logme_items(5 * states @ turn, labels) == pytest.approx(logme_items(states, labels), abs=1e-5)
    assert logme_items(blobs(apart=4)[0], labels).mean() > logme_items(states, labels).mean() > logme_items(blobs(apart=0)[0], labels).mean()
    assert np.isfinite(logme_items(np.zeros((12, 3)), np.arange(12) % 2)).all()
    assert np.isfinite(logme_items(np.eye(12), np.arange(12) % 2)).all()


def test_h_score_is_the_trace_by_hand():
    states, labels = blobs(40, 5, apart=2.0)
    centred = states - states.mean(0)
    covariance = np.zeros((5, 5))
    spread = 0.0
    for row in centred:
        covariance += np.outer(row, row) / 40
    for row in centred:  # Ledoit and Wolf, 2004, lemma 3.4
        spread += ((np.outer(row, row) - covariance) ** 2).sum() / 40**2
    scale = np.trace(covariance) / 5
    share = spread / ((covariance - scale * np.eye(5)) ** 2).sum()
    assert shrinkage(centred, covariance) == pytest.approx(share)
    between = sum((labels == one).sum() * np.outer(centred[labels == one].mean(0), centred[labels == one].mean(0)) for one in range(3)) / 39
    expected = np.trace(np.linalg.inv((1 - share) * covariance + share * scale * np.eye(5)) @ ((1 - share) * between))
    items = h_score_items(states, labels)
    assert items.mean() == pytest.approx(expected)
    assert 0 < expected < 2.1
    assert h_score_items(np.zeros((12, 3)), np.arange(12) % 2).tolist() == [0] * 12


def test_neighbours_vote():
    states = np.array([[0.0], [1.0], [2.1], [3.3], [10.0], [11.0], [12.1]])
    labels = np.array([0, 0, 1, 0, 1, 1, 2])
    # Of the third the nearest are the second, the fourth and the first, all of class 0; of the last the sixth and the fifth, of class 1.
    assert neighbour_items(states, labels, 3).tolist() == [1, 1, 0, 1, 1, 1, 0]
    # Of the sixth the fifth, the seventh and the fourth, each of another class: the nearest counts.
    assert neighbour_items(states, np.array([0, 0, 1, 0, 2, 2, 1]), 3)[5] == 1


def test_estimators_are_those_of_the_authors_library():
    ranker = pytest.importorskip("transformer_ranker.estimators")
    import torch

    for seed, (count, width, classes) in enumerate([(80, 10, 2), (120, 24, 4)]):
        states, labels = blobs(count, width, classes, seed=seed)
        tensors = torch.from_numpy(states), torch.from_numpy(labels)
        assert logme_items(states, labels).mean() == pytest.approx(ranker.LogME().fit(*tensors), abs=2e-3)
        assert h_score_items(states, labels).mean() == pytest.approx(ranker.HScore().fit(*tensors), rel=1e-6)
        if classes > 2:  # of two it takes the F1 of the second; one neighbour votes without ties
            assert neighbour_items(states, labels, 1).mean() == pytest.approx(ranker.NearestNeighbors(k=1).fit(*tensors))


def test_kendall_items_have_its_mean_and_its_jackknifed_spread():
    random = np.random.default_rng(0)
    one, other = random.normal(size=(2, 9)) + random.normal(size=9)
    items, tau = kendall_items(one, other), scipy.stats.kendalltau(one, other).statistic
    assert items.mean() == pytest.approx(tau)
    without = [scipy.stats.kendalltau(np.delete(one, place), np.delete(other, place)).statistic for place in range(9)]
    pseudo = 9 * tau - 8 * np.array(without)
    assert (items - tau) * 8 / 7 == pytest.approx(pseudo - tau)
    tied = np.round(one)
    assert kendall_items(tied, other).mean() == pytest.approx(scipy.stats.kendalltau(tied, other).statistic)
    assert kendall_items(np.ones(5), np.arange(5.0)).tolist() == [0] * 5
    assert kendall_items(np.ones(1), np.ones(1)).tolist() == [0]


RIVER, PRICE = ["river", "stone", "bird", "tree"], ["price", "bank", "trade", "coin"]


def topics(count: int, seed: int = 0) -> Corpus:
    """Short texts of two kinds, told apart by their words."""
    random = np.random.default_rng(seed)
    return Corpus([{"text": " ".join(random.choice((RIVER, PRICE)[place % 2], 4)), "label": ("nature", "money")[place % 2], "path": f"{place}.txt"} for place in range(count)])


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_the_measure_gives_every_estimator_of_every_choice_of_layer(name):
    model, corpus = texts.reader(name), topics(24)
    before = checkpoint.digest_state(model.network), corpus.digest
    found = {part.name: part for part in Transferability()(model, corpus)}
    assert (checkpoint.digest_state(model.network), corpus.digest) == before
    assert list(found) == [f"{one}_{layer}" for one in ESTIMATORS for layer in LAYERS]
    states, labels = hidden.states(model, corpus.texts), np.array([1, 0] * 12)
    assert found["logme_last"].value == pytest.approx(logme_items(states[3], labels).mean())
    assert found["h_score_mean"].value == pytest.approx(h_score_items(states[1:].mean(0, dtype=float), labels).mean())
    assert found["knn_best"].value == max(neighbour_items(one, labels, 3).mean() for one in states[1:])
    assert all(part.item_names == tuple(corpus.column("path")) and part.better == "higher" for part in found.values())
    few = {part.name: part for part in Transferability(records=10, pool="last", k=1)(model, corpus)}
    assert few["knn_last"].value == neighbour_items(hidden.states(model, corpus.texts[:10], pool="last")[3], labels[:10], 1).mean()


def test_wrong_settings_and_corpora_are_refused():
    for settings, message in (({"pool": "max"}, "pool is one of"), ({"k": 0}, "at least 1"), ({"records": 3}, "at least 4")):
        with pytest.raises(ValueError, match=message):
            Transferability(**settings)
    for settings, message in (({"batch": 0}, "at least 1"), ({"epochs": 0}, "more than 0"), ({"learning_rate": -1.0}, "more than 0"), ({"pool": "x"}, "pool is one of")):
        with pytest.raises(ValueError, match=message):
            TransferRanking(**settings)
    model = texts.reader("llama")
    with pytest.raises(InputError, match="12 texts of 1 classes in column 'label'"):
        Transferability()(model, Corpus([{"text": f"a {place}", "label": 1} for place in range(12)]))
    with pytest.raises(InputError, match="label"):
        Transferability()(model, Corpus(["a", "b", "c", "d"]))
    with pytest.raises(InputError, match="of classes other, and these were trained on: money, nature"):
        TransferRanking()([model], [topics(8), Corpus([{"text": "a", "label": "other"}])], seed=0)
    with pytest.raises(InputError, match="got 3 corpora"):
        TransferRanking()([model], [topics(8)] * 3, seed=0)


def test_candidates_are_ranked_by_what_fine_tuning_makes_of_them():
    models = [texts.reader("llama"), texts.reader("llama", blocks=1), texts.reader("gpt2")]
    train, heldout = topics(32), topics(16, seed=1)
    before = [checkpoint.digest_state(model.network) for model in models]
    method = TransferRanking(epochs=6, learning_rate=3e-3)
    found = method(models, [train, heldout], seed=0)
    assert [checkpoint.digest_state(model.network) for model in models] == before
    assert not any("classification_head" in name for model in models for name in model.network.state_dict())
    size = len(found) // 3
    parts = [{part.name: part for part in found[place * size : (place + 1) * size]} for place in range(3)]
    accuracy = [one["accuracy"].value for one in parts]
    assert parts[0]["chance"].value == 0.5
    assert max(accuracy) >= 0.9, "nothing was learned"
    for guess in ("logme_mean", "h_score_best", "knn_last"):
        foretold = [{part.name: part.value for part in Transferability()(model, train)}[guess] for model in models]
        assert parts[0][f"tau_{guess}"].value == pytest.approx(np.nan_to_num(scipy.stats.kendalltau(foretold, accuracy).statistic))
    size_tau = scipy.stats.kendalltau([model.parameters for model in models], accuracy).statistic
    assert parts[2]["tau_parameters"].value == pytest.approx(np.nan_to_num(size_tau))
    bits = scipy.stats.kendalltau([-one["bits_per_byte"].value for one in parts], accuracy).statistic
    assert parts[1]["tau_perplexity"].value == pytest.approx(np.nan_to_num(bits))
    again = method(models, [train, heldout], seed=0)
    assert [part.items.tolist() for part in again] == [part.items.tolist() for part in found]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("pool", hidden.POOLS)
def test_the_loss_of_fine_tuning_is_that_of_the_head_on_pooled_states(name, pool):
    """One step over all texts, at a rate that changes nothing to speak of."""
    model, corpus, labels = texts.reader(name), topics(12), np.array([1, 0] * 6)
    for module in model.network.modules():  # what is dropped at random no other computation can repeat
        for attribute in ("p", "dropout", "dropout_prob", "dropout_rate", "attention_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    length = max(map(len, hidden.encoded(model, corpus.texts, None)))
    tuned = classify.tune(model, corpus.texts, labels, Recipe(learning_rate=1e-12, length=length, batch_tokens=12 * length), 1, seed=3, pool=pool)
    head = tuned.network.get_submodule(classify.HEAD)
    (states,) = hidden.states(model, corpus.texts, pool=pool, layers=[-1])
    scores = states @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    nats = np.log(np.exp(scores).sum(1)) - scores[np.arange(12), labels]
    assert [row["step"] for row in tuned.history] == [1]
    assert tuned.history[0]["loss"] == pytest.approx(nats.mean(), abs=2e-5)
    assert classify.classes(tuned, corpus.texts, pool=pool).tolist() == scores.argmax(1).tolist()


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_models_that_are_not_causal_are_ranked_without_perplexity(name):
    parts = {part.name: part for part in TransferRanking(epochs=10, learning_rate=3e-3)([texts.reader(name)], [topics(40)], seed=0)}
    assert "tau_perplexity" not in parts
    assert "bits_per_byte" not in parts
    assert len(parts["accuracy"].items) == 8
    assert parts["accuracy"].value > 0.7


def test_an_encoder_without_a_head_can_be_fine_tuned():
    import transformers

    masked = texts.reader("bert")
    config = transformers.BertConfig(**{**masked.base.to_dict(), "architectures": None})
    encoder = Model(transformers.BertModel(config, add_pooling_layer=False).eval(), masked.tokenizer)
    assert encoder.kind == "encoder"
    parts = {part.name: part for part in TransferRanking(epochs=10, learning_rate=3e-3)([encoder], [topics(40)], seed=0)}
    assert parts["accuracy"].value > 0.7
