"""Gradients over calibration rows, against plain autograd a row at a time on the whole network."""

from __future__ import annotations

import numpy as np
import pytest
import texts
import torch
from architectures import CAUSAL, small
from texts import ROWS

from etude.engine import gradients as module
from etude.engine.cost import metered
from etude.engine.gradients import gradients
from etude.engine.progress import listening
from etude.values import checkpoint
from etude.values.errors import InputError

ARRAYS = [np.array(row) for row in ROWS]


def by_hand(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of the mean over all rows' tokens but the first, with transformers' own forward pass in float64 sums, each row alone."""
    total = 0.0
    for row in ROWS:
        logs = network(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1].double().log_softmax(1)
        total = total - logs[torch.arange(len(row) - 1), torch.tensor(row[1:])].sum()
    named = dict(network.named_parameters())
    found = torch.autograd.grad(total / sum(len(row) - 1 for row in ROWS), list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(parameter) if one is None else one for (name, parameter), one in zip(named.items(), found, strict=True)}


@pytest.mark.parametrize("name", CAUSAL)
def test_they_are_those_of_the_whole_whatever_the_micro_batch(name, monkeypatch):
    model = texts.reader(name).frozen_now()
    before = checkpoint.digest_state(model.network)
    wanted = by_hand(model.network)
    for most in (1, 100, 4096):
        monkeypatch.setattr(module, "_micro_tokens", lambda network, most=most: most)
        found = gradients(model, ARRAYS)
        assert wanted.keys() <= found.keys()
        for path, gradient in wanted.items():
            assert torch.allclose(found[path], gradient, atol=2e-4 * max(1e-3, gradient.abs().max().item()), rtol=0), path
    assert checkpoint.digest_state(model.network) == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.network.parameters())


def test_only_what_was_asked_for_and_everything_is_as_it_was():
    model = texts.reader("llama")
    first = model.network.model.layers[0].mlp.up_proj.weight
    second = model.network.model.layers[1].mlp.up_proj.weight
    first.requires_grad_(False)
    second.grad = kept = torch.ones_like(second)
    model.network.train()
    found = gradients(model, ARRAYS, ["model.layers.0.mlp.up_proj.weight"])
    assert found.keys() == {"model.layers.0.mlp.up_proj.weight"}
    assert not first.requires_grad
    assert second.grad is kept
    assert bool((kept == 1).all())
    assert model.network.training
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], gradients(texts.reader("llama"), ARRAYS)["model.layers.0.mlp.up_proj.weight"])


def test_tied_parameters_stand_under_each_name_with_the_sum():
    model = texts.reader("gpt2")
    assert model.network.lm_head.weight is model.network.transformer.wte.weight
    found = gradients(model, ARRAYS)
    assert torch.equal(found["lm_head.weight"], found["transformer.wte.weight"])


def test_they_are_reported_and_paid_for():
    model, seen = texts.reader("llama"), []
    with metered() as cost, listening(seen.append):
        gradients(model, ARRAYS)
    assert (seen[-1].done, seen[-1].total) == (sum(map(len, ROWS)),) * 2
    assert cost.tokens == sum(map(len, ROWS))
    assert cost.flops > 0


def test_what_predicts_nothing_is_refused():
    with pytest.raises(InputError, match="needs a causal language model, and this is a masked one"):
        gradients(small("bert"), ARRAYS)
    with pytest.raises(InputError, match="no token to predict"):
        gradients(texts.reader("llama"), [np.array([texts.END])])
