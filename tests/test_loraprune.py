"""LoRAPrune: its estimate against a step of the adapter, true gradients against autograd, masks against cuts, and its schedule."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import texts
import torch
import transformers
from texts import ROWS

from etude.engine.budget import Budget
from etude.methods._lora import inject, merge
from etude.methods.compress._taylor import coupled
from etude.methods.compress._units import cut, sites
from etude.methods.compress.loraprune import LoRAPrune, Masking
from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.model import Model

METHOD = LoRAPrune(ratio=0.3, rank=3, alpha=6.0, every=2, spared_first=0.0, spared_last=0.0, learning_rate=3e-3, batch_tokens=64, length=16, precision="float32", schedule="constant", warmup=0.0)


def adapted(name: str, criterion: str) -> tuple[Model, Model, Masking]:
    """A model, its draft with adapters of which B is not zero, and what masks it."""
    model = texts.reader(name)
    draft = model.copy()
    inject(draft, {path: 3 for block in model.anatomy.blocks for path in model.anatomy.linears(block)}, 2.0, 0)
    noise = torch.Generator().manual_seed(1)
    for key, parameter in draft.network.named_parameters():
        if "lora_B" in key:
            parameter.detach().copy_(torch.randn(parameter.shape, generator=noise) * 0.05)
    return model, draft, Masking(model, draft.network, sites(model, "test"), criterion, 0.9, np.random.default_rng(0))


def backward(network: torch.nn.Module) -> None:
    for row in ROWS:
        network(input_ids=torch.tensor([row]), labels=torch.tensor([row]), use_cache=False).loss.backward()


def layers(draft: Model) -> dict[str, torch.nn.Module]:
    return {path: module for path, module in draft.network.named_modules() if hasattr(module, "lora_A")}


def by_unit(model: Model, masking: Masking, saliences: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Normalised in each layer, added up over layers."""
    found = []
    for site in masking.places:
        parts = [[saliences[site.output][:, site.columns(unit)].sum() for unit in site.units]]
        parts += [[saliences[path][rows].sum() for rows in several] for path, several in coupled(model, site).items()]
        found.append(sum(np.array(part) / np.sqrt(np.square(part).sum()) for part in parts))
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_the_estimate_is_what_a_step_of_the_adapter_changes(name):
    """B · A less what is left of it when both factors take a step of their whole gradient."""
    model, draft, masking = adapted(name, "lora")
    backward(draft.network)
    masking.measure()
    saliences = {}
    for path, layer in layers(draft).items():
        a, b = layer.lora_A["default"].weight.detach().numpy().astype(float), layer.lora_B["default"].weight.detach().numpy().astype(float)
        slope_a, slope_b = layer.lora_A["default"].weight.grad.numpy(), layer.lora_B["default"].weight.grad.numpy()
        moved = b @ a - (b - slope_b) @ (a - slope_a)
        saliences[path] = np.abs(moved * (texts.matrix(model.network.get_submodule(path)) + 2.0 * b @ a))
    for found, wanted in zip(masking.scores, by_unit(model, masking, saliences), strict=True):
        assert np.allclose(found, 0.1 * wanted, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_true_gradient_is_autograds(name):
    model, draft, masking = adapted(name, "gradient")
    with masking.masked():
        backward(draft.network)
    kept = dict(masking.gradients)
    masking.measure()
    assert not masking.gradients
    draft.network.zero_grad()
    for layer in layers(draft).values():
        layer.get_base_layer().weight.requires_grad_(True)
    backward(draft.network)
    saliences = {}
    for path, layer in layers(draft).items():
        base = layer.get_base_layer()
        slope = base.weight.grad if isinstance(base, torch.nn.Linear) else base.weight.grad.T
        if path in kept:
            assert torch.allclose(kept[path], slope, atol=1e-4 * slope.abs().max().item())
        update = 2.0 * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
        saliences[path] = np.abs(slope.numpy() * (texts.matrix(model.network.get_submodule(path)) + update.numpy()))
    for found, wanted in zip(masking.scores, by_unit(model, masking, saliences), strict=True):
        assert np.allclose(found, 0.1 * wanted, rtol=1e-3)


def test_importance_is_a_moving_average():
    *_, masking = adapted("llama", "magnitude")
    masking.measure()
    once = [score.copy() for score in masking.scores]
    masking.measure()
    for first, second in zip(once, masking.scores, strict=True):
        assert np.allclose(second, 1.9 * first)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gemma2"])
def test_a_masked_model_is_the_cut_one(name):
    _, draft, masking = adapted(name, "magnitude")
    masking.measure()
    masking.mask(0.4)
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        with masking.masked():
            masked = draft.network(input_ids=ids).logits
        whole = draft.network(input_ids=ids).logits
        merge(draft.network)
        cut(draft, masking.places, masking.gone)
        assert any(members and site.attention for site, members in zip(masking.places, masking.gone, strict=True))
        assert torch.allclose(draft.network(input_ids=ids).logits, masked, atol=1e-4)
        assert not torch.allclose(whole, masked, atol=1e-2)


def test_what_is_masked_stays_masked():
    *_, masking = adapted("gpt2", "magnitude")
    random = np.random.default_rng(0)
    before: list[set] = [set() for _ in masking.places]
    for share in (0.05, 0.1, 0.3, 0.5):
        masking.scores = [random.random(len(score)) for score in masking.scores]
        masking.mask(share)
        assert all(old <= set(new) for old, new in zip(before, masking.gone, strict=True))
        before = [set(new) for new in masking.gone]
        for site, mask, gone in zip(masking.places, masking.masks, masking.gone, strict=True):
            assert np.flatnonzero(mask.numpy() == 0).tolist() == sorted(site.columns(gone))


def test_the_schedule_is_cubic_between_beginning_and_end():
    method = LoRAPrune(ratio=0.4, begin=0.2, end=0.3)
    assert [method.share(at) for at in (0.0, 0.2, 0.71, 1.0)] == [0.0, 0.0, 0.4, 0.4]
    assert method.share(0.45) == pytest.approx(0.4 * 7 / 8)  # half-way: an eighth is left
    at_once = LoRAPrune(ratio=0.4, begin=0.5, end=0.5)
    assert [at_once.share(at) for at in (0.49, 0.5, 0.51)] == [0.0, 0.0, 0.4]


def test_masks_come_every_few_steps_and_the_last_at_the_ratio(monkeypatch):
    seen = []
    mask = Masking.mask
    monkeypatch.setattr(Masking, "mask", lambda self, share: (seen.append(share), mask(self, share))[1])
    METHOD(texts.reader("gpt2"), texts.corpus(), Budget(12, "steps"), 3)
    assert seen == pytest.approx([METHOD.share((step - 1) / 12) for step in (4, 6, 8, 10, 12)])  # before step 2 a twelfth is spent, less than the tenth at which it begins
    assert seen[-1] == 0.3
    seen.clear()
    dataclasses.replace(METHOD, begin=0.5, end=0.5)(texts.reader("gpt2"), texts.corpus(), Budget(12, "steps"), 3)
    assert seen == [0.3]
    seen.clear()
    METHOD(texts.reader("gpt2"), texts.corpus(), Budget(1, "steps"), 3)
    assert seen == [0.3]


@pytest.mark.parametrize(("name", "criterion"), [("llama", "lora"), ("gpt2", "gradient"), ("gemma2", "magnitude"), ("gpt2", "random")])
def test_the_model_stays_and_the_smaller_one_loads_in_plain_transformers(name, criterion, tmp_path):
    model = texts.reader(name).frozen_now()
    before, corpus = checkpoint.digest_state(model.network), texts.corpus()
    digest = corpus.digest
    found = dataclasses.replace(METHOD, criterion=criterion)(model, corpus, Budget(6, "steps"), 3)
    assert checkpoint.digest_state(model.network) == before
    assert corpus.digest == digest
    assert all(parameter.requires_grad for network in (model.network, found.network) for parameter in network.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for network in (model.network, found.network) for part in network.modules())
    sizes = [sum(parameter.numel() for block in one.anatomy.blocks for parameter in block.module.parameters()) for one in (model, found)]
    assert 1 - sizes[1] / sizes[0] == pytest.approx(0.3, abs=0.05)
    found.export(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=ids).logits, found.network(input_ids=ids).logits, atol=1e-4)


