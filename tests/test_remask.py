"""Zeros put back: only they change, and models of other shapes are refused."""

from __future__ import annotations

import pytest
import texts
import torch

from etude.engine.budget import Budget
from etude.methods.adapt.lora import LoRA
from etude.methods.compress._masks import matrices
from etude.methods.compress.magnitude import Magnitude
from etude.methods.compress.remask import Remask
from etude.values.errors import InputError


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_zeros_come_back_and_nothing_else_changes(name):
    sparse = Magnitude(sparsity=0.6)(texts.reader(name))
    dense = texts.reader(name)
    with torch.no_grad():
        for parameter in dense.network.parameters():
            parameter.add_(torch.rand_like(parameter) + 0.1)
    before = dense.digest, sparse.digest
    masked = Remask()(dense.frozen_now(), sparse)
    assert (dense.digest, sparse.digest) == before
    zeros = 0
    for key, tensor in masked.network.state_dict().items():
        like, full = sparse.network.state_dict()[key], dense.network.state_dict()[key]
        inner = tensor.ndim > 1 and key.removesuffix(".weight").split(".")[-1] not in ("lm_head", "embed_tokens", "wte", "wpe", "gate")
        expected = full.masked_fill(like == 0, 0) if inner else full
        assert torch.equal(tensor, expected), key
        zeros += int((tensor == 0).sum())
    assert zeros > 1000


def test_lora_fills_zeros_and_remask_empties_them():
    sparse = Magnitude(pattern="2:4")(texts.reader("llama"))
    tuned = LoRA(rank=2, learning_rate=0.02, batch_tokens=64, length=32)(sparse, texts.corpus(), Budget(2, "steps"), 0)
    filled = matrices(tuned)
    assert all(bool((filled[path] != 0).all()) for path in filled)
    for path, matrix in matrices(Remask()(tuned, sparse)).items():
        assert (matrix == 0).equal(matrices(sparse)[path] == 0)


def test_another_shape_is_refused():
    small = texts.reader("llama")
    small.anatomy.drop_channels({1: [3]})
    with pytest.raises(InputError, match=r"differ at model\.layers\.1\.mlp"):
        Remask()(texts.reader("llama"), small.frozen_now())
    with pytest.raises(InputError, match="missing"):
        Remask()(texts.reader("llama"), texts.reader("llama", blocks=2))
