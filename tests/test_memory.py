"""Peak memory against what a pass is known to allocate."""

from __future__ import annotations

import pytest
import texts
import torch

from etude.engine import cost
from etude.measures import memory
from etude.measures.memory import Memory
from etude.values.errors import InputError

MIB = 1 << 20
LINUX = pytest.mark.skipif(not memory.RESET.exists(), reason="Linux alone measures a peak anew")


def holding(model, sizes):
    """The model, whose forward pass also holds arrays of these sizes at once, and frees them."""
    forward = model.network.forward

    def greedy(*arguments, **named):
        kept = [torch.ones(size, dtype=torch.uint8) for size in sizes]
        del kept
        return forward(*arguments, **named)

    model.network.forward = greedy
    return model


@LINUX
@pytest.mark.parametrize("sizes", [[64 * MIB], [40 * MIB, 56 * MIB], [MIB // 16] * 1000])
def test_the_peak_is_what_was_held_at_once(sizes):
    """Large arrays come from the system, small ones from the allocator's heap, which has kept them since the round before."""
    (found,) = Memory(length=8)(holding(texts.reader("llama"), sizes))
    assert found.items.tolist() == pytest.approx([sum(sizes)] * 3, abs=4 * MIB)
    assert (found.name, found.unit, found.better, found.exact) == ("memory", "bytes", "lower", False)
    assert found.item_names == ("round 1", "round 2", "round 3")


@LINUX
def test_a_higher_peak_before_does_not_count():
    before = torch.ones(200 * MIB, dtype=torch.uint8)
    del before
    (found,) = Memory(length=8)(holding(texts.reader("llama"), [16 * MIB]))
    assert found.value == pytest.approx(16 * MIB, abs=4 * MIB)


@LINUX
def test_it_is_what_torch_allocates_for_a_pass():
    """Against the allocations and frees that torch's profiler lists, with the gaps that a heap has."""
    model = texts.reader("gpt2")
    (found,) = Memory(length=64, batch=1024)(model)
    ids = torch.full((1024, 64), 10)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        model.network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak > 100 * MIB
    assert 0.95 * peak < found.value < 1.75 * peak


@LINUX
@pytest.mark.parametrize("name", ["bert", "t5", "mamba", "deberta-v2"])
def test_every_kind_of_model_is_read(name):
    with cost.metered() as bill:
        (found,) = Memory(length=16, batch=3, rounds=2)(texts.reader(name))
    assert bill.tokens == 3 * 3 * 16
    assert len(found.items) == 2


def test_the_peak_on_an_accelerator_is_that_of_its_allocator(monkeypatch):
    """On figures of our own: 100 bytes held before, 900 at an earlier peak, 350 at the pass's."""
    held = {"now": 100, "peak": 900}
    fakes = {"memory_allocated": lambda device: held["now"], "max_memory_allocated": lambda device: held["peak"], "synchronize": lambda device: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.update(peak=held["now"]))

    class Network:
        device = torch.device("cuda")

        def __call__(self, **given):
            held["peak"] = max(held["peak"], 350)

    assert memory._cuda_peak(Network(), {}) == 250


def test_what_cannot_be_measured_is_refused(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="reads 64 tokens, and length is 65"):
        Memory(length=65)(texts.reader("gpt2"))
    monkeypatch.setattr(memory, "RESET", tmp_path / "none")
    with pytest.raises(InputError, match="cannot be measured on cpu"):
        Memory(length=8)(texts.reader("llama"))
    for name in ("length", "batch", "rounds"):
        with pytest.raises(ValueError, match=f"{name} is at least 1"):
            Memory(**{name: 0})
