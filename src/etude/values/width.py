"""Make a model's residual stream narrower: the same channels cut from everything that writes to it, reads it or normalizes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from etude.values.edits import Edit, Tie
from etude.values.errors import InputError
from etude.values.trace import is_linear, output_dim

if TYPE_CHECKING:
    from etude.values.model import Model


def width(model: Model) -> int:
    """Channels of the residual stream."""
    embedding: Any = model.network.get_input_embeddings()
    return int(embedding.weight.shape[1])


def drop_width(model: Model, channels: Sequence[int]) -> None:
    """Cut these channels of the residual stream out of a draft.

    Cut are: rows of embeddings; inputs of what reads the stream (queries, keys, values, up, gate, the head) and outputs of what writes to it; vectors of the norms on it.
    A norm's mean is then one over fewer channels; a config that scales by the width (Gemma) keeps the scale that it had.
    Raises InputError, before anything is changed, for experts, for networks with linear layers of another kind outside or inside the blocks, for several stacks, and if nothing would be left.
    """
    model.require_draft()
    count = width(model)
    cuts, gone = places(model), set(channels)
    if not all(0 <= channel < count for channel in gone) or len(gone) >= count:
        raise InputError(f"the residual stream has channels 0 to {count - 1}, and keeps at least one; got {len(gone)} of them to drop")
    kept = [channel for channel in range(count) if channel not in gone]
    tied = _tied(model)
    for path, names in cuts:
        model.anatomy._narrow(path, names, kept)
    if tied and not any(isinstance(edit, Tie) for edit in model.edits):
        change: Edit = Tie()
        model.edit(change)
    elif tied:
        Tie().apply(model.network)


def _tied(model: Model) -> bool:
    head: Any = model.network.get_output_embeddings()
    embedding: Any = model.network.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def places(model: Model) -> list[tuple[str, tuple[tuple[str, int], ...]]]:
    """Every module that holds the stream's channels, by path, with the parameters concerned and the dimension of each; of tied ones the embedding.

    Raises InputError for a network in which they cannot be told, as `drop_width` does.
    """
    from torch import nn

    network, count, what = model.network, width(model), f"the width of this {model.base.model_type}"
    if len(model.anatomy.stacks) != 1:
        raise InputError(f"{what} cannot be cut: it has {len(model.anatomy.stacks)} stacks of blocks")
    reads, writes = set(), set()
    for block in model.anatomy.blocks:
        layer = block.feed_forward
        if layer is not None and layer.experts:
            raise InputError(f"{what} cannot be cut: block {block.index} has experts")
        for attention in block.parts.attentions:
            reads |= set(attention.rows)
            writes.add(attention.output)
        if layer is not None:
            reads |= set(layer.inputs)
            writes.add(layer.output)
    head = network.get_output_embeddings()
    found: list[tuple[str, tuple[tuple[str, int], ...]]] = []
    for path, module in network.named_modules():
        own = {name: parameter for name, parameter in module.named_parameters(recurse=False) if count in parameter.shape}
        if is_linear(module):
            if module is head:
                if not _tied(model):
                    found.append((path, (("weight", 1),)))
            elif path in reads:
                found.append((path, (("weight", 1 - output_dim(module)),)))
            elif path in writes:
                found.append((path, (("weight", output_dim(module)), *((("bias", 0),) if getattr(module, "bias", None) is not None else ()))))
            elif own:
                raise InputError(f"{what} cannot be cut: {path} is neither in a feed-forward layer nor in an attention")
        elif isinstance(module, nn.Embedding):
            if module.weight.shape[1] == count:
                found.append((path, (("weight", 1),)))
        elif own:
            if any(parameter.ndim != 1 for parameter in own.values()):
                raise InputError(f"{what} cannot be cut: {path} holds more than a vector of that width")
            found.append((path, tuple((name, 0) for name in own)))
    return found
