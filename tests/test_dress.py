"""DReSS: what is penalised against what a cut takes away, the penalty's gradient against autograd, and its phases."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import texts
import torch
import transformers
from texts import ROWS

from etude.engine.budget import Budget
from etude.engine.cost import metered
from etude.methods.compress._units import cut, sites
from etude.methods.compress.dress import DReSS, penalized
from etude.methods.compress.drop_units import RULES, DropUnits
from etude.methods.pretrain.causal_lm import CausalLM
from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.model import Model

TRAINING = {"learning_rate": 3e-3, "batch_tokens": 64, "length": 16, "precision": "float32", "schedule": "constant", "warmup": 0.0}
METHOD = DReSS(ratio=0.3, **TRAINING)


def chosen(model: Model, method: DReSS = METHOD) -> tuple[list, list]:
    places = sites(model, "test")
    return places, method.chosen(model, places, texts.corpus(), 3)


def leaving(model: Model, places, gone) -> dict[str, torch.Tensor]:
    """Which elements of every parameter a cut takes away: every element is numbered, and those are found that are missing afterwards."""
    numbered = model.copy()
    for parameter in numbered.network.parameters():
        parameter.detach().copy_(torch.arange(parameter.numel(), dtype=torch.float32).view_as(parameter))
    shapes = {name: parameter.shape for name, parameter in numbered.network.named_parameters()}
    cut(numbered, places, gone)
    found = {}
    for name, parameter in numbered.network.named_parameters():
        mask = torch.ones(shapes[name].numel(), dtype=torch.bool)
        mask[parameter.detach().flatten().long()] = False
        found[name] = mask.view(shapes[name])
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen2"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_penalty_falls_on_exactly_what_will_be_cut(name, norm):
    model = texts.reader(name)
    method = dataclasses.replace(METHOD, ratio=0.4, penalty=0.07, norm=norm)
    places, gone = chosen(model, method)
    masks = leaving(model, places, gone)
    assert any(members and site.attention for site, members in zip(places, gone, strict=True)), "no heads are cut: the test is weaker than it looks"
    named = dict(model.network.named_parameters())
    total = sum(((parameter.square() if norm == "l2" else parameter.abs()) * masks[key]).sum() for key, parameter in named.items())
    wanted = torch.autograd.grad(0.07 * total, list(named.values()), allow_unused=True)
    noise = torch.Generator().manual_seed(0)
    before = {key: torch.randn(parameter.shape, generator=noise) for key, parameter in named.items()}
    for key, parameter in named.items():
        parameter.grad = before[key].clone()
    method.fading(model, places, gone)(SimpleNamespace())
    for (key, parameter), slope in zip(named.items(), wanted, strict=True):
        assert torch.allclose(parameter.grad - before[key], slope, atol=1e-6), key


def test_shared_keys_and_values_are_penalised_only_where_all_their_heads_go():
    model = texts.reader("falcon")  # one key and one value for all heads
    places = sites(model, "test")
    gone = [[1] if site.attention else [] for site in places]
    masks = leaving(model, places, gone)
    for parameter, dim, rows in penalized(model, places, gone):
        (name,) = (key for key, other in model.network.named_parameters() if other is parameter)
        mask = torch.zeros_like(masks[name])
        mask.index_fill_(dim, rows, True)
        assert torch.equal(mask, masks[name])


@pytest.mark.parametrize("choose", RULES)
def test_it_deletes_what_the_rule_deletes_without_training(choose):
    model = texts.reader("llama")
    method = dataclasses.replace(METHOD, choose=choose, tokens=200)
    found = method(model, texts.corpus(), Budget(2, "steps"), 3)
    assert found.edits == DropUnits(ratio=0.3, choose=choose, tokens=200, length=16)(model, 3, texts.corpus()).edits


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_penalty_it_is_training_then_cutting_then_training(name):
    model = texts.reader(name)
    found = dataclasses.replace(METHOD, penalty=0.0)(model, texts.corpus(), Budget(6, "steps"), 3)
    by_hand = CausalLM(**TRAINING)(model, texts.corpus(), Budget(3, "steps"), 3).copy()
    cut(by_hand, *chosen(model))
    by_hand = CausalLM(**TRAINING)(by_hand.frozen_now(), texts.corpus(), Budget(3, "steps"), 4)
    assert checkpoint.digest_state(found.network) == checkpoint.digest_state(by_hand.network)


def test_what_goes_fades_and_the_cut_costs_less(monkeypatch):
    model = texts.reader("llama")
    places, gone = chosen(model)
    masks = leaving(model, places, gone)
    norms, losses = {}, {}
    for penalty in (0.0, 0.1):
        with monkeypatch.context() as patch:
            patch.setattr("etude.methods.compress.dress.cut", lambda *args: None)
            whole = dataclasses.replace(METHOD, penalty=penalty, regularized=1.0)(model, texts.corpus(), Budget(60, "steps"), 3)
        norms[penalty] = sum((parameter.square() * masks[key]).sum().item() for key, parameter in whole.network.named_parameters())
        after = whole.copy()
        cut(after, places, gone)
        with torch.no_grad():
            losses[penalty] = [sum(one.network(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in ROWS) for one in (whole, after)]
    assert norms[0.1] < 0.2 * norms[0.0]
    assert losses[0.1][1] - losses[0.1][0] < 0.5 * (losses[0.0][1] - losses[0.0][0])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_model_stays_and_the_smaller_one_loads_in_plain_transformers(name, tmp_path):
    model = texts.reader(name).frozen_now()
    before, corpus = checkpoint.digest_state(model.network), texts.corpus()
    digest = corpus.digest
    with metered() as cost:
        found = METHOD(model, corpus, Budget(7, "steps"), 3)
    assert checkpoint.digest_state(model.network) == before
    assert corpus.digest == digest
    assert all(parameter.grad is None for parameter in model.network.parameters())
    assert cost.tokens == 7 * 64
    sizes = [sum(parameter.numel() for block in one.anatomy.blocks for parameter in block.module.parameters()) for one in (model, found)]
    assert 1 - sizes[1] / sizes[0] == pytest.approx(0.3, abs=0.03)
    found.export(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=ids).logits, found.network(input_ids=ids).logits, atol=1e-4)


@pytest.mark.parametrize(("amount", "share", "phases"), [(7, 0.5, (4, 3)), (10, 0.25, (2, 8)), (2, 0.9, (1, 1)), (3, 0.01, (1, 2)), (1, 0.5, (1, None)), (5, 1.0, (5, None))])
def test_steps_are_shared_out_whole(amount, share, phases):
    first, rest = dataclasses.replace(METHOD, regularized=share)._phases(Budget(amount, "steps"))
    assert (first.amount, rest and rest.amount) == phases


def test_other_budgets_are_shared_out_as_they_are():
    first, rest = dataclasses.replace(METHOD, regularized=0.25)._phases(Budget(1000, "tokens"))
    assert (first, rest) == (Budget(250, "tokens"), Budget(750, "tokens"))


def test_what_is_wrong_is_refused():
    for wrong, message in [
        ({"ratio": 1.0}, r"less than 1, got 1\.0"),
        ({"choose": "best"}, "choose is one of random, magnitude, wanda, got 'best'"),
        ({"norm": "l3"}, "norm is one of l2, l1, got 'l3'"),
        ({"penalty": -0.1}, r"penalty is at least 0, got -0\.1"),
        ({"regularized": 0.0}, r"at most 1, got 0\.0; for half pass 0\.5"),
        ({"tokens": 1}, "tokens is at least 2"),
        ({"schedule": "sometimes"}, "schedule is one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            DReSS(**wrong)
    with pytest.raises(InputError, match="needs a causal language model, and this is a masked one"):
        METHOD(texts.reader("bert"), texts.corpus(), Budget(2, "steps"), 0)
    with pytest.raises(InputError, match="cannot prune experts"):
        METHOD(texts.reader("mixtral"), texts.corpus(), Budget(2, "steps"), 0)
