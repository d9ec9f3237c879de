"""Edits: frozen, serialisable changes of a network's structure, replayed on a fresh network before its weights load.

An edit names modules by their path and resizes, reorders or replaces them.  It knows nothing of architectures:
`etude.values.anatomy` decides what to cut and writes the edits down.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from etude.values.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn


@runtime_checkable
class Edit(Protocol):
    """A frozen dataclass of plain fields that changes the structure of a network in place."""

    def apply(self, network: nn.Module) -> None: ...


@dataclass(frozen=True)
class Narrow:
    """Keep some rows (dim 0) or columns (dim 1) of the parameters that a module holds itself.

    `kept` lists positions in the module as it was before any cut, as runs ("0-15,32-47"); `full` is its original size there.
    `names` are the parameters concerned, each with the dimension that is cut.
    """

    module: str
    names: tuple[tuple[str, int], ...]
    kept: str
    full: int

    def apply(self, network: nn.Module) -> None:
        import torch

        module = network.get_submodule(self.module)
        keep = torch.tensor(positions(self.kept))
        for name, dim in self.names:
            replace_parameter(module, name, getattr(module, name).detach().index_select(dim, keep.to(getattr(module, name).device)))
        set_sizes(module)

    def pad(self, state: dict[str, Tensor]) -> None:
        """Undo the cut in a state dict: zeros where something was taken away."""
        import torch

        keep = torch.tensor(positions(self.kept))
        for name, dim in self.names:
            key = f"{self.module}.{name}" if self.module else name
            small = state[key]
            shape = list(small.shape)
            shape[dim] = self.full
            state[key] = torch.zeros(shape, dtype=small.dtype).index_copy(dim, keep, small.cpu())


@dataclass(frozen=True)
class Bias:
    """Give a linear layer without a bias one, zero at first."""

    module: str

    def apply(self, network: nn.Module) -> None:
        import torch
        from torch import nn

        module = network.get_submodule(self.module)
        size = module.weight.shape[0 if isinstance(module, nn.Linear) else 1]  # type: ignore[union-attr, index]
        module.bias = nn.Parameter(torch.zeros(size, dtype=module.weight.dtype, device=module.weight.device))  # type: ignore[union-attr, arg-type]


@dataclass(frozen=True)
class Attributes:
    """Set plain attributes of a module; ``config.name`` sets one in a copy of the module's config that it alone holds."""

    module: str
    values: tuple[tuple[str, int], ...]

    def apply(self, network: nn.Module) -> None:
        module = network.get_submodule(self.module)
        for name, value in self.values:
            if name.startswith("config."):
                if not module.__dict__.get("_own_config"):
                    object.__setattr__(module, "config", copy.copy(module.config))
                    object.__setattr__(module, "_own_config", True)
                setattr(module.config, name.removeprefix("config."), value)
            else:
                setattr(module, name, value)


@dataclass(frozen=True)
class Silence:
    """Put in the place of an attention or a feed-forward layer, whose output is added to the residual stream, one that has no weights and gives zeros."""

    module: str
    outputs: int
    """Length of the tuple that the layer gives, whose first member is the output; 0 if it gives the output alone."""

    def apply(self, network: nn.Module) -> None:
        from etude.values.silent import Silent

        network.set_submodule(self.module, Silent(self.outputs))


@dataclass(frozen=True)
class Tie:
    """Let what the config ties share one parameter again, after one of them was cut."""

    def apply(self, network: nn.Module) -> None:
        network.tie_weights()  # type: ignore[operator]
        for module in (network.get_input_embeddings(), network.get_output_embeddings()):  # type: ignore[operator]
            set_sizes(module)


@dataclass(frozen=True)
class Arrange:
    """Choose and order the blocks of one stack: `order` lists positions in the stack as the config builds it.

    A position listed twice becomes two blocks of their own.  Cache positions are numbered anew, per-layer lists in the
    config follow the order, and what only the first block carries (the shared relative position bias of T5) moves to whichever is first now.
    """

    stack: str
    order: tuple[int, ...]
    counts: tuple[str, ...]
    """Config fields that hold the number of blocks of this stack."""

    def apply(self, network: nn.Module) -> None:
        from torch import nn

        blocks = network.get_submodule(self.stack)
        assert isinstance(blocks, nn.ModuleList)
        before, seen = len(blocks), set()
        arranged: list[nn.Module] = []
        for position in self.order:
            arranged.append(copy.deepcopy(blocks[position]) if position in seen else blocks[position])
            seen.add(position)
        first_alone = _first_alone(list(blocks)) if before > 1 else {}
        for block in arranged:
            for path, (name, _) in first_alone.items():
                block.get_submodule(path)._modules.pop(name, None)
                _flags(block.get_submodule(path), name, block is arranged[0])
        for path, (name, module) in first_alone.items():
            arranged[0].get_submodule(path).add_module(name, module)
        blocks._modules.clear()
        for index, block in enumerate(arranged):
            blocks.append(block)
            for module in block.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = index  # type: ignore[assignment]
        _follow(network, self, before)


