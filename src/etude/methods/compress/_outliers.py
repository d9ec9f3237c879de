"""Outliers of weights and activations, found from coarse to fine: weights are cut off, activations are scaled into the weights that read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from etude.engine import losses
from etude.engine.cost import flops_per_token, spend
from etude.engine.progress import report
from etude.engine.score import COUNTED_LENGTH, padded_batches
from etude.engine.stream import PROBE, real_tokens, watching
from etude.values.anatomy import Block, weight_of
from etude.values.model import Model
from etude.values.trace import is_linear


def bound(values: Tensor, coarse: float, fine: float) -> float:
    """The largest of these magnitudes that is no outlier.

    Coarse: those above Q3 + coarse · (Q3 - Q1), by quartiles, are suspects.  Fine: of all ways to part the suspects, in order, into some that are kept and
    larger ones that are outliers, the one with the greatest gap² - fine · variance: the gap between the least outlier and the largest that is kept, the
    variance of the suspects that are kept.  Having no outlier at all is one of the ways, with a gap of zero.
    """
    ordered = values.flatten().double().sort().values
    low, high = (_quantile(ordered, share) for share in (0.25, 0.75))
    first = int((ordered <= high + coarse * (high - low)).sum())
    suspects = ordered[first:]
    count = len(suspects)
    if not count:
        return float(ordered[-1])
    kept = ordered[first - 1 :]  # the largest that is kept, for 0, 1, … count suspects that are
    gaps = torch.cat([(suspects - kept[:-1]).square(), suspects.new_zeros(1)])
    centred = suspects - suspects.mean()
    sizes = torch.arange(1, count + 1, dtype=torch.float64, device=ordered.device)
    spread = centred.square().cumsum(0) / sizes - (centred.cumsum(0) / sizes).square()
    return float(kept[(gaps - fine * torch.cat([spread.new_zeros(1), spread.clamp(min=0)])).argmax()])


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """Between the two nearest of sorted values, as numpy's default."""
    place = share * (len(ordered) - 1)
    below = ordered[int(place)]
    return below + (place - int(place)) * (ordered[min(int(place) + 1, len(ordered) - 1)] - below)


@torch.no_grad()
def truncate(weight: Tensor, coarse: float, fine: float) -> None:
    """Cut a layer's weights off at the largest magnitude that is no outlier, in place."""
    most = bound(weight.float().abs(), coarse, fine)
    weight.clamp_(-most, most)


def factors(tops: Tensor, coarse: float, fine: float) -> Tensor | None:
    """By what channels with these largest magnitudes, (channels,), are divided: outliers by √(magnitude / the largest that is none), others by 1; None if there is no outlier."""
    most = bound(tops, coarse, fine)
    found = torch.where(tops > most, (tops / most).sqrt(), 1.0) if most > 0 else torch.ones_like(tops)
    return found if bool((found > 1).any()) else None


@torch.no_grad()
def tops(model: Model, rows: Sequence[np.ndarray], paths: Sequence[str]) -> dict[str, Tensor]:
    """The largest magnitude over all tokens of every input channel of these linear layers, float32.  Cost: one forward pass over the rows."""
    found: dict[str, Tensor] = {}
    real: Tensor

    def see(path: str, read: Tensor) -> None:
        most = real_tokens(path, read, real).float().abs().amax(0)
        found[path] = torch.maximum(found[path], most) if path in found else most

    done, count = 0, sum(map(len, rows))
    with losses.headless(model.network), watching({path: model.network.get_submodule(path) for path in paths}, see):
        for ids, real in padded_batches(model, rows):
            model.network(input_ids=ids, use_cache=False)
            done += int(real.sum())
            report("measuring activations", done, count)
    spend(tokens=count, flops=count * flops_per_token(model.network, COUNTED_LENGTH))
    return found


