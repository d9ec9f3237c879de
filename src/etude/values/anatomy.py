"""The anatomy of a model: its blocks, heads and channels, and the cuts that can be made there.

The only place that knows architectures.  What a block is made of is traced (`etude.values.trace`); a cut is written down as
edits (`etude.values.edits`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from etude.values import trace
from etude.values.edits import Arrange, Attributes, Edit, Narrow, positions, runs
from etude.values.errors import InputError
from etude.values.trace import Attention, FeedForward, Parts, is_linear, output_dim

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

    from etude.values.model import Model

COUNTS = {"encoder": ("encoder_layers", "num_layers"), "decoder": ("decoder_layers", "num_decoder_layers", "num_layers")}
ALONE = ("num_hidden_layers",)
QUERY_HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads")
KEY_VALUE_HEADS = ("num_kv_heads", "num_key_value_heads")
GROUP_SIZES = ("num_key_value_groups",)
WIDTHS = ("all_head_size", "inner_dim", "embed_dim", "split_size", "dim")
CHANNELS = ("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "n_inner", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim", "intermediate_dim", "ffn_dim")


@dataclass(frozen=True)
class Block:
    """One transformer block: its place, its module, and its parts."""

    index: int
    """Place among all blocks, encoder before decoder."""
    stack: str
    """Path of the list that it stands in."""
    place: int
    """Place in that list."""
    module: nn.Module
    parts: Parts

    @property
    def path(self) -> str:
        return f"{self.stack}.{self.place}"

    @property
    def attention(self) -> Attention | None:
        """The self-attention, or None if the block has none or its heads cannot be told apart."""
        return self.parts.attentions[0] if self.parts.attentions else None

    @property
    def cross_attention(self) -> Attention | None:
        return self.parts.attentions[1] if len(self.parts.attentions) > 1 else None

    @property
    def feed_forward(self) -> FeedForward | None:
        return self.parts.feed_forward


class Anatomy:
    """What a model is made of.  Cuts change the model, which must be a draft."""

    def __init__(self, model: Model):
        self._model = model

    @property
    def network(self) -> nn.Module:
        return self._model.network

    @functools.cached_property
    def stacks(self) -> dict[str, int]:
        """Paths of the lists of blocks, with how many stand in each."""
        return {stack: len(self.network.get_submodule(stack)) for stack in trace.stacks(self.network)}  # type: ignore[arg-type]

    @functools.cached_property
    def blocks(self) -> list[Block]:
        """Every block, traced: encoder before decoder.  Cost: one forward pass over a few tokens."""
        found = trace.trace(self._model.network)
        listed = [(stack, place, parts) for stack, several in found.items() for place, parts in enumerate(several)]
        return [Block(index, stack, place, self.network.get_submodule(f"{stack}.{place}"), parts) for index, (stack, place, parts) in enumerate(listed)]

    @property
    def embeddings(self) -> nn.Module:
        """The module whose weight is (tokens, width)."""
        return self._model.network.get_input_embeddings()

    @property
    def head(self) -> nn.Module | None:
        """The module that makes logits, if there is one."""
        return self._model.network.get_output_embeddings()

    def linears(self, block: Block) -> dict[str, nn.Module]:
        """The linear layers of a block by path, those of its experts aside."""
        return {path: self.network.get_submodule(path) for path in block.parts.linears}

    # Whole blocks.

    def arrange(self, order: Sequence[int]) -> None:
        """Keep these blocks in this order; one named twice becomes two.  A stack of an encoder–decoder keeps to itself.

        Raises InputError if a stack is left empty or the order mixes stacks.
        """
        places = [(stack, place) for stack, count in self.stacks.items() for place in range(count)]
        if any(not 0 <= index < len(places) for index in order):
            raise InputError(f"the model has blocks 0 to {len(places) - 1}, got {list(order)}")
        chosen = [places[index] for index in order]
        if [stack for stack, _ in chosen] != sorted((stack for stack, _ in chosen), key=list(self.stacks).index):
            raise InputError("blocks cannot move between an encoder and a decoder")
        for stack, count in self.stacks.items():
            own = tuple(place for owner, place in chosen if owner == stack)
            if not own:
                raise InputError(f"a model keeps at least one block; nothing is left of {stack}")
            if own != tuple(range(count)):
                self._arrange(stack, own, len(self.stacks))

    def drop(self, blocks: Sequence[int]) -> None:
        """Take blocks away."""
        count = sum(self.stacks.values())
        if any(not 0 <= block < count for block in blocks):
            raise InputError(f"the model has blocks 0 to {count - 1}, got {list(blocks)}")
        self.arrange([index for index in range(count) if index not in set(blocks)])

    def _arrange(self, stack: str, order: tuple[int, ...], stacks: int) -> None:
        model = self._model
        side = next((side for side in COUNTS if side in stack.split(".")), None)
        change = Arrange(stack, order, COUNTS[side] if stacks > 1 and side else ALONE)
        before = model.edits
        model.edit(change)
        earlier = next((edit for edit in before if isinstance(edit, Arrange) and edit.stack == stack), None)
        if earlier:
            change = dataclasses.replace(change, order=tuple(earlier.order[place] for place in order))
        arranges: list[Edit] = [edit for edit in before if isinstance(edit, Arrange) and edit is not earlier]
        moved = [new for edit in before if not isinstance(edit, Arrange) for new in _moved(edit, stack, order)]
        model.replace_edits([*arranges, change, *moved])

    # Heads.

    def drop_heads(self, cuts: Mapping[int, Sequence[int]], cross: bool = False) -> None:
        """Take query heads away, by block; keys and values that no head is left to use go with them.

        cross: cut the cross-attention instead.  Heads that share keys and values must lose equally many in every group that stays, as every
        implementation divides them evenly; where the blocks share one position bias (T5), all of them must lose the same heads.
        Raises InputError, before anything is changed, if a cut is not of this kind.
        """
        self._model.require_draft()
        blocks = self.blocks
        attentions = {index: self._attention(blocks, index, cross) for index in cuts}
        changes: list[tuple[Block, Attention, list[int]]] = []
        for index, heads in cuts.items():
            _check_heads(attentions[index], heads, index)
            if heads:
                changes.append((blocks[index], attentions[index], sorted(set(heads))))
        bias = {path for block, _, _ in changes for path in self._shared_bias(block, cross)}
        if bias:
            self._check_shared(cuts, [block for block, _, _ in changes], blocks)
        for block, attention, heads in changes:
            self._cut_heads(block, attention, heads)
        for path in sorted(bias):
            table = self.network.get_submodule(path)
            dropped = changes[0][2]
            self._narrow(path, (("weight", 1),), [column for column in range(table.weight.shape[1]) if column not in dropped])  # type: ignore[union-attr, index, operator]

    def _attention(self, blocks: list[Block], index: int, cross: bool) -> Attention:
        if not 0 <= index < len(blocks):
            raise InputError(f"the model has blocks 0 to {len(blocks) - 1}, got {index}")
        attention = blocks[index].cross_attention if cross else blocks[index].attention
        if attention is None:
            raise InputError(f"block {index} of this {self._model.base.model_type} has no {'cross-' if cross else ''}attention heads to cut")
        return attention

    def _shared_bias(self, block: Block, cross: bool) -> list[str]:
        """Paths of tables of position biases, a column a head, that the blocks of this stack share."""
        from torch import nn

        if cross:
            return []
        attention = block.attention
        assert attention is not None
        first = self.network.get_submodule(f"{block.stack}.0")
        return [f"{block.stack}.0.{path}" for path, module in first.named_modules() if isinstance(module, nn.Embedding) and module.embedding_dim == attention.heads]

    def _check_shared(self, cuts: Mapping[int, Sequence[int]], changed: list[Block], blocks: list[Block]) -> None:
        for stack in {block.stack for block in changed}:
            members = [block.index for block in blocks if block.stack == stack]
            if len({tuple(sorted(set(cuts.get(index, ())))) for index in members}) > 1:
                raise InputError("the blocks of this stack share one position bias", remedy="Cut the same heads in every one of its blocks, in one call.")

    def _cut_heads(self, block: Block, attention: Attention, dropped: list[int]) -> None:
        gone = set(dropped)
        for path, rows in attention.rows.items():
            self._narrow_rows(path, [row for row, users in enumerate(rows) if not users or not users <= gone])
        width = attention.head_dim
        self._narrow_columns(attention.output, [head * width + i for head in range(attention.heads) if head not in gone for i in range(width)])
        groups = [[head for head in group if head not in gone] for group in attention.groups]
        groups = [group for group in groups if group]
        heads, shared = sum(map(len, groups)), len(groups)
        for owner in sorted({path.rpartition(".")[0] for path in attention.rows}):
            values = _head_attributes(self.network.get_submodule(owner), attention, heads, shared)
            if values:
                self._set(owner, values)

    # Channels.

    def drop_channels(self, cuts: Mapping[int, Sequence[int]]) -> None:
        """Take feed-forward channels away, by block; of a layer of experts, the same channels of each.

        Raises InputError, before anything is changed, if a block has no such channels or would keep none.
        """
        self._model.require_draft()
        blocks = self.blocks
        for index, channels in cuts.items():
            layer = blocks[index].feed_forward if 0 <= index < len(blocks) else None
            if layer is None:
                raise InputError(f"block {index} of this {self._model.base.model_type} has no feed-forward channels to cut")
            if not all(0 <= channel < layer.channels for channel in channels) or len(set(channels)) >= layer.channels:
                raise InputError(f"block {index} has channels 0 to {layer.channels - 1}, and keeps at least one; got {len(set(channels))} of them to drop")
            if layer.experts and (layer.channels - len(set(channels))) % 8:
                raise InputError(
                    f"the experts of block {index} keep a multiple of 8 of their {layer.channels} channels, for torch's grouped products; this cut leaves {layer.channels - len(set(channels))}"
                )
        for index, channels in cuts.items():
            layer = blocks[index].feed_forward
            assert layer is not None
            gone = set(channels)
            kept = [channel for channel in range(layer.channels) if channel not in gone]
            if len(kept) == layer.channels:
                continue
            for path, offsets in layer.inputs.items():
                rows = [offset + channel for offset in offsets for channel in kept]
                if layer.experts:
                    self._narrow(path.rpartition(".")[0], ((path.rpartition(".")[2], 1),), rows)
                else:
                    self._narrow_rows(path, rows)
            if layer.experts:
                self._narrow(layer.output.rpartition(".")[0], ((layer.output.rpartition(".")[2], 2),), kept)
            else:
                self._narrow_columns(layer.output, kept)
            for owner in sorted({path.rpartition(".")[0] for path in layer.inputs}):
                values = tuple((name, len(kept)) for name in dict.fromkeys(CHANNELS) if getattr(self.network.get_submodule(owner), name, None) == layer.channels)
                if values:
                    self._set(owner, values)

    # Writing cuts down.

    def _narrow_rows(self, path: str, kept: list[int]) -> None:
        module = self.network.get_submodule(path)
        names = (("weight", output_dim(module)),) + ((("bias", 0),) if getattr(module, "bias", None) is not None else ())
        self._narrow(path, names, kept)

    def _narrow_columns(self, path: str, kept: list[int]) -> None:
        self._narrow(path, (("weight", 1 - output_dim(self.network.get_submodule(path))),), kept)

    def _narrow(self, path: str, names: tuple[tuple[str, int], ...], kept: list[int]) -> None:
        """Cut now, and merge with an earlier cut at the same place, so that what is written counts from the uncut module."""
        model = self._model
        size = getattr(self.network.get_submodule(path), names[0][0]).shape[names[0][1]]
        if len(kept) == size:
            return
        before = list(model.edits)
        model.edit(Narrow(path, names, runs(kept), size))
        for place, edit in enumerate(before):
            if isinstance(edit, Narrow) and (edit.module, edit.names) == (path, names):
                old = positions(edit.kept)
                before[place] = dataclasses.replace(edit, kept=runs([old[i] for i in kept]))
                return model.replace_edits(before)

    def _set(self, path: str, values: tuple[tuple[str, int], ...]) -> None:
        model = self._model
        before = list(model.edits)
        model.edit(Attributes(path, values))
        for place, edit in enumerate(before):
            if isinstance(edit, Attributes) and edit.module == path:
                before[place] = Attributes(path, tuple({**dict(edit.values), **dict(values)}.items()))
                return model.replace_edits(before)


def weight_of(module: nn.Module) -> Tensor:
    """A linear layer's weight as (output, input), a view: what is written there is written to the layer."""
    assert is_linear(module)
    return module.weight if output_dim(module) == 0 else module.weight.T  # type: ignore[union-attr, return-value, operator]


