"""LLM-Pruner: its importance against derivatives with respect to masks and against sums spelt out by hand, and what it deletes."""

from __future__ import annotations

import numpy as np
import pytest
import texts
import torch
import transformers
from test_gradients import ARRAYS, by_hand
from texts import LENGTH, ROWS, TOKENS

from etude.methods.compress._taylor import coupled, importance
from etude.methods.compress._units import sites
from etude.methods.compress.llm_pruner import LLMPruner
from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.model import Model

ALL = {"spared_first": 0.0, "spared_last": 0.0, "tokens": TOKENS, "length": LENGTH}


def llama_by_hand(model: Model, block: int) -> tuple[list[float], list[float]]:
    """Scores of two groups of two heads of 8 channels, and of 48 channels, by transformers' names."""
    layer, slopes = model.network.model.layers[block], by_hand(model.network)

    def salience(path: str) -> np.ndarray:
        return np.abs(layer.get_submodule(path).weight.detach().numpy() * slopes[f"model.layers.{block}.{path}.weight"].numpy())

    heads = []
    for group in range(2):
        query, key = slice(16 * group, 16 * group + 16), slice(8 * group, 8 * group + 8)
        heads.append(salience("self_attn.q_proj")[query].sum() + salience("self_attn.k_proj")[key].sum() + salience("self_attn.v_proj")[key].sum() + salience("self_attn.o_proj")[:, query].sum())
    channels = [salience("mlp.gate_proj")[j].sum() + salience("mlp.up_proj")[j].sum() + salience("mlp.down_proj")[:, j].sum() for j in range(48)]
    return heads, channels


def gpt2_by_hand(model: Model, block: int) -> tuple[list[float], list[float]]:
    """Scores of four heads of 8 channels, and of 128 channels, with biases; weights lie transposed, queries, keys and values side by side."""
    layer, slopes = model.network.transformer.h[block], by_hand(model.network)

    def salience(path: str) -> np.ndarray:
        owner, _, name = path.rpartition(".")
        return np.abs(getattr(layer.get_submodule(owner), name).detach().numpy() * slopes[f"transformer.h.{block}.{path}"].numpy())

    heads = []
    for head in range(4):
        rows = [32 * part + 8 * head + i for part in range(3) for i in range(8)]
        heads.append(salience("attn.c_attn.weight")[:, rows].sum() + salience("attn.c_attn.bias")[rows].sum() + salience("attn.c_proj.weight")[8 * head : 8 * head + 8].sum())
    channels = [salience("mlp.c_fc.weight")[:, j].sum() + salience("mlp.c_fc.bias")[j] + salience("mlp.c_proj.weight")[j].sum() for j in range(128)]
    return heads, channels


