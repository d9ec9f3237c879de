"""Ranks under a budget, by enumeration; trials and what they cost, by a training loop that only counts; and the recovered model's updates."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import texts
import torch

from etude.engine.budget import Budget
from etude.methods import _lora
from etude.methods.compress import rankadaptor
from etude.methods.compress._ranks import Allocations, predicted
from etude.methods.compress.rankadaptor import RankAdaptor
from etude.values import checkpoint
from etude.values.anatomy import weight_of
from etude.values.corpus import Corpus
from etude.values.errors import InputError

SMALL = dict(batch_tokens=64, length=32, learning_rate=1e-2)
CORPUS = Corpus(texts.SENTENCES * 6)


def test_drawn_ranks_are_exactly_the_lists_to_which_nothing_can_be_added():
    choices, costs, budget = (1, 2, 4), (3, 5, 4), 24
    allocations = Allocations(choices, costs, budget)
    fits = {ranks for ranks in itertools.product(choices, repeat=3) if sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)) <= budget}

    def more(ranks):
        return [ranks[:layer] + (choices[choices.index(rank) + 1],) + ranks[layer + 1 :] for layer, rank in enumerate(ranks) if rank < 4]

    whole = {ranks for ranks in fits if not fits & set(more(ranks))}
    random = np.random.default_rng(0)
    assert {allocations.draw(random) for _ in range(2000)} == whole
    assert len(whole) > 2
    some = allocations.several(100, random, [sorted(whole)[0]])
    assert set(some) == whole - {sorted(whole)[0]}
    assert len(some) == len(set(some))


def test_with_blocks_alike_all_lists_have_the_parameters_of_the_uniform_one():
    allocations = Allocations((2, 4, 6, 8, 10, 12), (7,) * 6, 8 * 7 * 6)
    random = np.random.default_rng(1)
    drawn = [allocations.draw(random) for _ in range(200)]
    assert {sum(ranks) for ranks in drawn} == {48}
    assert len(set(drawn)) > 100


def test_the_perceptron_finds_which_layer_matters():
    """Losses that fall with the first layer's rank and rise with the last one's: what it predicts for other lists is ordered as they are."""
    allocations = Allocations((2, 4, 6, 8, 10, 12), (1,) * 5, 40)
    lists = allocations.several(140, np.random.default_rng(2))
    losses = [3 - 0.1 * ranks[0] + 0.02 * ranks[4] for ranks in lists]
    state = torch.get_rng_state()
    found = predicted(lists[:40], losses[:40], lists[40:], seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.corrcoef(found, losses[40:])[0, 1] > 0.95
    assert np.allclose(predicted(lists[:40], losses[:40], lists[:40], seed=0), losses[:40], atol=0.05)
    assert np.array_equal(found, predicted(lists[:40], losses[:40], lists[40:], seed=0))
    assert np.isfinite(predicted(lists[:1], losses[:1], lists[1:3], seed=0)).all()


@pytest.fixture
def counted(monkeypatch):
    """Replaces training and scoring: every training is noted with its tokens, documents and ranks, and the loss of a trial is the rank of its last block."""
    runs, ranks = [], []
    inject = rankadaptor.inject

    def note(draft, given, scale, seed):
        inject(draft, given, scale, seed)
        blocks = [{rank for path, rank in given.items() if path.startswith(block.path + ".")} for block in draft.anatomy.blocks]
        ranks.append(tuple(next(iter(one)) for one in blocks if len(one) == 1))

    def train(draft, feed, recipe, budget, seed, loss):
        assert budget.unit == "tokens"
        runs.append((ranks[-1], budget.amount, list(feed.documents._texts)))

    scored = []

    def mean_loss(model, rows, window):
        scored.append([row.tolist() for row in rows])
        return float(ranks[-1][-1])

    monkeypatch.setattr(rankadaptor, "inject", note)
    monkeypatch.setattr(rankadaptor, "train", train)
    monkeypatch.setattr(rankadaptor, "mean_loss", mean_loss)
    return runs, scored


def test_trials_and_recovery_share_one_budget(counted):
    runs, scored = counted
    model = texts.reader("llama", blocks=4)
    method = RankAdaptor(samples=5, rounds=3, candidates=50, share=0.5, tokens=40, **SMALL)
    method(model, CORPUS, Budget(4800, "tokens"), seed=1)
    trials, (ranks, tokens, documents) = runs[:-1], runs[-1]
    assert len(trials) == len({one for one, _, _ in trials}) == 8
    read = sum(map(len, scored[0]))
    assert 40 <= read <= 44
    assert all(one == scored[0] for one in scored)
    assert {amount for _, amount, _ in trials} == {64 * ((2400 / 8 - read) // 64)}
    assert tokens == 4800 - 8 * (trials[0][1] + read)
    assert tokens >= 2400
    assert ranks in [one for one, _, _ in trials]
    assert ranks[-1] == min(one[-1] for one, _, _ in trials)
    assert sorted(documents) == sorted(CORPUS.texts)
    start = model.tokenizer.bos_token_id
    kept = {model.tokenizer.decode([token for token in row if token != start]) for row in scored[0]}
    assert all(len(rest) < len(documents) for _, _, rest in trials)
    assert kept
    runs.clear()
    method(model, CORPUS, Budget(4800 / 64, "steps"), seed=1)
    assert runs[-1][:2] == (ranks, tokens)


def test_predicted_lists_are_better_than_sampled_ones(counted):
    """The loss is the last block's rank: after six samples the perceptron goes where it is low."""
    runs, _ = counted
    method = RankAdaptor(samples=6, rounds=4, candidates=200, tokens=40, **SMALL)
    method(texts.reader("llama", blocks=4), CORPUS, Budget(20000, "tokens"), seed=3)
    last = [ranks[-1] for ranks, _, _ in runs[:-1]]
    assert np.mean(last[6:]) < np.mean(last[:6])
    assert runs[-1][0][-1] == min(last)


