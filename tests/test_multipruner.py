"""MultiPruner against the greedy choice by hand, with every candidate made and scored anew."""

from __future__ import annotations

import numpy as np
import pytest
import texts
import torch
import transformers
from architectures import small
from texts import LENGTH, ROWS, TOKENS

from etude.methods.compress.multipruner import MultiPruner
from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.model import Model

GIVEN = {"tokens": TOKENS, "length": LENGTH}


def loss(network):
    total, count = 0.0, 0
    with torch.no_grad():
        for row in ROWS:
            ids = torch.tensor([row])
            logits = network(input_ids=ids, use_cache=False).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += len(row) - 1
    return total / count


def without(model, gone):
    """The model with the output projections of these sub-layers at zero: (block, attention)."""
    network = model.copy().network
    with torch.no_grad():
        for block, attention in gone:
            part = model.anatomy.blocks[block].attention if attention else model.anatomy.blocks[block].feed_forward
            module = network.get_submodule(part.output)
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()
    return network


@pytest.mark.parametrize(("name", "ratio"), [("llama", 0.34), ("gpt2", 0.45)])
def test_sublayers_go_by_the_loss_without_them(name, ratio):
    model = texts.reader(name)
    before = checkpoint.digest_state(model.network)
    blocks = model.anatomy.blocks
    sizes = {}
    for block in blocks:
        for attention, paths in ((True, [*block.attention.rows, block.attention.output]), (False, [*block.feed_forward.inputs, block.feed_forward.output])):
            if block.index or not attention:
                sizes[block.index, attention] = sum(p.numel() for path in paths for p in model.network.get_submodule(path).parameters())
    total = sum(p.numel() for block in blocks for p in block.module.parameters())
    pruned = MultiPruner(ratio=ratio, distribution=(1.0, 0.0, 0.0), **GIVEN)(model, texts.corpus())
    gone, spent = [], 0
    while fitting := [one for one in sizes if one not in gone and sizes[one] <= ratio * total - spent]:
        best = min(fitting, key=lambda one: loss(without(model, [*gone, one])))
        gone.append(best)
        spent += sizes[best]
    assert checkpoint.digest_state(model.network) == before
    assert model.parameters - pruned.parameters == spent
    probe = checkpoint.probe(model.network)
    torch.testing.assert_close(checkpoint.outputs(pruned.network, probe), checkpoint.outputs(without(model, gone), probe), rtol=1e-4, atol=1e-5)


def test_channels_go_from_the_layer_that_misses_them_least():
    model = texts.reader("llama")
    pruned = MultiPruner(ratio=0.1, distribution=(0.0, 1.0, 0.0), portion=0.25, **GIVEN)(model, texts.corpus())
    total = sum(p.numel() for block in model.anatomy.blocks for p in block.module.parameters())
    draft, spent = model.copy(), 0
    cost = 12 * 32 * 3  # a quarter of 48 channels, in three projections
    while spent + cost <= 0.1 * total + cost / 2:
        options = []
        for block in draft.anatomy.blocks:
            if block.feed_forward.channels > 12:
                scores = np.abs(draft.network.get_submodule(block.feed_forward.output).weight.detach().numpy()).sum(0)
                view = draft.copy()
                view.anatomy.drop_channels({block.index: np.argsort(scores)[:12].tolist()})
                options.append((loss(view.network), view))
        draft = min(options, key=lambda one: one[0])[1]
        spent += cost
    for key, wanted in draft.network.state_dict().items():
        assert torch.equal(pruned.network.state_dict()[key], wanted), key


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_all_three_dimensions_meet_the_ratio_and_it_is_saved(name, tmp_path):
    model = texts.reader(name)
    pruned = MultiPruner(ratio=0.4, distribution=(0.4, 0.4, 0.2), portion=0.1, **GIVEN)(model, texts.corpus())
    total = sum(p.numel() for block in model.anatomy.blocks for p in block.module.parameters())
    assert abs((model.parameters - pruned.parameters) / total - 0.4) < 0.05
    pruned.save(tmp_path)
    assert checkpoint.digest_state(Model.load(tmp_path).network) == checkpoint.digest_state(pruned.network)


def test_without_whole_parts_plain_transformers_loads_it(tmp_path):
    pruned = MultiPruner(ratio=0.2, distribution=(0.0, 0.9, 0.1), **GIVEN)(texts.reader("llama"), texts.corpus())
    pruned.export(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    probe = checkpoint.probe(pruned.network)
    torch.testing.assert_close(checkpoint.outputs(loaded, probe), checkpoint.outputs(pruned.network, probe), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_pruned_is_refused():
    for name, message in (("mixtral", "experts"), ("bert", "causal"), ("mamba", "no heads")):
        with pytest.raises(InputError, match=message):
            MultiPruner(**GIVEN)(small(name), texts.corpus())
    with pytest.raises(InputError, match="cannot be met"):
        MultiPruner(ratio=0.9, distribution=(0.0, 0.0, 1.0), **GIVEN)(texts.reader("llama"), texts.corpus())
    for wrong in ({"ratio": 0}, {"distribution": (0.5, 0.5)}, {"distribution": (0.5, 0.6, 0.1)}, {"portion": 1}, {"tokens": 1}):
        with pytest.raises(ValueError, match=r"ratio|distribution|portion|tokens"):
            MultiPruner(**wrong)
