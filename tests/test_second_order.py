"""SparseGPT and GPTQ against the textbook's elimination with explicit inverses, and weights on a grid saved, exported and loaded by plain transformers."""

from __future__ import annotations

import numpy as np
import pytest
import texts
import torch
import transformers
from architectures import small
from texts import LENGTH, TOKENS, inputs_of, linear_layers, matrix

from etude.methods.compress._second_order import inverse_factor, second_moments, sweep
from etude.methods.compress.gptq import GPTQ
from etude.methods.compress.magnitude import Magnitude
from etude.methods.compress.round_to_nearest import RoundToNearest
from etude.methods.compress.sparsegpt import SparseGPT
from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.model import Model

GIVEN = {"tokens": TOKENS, "length": LENGTH}


def eliminated(weight, moments, damp, choose, every):
    """The method in float64, with the inverse of what is left taken anew at every column.  choose(first, columns, diagonal) gives what each column becomes by its place."""
    hessian = moments.astype(np.float64).copy()
    weight = weight.astype(np.float64).copy()
    dead = np.diag(hessian) == 0
    weight[:, dead] = 0
    hessian[dead, dead] = 1
    hessian += damp * np.diag(hessian).mean() * np.eye(len(hessian))
    count = weight.shape[1]
    roots = np.array([np.linalg.inv(hessian[j:, j:])[0, 0] for j in range(count)])
    for first in range(0, count, every):
        last = min(first + every, count)
        become = choose(first, weight[:, first:last], roots[first:last])
        for j in range(first, last):
            inverse = np.linalg.inv(hessian[j:, j:])
            kept = become(j - first, weight[:, j].copy(), weight[:, first:last])
            error = (weight[:, j] - kept) / inverse[0, 0]
            weight[:, j] = kept
            weight[:, j + 1 :] -= np.outer(error, inverse[0, 1:])
    return weight


def sparse(share, across=True):
    def choose(first, columns, roots):
        scores = columns**2 / roots
        gone = np.zeros(scores.shape, bool).ravel()
        gone[np.argsort(scores, axis=None, kind="stable")[: round(share * scores.size)]] = True
        gone = gone.reshape(scores.shape)
        return lambda place, column, live: np.where(gone[:, place], 0, column)

    return choose


def sparse_two_of_four(first, columns, roots):
    def become(place, column, live):
        begin = place // 4 * 4
        if place == begin:
            order = np.argsort(live[:, begin : begin + 4] ** 2 / roots[begin : begin + 4], axis=1, kind="stable")[:, :2]
            become.gone = np.zeros((len(live), 4), bool)
            np.put_along_axis(become.gone, order, True, axis=1)
        return np.where(become.gone[:, place - begin], 0, column)

    return become


def levels(columns, bits, symmetric):
    """Nearest level of each value of a column, by a search over all levels."""
    if symmetric:
        scale = np.abs(columns).max(1) / (2 ** (bits - 1) - 1)
        grid = np.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1))[None] * scale[:, None]
    else:
        low, high = np.minimum(columns.min(1), 0), np.maximum(columns.max(1), 0)
        scale = (high - low) / (2**bits - 1)
        grid = (np.arange(2**bits)[None] - np.round(-low / scale)[:, None]) * scale[:, None]
    return lambda column: grid[np.arange(len(column)), np.abs(grid - column[:, None]).argmin(1)]


def by_hand(model, order, solve):
    """Every layer of a copy solved in turn, on what it reads in the network as it stands."""
    hand = model.copy()
    for block in hand.anatomy.blocks:
        layers = {f"{block.path}.{path}": module for path, module in linear_layers(block.module).items()}
        for group in order:
            paths = [path for path in layers if path.rpartition(".")[2] in group]
            read = {path: inputs_of(hand.network, [path])[path] for path in paths}
            for path in paths:
                matrix(layers[path])[:] = solve(matrix(layers[path]), read[path].T @ read[path])
    return hand