def _first_alone(blocks: list[nn.Module]) -> dict[str, tuple[str, nn.Module]]:
    """Submodules that the first block has and the second has not: parent path to (name, module)."""
    others = {name for name, _ in blocks[1].named_modules()}
    alone = {name: module for name, module in blocks[0].named_modules() if name and name not in others}
    return {name.rpartition(".")[0]: (name.rpartition(".")[2], module) for name, module in alone.items() if name.rpartition(".")[0] not in alone}


def _flags(module: nn.Module, name: str, value: bool) -> None:
    flag = f"has_{name}"
    if isinstance(getattr(module, flag, None), bool):
        setattr(module, flag, value)


def _follow(network: nn.Module, arrange: Arrange, before: int) -> None:
    """Bring every config object that the network holds up to the new number and order of blocks."""
    stack_owner = network.get_submodule(arrange.stack.rpartition(".")[0])
    configs = {id(c): c for m in (network, *stack_owner.modules()) if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        for field in arrange.counts:
            if getattr(config, field, None) == before:
                setattr(config, field, len(arrange.order))
        for name, value in list(vars(config).items()):
            if isinstance(value, (list, tuple)) and len(value) == before and name in PER_LAYER_LISTS:
                setattr(config, name, [value[position] for position in arrange.order])


PER_LAYER_LISTS = ("layer_types", "attention_layers", "no_rope_layers", "mlp_layer_types", "layers_block_type")
"""Config fields that say something of each block in turn."""


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a new parameter in the place of another, trainable as that one was."""
    from torch import nn

    setattr(module, name, nn.Parameter(value.contiguous(), requires_grad=getattr(module, name).requires_grad))


def set_sizes(module: nn.Module) -> None:
    """Let a module's own size attributes say what its weight says."""
    from torch import nn

    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif type(module).__name__ == "Conv1D":
        module.nx, module.nf = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)


def runs(kept: list[int]) -> str:
    """Write positions as runs: [0, 1, 2, 5] is "0-2,5".

    >>> runs([0, 1, 2, 5])
    '0-2,5'
    """
    parts: list[list[int]] = []
    for position in kept:
        if parts and position == parts[-1][1] + 1:
            parts[-1][1] = position
        else:
            parts.append([position, position])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in parts)


def positions(written: str) -> list[int]:
    """Read what `runs` wrote."""
    found: list[int] = []
    for part in written.split(","):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found


def to_plain(edit: Edit) -> dict[str, Any]:
    """An edit as plain data: its class by module and name, and its fields."""
    return {"edit": f"{type(edit).__module__}:{type(edit).__qualname__}", **dataclasses.asdict(edit)}  # type: ignore[call-overload]


def from_plain(data: dict[str, Any], allowed: tuple[str, ...] = ("etude",)) -> Edit:
    """Read an edit back.  Only classes of Étude's own packages (or those named) are ever looked up.

    Raises InputError for anything else: a checkpoint must not choose what code runs.
    """
    fields = dict(data)
    where, _, name = str(fields.pop("edit", "")).partition(":")
    if where.split(".")[0] not in allowed or not name.isidentifier():
        raise InputError(f"the checkpoint names an edit {where}:{name} that is not Étude's", remedy="Only edits of installed Étude packages are replayed.")
    try:
        kind = getattr(importlib.import_module(where), name, None)
    except ImportError:
        kind = None
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and hasattr(kind, "apply")):
        raise InputError(f"the checkpoint names {where}:{name}, which is no edit", remedy="Was it saved by another version?")
    try:
        return kind(**{key: _tuples(value) for key, value in fields.items()})  # type: ignore[return-value]
    except TypeError as error:
        raise InputError(f"the checkpoint's {where}:{name} has other fields than this version's: {error}", remedy="Was it saved by another version?") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
