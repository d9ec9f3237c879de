"""Calibration tokens on their way through the blocks: what layers read, gathered while the blocks are changed one after another."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from greenlet import greenlet
from torch import Tensor, nn

from etude.engine import fused, losses
from etude.engine.cost import flops_per_token, spend
from etude.engine.progress import report
from etude.engine.score import COUNTED_LENGTH, padded_batches, require_causal, row_tokens
from etude.values.anatomy import Block
from etude.values.errors import InputError
from etude.values.model import Model

PROBE = 8
"""Tokens on which the blocks are tried."""
UNSEEN = "The network computes this layer without calling it once for each token, and what it reads cannot be seen."


def require_dense(model: Model, what: str) -> None:
    """Raises InputError if a block has experts, each of which reads only some of the tokens."""
    for block in model.anatomy.blocks:
        if block.feed_forward is not None and block.feed_forward.experts:
            raise InputError(f"{what} cannot prune experts, and block {block.index} of this {model.base.model_type} has them")


def through_blocks(model: Model, rows: Sequence[np.ndarray], measure: Callable[[Tensor], Tensor]) -> Iterator[tuple[Block, dict[str, Tensor]]]:
    """For one group of linear layers after another, the sum of `measure` over what its layers read.  A group is the layers of a block that read the same thing.

    measure: of real tokens' inputs, (tokens, channels) float32; its results are added up over the batches.
    Whoever iterates may change the weights of the group at hand: what comes later in the block, and the next blocks, read what the changed ones write.
    So one pass over the rows serves all layers: every batch waits before the group's first layer until the others have come there.
    Yields the block with the group as its linear layers, so that `anatomy.linears` gives these, and the sums by path; the layers of a group share one tensor.
    Raises InputError, before anything is measured, if the blocks do not simply follow each other, or a layer is not reached, or not by every token, or twice.
    Cost: one pass over the rows through the blocks; memory for the hidden states of all rows and for what the group at hand reads of them.
    """
    require_causal(model, "streaming through blocks")
    return _through(model, model.anatomy.blocks, rows, measure)


@torch.no_grad()
def _through(model: Model, blocks: Sequence[Block], rows: Sequence[np.ndarray], measure: Callable[[Tensor], Tensor]) -> Iterator[tuple[Block, dict[str, Tensor]]]:
    network = model.network
    groups, whole = groups_of(model, blocks, rows)
    with fused.fused(network):
        batches = [capture(model, blocks, whole, ids, real) for ids, real in padded_batches(model, rows, row_tokens(network.device.type, network.num_parameters()))]
        total = sum(map(len, groups))
        done = 0
        for block, several in zip(blocks, groups, strict=True):
            with _Passes(model, block, batches, several, measure) as passes:
                for group in several:
                    sums = passes.next(group)
                    yield dataclasses.replace(block, parts=dataclasses.replace(block.parts, linears=list(group))), dict.fromkeys(group, sums)
                    done += 1
                    report("going through the blocks", done, total)
                passes.finish()
    passed = sum(map(len, rows))
    spend(tokens=passed, flops=passed * flops_per_token(network, COUNTED_LENGTH))


class _Passes:
    """One block computed for every batch at once: each batch's pass is a greenlet, which waits before every group of layers for the others."""

    def __init__(self, model: Model, block: Block, batches: Sequence[Between], groups: Sequence[tuple[str, ...]], measure: Callable[[Tensor], Tensor]):
        self.block, self.batches, self.measure = block, batches, measure
        firsts = {group[0]: model.network.get_submodule(group[0]) for group in groups}
        self.watching = watching(firsts, self._came)
        self.passes = [greenlet(self._pass) for _ in batches]
        self.sums: Tensor | None = None

    def __enter__(self) -> _Passes:
        self.watching.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.watching.__exit__(*error)
        for one in self.passes:
            if one:  # whoever iterated went away
                one.throw()

    def _pass(self, batch: Between) -> None:
        batch.hidden = batch.after(self.block)

    def _came(self, path: str, read: Tensor) -> None:
        if greenlet.getcurrent() is not self.running:
            return  # somebody else computes with the network
        value = self.measure(real_tokens(path, read, self.at.real).float())
        self.sums = value if self.sums is None else self.sums.add_(value)
        self.came = path
        greenlet.getcurrent().parent.switch()

    def next(self, group: tuple[str, ...]) -> Tensor:
        """Let every batch come to this group, and give the sum over what they read."""
        self.sums = None
        _give_back()
        for batch, one in zip(self.batches, self.passes, strict=True):
            self.came = ""
            self._go_on(batch, one)
            if self.came != group[0]:
                raise InputError(f"the layers of block {self.block.index} come in another order for other texts: {self.came or 'the end'} where {group[0]} was before")
        return self.sums  # type: ignore[return-value]

    def finish(self) -> None:
        """Let every batch leave the block."""
        for batch, one in zip(self.batches, self.passes, strict=True):
            self._go_on(batch, one)

    def _go_on(self, batch: Between, one: greenlet) -> None:
        self.at, self.running = batch, one
        one.switch(*(() if one else (batch,)))


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """The C library's call that gives unused pages back; None where it has none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _give_back() -> None:
    """Give the system the pages between the waiting batches' tensors: without it, a quarter more memory is held than is used."""
    trim = _trim()
    if trim is not None:
        trim(0)


