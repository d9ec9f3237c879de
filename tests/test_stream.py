"""Calibration tokens on their way through the blocks, against full forward passes, row by row."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import texts
import torch
from architectures import CAUSAL
from texts import ROWS, inputs_of
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from etude.engine import stream
from etude.engine.score import padded_batches
from etude.engine.stream import moments, through_blocks
from etude.values.errors import InputError


def halving(forward, hidden_states, *args, **kwargs):
    return forward(hidden_states.mul_(0.5), *args, **kwargs)


@pytest.mark.parametrize("name", [*(name for name in CAUSAL if name != "mamba"), "llama changing its input in place"])
def test_streaming_reads_what_a_full_forward_of_the_partly_pruned_model_reads(name, monkeypatch):
    """What unpadded rows give one by one, in the network as it stands when the group's turn has come; in several batches."""
    monkeypatch.setattr(stream, "row_tokens", lambda device, parameters: 90)
    model = texts.reader(name.split()[0])
    if name.endswith("in place"):
        for layer in model.network.model.layers:
            layer.forward = functools.partial(halving, layer.forward)
    rows = [np.array(row) for row in ROWS]
    assert len(list(padded_batches(model, rows, 90))) > 2
    assert len({len(row) for row in rows}) > 2  # padding was at work
    places, came = [], []
    for block, sums in through_blocks(model, rows, lambda tokens: tokens.square().sum(0)):
        paths = list(model.anatomy.linears(block))
        assert set(paths) == set(sums)
        alone = inputs_of(model.network, paths)
        for path in paths:
            wanted = (alone[path] ** 2).sum(0)
            assert np.allclose(sums[path].numpy(), wanted, rtol=1e-3, atol=1e-4 * wanted.max())
            assert sums[path] is sums[paths[0]]
        with torch.no_grad():
            for module in model.anatomy.linears(block).values():
                module.weight[::2] = 0  # a change that the next group must notice
        places.append(block.index)
        came += paths
    assert sorted(set(places)) == list(range(len(model.anatomy.blocks)))
    assert sorted(came) == sorted(path for block in model.anatomy.blocks for path in block.parts.linears)
    assert not any("forward" in vars(block.module) for block in model.anatomy.blocks) or name.endswith("in place")


def test_layers_that_read_the_same_are_one_group():
    groups = [list(model.anatomy.linears(block)) for model in [texts.reader("llama")] for block, _ in through_blocks(model, [np.array(row) for row in ROWS], lambda tokens: tokens.sum(0))]
    assert [[path.rpartition(".")[2] for path in group] for group in groups[:4]] == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_streaming_may_be_left_and_layers_that_are_not_called_are_refused():
    model = texts.reader("llama")
    passes = through_blocks(model, [np.array(row) for row in ROWS], lambda tokens: tokens.sum(0))
    next(passes)
    passes.close()
    assert not any(module._forward_pre_hooks for module in model.network.modules())
    with pytest.raises(InputError, match=r"no calibration token reaches \S+dt_proj"):
        next(through_blocks(texts.reader("mamba"), [np.array(row) for row in ROWS], lambda tokens: tokens.sum(0)))


def test_moments_are_those_of_the_tokens():
    model = texts.reader("opt")
    paths = model.anatomy.blocks[1].parts.linears
    read = inputs_of(model.network, paths)
    for path, (mean, variance) in moments(model, [np.array(row) for row in ROWS], paths).items():
        assert np.allclose(mean, read[path].mean(0), atol=1e-5)
        assert np.allclose(variance, read[path].var(0, ddof=1), rtol=1e-4, atol=1e-9)


def test_blocks_that_do_not_follow_each_other_are_refused():
    model = texts.reader("llama")
    model.anatomy.blocks  # noqa: B018, traced before
    inside, forward = [], model.network.forward

    def within(**given):
        inside.append(True)
        try:
            return forward(**given)
        finally:
            inside.clear()

    model.network.forward = within
    model.network.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]) if inside else None)
    with pytest.raises(InputError, match="do not simply follow"):
        next(through_blocks(model, [np.array(row) for row in ROWS], lambda tokens: tokens.sum(0)))


class Held(TorchDispatchMode):
    """Counts the bytes that operations wrote and that are still held: the most at any time, and all that was ever written."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for one in pytree.tree_leaves(found):
            if isinstance(one, torch.Tensor) and one.untyped_storage()._cdata not in self.storages:
                storage = one.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.written += storage.nbytes()
        self.storages = {key: (storage, size) for key, (storage, size) in self.storages.items() if not storage.expired()}
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return found


def test_what_is_held_is_less_than_one_block_writes_and_does_not_grow_with_the_blocks(monkeypatch):
    """Sixteen batches of rows, of which every hidden state is a megabyte, through two blocks and through eight."""
    monkeypatch.setattr(stream, "row_tokens", lambda device, parameters: 512)
    rows = [np.arange(64, dtype=np.int64) % 50 + row % 3 for row in range(128)]
    most, sizes = {}, {}
    for blocks in (2, 8):
        model = texts.reader("llama", blocks=blocks)
        sizes[blocks] = sum(parameter.numel() * parameter.element_size() for parameter in model.network.parameters())
        with Held() as whole, torch.no_grad():
            for ids, _ in padded_batches(model, rows):
                model.network.base_model(input_ids=ids, use_cache=False)
        with Held() as held:
            for _ in through_blocks(model, rows, lambda states: states.square().sum(0)):
                pass
        most[blocks] = held.most
        assert held.most <= sizes[blocks] / 2 + whole.written / blocks
    assert most[8] - most[2] <= sizes[8] - sizes[2]