@pytest.mark.parametrize(("settings", "budget"), [(dict(samples=1, rounds=0), 9600), (dict(samples=8, rounds=4), 128)])
def test_without_trials_all_goes_to_recovery(counted, settings, budget):
    runs, scored = counted
    for seed in range(6):
        RankAdaptor(tokens=40, **settings, **SMALL)(texts.reader("llama", blocks=4), CORPUS, Budget(budget, "tokens"), seed=seed)
    assert not scored
    assert {amount for _, amount, _ in runs} == {budget}
    assert len({ranks for ranks, _, _ in runs}) > 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_updates_have_the_ranks_that_the_history_says(name, tmp_path):
    model = texts.reader(name)
    model.anatomy.drop_channels({0: list(range(20))})  # its blocks are uneven
    model.frozen_now()
    before = model.digest
    method = RankAdaptor(rank=4, ranks=(1, 2, 4, 6), samples=3, rounds=1, candidates=20, tokens=40, **SMALL)
    recovered = method(model, CORPUS, Budget(1600, "tokens"), seed=0)
    assert model.digest == before
    ranks = [int(recovered.history[-1][f"rank.{block.index}"]) for block in model.anatomy.blocks]
    total = 0
    for block, rank in zip(model.anatomy.blocks, ranks, strict=True):
        for path in model.anatomy.linears(block):
            old, new = (weight_of(one.network.get_submodule(path)).detach().double() for one in (model, recovered))
            sizes = torch.linalg.svdvals(new - old)
            assert (sizes > 1e-5 * sizes[0]).sum() <= rank
            assert sizes[min(rank, len(sizes)) - 1] > 1e-5 * sizes[0]
            total += rank * sum(old.shape)
    assert total <= 4 * sum(sum(weight_of(module).shape) for block in model.anatomy.blocks for module in model.anatomy.linears(block).values())
    assert all(parameter.requires_grad for parameter in recovered.network.parameters())
    assert recovered.edits == model.edits
    recovered.save(tmp_path)


def test_an_update_is_scaled_alike_whatever_its_rank():
    model = texts.reader("llama")
    paths = [path for block in model.anatomy.blocks for path in model.anatomy.linears(block)]
    draft = model.copy()
    _lora.inject(draft, {path: 1 + place % 3 for place, path in enumerate(paths)}, 2.0, seed=0)
    wanted = {}
    with torch.no_grad():
        for place, path in enumerate(paths):
            layer = draft.network.get_submodule(path)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert a.shape[0] == 1 + place % 3
            b.normal_()
            wanted[path] = weight_of(model.network.get_submodule(path)) + 2.0 * b @ a
    trained = {name for name, parameter in draft.network.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    _lora.merge(draft.network)
    assert all(torch.allclose(weight_of(draft.network.get_submodule(path)), new, atol=1e-5) for path, new in wanted.items())
    assert checkpoint.shapes(draft.network) == checkpoint.shapes(model.network)


def test_what_does_not_fit_is_refused():
    wrong = [dict(rank=0), dict(alpha=0), dict(ranks=()), dict(ranks=(4, 2, 8)), dict(ranks=(2, 4)), dict(rank=1)]
    wrong += [dict(samples=0), dict(rounds=-1), dict(candidates=0), dict(share=1.0), dict(tokens=1)]
    for settings in wrong:
        with pytest.raises(ValueError, match=r"at least|rise|share"):
            RankAdaptor(**settings)
    model = texts.reader("llama")
    with pytest.raises(InputError, match="must know its tokens"):
        RankAdaptor(**SMALL)(model, CORPUS, Budget(1, "seconds"), seed=0)
    with pytest.raises(InputError, match="only one"):
        RankAdaptor(samples=2, rounds=0, tokens=8, **SMALL)(model, Corpus(["a b c" * 100]), Budget(2000, "tokens"), seed=0)