@torch.no_grad()
def groups_of(model: Model, blocks: Sequence[Block], rows: Sequence[np.ndarray]) -> tuple[list[list[tuple[str, ...]]], list[int]]:
    """For every block the layers that read the same tensor, in the order in which they are computed; and the length of the tuple that it gives, 0 for a tensor.

    Tries on a few tokens whether the blocks, computed by themselves, write what they write in the network.
    """
    ids = torch.from_numpy(max(rows, key=len)[:PROBE])[None].to(model.network.device)
    real = torch.ones_like(ids, dtype=torch.bool)
    calls: list[tuple[str, Tensor]] = []
    written: list[tuple[int, Tensor]] = []

    def seen(path: str, read: Tensor) -> None:
        real_tokens(path, read, real)
        calls.append((path, read))

    def leave(module: nn.Module, args: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        written.append((0 if isinstance(output, Tensor) else len(output), _first(output).clone()))

    with losses.headless(model.network), ExitStack() as stack:
        for block in blocks:
            stack.callback(block.module.register_forward_hook(leave).remove)
        stack.enter_context(watching({path: module for block in blocks for path, module in model.anatomy.linears(block).items()}, seen))
        model.network(input_ids=ids, use_cache=False)
    whole = [length for length, _ in written]
    if len(written) != len(blocks) or not _follow(capture(model, blocks, whole, ids, real), blocks, [states for _, states in written]):
        raise InputError(f"the blocks of this {model.base.model_type} do not simply follow each other, or what they write is not finite")
    return [_alike(block, [(path, read) for path, read in calls if path in block.parts.linears]) for block in blocks], whole


def _follow(batch: Between, blocks: Sequence[Block], written: Sequence[Tensor]) -> bool:
    """Whether the blocks, one after another, write this."""
    for block, expected in zip(blocks, written, strict=True):
        batch.hidden = batch.after(block)
        if not torch.allclose(batch.hidden, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())):
            return False
    return True


def _alike(block: Block, calls: Sequence[tuple[str, Tensor]]) -> list[tuple[str, ...]]:
    """The block's layers, grouped by the tensor that they read."""
    for path in block.parts.linears:
        times = sum(path == one for one, _ in calls)
        if times != 1:
            raise InputError(f"{'no calibration token reaches' if not times else f'calibration tokens reach {times} times'} {path}", remedy=UNSEEN)
    found: list[tuple[Tensor, list[str]]] = []
    for path, read in calls:
        if found and found[-1][0].data_ptr() == read.data_ptr() and found[-1][0].shape == read.shape:
            found[-1][1].append(path)
        else:
            found.append((read, [path]))
    return [tuple(paths) for _, paths in found]