GROUPS = {
    "llama": (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)),
    "gpt2": (("c_attn",), ("attn.c_proj",), ("c_fc",), ("c_proj",)),
    "opt": (("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)),
}


def close(model, hand):
    for key, wanted in hand.network.state_dict().items():
        got = model.network.state_dict()[key]
        gap = (got - wanted).abs()
        # a tie that float32 breaks otherwise changes a weight by a level, and those after it a little
        assert (gap > 1e-3 * wanted.abs().max()).float().mean() < 0.02, (key, gap.max())


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsegpt_is_elimination_with_explicit_inverses(name, pattern):
    model = texts.reader(name)
    before = checkpoint.digest_state(model.network)
    pruned = SparseGPT(pattern=pattern, block=16, damp=0.1, **GIVEN)(model, texts.corpus())
    choose, every = (sparse_two_of_four, 32) if pattern == "2:4" else (sparse(0.5), 16)
    hand = by_hand(model, GROUPS[name], lambda weight, moments: eliminated(weight, moments, 0.1, choose, every))
    close(pruned, hand)
    assert checkpoint.digest_state(model.network) == before
    for block in pruned.anatomy.blocks:
        for module in pruned.anatomy.linears(block).values():
            assert (module.weight == 0).float().mean().item() >= 0.49  # and the weights of inputs that are never read


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_is_elimination_with_explicit_inverses(name, symmetric):
    model = texts.reader(name)
    before = checkpoint.digest_state(model.network)
    rounded = GPTQ(bits=4, group=16, symmetric=symmetric, damp=0.1, **GIVEN)(model, texts.corpus())

    def choose(first, columns, roots):
        nearest = levels(columns, 4, symmetric)
        return lambda place, column, live: nearest(column)

    hand = by_hand(model, GROUPS[name], lambda weight, moments: eliminated(weight, moments, 0.1, choose, 16))
    close_weights(rounded, hand)
    assert checkpoint.digest_state(model.network) == before


def close_weights(rounded, hand):
    for block in hand.anatomy.blocks:
        for path, module in hand.anatomy.linears(block).items():
            got, wanted = matrix(rounded.network.get_submodule(path)), matrix(module)
            assert (np.abs(got - wanted) > 1e-3 * np.abs(wanted).max()).mean() < 0.03, path


def test_moments_and_the_factor_are_those_of_linear_algebra():
    tokens = torch.randn(50, 13, generator=torch.Generator().manual_seed(0))
    found = second_moments(tokens)
    torch.testing.assert_close(found.triu(), (tokens.T @ tokens).triu())
    whole = found.triu() + found.triu(1).T
    factor = inverse_factor(whole, 0.01, "this").double()
    damped = (whole + 0.01 * whole.diagonal().mean() * torch.eye(13)).double()
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-4, atol=1e-6)
    assert torch.equal(factor, factor.triu())
    with pytest.raises(InputError, match=r"what this reads cannot be inverted"):
        inverse_factor(-whole, 0.01, "this")


def test_what_is_left_makes_up_for_what_goes():
    """With one input zeroed, the others become those of least squares: the optimum in closed form."""
    random = torch.Generator().manual_seed(0)
    tokens, weight = torch.randn(200, 8, generator=random) @ torch.randn(8, 8, generator=random), torch.randn(5, 8, generator=random)
    moments = tokens.T @ tokens
    swept = sweep(weight, inverse_factor(moments, 1e-7, "this"), lambda first, live, roots: lambda place, column: column * 0 if first + place == 0 else column, 8)
    wanted = torch.linalg.lstsq(tokens[:, 1:].double(), (tokens @ weight.T).double()).solution
    torch.testing.assert_close(swept[:, 1:].double(), wanted.T, rtol=1e-3, atol=1e-3)


def test_inputs_that_say_nothing_of_each_other_are_rounded_to_the_nearest():
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    method = GPTQ(group=8)
    found, _ = method._round(weight, torch.eye(32), "this")
    ordered, _ = GPTQ(group=8, order="activation")._round(weight, torch.diag(torch.arange(32.0) + 1), "this")
    model = small("llama")
    with torch.no_grad():
        model.network.model.layers[0].self_attn.q_proj.weight[:6] = weight
    wanted = RoundToNearest(group=8)(model).network.model.layers[0].self_attn.q_proj.weight[:6]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(ordered, wanted)