@pytest.mark.parametrize(("name", "reference"), [("llama", llama_by_hand), ("gpt2", gpt2_by_hand)])
def test_importance_sums_the_coupled_weights(name, reference):
    model = texts.reader(name)
    places = sites(model, "test")
    found = importance(model, places, ARRAYS)
    for block in range(3):
        for wanted, attention in zip(reference(model, block), (True, False), strict=True):
            (scores,) = (scores for site, scores in zip(places, found, strict=True) if (site.block, site.attention) == (block, attention))
            assert np.allclose(scores, wanted, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma2"])
def test_the_importance_of_vectors_is_the_slope_of_the_loss_in_their_masks(name):
    """Each row of each layer times a mask, each column of the output projection likewise; the bias apart, as a row of its own."""
    model = texts.reader(name)
    places = sites(model, "test")
    found = importance(model, places, ARRAYS, vectors=True)
    network, masks, weights = model.network, {}, {}
    for site in places:
        for path in (site.output, *coupled(model, site)):
            layer = network.get_submodule(path)
            masks[path] = torch.ones(layer.weight.shape[1] if path == site.output else layer.weight.shape[0], requires_grad=True)
            weights[f"{path}.weight"] = layer.weight.detach() * (masks[path] if path == site.output else masks[path][:, None])
            if path != site.output and layer.bias is not None:
                masks[f"{path}.bias"] = torch.ones(layer.weight.shape[0], requires_grad=True)
                weights[f"{path}.bias"] = layer.bias.detach() * masks[f"{path}.bias"]
    total = 0.0
    for row in ROWS:
        logits = torch.func.functional_call(network, weights, (), {"input_ids": torch.tensor([row]), "use_cache": False}).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum")
    slopes = dict(zip(masks, torch.autograd.grad(total / sum(len(row) - 1 for row in ROWS), list(masks.values())), strict=True))
    for site, scores in zip(places, found, strict=True):
        rows_of = coupled(model, site)
        for place, unit in enumerate(site.units):
            wanted = slopes[site.output][site.columns(unit)].abs().sum()
            for path, rows in rows_of.items():
                wanted += slopes[path][rows[place]].abs().sum()
                if f"{path}.bias" in slopes:
                    wanted += slopes[f"{path}.bias"][rows[place]].abs().sum()
            assert scores[place] == pytest.approx(wanted.item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_deletes_the_least_important_of_every_block_and_loads_in_plain_transformers(name, tmp_path):
    model = texts.reader(name).frozen_now()
    before = checkpoint.digest_state(model.network)
    pruned = LLMPruner(ratio=0.25, **ALL)(model, texts.corpus())
    assert checkpoint.digest_state(model.network) == before
    scores = importance(model, places := sites(model, "test"), ARRAYS)
    for site, found in zip(places, scores, strict=True):
        block = pruned.anatomy.blocks[site.block]
        kept = block.attention.heads // len(site.units[0]) if site.attention else block.feed_forward.channels
        stay = sorted(np.argsort(found, kind="stable")[len(found) - kept :].tolist())
        columns = [column for unit in stay for column in site.columns(site.units[unit])]
        assert np.array_equal(texts.matrix(pruned.network.get_submodule(site.output)), texts.matrix(model.network.get_submodule(site.output))[:, columns])
    sizes = [sum(p.numel() for block in one.anatomy.blocks for p in block.module.parameters()) for one in (model, pruned)]
    assert 1 - sizes[1] / sizes[0] == pytest.approx(0.25, abs=0.02)
    pruned.export(tmp_path)
    ids = torch.tensor([ROWS[0]])
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=ids).logits, pruned.network(input_ids=ids).logits, atol=1e-4)


def test_the_first_and_last_blocks_are_spared():
    model = texts.reader("llama", blocks=8)
    pruned = LLMPruner(ratio=0.2, spared_first=0.25, spared_last=0.1, tokens=TOKENS, length=LENGTH)(model, texts.corpus())
    channels = [block.feed_forward.channels for block in pruned.anatomy.blocks]
    assert channels[:2] == [48, 48]
    assert channels[7] == 48
    assert len(set(channels[2:7])) == 1
    assert channels[2] < 48


def test_deleting_what_matters_least_costs_less_than_deleting_what_matters_most():
    """The first order predicts the loss: zero out the least important channels, and the most important ones."""
    model = texts.reader("gpt2")
    places = sites(model, "test")
    site, scores = next((site, scores) for site, scores in zip(places, importance(model, places, ARRAYS), strict=True) if not site.attention)
    changes = []
    order = np.argsort(scores)
    with torch.no_grad():
        whole = [model.network(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss for row in ROWS]
        for chosen in (order[:32], order[-32:]):
            draft = model.copy()
            draft.network.get_submodule(site.output).weight[chosen.copy()] = 0
            parts = [draft.network(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss for row in ROWS]
            changes.append(sum(abs(one - other) for one, other in zip(parts, whole, strict=True)))
    assert changes[0] < changes[1]


def test_what_is_wrong_is_refused():
    with pytest.raises(ValueError, match=r"less than 1, got 1\.5; for a fifth pass 0\.2"):
        LLMPruner(ratio=1.5)
    with pytest.raises(ValueError, match="importance is one of element, vector, got 'l2'"):
        LLMPruner(importance="l2")
    with pytest.raises(ValueError, match=r"together less than 1, got 0\.5 and 0\.5"):
        LLMPruner(spared_first=0.5, spared_last=0.5)
    with pytest.raises(ValueError, match="length at least 3, got 32768 and 2"):
        LLMPruner(length=2)
    with pytest.raises(InputError, match="needs a causal language model, and this is a masked one"):
        LLMPruner()(texts.reader("bert"), texts.corpus())
    with pytest.raises(InputError, match="cannot prune experts"):
        LLMPruner(**ALL)(texts.reader("mixtral"), texts.corpus())
    with pytest.raises(InputError, match="cannot be met"):
        LLMPruner(ratio=0.97, **ALL)(texts.reader("llama"), texts.corpus())
