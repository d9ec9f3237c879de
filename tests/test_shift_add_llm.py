"""Binary codes against the conditions of their optimum, bits against all allotments, and the whole against elimination with explicit inverses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import texts
import torch
from architectures import small
from test_second_order import GROUPS, by_hand, eliminated
from texts import LENGTH, TOKENS, linear_layers, matrix

from etude.methods.compress import shift_add_llm
from etude.methods.compress._codes import coded
from etude.methods.compress.shift_add_llm import ShiftAddLLM, allot
from etude.values import checkpoint
from etude.values.errors import InputError

GIVEN = {"tokens": TOKENS, "length": LENGTH}


def test_one_bit_is_the_sign_times_the_mean_magnitude():
    values = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(coded(values, 1, powers=False), values.sign() * values.abs().mean(1, keepdim=True), rtol=1e-3, atol=1e-3)
    made = coded(values, 1, powers=True)
    exponents = made.abs().log2()
    torch.testing.assert_close(exponents, exponents.round())
    wanted = values.abs().mean(1).log2().round()
    torch.testing.assert_close(exponents[:, 0], wanted)


@pytest.mark.parametrize("bits", [2, 3])
def test_codes_are_near_the_best_of_all_signs(bits):
    """Of eight numbers, against every choice of signs with scales by least squares."""
    values = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).double()
    made = coded(values.float(), bits, powers=False).double()
    errors = (made - values).square().sum(1)
    patterns = np.array(list(itertools.product((-1.0, 1.0), repeat=8)))
    for row, error in zip(values.numpy(), errors.tolist(), strict=True):
        best = min(
            np.square(row - (basis := patterns[list(chosen)].T) @ np.linalg.lstsq(basis, row, rcond=None)[0]).sum() for chosen in itertools.combinations(range(0, 256, 1 if bits == 2 else 5), bits)
        )
        if bits == 2:
            assert best <= error + 1e-6
        assert error <= np.square(row).sum() * (0.25 if bits == 2 else 0.08)
    assert (errors < (coded(values.float(), bits - 1, powers=False).double() - values).square().sum(1)).all()


def test_powers_of_two_make_sums_of_powers_of_two():
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    for row in coded(values, 2, powers=True):
        levels = sorted({round(float(value), 9) for value in row.abs()})
        assert len(levels) <= 2
        if len(levels) == 2:
            scales = np.array([(levels[1] + levels[0]) / 2, (levels[1] - levels[0]) / 2])
            np.testing.assert_allclose(np.log2(scales), np.round(np.log2(scales)), atol=1e-4)


def test_bits_are_allotted_as_the_best_of_all_ways():
    random = np.random.default_rng(0)
    errors = np.sort(random.random((6, 3)), axis=1)[:, ::-1].tolist()
    sizes = [10, 20, 10, 40, 20, 30]
    ways = [way for way in itertools.product(range(3), repeat=6) if sum(size * (2 + place) for size, place in zip(sizes, way, strict=True)) <= 3 * sum(sizes)]
    best = min(ways, key=lambda way: sum(errors[layer][place] for layer, place in enumerate(way)))
    assert allot(errors, sizes, (2, 3, 4), 3) == [2 + place for place in best]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_joint_fits_are_elimination_with_explicit_inverses(name):
    model = texts.reader(name)
    before = checkpoint.digest_state(model.network)
    made = ShiftAddLLM(bits=2, group=16, damp=0.1, **GIVEN)(model, texts.corpus())

    def plan(first, columns, roots):
        def become(place, column, live):
            groups = [column[begin : begin + 16] for begin in range(0, len(column), 16)]
            return np.concatenate([coded(torch.tensor(group[None], dtype=torch.float32), 2, powers=True)[0].numpy() for group in groups])

        return become

    hand = by_hand(model, GROUPS[name], lambda weight, moments: eliminated(weight, moments, 0.1, plan, weight.shape[1]))
    for path in [path for path in model.anatomy.blocks[0].parts.linears if path.rpartition(".")[2] in GROUPS[name][0]]:  # what follows reads what a tie, broken otherwise, wrote
        got, wanted = (matrix(one.network.get_submodule(path)) for one in (made, hand))
        assert (np.abs(got - wanted) > 1e-3 * np.abs(wanted).max()).mean() < 0.03, path
    assert checkpoint.digest_state(model.network) == before


def test_weights_alone_are_coded_output_by_output():
    model = texts.reader("gpt2")
    made = ShiftAddLLM(bits=3, objective="weights", group=20, **GIVEN)(model, texts.corpus())
    for path, module in linear_layers(model.network.transformer.h).items():
        old, new = torch.tensor(matrix(module)), matrix(made.network.transformer.h.get_submodule(path))
        parts = [coded(part.contiguous(), 3, powers=True) for part in old.tensor_split(-(-old.shape[1] // 20), 1)]
        np.testing.assert_allclose(new, torch.cat(parts, 1).numpy(), atol=1e-6)


def test_mixed_bits_keep_the_mean_and_lose_less(monkeypatch):
    model = texts.reader("llama")
    seen = []
    monkeypatch.setattr(shift_add_llm, "allot", lambda *given: seen.append((given, allot(*given))) or seen[-1][1])
    ShiftAddLLM(bits=3, mixed=True, objective="weights", group=16, **GIVEN)(model, texts.corpus())
    (errors, sizes, choices, bits), found = seen[0]
    assert sum(size * count for size, count in zip(sizes, found, strict=True)) <= bits * sum(sizes)
    total = sum(row[choices.index(count)] for row, count in zip(errors, found, strict=True))
    assert total <= sum(row[1] for row in errors)
    assert all(row[0] > row[1] > row[2] for row in errors)


def test_what_cannot_be_coded_is_refused():
    with pytest.raises(InputError, match="cannot prune experts"):
        ShiftAddLLM()(small("mixtral"), texts.corpus())
    with pytest.raises(InputError, match="causal"):
        ShiftAddLLM()(small("bert"), texts.corpus())
    for wrong in ({"bits": 0}, {"bits": 7}, {"bits": 1, "mixed": True}, {"objective": "all"}, {"group": 1}, {"damp": 0}, {"length": 2}):
        with pytest.raises(ValueError, match=r"bits|objective|group|damp|length"):
            ShiftAddLLM(**wrong)
