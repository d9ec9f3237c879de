"""What training computes instead of a network's own norms, gates, rotations and attention: the same values, and the same gradients."""

from __future__ import annotations

import copy

import pytest
import texts
import torch
import torch.nn.functional as F
from architectures import CAUSAL, small

from etude.engine import functions, fused, losses, varlen
from etude.engine.feed import Batch
from etude.methods.adapt.lora import LoRA

IDS = 1 + torch.arange(24).view(2, 12) * 7 % 90
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4], [*range(9), 0, 1, 2]])
REPLACED = {"llama": 7 + 3, "mistral": 7 + 3, "qwen3": 7 + 6 + 3, "qwen2": 7 + 3, "phi3": 7, "gemma2": 13, "gpt2": 0, "gpt_neox": 0}
"""Norms and gates that are to be replaced in three blocks; gemma2's gate is not silu, phi3's matrices are fused."""


def gradients(network):
    network.zero_grad()
    with varlen.documents(network, POSITIONS):
        loss = losses.next_token(network, Batch(IDS, IDS.roll(-1, 1), POSITIONS))
        loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in ("mamba",)])
def test_loss_and_gradients_are_those_of_the_network_itself(name):
    network = small(name).network
    loss, expected = gradients(network)
    before = {path: vars(module).get("forward") for path, module in network.named_modules()}
    with fused.fused(network), varlen.by_document(network):
        changed = sum("forward" in vars(module) for module in network.modules())
        found, slopes = gradients(network)
    assert changed == REPLACED.get(name, changed)
    assert found == pytest.approx(loss, rel=1e-5)
    assert slopes.keys() == expected.keys()
    for key, slope in expected.items():
        torch.testing.assert_close(slopes[key], slope, rtol=1e-3, atol=1e-4 * slope.abs().max().item())
    assert {path: vars(module).get("forward") for path, module in network.named_modules()} == before, "something stayed replaced"


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_norm_against_its_definition_in_float64(offset):
    torch.manual_seed(0)
    states, weight = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True), torch.randn(16, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(2, 5, 16, dtype=torch.float64)
    (states / (states.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight + offset) * slope).sum().backward()
    own, gain = states.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    (functions.Norm.apply(own, gain, offset, 1e-5) * slope.float()).sum().backward()
    torch.testing.assert_close(own.grad.double(), states.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gain.grad.double(), weight.grad, rtol=1e-4, atol=1e-5)


def test_rotation_and_gate_pass_the_check_of_gradients():
    torch.manual_seed(0)
    q, cos, sin = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True), torch.randn(2, 1, 4, 6, dtype=torch.float64), torch.randn(2, 1, 4, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: functions.Rotation.apply(x, cos, sin), q)
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(functions.Gate.apply, (gate, up))
    torch.testing.assert_close(functions.Gate.apply(gate, up), F.silu(gate) * up)


@pytest.mark.parametrize(("heads", "shared"), [(6, 2), (4, 4), (3, 1)])
def test_attention_is_that_of_each_document_alone(heads, shared):
    torch.manual_seed(0)
    q = torch.randn(2, heads, 12, 8, requires_grad=True)
    k, v = (torch.randn(2, shared, 12, 8, requires_grad=True) for _ in range(2))
    pieces, slope = varlen.lengths(POSITIONS), torch.randn(2, 12, heads, 8)
    found = fused.attend(q, k, v, pieces, 0.3)
    (found * slope).sum().backward()
    grads = [one.grad.clone() for one in (q, k, v)]
    for one in (q, k, v):
        one.grad = None
    wide = [one.repeat_interleave(heads // shared, 1) for one in (k, v)]
    expected, at = torch.zeros(24, heads, 8), 0
    flat = [one.transpose(0, 1).reshape(heads, 24, 8) for one in (q, *wide)]
    for size in pieces:
        a, b, c = (one[:, at : at + size] for one in flat)
        scores = (a @ b.transpose(1, 2) * 0.3).masked_fill(torch.ones(size, size).triu(1).bool(), float("-inf"))
        expected[at : at + size] = (scores.softmax(-1) @ c).transpose(0, 1)
        at += size
    torch.testing.assert_close(found, expected.view(2, 12, heads, 8), rtol=1e-4, atol=1e-5)
    (expected.view(2, 12, heads, 8) * slope).sum().backward()
    for one, other in zip((q, k, v), grads, strict=True):
        torch.testing.assert_close(other, one.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_adapters_are_those_of_peft(name):
    """With B away from its zero, so that A has a gradient; qwen2 has biases."""
    model = texts.reader(name)
    LoRA(rank=4, alpha=7.0)._inject(model, 0)
    network = model.network
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    loss, expected = gradients(network)
    with fused.fused(network):
        changed = sum("forward" in vars(module) for module in network.modules() if hasattr(module, "lora_A"))
        found, slopes = gradients(network)
    assert changed == 7 * 3
    assert found == pytest.approx(loss, rel=1e-5)
    assert slopes.keys() == expected.keys()
    for key, slope in expected.items():
        torch.testing.assert_close(slopes[key], slope, rtol=1e-3, atol=1e-4 * slope.abs().max().item())


@pytest.mark.parametrize("adapted", [False, True])
def test_products_of_bfloat16_have_gradients_as_near_as_the_networks_own(adapted):
    model = texts.reader("llama")
    if adapted:
        LoRA(rank=4)._inject(model, 0)
        for key, parameter in model.network.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
    network = model.network
    _, exact = gradients(network)
    with torch.autocast("cpu", torch.bfloat16):
        _, own = gradients(network)
        with fused.fused(network), varlen.by_document(network):
            _, equal = gradients(network)
    assert equal.keys() == exact.keys()
    for key, slope in exact.items():
        assert equal[key].dtype == torch.float32
        assert (equal[key] - slope).norm() <= 2 * (own[key] - slope).norm() + 1e-3 * slope.norm(), key


def test_frozen_weights_get_no_gradient_and_a_network_of_bfloat16_is_left_alone():
    network = small("llama").network
    network.requires_grad_(False)
    network.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    with fused.fused(network):
        _, slopes = gradients(network)
    assert set(slopes) == {"model.layers.1.mlp.up_proj.weight"}
    half = copy.deepcopy(network).to(torch.bfloat16)
    with fused.fused(half):
        assert not any("forward" in vars(module) for module in half.modules())


# Products of few rows.


@pytest.mark.parametrize("bias", [True, False])
def test_products_of_few_rows_are_those_of_linear(bias):
    layer = torch.nn.Linear(256, 600, bias=bias)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad(), fused.narrow(torch.nn.Sequential(layer)):
            assert "forward" in vars(layer)
            for shape in ((1,), (3,), (4,), (2, 5), (32,), (33,), (8, 2, 2)):
                states = torch.randn(*shape, 256)
                found = layer(states)
                assert found.is_contiguous()
                torch.testing.assert_close(found, states @ layer.weight.T + (layer.bias if bias else 0), rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(before)
    assert "forward" not in vars(layer)
