"""Attentions and feed-forward layers taken away as wholes: against their output projections set to zero."""

from __future__ import annotations

import pytest
import torch
from architectures import CAUSAL, NAMES, small

from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.model import Model
from etude.values.sublayers import silence, sublayers


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"mamba", "t5", "bart", "distilbert", "bert", "roberta", "electra", "deberta-v2"}))
def test_a_silent_part_adds_nothing(name, tmp_path):
    model = small(name)
    found = sublayers(model)
    assert not any(one.attention and one.block == 0 for one in found)
    chosen = [one for one in found if (one.block, one.attention) in ((1, True), (2, False), (0, False))]
    if name in ("opt", "mixtral"):
        assert all(one.attention for one in found)
    draft = model.copy()
    silence(draft, chosen)
    assert draft.parameters == model.parameters - sum(one.parameters for one in chosen)
    hand = model.copy().network
    with torch.no_grad():
        for one in chosen:
            block = model.anatomy.blocks[one.block]
            part = block.attention if one.attention else block.feed_forward
            module = hand.get_submodule(part.output)
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()
    probe = checkpoint.probe(hand)
    torch.testing.assert_close(checkpoint.outputs(draft.network, probe), checkpoint.outputs(hand, probe), rtol=1e-4, atol=1e-5)
    draft.save(tmp_path)
    again = Model.load(tmp_path)
    torch.testing.assert_close(checkpoint.outputs(again.network, probe), checkpoint.outputs(draft.network, probe))
    blocks = draft.anatomy.blocks
    for one in chosen:
        assert (blocks[one.block].attention if one.attention else blocks[one.block].feed_forward) is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_it_still_writes_with_a_cache(name):
    draft = small(name)
    silence(draft, [one for one in sublayers(draft) if one.block == 1])
    network = draft.network
    ids = torch.tensor([[5, 9, 13, 2, 7]])
    with torch.no_grad():
        whole = network(input_ids=ids, use_cache=False).logits[:, -1]
        begun = network(input_ids=ids[:, :-1], use_cache=True)
        step = network(input_ids=ids[:, -1:], past_key_values=begun.past_key_values, use_cache=True).logits[:, -1]
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-5)


def test_where_nothing_can_be_taken_away_it_says_so():
    assert "mamba" in CAUSAL
    with pytest.raises(InputError, match="no attentions"):
        sublayers(small("mamba"))
