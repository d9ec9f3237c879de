"""Rounding to the nearest level against brute force over every level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import NAMES, small
from texts import linear_layers, matrix, reader

from etude.methods.compress.round_to_nearest import RoundToNearest
from etude.values import checkpoint
from etude.values.model import Model


def levels_of(group: list[float], bits: int, symmetric: bool) -> np.ndarray:
    """Every value that a weight of this group may take, spelt out."""
    count = 2**bits
    if symmetric:
        largest = max(abs(value) for value in group)
        return np.array([largest * step / (count / 2 - 1) for step in range(-count // 2 + 1, count // 2)])
    low, high = min(0.0, *group), max(0.0, *group)
    scale = (high - low) / (count - 1)
    zero = round(-low / scale)
    return np.array([scale * (step - zero) for step in range(count)])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(2, None, False), (3, 12, True), (4, 16, False), (8, 20, True)])
def test_every_weight_becomes_the_nearest_level_of_its_group(name, bits, group, symmetric):
    model = small(name).frozen_now()
    before = model.digest
    rounded = RoundToNearest(bits=bits, group=group, symmetric=symmetric)(model)
    assert model.digest == before
    (stack,) = model.anatomy.stacks
    for path, module in linear_layers(model.network.get_submodule(stack)).items():
        old, new = matrix(module).astype(np.float64), matrix(rounded.network.get_submodule(f"{stack}.{path}"))
        for row in range(0, len(old), 5):
            for begin in range(0, old.shape[1], group or old.shape[1]):
                part = slice(begin, begin + (group or old.shape[1]))
                levels = levels_of(old[row, part].tolist(), bits, symmetric)
                gaps = np.abs(old[row, part][:, None] - levels[None])
                np.testing.assert_allclose(np.abs(old[row, part] - new[row, part]), gaps.min(1), atol=2e-6, err_msg=path)
                assert np.abs(new[row, part][:, None] - levels[None]).min(1).max() < 2e-6, "a weight lies on no level"
                assert len(np.unique(new[row, part])) <= 2**bits


@pytest.mark.parametrize("name", NAMES)
def test_all_else_stays_and_it_is_its_own_rounding(name):
    model = small(name)
    rounded = RoundToNearest(bits=3, symmetric=True)(model)
    layers = {f"{path}.weight" for stack in model.anatomy.stacks for path in linear_layers(model.network) if path.startswith(stack + ".")}
    changed = {key for key, tensor in model.network.state_dict().items() if not torch.equal(tensor, rounded.network.state_dict()[key])}
    experts = {key for key, tensor in model.network.state_dict().items() if tensor.ndim == 3}
    assert changed - experts == layers - experts
    assert name != "mixtral" or changed & experts
    again = RoundToNearest(bits=3, symmetric=True)(rounded)
    for key, tensor in again.network.state_dict().items():
        torch.testing.assert_close(tensor, rounded.network.state_dict()[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_more_bits_and_smaller_groups_are_nearer(symmetric):
    model = reader("llama").frozen_now()

    def error(**fields):
        rounded = RoundToNearest(symmetric=symmetric, **fields)(model)
        return sum((one - other).square().sum().item() for one, other in zip(model.network.parameters(), rounded.network.parameters(), strict=True))

    errors = [error(bits=bits) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 100 * errors[-1] > 0
    assert error(bits=3, group=8) < error(bits=3, group=16) < error(bits=3, group=None)


def test_a_group_of_zeros_stays_and_nothing_else_is_needed(tmp_path):
    draft = reader("llama")
    path, module = next(iter(linear_layers(draft.network).items()))
    with torch.no_grad():
        module.weight[0] = 0
        module.weight[1] = 0.25
    for symmetric in (False, True):
        rounded = RoundToNearest(bits=2, symmetric=symmetric)(draft)
        weight = rounded.network.get_submodule(path).weight
        assert torch.isfinite(weight).all()
        assert not weight[0].any()
        assert weight[1].eq(0.25).all()
    rounded.save(tmp_path)
    probe = checkpoint.probe(rounded.network)
    assert torch.equal(checkpoint.outputs(Model.load(tmp_path).network, probe), checkpoint.outputs(rounded.network, probe))


def test_wrong_settings_are_refused():
    for fields in ({"bits": 1}, {"bits": 9}, {"group": 1}, {"group": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            RoundToNearest(**fields)
