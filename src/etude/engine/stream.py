"""Calibration tokens on their way through the blocks: what layers read, gathered while the blocks are changed one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from etude.engine.cost import flops_per_token, spend
from etude.engine.progress import report
from etude.engine.score import COUNTED_LENGTH, padded_batches, require_causal
from etude.values.anatomy import Block
from etude.values.errors import InputError
from etude.values.model import Model


def require_dense(model: Model, what: str) -> None:
    """Raises InputError if a block has experts, each of which reads only some of the tokens."""
    for block in model.anatomy.blocks:
        if block.feed_forward is not None and block.feed_forward.experts:
            raise InputError(f"{what} cannot prune experts, and block {block.index} of this {model.base.model_type} has them")


def through_blocks(model: Model, rows: Sequence[np.ndarray], measure: Callable[[Tensor], Tensor]) -> Iterator[tuple[Block, dict[str, Tensor]]]:
    """For one block after another, the sum of `measure` over what each of its linear layers reads.

    measure: of real tokens' inputs, (tokens, channels) float32; its results are added up over the batches.
    Whoever iterates may change the weights of the block at hand: the next block reads what the changed one writes, as in a
    full forward pass.  Yields the block, and its sums by path; a layer that no token reaches is missing there.
    Raises InputError if the blocks do not simply follow each other.
    Cost: three passes over the rows; memory for the hidden states of all rows, and for all their attention masks.
    """
    require_causal(model, "streaming through blocks")
    return _through(model, model.anatomy.blocks, rows, measure)


@torch.no_grad()
def _through(model: Model, blocks: Sequence[Block], rows: Sequence[np.ndarray], measure: Callable[[Tensor], Tensor]) -> Iterator[tuple[Block, dict[str, Tensor]]]:
    batches = [_capture(model, blocks, ids, real) for ids, real in padded_batches(model, rows)]
    for block in blocks:
        sums: dict[str, Tensor] = {}
        for batch in batches:

            def add(path: str, read: Tensor, real: Tensor = batch.real, sums: dict[str, Tensor] = sums) -> None:
                value = measure(_tokens(path, read, real).float())
                sums[path] = sums[path] + value if path in sums else value

            with _watching(model.anatomy.linears(block), add):
                batch.after(block)
        yield block, sums
        for batch in batches:
            batch.hidden = batch.after(block)
        report("pruning block by block", block.index + 1, len(blocks))
    passed = 3 * sum(map(len, rows))
    spend(tokens=passed, flops=passed * flops_per_token(model.network, COUNTED_LENGTH))


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
        tokens = _tokens(path, read, real).double()
        sums[path] = sums.get(path, 0) + tokens.sum(0)
        squares[path] = squares.get(path, 0) + tokens.square().sum(0)

    done, count = 0, sum(map(len, rows))
    with _watching({path: model.network.get_submodule(path) for path in paths}, add):
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
        raise InputError(f"no calibration token reaches {path}", remedy="The network computes this layer without calling it, and what it reads cannot be seen.")
    return sums[path]


def _tokens(path: str, read: Tensor, real: Tensor) -> Tensor:
    """The real tokens' part of what a layer read, (tokens, channels)."""
    flat = read.reshape(-1, read.shape[-1])
    if len(flat) != real.numel():
        raise InputError(f"{path} reads {len(flat)} positions of {real.numel()} tokens", remedy="Layers that read only some tokens, such as experts, cannot be measured.")
    return flat[real.flatten()]


@contextmanager
def _watching(modules: Mapping[str, nn.Module], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
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
class _Batch:
    """Rows between two blocks, and what else each block is given: masks and positions, which no weight influences."""

    hidden: Tensor
    real: Tensor
    calls: list[tuple[bool, tuple[Any, ...], dict[str, Any]]]
    """For each block whether hidden states come by position, and its other arguments."""

    def after(self, block: Block) -> Tensor:
        """What the block makes of the hidden states."""
        by_position, args, kwargs = self.calls[block.index]
        hidden = self.hidden.clone()  # some blocks add to their input in place
        return _first(block.module(hidden, *args, **kwargs) if by_position else block.module(*args, hidden_states=hidden, **kwargs))


class _Stop(Exception):  # noqa: N818, nothing is wrong
    """Every block was entered, and the rest of the network need not run."""


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _capture(model: Model, blocks: Sequence[Block], ids: Tensor, real: Tensor) -> _Batch:
    """Run up to the last block and keep what the first is given, and every block's other arguments."""
    calls: list[tuple[bool, tuple[Any, ...], dict[str, Any]]] = []
    streams: list[Tensor] = []
    written: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if module is not blocks[len(calls)].module or (written and not torch.equal(written.pop(), hidden)):
            raise InputError(f"the blocks of this {model.base.model_type} do not simply follow each other, or what they write is not finite")
        if not calls:
            streams.append(hidden.clone())
        calls.append((bool(args), tuple(args[1:]), {name: value for name, value in kwargs.items() if name != "hidden_states"}))
        if len(calls) == len(blocks):
            raise _Stop

    def leave(module: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        written.append(_first(output))

    handles = [block.module.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    handles += [block.module.register_forward_hook(leave) for block in blocks]
    try:
        model.network(input_ids=ids, use_cache=False)
    except _Stop:
        return _Batch(streams[0], real, calls)
    finally:
        for handle in handles:
            handle.remove()
    raise InputError(f"only {len(calls)} of the {len(blocks)} blocks of this {model.base.model_type} are ever entered")
