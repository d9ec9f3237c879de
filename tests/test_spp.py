"""SPP: multipliers against loops and autograd, zeros that stay, and what is trained and merged."""

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
from etude.methods.compress import spp
from etude.methods.compress.magnitude import Magnitude
from etude.methods.compress.spp import SPP, Multiplied, multiply
from etude.values import checkpoint
from etude.values.anatomy import weight_of
from etude.values.errors import InputError
from etude.values.model import Model

METHOD = SPP(rank=4, learning_rate=2e-2, batch_tokens=64, length=16, precision="float32", schedule="constant", warmup=0.0, dropout=0.0)
STEPS = Budget(3, "steps")
PATTERNS = {"half": Magnitude(), "three quarters": Magnitude(sparsity=0.75), "2:4": Magnitude(pattern="2:4")}


def sparse(name: str, pattern: str = "half") -> Model:
    return PATTERNS[pattern](texts.reader(name))


def by_loops(weight: np.ndarray, rows: np.ndarray, column: np.ndarray, scale: float) -> np.ndarray:
    """W + scale · W ⊙ M, entry by entry, for a rank that divides the outputs: row k of the factor serves the k-th run of outputs."""
    found = weight.copy()
    run = len(weight) // len(rows)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            found[i, j] += scale * weight[i, j] * rows[i // run, j] * column[i, 0]
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_zeros_stay_and_the_multiplier_is_merged(name, pattern, monkeypatch, tmp_path):
    model = sparse(name, pattern)
    before, caught, merge = model.digest, {}, spp.merge

    def watch(network: nn.Module, multiplied: dict) -> None:
        caught.update({path: (one.rows.detach().clone(), one.column.detach().clone()) for path, one in multiplied.items()})
        assert {key for key, parameter in network.named_parameters() if parameter.requires_grad} == {f"{path}.{factor}" for path in caught for factor in ("rows", "column")}
        merge(network, multiplied)

    monkeypatch.setattr(spp, "merge", watch)
    tuned = METHOD(model, texts.corpus(), STEPS, 5)
    assert model.digest == before
    assert set(caught) == {path for path in texts.linear_layers(model.network) if "lm_head" not in path}
    for path, (rows, column) in caught.items():
        old, new = (texts.matrix(one.network.get_submodule(path)) for one in (model, tuned))
        np.testing.assert_allclose(new, by_loops(old, rows.numpy(), column.numpy(), 2.0), rtol=2e-5, atol=1e-7)
        np.testing.assert_array_equal(new == 0, old == 0)
        assert 0.4 < (old == 0).mean() < 0.8
        assert np.abs(new - old).max() > 1e-3 * np.abs(old).max()
    changed = {key for key, tensor in tuned.network.state_dict().items() if not torch.equal(tensor, model.network.state_dict()[key])}
    assert changed == {f"{path}.weight" for path in caught}
    assert all(parameter.requires_grad for parameter in tuned.network.parameters())
    assert {type(one) for one in tuned.network.modules()} == {type(one) for one in model.network.modules()}
    tuned.save(tmp_path)
    assert Model.load(tmp_path).plain
    assert checkpoint.digest_state(Model.load(tmp_path).network) == checkpoint.digest_state(tuned.network)