def test_second_order_loses_less_than_the_first():
    """The squared error of a layer's outputs on the text that it was calibrated on."""
    model = texts.reader("llama")
    path = model.anatomy.blocks[0].parts.linears[0]
    read = inputs_of(model.network, [path])[path]
    weight = matrix(model.network.get_submodule(path)).copy()
    pairs = (
        (SparseGPT(**GIVEN)(model, texts.corpus()), Magnitude()(model)),
        (GPTQ(bits=3, group=None, **GIVEN)(model, texts.corpus()), RoundToNearest(bits=3, group=None)(model)),
        (GPTQ(bits=3, group=None, order="activation", **GIVEN)(model, texts.corpus()), RoundToNearest(bits=3, group=None)(model)),
    )
    for second, first in pairs:
        errors = [((read @ (matrix(one.network.get_submodule(path)) - weight).T) ** 2).sum() for one in (second, first)]
        assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ["given", "activation", "nearest"])
def test_weights_on_a_grid_are_saved_and_exported(name, symmetric, order, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = texts.reader(name)
    if order == "nearest":
        rounded = RoundToNearest(group=16, symmetric=symmetric)(model)
    else:
        rounded = GPTQ(group=16, symmetric=symmetric, order=order, **GIVEN)(model, texts.corpus())
    rounded.save(tmp_path / "own")
    again = Model.load(tmp_path / "own")
    assert checkpoint.digest_state(again.network) == checkpoint.digest_state(rounded.network)
    if name == "gpt2":
        with pytest.raises(InputError, match="packs torch's Linear alone"):
            again.export(tmp_path / "packed")
        return
    again.export(tmp_path / "packed")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    probe = checkpoint.probe(rounded.network)
    torch.testing.assert_close(checkpoint.outputs(loaded, probe), checkpoint.outputs(rounded.network, probe), rtol=1e-4, atol=1e-5)
    state = checkpoint.read_state(tmp_path / "packed")
    key = next(key for key in state if key.endswith("q_proj.weight_packed" if symmetric else "q_proj.weight"))
    assert state[key].numel() * state[key].element_size() == model.network.get_submodule(key.rpartition(".")[0]).weight.numel() * (4 if symmetric else 8) // 8


def test_weights_that_left_their_grid_or_do_not_fit_are_refused(tmp_path):
    pytest.importorskip("compressed_tensors")
    draft = RoundToNearest(group=16, symmetric=True)(texts.reader("llama")).copy()
    with torch.no_grad():
        draft.network.model.layers[1].mlp.up_proj.weight[0, 0] += 0.01
    with pytest.raises(InputError, match="up_proj have left their grid"):
        draft.export(tmp_path)
    with pytest.raises(InputError, match="wants whole groups"):
        RoundToNearest(group=20)(texts.reader("llama")).export(tmp_path)


def test_what_cannot_be_solved_is_refused():
    for method in (SparseGPT(), GPTQ()):
        with pytest.raises(InputError, match="cannot prune experts"):
            method(small("mixtral"), texts.corpus())
        with pytest.raises(InputError, match="causal"):
            method(small("bert"), texts.corpus())
    with pytest.raises(InputError, match=r"multiple of 5 inputs, and \S+ has 32"):
        SparseGPT(sparsity=0.2, pattern="1:5", length=64)(texts.reader("llama"), texts.corpus())
    for wrong in ({"damp": 0}, {"bits": 1}, {"group": 1}, {"order": "other"}, {"tokens": 1}):
        with pytest.raises(ValueError, match=r"damp|bits|group|order|tokens"):
            GPTQ(**wrong)
    for wrong in ({"damp": 0}, {"block": 0}, {"sparsity": 1.5}, {"length": 2}):
        with pytest.raises(ValueError, match=r"damp|block|sparsity|length"):
            SparseGPT(**wrong)


def test_a_folder_keeps_no_edits_of_the_model_before(tmp_path):
    RoundToNearest()(texts.reader("llama")).save(tmp_path)
    texts.reader("gpt2").save(tmp_path)
    assert Model.load(tmp_path).base.model_type == "gpt2"
    assert not Model.load(tmp_path).edits