@torch.no_grad()
def moments(model: Model, rows: Sequence[np.ndarray], paths: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance over the tokens of every input channel of these linear layers, float64; the variance divides by tokens - 1.

    Raises InputError if the tokens do not all reach a layer.  Cost: one forward pass over the rows.
    """
    require_causal(model, "measuring channels")
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    real: Tensor

    def add(path: str, read: Tensor) -> None:
        tokens = real_tokens(path, read, real).double()
        sums[path] = sums.get(path, 0) + tokens.sum(0)
        squares[path] = squares.get(path, 0) + tokens.square().sum(0)

    done, count = 0, sum(map(len, rows))
    with losses.headless(model.network), watching({path: model.network.get_submodule(path) for path in paths}, add):
        for ids, real in padded_batches(model, rows):
            model.network(input_ids=ids, use_cache=False)
            done += int(real.sum())
            report("measuring channels", done, count)
    spend(tokens=count, flops=count * flops_per_token(model.network, COUNTED_LENGTH))
    means = {path: reached(sums, path) / count for path in paths}
    return {path: (mean, ((squares[path] - count * mean.square()) / (count - 1)).clamp(min=0)) for path, mean in means.items()}


def reached(sums: Mapping[str, Tensor], path: str) -> Tensor:
    """What was gathered of this layer.  Raises InputError if nothing was."""
    if path not in sums:
        raise InputError(f"no calibration token reaches {path}", remedy=UNSEEN)
    return sums[path]


def real_tokens(path: str, read: Tensor, real: Tensor) -> Tensor:
    """The real tokens' part of what a layer read, (tokens, channels)."""
    flat = read.reshape(-1, read.shape[-1])
    if len(flat) != real.numel():
        raise InputError(f"{path} reads {len(flat)} positions of {real.numel()} tokens", remedy="Layers that read only some tokens, such as experts, cannot be measured.")
    return flat[real.flatten()]


@contextmanager
def watching(modules: Mapping[str, nn.Module], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Tell `seen` what every one of these layers reads."""

    def watch(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: seen(path, args[0])

    handles = [module.register_forward_pre_hook(watch(path)) for path, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Between:
    """Rows between two blocks, and what else each block is given: masks and positions, which no weight influences."""

    hidden: Tensor
    real: Tensor
    calls: list[tuple[bool, tuple[Any, ...], dict[str, Any]]]
    """For each block whether hidden states come by position, and its other arguments."""

    def after(self, block: Block) -> Tensor:
        """What the block makes of the hidden states, which are handed over to it: some blocks add to their input in place, and nobody else needs them."""
        by_position, args, kwargs = self.calls[block.index]
        held = [self.hidden]
        del self.hidden
        return _first(block.module(held.pop(), *args, **kwargs) if by_position else block.module(*args, hidden_states=held.pop(), **kwargs))


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


class _Stop(Exception):  # noqa: N818, nothing is wrong
    """Every block was entered, and the rest of the network need not run."""


@contextmanager
def _handing_on(model: Model, blocks: Sequence[Block], whole: Sequence[int]) -> Iterator[list[tuple[Tensor, tuple[bool, tuple[Any, ...], dict[str, Any]]]]]:
    """Inside, blocks hand on what they read instead of computing; gives what each was called with.  whole: for each, the length of the tuple that it gives, 0 for a tensor."""
    calls: list[tuple[Tensor, tuple[bool, tuple[Any, ...], dict[str, Any]]]] = []

    def enter(place: int, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if place != len(calls):
            raise InputError(f"the blocks of this {model.base.model_type} do not simply follow each other")
        calls.append((hidden, (bool(args), tuple(args[1:]), {name: value for name, value in kwargs.items() if name != "hidden_states"})))
        if len(calls) == len(blocks):
            raise _Stop
        return (hidden, *(None,) * (whole[place] - 1)) if whole[place] else hidden

    with ExitStack() as stack:
        for place, block in enumerate(blocks):
            stack.enter_context(fused.instead(block.module, "forward", functools.partial(enter, place)))
        yield calls


def capture(model: Model, blocks: Sequence[Block], whole: Sequence[int], ids: Tensor, real: Tensor) -> Between:
    """What the first block is given, and every block's other arguments; no block is computed."""
    with _handing_on(model, blocks, whole) as calls:
        try:
            model.network(input_ids=ids, use_cache=False)
        except _Stop:
            return Between(calls[0][0].clone(), real, [given for _, given in calls])
    raise InputError(f"only {len(calls)} of the {len(blocks)} blocks of this {model.base.model_type} are ever entered")
