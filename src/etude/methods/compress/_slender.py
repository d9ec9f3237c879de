"""Make every layer of an encoder narrower by first-order importance: heads, feed-forward channels, and channels of the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from etude.engine.feed import Batch
from etude.methods.compress._taylor import coupled
from etude.methods.compress._units import Site, cut, sites
from etude.values.anatomy import output_dim
from etude.values.edits import Edit, Tie
from etude.values.errors import InputError
from etude.values.model import Model
from etude.values.trace import Attention, FeedForward, is_linear
from etude.values.width import width

Places = list[tuple[str, tuple[tuple[str, int], ...]]]


def salience(network: nn.Module, batches: Iterable[Batch], loss: Callable[[nn.Module, Batch], Tensor]) -> dict[str, Tensor]:
    """|weight| · Σ |gradient| over the batches, by parameter name, each of its parameter's shape; a tied one stands under each of its names.

    The network is left as it was, without gradients.  Cost: a forward and a backward pass over the batches; memory for two gradients.
    """
    named = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    sums = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    training = network.training
    network.eval()
    with torch.enable_grad():
        for part in batches:
            loss(network, part).backward()
            for name, parameter in named.items():
                if parameter.grad is not None:
                    sums[name] += parameter.grad.abs()
            network.zero_grad(set_to_none=True)
    network.train(training)
    by_parameter = {id(parameter): sums[name] * parameter.detach().abs() for name, parameter in named.items()}
    return {name: by_parameter[id(parameter)] for name, parameter in network.named_parameters(remove_duplicate=False) if id(parameter) in by_parameter}


def narrow(draft: Model, known: dict[str, Tensor], heads: dict[int, int], channels: dict[int, int], stream: int) -> list[int]:
    """Cut a draft in place: in each block the heads and channels of least salience, until so many are left, and of the residual stream; which of its channels stay.

    A head scores the salience of its columns of the output projection, a channel that of its column and of its rows (as in COST-EFF's code), a channel of the stream that of
    all that goes with it.  heads and channels: by block; of heads that share keys and values as many groups as come nearest.
    """
    places = sites(draft, "COST-EFF")
    gone = []
    for site in places:
        members = sum(map(len, site.units))
        wanted = (heads if site.attention else channels)[site.block]
        drop = len(site.units) - max(1, round(wanted * len(site.units) / members))
        order = np.argsort(unit_scores(draft, known, site), kind="stable")[: max(0, drop)]
        gone.append(sorted(member for unit in order for member in site.units[unit]))
    scores = stream_scores(draft, known)
    order = np.argsort(scores, kind="stable")[: max(0, len(scores) - stream)].tolist()
    cut(draft, places, gone)
    kept = [channel for channel in range(len(scores)) if channel not in set(order)]
    drop_stream(draft, kept)
    return kept


def unit_scores(model: Model, known: dict[str, Tensor], site: Site) -> np.ndarray:
    """Salience of the units of a site, (units,)."""
    columns = _oriented(model, site.output, known).sum(0).double().cpu().numpy()
    total = np.array([columns[site.columns(unit)].sum() for unit in site.units])
    if not site.attention:
        for path, by_unit in coupled(model, site).items():
            rows = _oriented(model, path, known).sum(1).double().cpu().numpy()
            total += [rows[chosen].sum() for chosen in by_unit]
    return total


def _oriented(model: Model, path: str, known: dict[str, Tensor]) -> Tensor:
    """Salience of a linear layer's weight, (output, input)."""
    found = known[f"{path}.weight"]
    return found if output_dim(model.network.get_submodule(path)) == 0 else found.T


def stream_scores(model: Model, known: dict[str, Tensor]) -> np.ndarray:
    """Salience of the residual stream's channels, (width,): over everything that they are cut from."""
    total = np.zeros(width(model))
    for path, names in stream_places(model):
        for name, dim in names:
            found = known[f"{path}.{name}" if path else name].double()
            total += found.sum([other for other in range(found.ndim) if other != dim]).cpu().numpy() if found.ndim > 1 else found.cpu().numpy()
    return total


def drop_stream(model: Model, kept: list[int]) -> None:
    """Keep these channels of a draft's residual stream, as `values.width.drop_width` does, and in everything outside the blocks that is as wide: heads with a matrix of their own, exits."""
    if len(kept) == width(model):
        return
    tied = _tied(model)
    for path, names in stream_places(model):
        for dim in sorted({dim for _, dim in names}):
            model.anatomy._narrow(path, tuple((name, own) for name, own in names if own == dim), kept)
    if tied and not any(isinstance(edit, Tie) for edit in model.edits):
        change: Edit = Tie()
        model.edit(change)
    elif tied:
        Tie().apply(model.network)


def stream_places(model: Model) -> Places:
    """Every module that holds the stream's channels, by path, with the parameters concerned and the dimension of each; of tied ones the embedding.

    Raises InputError for experts, several stacks, and linear layers of another kind inside the blocks.
    """
    network, count, what = model.network, width(model), f"the width of this {model.base.model_type}"
    if len(model.anatomy.stacks) != 1:
        raise InputError(f"{what} cannot be cut: it has {len(model.anatomy.stacks)} stacks of blocks")
    inside: dict[str, int] = {}
    for block in model.anatomy.blocks:
        layer = block.feed_forward
        if layer is not None and layer.experts:
            raise InputError(f"{what} cannot be cut: block {block.index} has experts")
        parts: list[Attention | FeedForward] = [*block.parts.attentions, *([layer] if layer else [])]
        for part in parts:
            reads = part.rows if isinstance(part, Attention) else part.inputs
            inside |= {path: 1 - output_dim(network.get_submodule(path)) for path in reads} | {part.output: output_dim(network.get_submodule(part.output))}
    paths, head = tuple(f"{block.path}." for block in model.anatomy.blocks), network.get_output_embeddings()
    found: Places = []
    for path, module in network.named_modules():
        own = {name: parameter for name, parameter in module.named_parameters(recurse=False) if count in parameter.shape}
        if not own or (module is head and _tied(model)):
            continue
        if path in inside:
            names: tuple[tuple[str, int], ...] = (("weight", inside[path]), *((("bias", 0),) if inside[path] == output_dim(module) and getattr(module, "bias", None) is not None else ()))
        elif is_linear(module) and path.startswith(paths):
            raise InputError(f"{what} cannot be cut: {path} is neither in a feed-forward layer nor in an attention")
        elif isinstance(module, nn.Embedding) or module is head:
            names = (("weight", 1),)
        else:
            names = tuple((name, dim) for name, parameter in own.items() for dim, size in enumerate(parameter.shape) if size == count)
        found.append((path, names))
    return found


def _tied(model: Model) -> bool:
    head: Any = model.network.get_output_embeddings()
    embedding: Any = model.network.get_input_embeddings()
    return head is not None and head.weight is embedding.weight