@pytest.mark.parametrize("outputs", [6, 7, 3])
@pytest.mark.parametrize("own", [0.0, 1.0])
def test_the_product_and_its_gradients(outputs, own):
    """Against finite differences in double precision; with runs of equal length, of unequal length, and fewer outputs than rows."""
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(5, outputs).double()
    layer.weight.data[torch.rand(outputs, 5, generator=draw) < 0.5] = 0
    one = Multiplied(layer.requires_grad_(False), 4, 2.0, 0.0, draw)
    inputs = torch.randn(2, 3, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    rows, column = one.rows, nn.Parameter(torch.randn(outputs, 1, generator=draw, dtype=torch.float64))

    def product(inputs: torch.Tensor, rows: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return spp._Product.apply(inputs, layer.weight, layer.bias, rows, column, one.turn, 2.0, own, torch.float64)

    assert torch.autograd.gradcheck(product, (inputs, rows, column))
    which = {6: [0, 0, 1, 2, 2, 3], 7: [0, 0, 1, 1, 2, 2, 3], 3: [0, 1, 2]}[outputs]
    multiplier = torch.stack([rows[k] * column[i] for i, k in enumerate(which)])
    torch.testing.assert_close(product(inputs, rows, column), inputs @ (layer.weight * (own + 2.0 * multiplier)).T + layer.bias)


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_step_is_adamw_on_the_factors(name):
    """Two steps by hand, on the plain network with its weights replaced: the paper's formula by repetition, autograd, the norm clipped at 1, torch's AdamW."""
    method = dataclasses.replace(METHOD, learning_rate=3e-3, weight_decay=0.1)
    model = sparse(name).copy()
    for one in model.network.modules():
        if isinstance(one, nn.Dropout):  # GPT-2's own
            one.p = 0.0
    trained = method(model, texts.corpus(), Budget(2, "steps"), 5)
    factors = {path: (one.rows, one.column) for path, one in method.inject(model.copy(), 5).items()}
    plain = model.copy().network
    for rows, column in factors.values():
        assert float(column.detach().abs().max()) == 0
        assert 0.9 < float(rows.detach().abs().max()) * rows.shape[1] ** 0.5 <= 1

    def weights() -> dict[str, torch.Tensor]:
        found = {}
        for path, (rows, column) in factors.items():
            layer = plain.get_submodule(path)
            multiplier = torch.repeat_interleave(rows, len(column) // len(rows), 0) * column.expand(-1, rows.shape[1])
            found[f"{path}.weight"] = layer.weight.detach() * (1 + 2.0 * (multiplier if isinstance(layer, nn.Linear) else multiplier.T))
        return found

    every = [factor for pair in factors.values() for factor in pair]
    optimizer = torch.optim.AdamW(every, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    feed = Packed(batch.Documents(model, texts.corpus()), 16)
    feed.begin(5)
    for _ in range(2):
        part = feed.collate(feed.take(4, 0.0))
        logits = torch.func.functional_call(plain, weights(), (), {"input_ids": part.ids, "position_ids": part.positions, "use_cache": False}).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), part.labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(every, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for path, by_hand in weights().items():
        start, found = model.network.get_parameter(path), trained.network.get_parameter(path)
        assert (by_hand - found).abs().mean() <= 0.01 * (by_hand - start).abs().mean() + 1e-8


def test_dropout_hides_inputs_from_the_update_alone():
    layer = nn.Linear(8, 6).requires_grad_(False)
    one = Multiplied(layer, 3, 2.0, 0.5, torch.Generator().manual_seed(1))
    one.column.data.normal_()
    inputs = torch.randn(4, 8)
    torch.manual_seed(7)
    seen = nn.functional.dropout(inputs, 0.5)
    update = multiply(layer.weight, one.rows, one.column, one.turn, 2.0, 1.0) - layer.weight
    torch.manual_seed(7)
    torch.testing.assert_close(one.train()(inputs), layer(inputs) + seen @ update.T)
    torch.testing.assert_close(one.eval()(inputs), layer(inputs) + inputs @ update.T)
    trained = [dataclasses.replace(METHOD, dropout=share)(sparse("llama"), texts.corpus(), STEPS, 0) for share in (0.0, 0.5)]
    assert trained[0].digest != trained[1].digest
    for path in texts.linear_layers(trained[0].network):
        assert (weight_of(trained[1].network.get_submodule(path)) == 0).equal(weight_of(sparse("llama").network.get_submodule(path)) == 0)


def test_training_begins_at_the_model_as_it_was():
    model = sparse("llama")
    draft = model.copy()
    METHOD.inject(draft, 0)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(draft.network(ids).logits, model.network(ids).logits)


def test_how_many_numbers_are_trained():
    """A Llama block of width 32 with 4 heads of 8, 2 of keys and values, and 48 channels: rank · inputs + outputs, layer by layer."""
    draft = sparse("llama").copy()
    METHOD.inject(draft, 0)
    trained = sum(parameter.numel() for parameter in draft.network.parameters() if parameter.requires_grad)
    assert trained == 3 * (2 * (4 * 32 + 32) + 2 * (4 * 32 + 16) + 2 * (4 * 32 + 48) + (4 * 48 + 32))


def test_it_learns_the_text():
    model = sparse("llama")
    history = METHOD(model, texts.corpus(), Budget(30, "steps"), 0).history
    assert history[-1]["loss"] < history[0]["loss"] - 0.1


def test_a_seed_decides_every_bit():
    model = sparse("gpt2")
    digests = [METHOD(model, texts.corpus(), Budget(1, "steps"), seed).digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_a_killed_run_goes_on_to_the_same_bits(stopped):
    model, method = sparse("llama"), dataclasses.replace(METHOD, dropout=0.2)
    whole = method(model, texts.corpus(), Budget(4, "steps"), 0)
    assert stopped(Packed, 2, lambda: method(model, texts.corpus(), Budget(4, "steps"), 0)).digest == whole.digest


def test_what_cannot_be_tuned_is_refused():
    with pytest.raises(InputError, match="causal"):
        METHOD(texts.reader("bert"), texts.corpus(), STEPS, 0)


@pytest.mark.parametrize(("fields", "match"), [({"rank": 0}, "rank"), ({"scale": 0.0}, "scale"), ({"dropout": 1.0}, "dropout"), ({"schedule": "steps"}, "schedule")])
def test_hyperparameters_out_of_range(fields, match):
    with pytest.raises(ValueError, match=match):
        SPP(**fields)