@torch.no_grad()
def scale_activations(draft: Model, rows: Sequence[np.ndarray], groups: Sequence[Sequence[tuple[str, ...]]], coarse: float, fine: float) -> list[str]:
    """Divide outlying channels of what layers read where it is written, and multiply the weights that read them, so that the network computes what it did.

    groups: for every block the layers that read the same tensor.  A norm's gain, or a linear layer whose channels only a linear or piecewise linear map parts from the
    readers, can take the division; whether it can is tried out with a factor of two on all channels, which is exact.
    Gives the first layer of every group that was scaled.
    """
    ids = torch.from_numpy(max(rows, key=len)[:PROBE])[None].to(draft.network.device)
    most = tops(draft, rows, [group[0] for several in groups for group in several])
    scaled = []
    with losses.headless(draft.network):
        norms, expected = _norms(draft, ids), _states(draft, ids)
        for block, several in zip(draft.anatomy.blocks, groups, strict=True):
            for group in several:
                by = factors(most[group[0]], coarse, fine)
                readers = [weight_of(draft.network.get_submodule(path)).T for path in group]
                for writers in _writers(draft, block, group, norms) if by is not None else ():
                    assert by is not None
                    twice = torch.full_like(by, 2.0)
                    _move(writers, readers, twice)
                    same = torch.allclose(_states(draft, ids), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
                    _move(writers, readers, 1 / twice)
                    if same:
                        _move(writers, readers, by)
                        scaled.append(group[0])
                        break
    return scaled


def _move(writers: Sequence[Tensor], readers: Sequence[Tensor], by: Tensor) -> None:
    """Divide what writes the channels, and multiply what reads them; each tensor has the channels as its first dimension."""
    for tensor in writers:
        tensor.div_(by.to(tensor.dtype).view(-1, *(1,) * (tensor.ndim - 1)))
    for tensor in readers:
        tensor.mul_(by.to(tensor.dtype)[:, None])


def _writers(draft: Model, block: Block, group: tuple[str, ...], norms: dict[str, nn.Module]) -> Iterator[list[Tensor]]:
    """Tensors that may write what a group of layers reads, the channels first."""
    if group[0] in norms:
        module: Any = norms[group[0]]
        yield [one.detach() for one in (module.weight, getattr(module, "bias", None)) if one is not None]
    layer = block.feed_forward
    if layer is not None and not layer.experts and group == (layer.output,):
        for path, offsets in layer.inputs.items():
            module = draft.network.get_submodule(path)
            for offset in offsets:
                part = slice(offset, offset + layer.channels)
                yield [weight_of(module).detach()[part], *([] if module.bias is None else [module.bias.detach()[part]])]


def _norms(draft: Model, ids: Tensor) -> dict[str, nn.Module]:
    """The norms whose output linear layers read as it is, by the layer's path."""
    written: list[tuple[nn.Module, Tensor]] = []
    found: dict[str, nn.Module] = {}

    def write(module: nn.Module, given: Any, made: Any) -> None:
        if isinstance(made, Tensor):
            written.append((module, made))  # held, so that no other tensor takes its place in memory

    def see(path: str, read: Tensor) -> None:
        for module, made in written:
            if made.data_ptr() == read.data_ptr() and made.shape == read.shape:
                found[path] = module

    anatomy = draft.anatomy
    with ExitStack() as stack:
        for block in anatomy.blocks:
            for module in block.module.modules():
                if not is_linear(module) and getattr(getattr(module, "weight", None), "ndim", None) == 1:
                    stack.callback(module.register_forward_hook(write).remove)
        stack.enter_context(watching({path: module for block in anatomy.blocks for path, module in anatomy.linears(block).items()}, see))
        draft.network(input_ids=ids, use_cache=False)
    return found


def _states(draft: Model, ids: Tensor) -> Tensor:
    """What the head would read, inside `losses.headless`."""
    return draft.network(input_ids=ids, use_cache=False).logits.clone()  # type: ignore[no-any-return]
