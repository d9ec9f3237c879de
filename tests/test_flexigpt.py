"""FlexiGPT: whose weights stand in, what corrects them, and that a shared weight stays one through copies and folders."""

from __future__ import annotations

import numpy as np
import pytest
import texts
import torch

from etude.engine.budget import Budget
from etude.engine.score import block_changes, sample_rows
from etude.measures.size import Size
from etude.methods.compress._shared import Shared, corrections, distance
from etude.methods.compress.flexigpt import FlexiGPT, _donor, _layers
from etude.values.anatomy import weight_of
from etude.values.checkpoint import digest_state
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

TEXT = Corpus(["the river runs under the old stone bridge and the bird sings " * 3, "a red tree falls quickly over the new green house " * 4])
ONE = Budget(1, "steps")
QUICK = {"tokens": 256, "length": 32, "batch_tokens": 64, "rank": 2, "learning_rate": 1e-12}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_blocks_that_change_least_use_the_nearest_weights(kind):
    model = texts.reader(kind, blocks=4)
    before = digest_state(model.network)
    smaller = FlexiGPT(blocks=0.5, **QUICK)(model, TEXT, ONE, seed=0)
    assert digest_state(model.network) == before
    gone = set(np.argsort(block_changes(model, sample_rows(model, TEXT, 256, 32)))[:2].tolist())
    paths = [edit.module for edit in smaller.edits if isinstance(edit, Shared)]
    blocks = model.anatomy.blocks
    assert set(paths) == {path for place in gone for path in model.anatomy.linears(blocks[place])}
    weights = [{path.removeprefix(f"{block.path}."): weight_of(module).detach().numpy() for path, module in model.anatomy.linears(block).items()} for block in blocks]
    for place in gone:
        apart = {}
        for other in set(range(4)) - gone:
            shares = []
            for name, weight in weights[place].items():
                u, s, v = np.linalg.svd(weight - weights[other][name], full_matrices=False)
                s[2:] = 0
                shares.append(np.linalg.norm(weight - weights[other][name] - (u * s) @ v) / np.linalg.norm(weight))
            apart[other] = np.mean(shares)
        donors = {edit.donor.split(".")[-len(name.split(".")) - 1] for edit in smaller.edits if isinstance(edit, Shared) for name in weights[place] if edit.module == f"{blocks[place].path}.{name}"}
        assert donors == {str(min(apart, key=apart.get))}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_corrected_layer_computes_the_nearest_weight_of_its_rank(kind):
    model = texts.reader(kind, blocks=2)
    smaller = FlexiGPT(blocks=0.5, **QUICK)(model, TEXT, ONE, seed=0)
    for edit in smaller.edits:
        module, donor = smaller.network.get_submodule(edit.module), smaller.network.get_submodule(edit.donor)
        assert module.weight is donor.weight
        own, lent = weight_of(model.network.get_submodule(edit.module)).detach().numpy(), weight_of(donor).detach().numpy()
        u, s, v = np.linalg.svd(own - lent, full_matrices=False)
        whole = lent + (u[:, :2] * s[:2]) @ v[:2]
        whole *= np.linalg.norm(own, axis=1, keepdims=True) / np.linalg.norm(whole, axis=1, keepdims=True)
        states = torch.randn(3, own.shape[1], generator=torch.Generator().manual_seed(0))
        expected = states.numpy() @ whole.T + (0 if module.bias is None else module.bias.detach().numpy())
        assert np.allclose(module(states).detach().numpy(), expected, atol=1e-4)


def test_a_block_that_differs_by_the_rank_comes_back_whole():
    draft = texts.reader("llama", blocks=3).copy()
    draft.anatomy.arrange([0, 1, 1, 2])
    with torch.no_grad():
        for module in draft.anatomy.linears(draft.anatomy.blocks[2]).values():
            weight = weight_of(module)
            weight.add_(torch.outer(torch.ones(len(weight)), torch.linspace(-0.1, 0.1, weight.shape[1])))
    model, method = draft.frozen_now(), FlexiGPT(**{**QUICK, "rank": 1})
    layers = _layers(model, 1)
    assert _donor(layers, 2, [0, 1, 3], 1) == 1
    assert max(distance(layers[2][name][1], layers[1][name][1], 1) for name in layers[2]) < 1e-4
    smaller = model.copy()
    method._replace(smaller, layers, {2: 1})
    ids = torch.arange(12)[None]
    assert smaller.parameters < model.parameters
    assert torch.allclose(smaller.network(ids).logits, model.network(ids).logits, atol=1e-3)


def test_only_corrections_are_trained_and_a_weight_is_counted_once(tmp_path):
    model = texts.reader("llama", blocks=3)
    method = FlexiGPT(blocks=0.34, **{**QUICK, "learning_rate": 1e-2})
    smaller = method(model, TEXT, Budget(3, "steps"), seed=0)
    own = {id(parameter) for parameter in corrections(smaller.network)}
    names = dict(model.network.named_parameters())
    for name, parameter in smaller.network.named_parameters():
        if name in names and id(parameter) not in own:
            assert torch.equal(parameter, names[name]), name
    one = sum(weight_of(module).numel() for module in model.anatomy.linears(model.anatomy.blocks[0]).values())
    added = sum(parameter.numel() for parameter in corrections(smaller.network))
    assert smaller.parameters == model.parameters - one + added
    assert Size()(smaller)[0].value == smaller.parameters
    # through a copy and a folder
    copied = smaller.copy()
    shared = next(edit for edit in copied.edits if isinstance(edit, Shared))
    assert copied.network.get_submodule(shared.module).weight is copied.network.get_submodule(shared.donor).weight
    assert copied.network.get_submodule(shared.module).weight is not smaller.network.get_submodule(shared.module).weight
    smaller.save(tmp_path / "saved")
    again = Model.load(tmp_path / "saved")
    assert again.parameters == smaller.parameters
    assert again.network.get_submodule(shared.module).weight is again.network.get_submodule(shared.donor).weight
    ids = torch.arange(12)[None]
    assert torch.allclose(again.network(ids).logits, smaller.network(ids).logits, atol=1e-5)
    with pytest.raises(InputError, match="no plain"):
        smaller.export(tmp_path / "exported")


def test_training_all_moves_the_shared_weight_by_both_blocks_gradients():
    model = texts.reader("llama", blocks=3)
    smaller = FlexiGPT(blocks=0.34, train="all", **{**QUICK, "learning_rate": 1e-2})(model, TEXT, Budget(2, "steps"), seed=0)
    shared = next(edit for edit in smaller.edits if isinstance(edit, Shared))
    assert not torch.equal(smaller.network.get_submodule(shared.donor).weight, model.network.get_submodule(shared.donor).weight)


def test_mistakes_are_said():
    for wrong in ({"blocks": 0.0}, {"blocks": 1.0}, {"rank": 0}, {"start": "random"}, {"train": "some"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FlexiGPT(**wrong)
    with pytest.raises(InputError, match="masked"):
        FlexiGPT(**QUICK)(texts.reader("bert"), TEXT, ONE, seed=0)
    with pytest.raises(InputError, match="rank is at most"):
        FlexiGPT(**{**QUICK, "rank": 5000})(texts.reader("llama", blocks=3), TEXT, ONE, seed=0)
    with pytest.raises(InputError, match="has one block"):
        FlexiGPT(**QUICK)(texts.reader("llama", blocks=1), TEXT, ONE, seed=0)
