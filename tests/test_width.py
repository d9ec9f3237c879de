"""A narrower residual stream: against a network built narrow from the start, saved, exported, and refused where it cannot be cut."""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures import NAMES, VOCABULARY, small

from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.model import Model
from etude.values.width import drop_width, width

CUT = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "gpt_neox", "opt", "falcon", "gemma2"]
GONE = (0, 3, 4, 5, 17, 20, 30, 31)


def independent(model, kept):
    """The model with zeros where channels went, and norms that count the kept channels alone: what a cut computes, without one."""
    whole = model.copy().network
    full = width(model)
    mask = torch.zeros(full)
    mask[kept] = 1

    def masked(module, args, output):
        return output * mask

    def norm(module, args, kwargs=None):
        states = args[0][..., kept]
        weight, bias = module.weight[kept], getattr(module, "bias", None)
        if isinstance(module, torch.nn.LayerNorm):
            made = torch.nn.functional.layer_norm(states, (len(kept),), weight, bias[kept], module.eps)
        else:
            made = module_norm(module, states, weight)
        out = torch.zeros_like(args[0])
        out[..., kept] = made
        return out

    for module in whole.modules():
        if isinstance(module, torch.nn.Embedding) and module.weight.shape[1] == full:
            module.register_forward_hook(masked)
        elif (isinstance(module, torch.nn.LayerNorm) or "RMSNorm" in type(module).__name__) and module.weight.shape == (full,):
            module.forward = lambda states, module=module: norm(module, (states,))
    for block in model.anatomy.blocks:
        for path in (*(one.output for one in block.parts.attentions), block.feed_forward.output):
            whole.get_submodule(path).register_forward_hook(masked)
    return whole


def module_norm(module, states, weight):
    epsilon = getattr(module, "variance_epsilon", None) or module.eps
    unit = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + epsilon)
    return unit * (1 + weight if "Gemma" in type(module).__name__ else weight)


@pytest.mark.parametrize("name", CUT)
def test_a_cut_computes_what_masks_compute(name, tmp_path):
    model = small(name)
    before = checkpoint.digest_state(model.network)
    kept = [channel for channel in range(32) if channel not in GONE]
    draft = model.copy()
    drop_width(draft, GONE)
    assert width(draft) == 24
    assert checkpoint.digest_state(model.network) == before
    probe = checkpoint.probe(model.network)
    torch.testing.assert_close(checkpoint.outputs(draft.network, probe), checkpoint.outputs(independent(model, kept), probe), rtol=1e-4, atol=1e-4)
    assert draft.parameters < model.parameters
    draft.save(tmp_path / "own")
    again = Model.load(tmp_path / "own")
    torch.testing.assert_close(checkpoint.outputs(again.network, probe), checkpoint.outputs(draft.network, probe))
    assert again.parameters == draft.parameters


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_plain_transformers_loads_it_and_more_cuts_follow(name, tmp_path):
    draft = small(name)
    drop_width(draft, GONE)
    drop_width(draft, [0, 1, 7, 9])
    draft.anatomy.drop_channels({block: range(8) for block in range(3)})
    draft.anatomy.drop([1])
    assert width(draft) == 20
    assert draft.plain
    draft.export(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.config.hidden_size == 20
    probe = checkpoint.probe(draft.network)
    torch.testing.assert_close(checkpoint.outputs(loaded, probe), checkpoint.outputs(draft.network, probe), rtol=1e-4, atol=1e-5)


def test_a_tied_head_stays_tied(tmp_path):
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=True, pad_token_id=0)
    draft = Model(transformers.LlamaForCausalLM(config))
    drop_width(draft, GONE)
    drop_width(draft, [2, 3, 6, 8])
    network = draft.network
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert network.lm_head.in_features == 20
    draft.save(tmp_path)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.shape == (VOCABULARY, 20)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(CUT)))
def test_what_has_no_one_stream_is_refused_and_left_alone(name):
    draft = small(name)
    before = checkpoint.digest_state(draft.network)
    with pytest.raises(InputError, match="cannot be cut"):
        drop_width(draft, GONE)
    assert checkpoint.digest_state(draft.network) == before


def test_wrong_channels_are_refused():
    draft = small("llama")
    for wrong in ([32], [-1], range(32)):
        with pytest.raises(InputError, match="channels 0 to 31"):
            drop_width(draft, wrong)