def _check_heads(attention: Attention, heads: Sequence[int], index: int) -> None:
    gone = set(heads)
    if not gone <= set(range(attention.heads)):
        raise InputError(f"block {index} has heads 0 to {attention.heads - 1}, got {sorted(gone)}")
    left = [sum(head not in gone for head in group) for group in attention.groups]
    if not any(left):
        raise InputError(f"block {index} keeps at least one of its {attention.heads} heads")
    if len({count for count in left if count}) > 1:
        raise InputError(
            f"block {index} shares keys and values among heads {', '.join(map(str, attention.groups))}; this cut would leave {left} of them",
            remedy="Drop whole groups, or equally many heads of every group.",
        )


def _head_attributes(module: nn.Module, attention: Attention, heads: int, shared: int) -> tuple[tuple[str, int], ...]:
    """The counts that a module keeps of its heads, with their new values."""
    values: dict[str, int] = {}
    for names, new in ((QUERY_HEADS, heads), (KEY_VALUE_HEADS, shared), (GROUP_SIZES, heads // shared)):
        values.update({name: new for name in names if isinstance(getattr(module, name, None), int)})
    values.update({name: heads * attention.head_dim for name in WIDTHS if getattr(module, name, None) == attention.heads * attention.head_dim})
    source = inspect.getsource(type(module).forward)
    for name in set(re.findall(r"self\.config\.(\w+)", source)) & {*QUERY_HEADS, *KEY_VALUE_HEADS}:
        values[f"config.{name}"] = heads if name in QUERY_HEADS else shared
    return tuple(values.items())


def _moved(edit: Edit, stack: str, order: tuple[int, ...]) -> Iterator[Edit]:
    """An edit of something inside a stack, where it stands after the stack was arranged anew: nowhere, or at several places."""
    path = getattr(edit, "module", "")
    if not path.startswith(stack + "."):
        yield edit
        return
    place, _, rest = path.removeprefix(stack + ".").partition(".")
    for new, old in enumerate(order):
        if old == int(place):
            yield dataclasses.replace(edit, module=f"{stack}.{new}.{rest}" if rest else f"{stack}.{new}")  # type: ignore[type-var]


def candidates(model: Model) -> Iterator[PretrainedConfig]:
    """Configs that may describe an edited network alone, the likeliest first; the caller checks them against it."""
    config = copy.deepcopy(model.network.config)
    if not any(isinstance(edit, Narrow) for edit in model.edits):
        yield config
        return
    blocks = model.anatomy.blocks
    attentions = [attention for block in blocks for attention in block.parts.attentions]
    layers = [block.feed_forward for block in blocks if block.feed_forward]
    if attentions and len({(a.heads, a.key_value_heads, a.head_dim) for a in attentions}) == 1:
        first = attentions[0]
        for name, value in (("num_attention_heads", first.heads), ("num_key_value_heads", first.key_value_heads), ("head_dim", first.head_dim)):
            if hasattr(config, name) and not isinstance(getattr(type(config), name, None), property):
                setattr(config, name, value)
    if any(isinstance(edit, Narrow) and edit.module == _embedding_path(model) for edit in model.edits):
        embedding: Any = model.anatomy.embeddings
        config.hidden_size = embedding.weight.shape[1]
    if layers and len({layer.channels for layer in layers}) == 1:
        for name in _channel_fields(config, model):
            setattr(config, name, layers[0].channels)
    yield config


def _embedding_path(model: Model) -> str:
    return next(path for path, module in model.network.named_modules() if module is model.anatomy.embeddings)


def _channel_fields(config: PretrainedConfig, model: Model) -> list[str]:
    """Config fields that hold the number of feed-forward channels before any cut."""
    cuts = [edit for edit in model.edits if isinstance(edit, Narrow)]
    full: set[Any] = {edit.full for edit in cuts}
    return [name for name in dict.fromkeys(CHANNELS) if hasattr(config, name) and (getattr(config, name) in full or (name == "n_inner" and getattr(config, name) is None))]