def test_the_first_and_last_blocks_are_spared():
    found = dataclasses.replace(METHOD, spared_first=0.25, spared_last=0.1)(texts.reader("llama", blocks=8), texts.corpus(), Budget(2, "steps"), 3)
    channels = [block.feed_forward.channels for block in found.anatomy.blocks]
    assert [place for place, count in enumerate(channels) if count == 48] == [0, 1, 7]


def test_what_is_wrong_is_refused():
    for wrong, message in [
        ({"ratio": 0.0}, r"less than 1, got 0\.0; for half pass 0\.5"),
        ({"criterion": "best"}, "criterion is one of lora, gradient, magnitude, random, got 'best'"),
        ({"rank": 0}, r"rank and every are at least 1 and alpha more than 0, got 0, 10 and 16\.0"),
        ({"memory": 1.0}, r"less than 1, got 1\.0"),
        ({"begin": 0.6, "end": 0.5}, r"together at most 1, got 0\.6 and 0\.5"),
        ({"spared_first": 0.5, "spared_last": 0.5}, "together less than 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            LoRAPrune(**wrong)
    budget = Budget(2, "steps")
    with pytest.raises(InputError, match="needs a causal language model, and this is a masked one"):
        METHOD(texts.reader("bert"), texts.corpus(), budget, 0)
    with pytest.raises(InputError, match="cannot prune experts"):
        METHOD(texts.reader("mixtral"), texts.corpus(), budget, 0)
    with pytest.raises(InputError, match=r"ratio 0\.97 cannot be met"):
        dataclasses.replace(METHOD, ratio=0.97)(texts.reader("llama"), texts.corpus(), budget, 0)
