"""Static model pruning: gradients, selections and steps by hand, and weights that never change."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import texts
import torch
from torch import nn

from etude.engine import batch
from etude.engine.budget import Budget
from etude.engine.feed import Packed
from etude.engine.select import highest
from etude.methods.compress._masks import matrices
from etude.methods.compress.static_model_pruning import Masked, Selection, StaticModelPruning
from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.model import Model

METHOD = StaticModelPruning(sparsity=0.6, allocation="uniform", penalty=300.0, batch_tokens=64, length=16, precision="float32", schedule="constant")
STEPS = Budget(4, "steps")


def still(name: str) -> Model:
    model = texts.reader(name)
    for one in model.network.modules():
        if isinstance(one, nn.Dropout):
            one.p = 0.0
    return model


@pytest.mark.parametrize("count", [1, 5, 11, 12])
def test_the_highest_and_of_equal_ones_the_first(count):
    scores = torch.tensor([[3.0, 1.0, 1.0, 2.0], [1.0, 0.0, 3.0, 1.0], [-1.0, 1.0, 2.0, 0.0]])
    order = np.argsort(-scores.flatten().numpy(), kind="stable")[:count]
    assert sorted(highest(scores, count).flatten().nonzero().flatten().tolist()) == sorted(order.tolist())


def test_scores_get_the_gradient_of_the_mask():
    layer = nn.Linear(5, 4).double()
    one = Masked(layer)
    one.mask.copy_(torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.5)
    inputs, target = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    (one(inputs) - target).square().sum().backward()
    mask = one.mask.double().requires_grad_()
    (inputs @ (layer.weight * mask).T + layer.bias - target).square().sum().backward()
    torch.testing.assert_close(one.scores.grad, mask.grad)


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_steps_by_hand(name, tuned):
    """Four steps: the share of each, its mask, the loss with its penalty and where its gradient goes, torch's AdamW; then the last mask."""
    method = dataclasses.replace(METHOD, learning_rate=3e-3, ramp=0.5, tuned=tuned)
    model = still(name)
    before = model.digest
    trained = method(model, texts.corpus(), STEPS, 5)
    assert model.digest == before
    network = still(name).network
    weights = {path: layer.weight for path, layer in texts.linear_layers(network).items() if "lm_head" not in path}
    scores = {path: nn.Parameter(torch.zeros_like(weight)) for path, weight in weights.items()}

    def mask(path: str, share: float) -> torch.Tensor:
        size = scores[path].numel()
        turned = scores[path].detach() if isinstance(network.get_submodule(path), nn.Linear) else scores[path].detach().T
        chosen = torch.zeros(size)
        chosen[np.argsort(-turned.flatten().numpy(), kind="stable")[: round(share * size)]] = 1
        return chosen.view(turned.shape) if turned.shape == scores[path].shape and isinstance(network.get_submodule(path), nn.Linear) else chosen.view(turned.shape).T

    own = [parameter for parameter in network.parameters() if tuned]
    optimizer = torch.optim.AdamW([*scores.values(), *own], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    feed = Packed(batch.Documents(model, texts.corpus()), 16)
    feed.begin(5)
    for progress, share in ((0.0, 1.0), (0.25, 1 - 0.6 * (1 - 0.5**3)), (0.5, 0.4), (0.75, 0.4)):
        part = feed.collate(feed.take(4, 0.0))
        masks = {path: mask(path, share).requires_grad_() for path in weights}
        given = {f"{path}.weight": weight * masks[path] for path, weight in weights.items()}
        logits = torch.func.functional_call(network, given, (), {"input_ids": part.ids, "position_ids": part.positions, "use_cache": False}).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), part.labels.flatten()).backward()
        pressure = 300.0 * (1 - (1 - progress) ** 3) * torch.stack([one.sigmoid().mean() for one in scores.values()]).mean()
        pressure.backward()
        for path, one in scores.items():
            one.grad = one.grad + masks[path].grad
        torch.nn.utils.clip_grad_norm_([*scores.values(), *own], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for parameter in network.parameters():
            parameter.grad = None
    for path, weight in weights.items():
        found = trained.network.get_submodule(path).weight
        by_hand = weight.detach() * mask(path, 0.4)
        assert float(((found == 0) == (by_hand == 0)).float().mean()) > 0.98, path
        both = (found != 0) & (by_hand != 0)
        assert torch.equal(found[both], by_hand[both]) or (tuned and (found - by_hand)[both].abs().mean() < 1e-3 * by_hand.abs().mean())


@pytest.mark.parametrize("allocation", ["uniform", "sigmoid"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_stays_is_what_it_was(name, allocation, tmp_path):
    model = texts.reader(name).frozen_now()
    pruned = dataclasses.replace(METHOD, allocation=allocation)(model, texts.corpus(), STEPS, 0)
    inner = set(matrices(pruned))
    zeros = total = 0
    for key, tensor in pruned.network.state_dict().items():
        before = model.network.state_dict()[key]
        assert torch.equal(tensor, before if key not in inner else before.masked_fill(tensor == 0, 0)), key
        if key in inner:
            zeros, total = zeros + int((tensor == 0).sum()), total + tensor.numel()
            if allocation == "uniform":
                assert int((tensor == 0).sum()) == tensor.numel() - round(0.4 * tensor.numel())
    assert zeros / total == pytest.approx(0.6, abs=2e-3)
    assert all(parameter.requires_grad for parameter in pruned.network.parameters())
    pruned.save(tmp_path)
    assert Model.load(tmp_path).plain
    assert checkpoint.digest_state(Model.load(tmp_path).network) == checkpoint.digest_state(pruned.network)


def test_matrices_of_a_kind_share_by_their_mean_sigmoid():
    """The scores of three blocks are -1, 0 and 1: sigmoids 0.2689, 0.5 and 0.7311 with a mean of 0.5, so that shares of 0.3 become 0.1614, 0.3 and 0.4386; of 0.8, the last is cut to 1."""
    selection = Selection(dataclasses.replace(METHOD, allocation="sigmoid"), texts.reader("llama"))
    for path, one in selection.masked.items():
        one.scores.data += int(path.split(".")[2]) - 1.0
    assert {len(members) for members in selection.kinds.values()} == {3}
    for share, expected in ((0.3, (0.16137, 0.3, 0.43863)), (0.8, (0.43031, 0.8, 1.0))):
        selection.select(share)
        for path, one in selection.masked.items():
            assert int(one.mask.sum()) == round(expected[int(path.split(".")[2])] * one.mask.numel())


def test_movement_pruning_moves_what_stays_and_leaves_zeros_zero():
    model = texts.reader("llama")
    moved = dataclasses.replace(METHOD, tuned=True, penalty=0.0)(model, texts.corpus(), STEPS, 0)
    for path, matrix in matrices(moved).items():
        assert int((matrix == 0).sum()) == matrix.numel() - round(0.4 * matrix.numel())
        assert (matrix != matrices(model)[path])[matrix != 0].float().mean() > 0.9


def test_masks_alone_learn_the_text():
    model = texts.reader("llama")
    history = dataclasses.replace(METHOD, sparsity=0.3, learning_rate=2e-2, penalty=0.0)(model, texts.corpus(), Budget(40, "steps"), 0).history
    assert history[-1]["loss"] < history[0]["loss"] - 0.1


def test_a_killed_run_goes_on_to_the_same_bits(stopped):
    model, method = texts.reader("llama"), dataclasses.replace(METHOD, allocation="sigmoid")
    whole = method(model, texts.corpus(), STEPS, 0)
    assert stopped(Packed, 2, lambda: method(model, texts.corpus(), STEPS, 0)).digest == whole.digest


def test_what_cannot_be_pruned_is_refused():
    with pytest.raises(InputError, match="causal"):
        METHOD(texts.reader("bert"), texts.corpus(), STEPS, 0)


@pytest.mark.parametrize(
    ("fields", "match"), [({"sparsity": 1.0}, "sparsity"), ({"allocation": "global"}, "allocation"), ({"penalty": -1.0}, "penalty"), ({"ramp": 0.0}, "ramp"), ({"optimizer": "muon"}, "adamw")]
)
def test_hyperparameters_out_of_range(fields, match):
    with pytest.raises(ValueError, match=match):
        StaticModelPruning(**fields)
