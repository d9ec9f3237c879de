"""Minitron: importance against numbers computed row by row, shapes against the parameters that they really have, and what is cut, tried and taught."""

from __future__ import annotations

import numpy as np
import pytest
import texts
import torch
import transformers
from architectures import small
from texts import ROWS, TOKENS

from etude.engine.budget import Budget
from etude.methods.compress._activations import sizes
from etude.methods.compress._shapes import shapes
from etude.methods.compress._units import sites
from etude.methods.compress.minitron import Minitron
from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.width import width

SMALL = {"learning_rate": 1e-3, "batch_tokens": 64, "length": 16, "precision": "float32", "tokens": TOKENS}
NORMS = {"llama": ("input_layernorm", "post_attention_layernorm", "norm"), "opt": ("self_attn_layer_norm", "final_layer_norm"), "gpt2": ("ln_1", "ln_2", "ln_f")}


def looked_at(network, row, outputs, norms):
    """What these layers read, and what these norms write, over one row by itself, (tokens, channels) each."""
    read, written = {}, {}
    handles = [network.get_submodule(path).register_forward_pre_hook(lambda module, args, path=path: read.__setitem__(path, args[0].reshape(len(row), -1).numpy().copy())) for path in outputs]
    handles += [network.get_submodule(path).register_forward_hook(lambda module, args, made, path=path: written.__setitem__(path, made.reshape(len(row), -1).numpy().copy())) for path in norms]
    with torch.no_grad():
        network(input_ids=torch.tensor([row]), use_cache=False)
    for handle in handles:
        handle.remove()
    return read, written


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_importance_is_the_size_of_activations_row_by_row(name):
    model = texts.reader(name)
    places = sites(model, "this")
    found = sizes(model, places, [np.array(row) for row in ROWS])
    norms = {path: module for path, module in model.network.named_modules() if path.rpartition(".")[2] in NORMS[name]}
    stream = {path: np.zeros(width(model)) for path in norms}
    units = [0.0] * len(places)
    for row in ROWS:
        read, written = looked_at(model.network, row, [site.output for site in places], list(norms))
        for path in stream:
            stream[path] += np.abs(written[path]).mean(0) ** 2
        for place, site in enumerate(places):
            units[place] = units[place] + np.linalg.norm(read[site.output].reshape(len(row), -1, site.width), axis=2).mean(0) ** 2
    np.testing.assert_allclose(found.stream, sum(np.sqrt(squares) for squares in stream.values()), rtol=1e-4)
    for got, squares, site in zip(found.units, units, places, strict=True):
        by_member = np.sqrt(squares)
        np.testing.assert_allclose(got, [by_member[list(unit)].sum() for unit in site.units], rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt", "gpt2", "mistral"])
@pytest.mark.parametrize("candidate", ["stream+channels", "heads+channels", "stream+heads+channels", "channels", "depth"])
def test_shapes_have_the_parameters_that_were_counted(name, candidate):
    model = texts.reader(name)
    ratio = 0.25
    (shape,) = shapes(model, sites(model, "this"), [candidate], ratio)
    method = Minitron(ratio=ratio, candidates=(candidate,), **SMALL)
    places = sites(model, "this")
    known = sizes(model, places, [np.array(row) for row in ROWS])
    draft, kept = method._pruned(model, places, shape, known, np.arange(3.0), np.random.default_rng(0), 0)
    assert abs(draft.parameters / model.parameters - (1 - ratio)) < 0.12
    assert len(kept) == shape.blocks == len(draft.anatomy.blocks)
    assert width(draft) == shape.stream
    best = np.argsort(-known.stream)[: shape.stream]
    embedding, whole = draft.network.get_input_embeddings().weight, model.network.get_input_embeddings().weight
    torch.testing.assert_close(embedding, whole[:, sorted(best.tolist())])


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_best_candidate_is_taught_and_plain_transformers_loads_it(name, tmp_path):
    model = texts.reader(name)
    before = checkpoint.digest_state(model.network)
    method = Minitron(ratio=0.25, candidates=("stream+channels", "heads+channels"), **SMALL)
    made = method(model, texts.corpus(), Budget(10, "steps"), 0)
    assert checkpoint.digest_state(model.network) == before
    assert 0.6 < made.parameters / model.parameters < 0.9
    assert [row["step"] for row in made.history] == [1, 1]  # two steps of the trial, seven of the rest
    assert all("kl" in row for row in made.history)
    made.export(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    probe = checkpoint.probe(made.network)
    torch.testing.assert_close(checkpoint.outputs(loaded, probe), checkpoint.outputs(made.network, probe), rtol=1e-4, atol=1e-5)


def test_blocks_are_taught_by_those_that_they_were():
    model = texts.reader("llama")
    made = Minitron(ratio=0.2, candidates=("depth",), **SMALL)(model, texts.corpus(), Budget(3, "steps"), 0)
    assert len(made.anatomy.blocks) == 2
    assert made.history[0]["states"] < 0.5
    plain = Minitron(ratio=0.2, candidates=("depth",), truth=1.0, divergence=0.0, **SMALL)(model, texts.corpus(), Budget(3, "steps"), 0)
    assert "kl" not in plain.history[0]


def test_controls_draw_by_the_seed():
    model = texts.reader("llama")
    made = {choose: [Minitron(ratio=0.25, candidates=("channels",), choose=choose, **SMALL)(model, texts.corpus(), Budget(1, "steps"), seed) for seed in (0, 0, 1)] for choose in ("random", "scratch")}
    for several in made.values():
        digests = [checkpoint.digest_state(one.network) for one in several]
        assert digests[0] == digests[1] != digests[2]
        assert len({one.parameters for one in several}) == 1
    fresh = made["scratch"][0].network.model.layers[0].mlp.up_proj.weight
    assert fresh.std().item() == pytest.approx(0.02, rel=0.2)
    assert fresh.shape == made["random"][0].network.model.layers[0].mlp.up_proj.weight.shape


def test_what_cannot_be_pruned_is_refused():
    for name, message in (("mixtral", "experts"), ("bert", "causal")):
        with pytest.raises(InputError, match=message):
            Minitron()(small(name), texts.corpus(), Budget(1, "steps"), 0)
    with pytest.raises(InputError, match="cannot be met by channels"):
        Minitron(ratio=0.9, candidates=("channels",), **SMALL)(texts.reader("llama"), texts.corpus(), Budget(1, "steps"), 0)
    for wrong in ({"ratio": 0}, {"search": 1}, {"choose": "best"}, {"candidates": ("all",)}, {"candidates": ()}, {"truth": 0.0, "divergence": 0.0, "states": 0.0}):
        with pytest.raises(ValueError, match=r"ratio|search|choose|candidate|lesson"):
            Minitron(**wrong)
