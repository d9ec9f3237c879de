"""Find what a transformer block is made of by watching what depends on what, not by names.

One forward pass over a few tokens, with the output of every linear layer replaced by random numbers that record gradients.  Then the
gradient of one layer's input with respect to the others' outputs shows the direct dependences, channel by channel:

- a *writer* depends on nothing but other layers of its block, and gives the width of the residual stream;
- a writer whose input at one position depends on other positions ends an attention, any other ends a feed-forward layer;
- the channels that one slice of a writer's input depends on are the rows of q, k and v that make up that head (or the rows of up and gate
  that make up that channel), whether they lie in separate matrices, in a fused one, or interleaved head by head.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from etude.values.checkpoint import embedding_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH = 6
"""Tokens of the probe."""


@dataclass(frozen=True)
class Attention:
    """Where the heads of one attention live."""

    output: str
    """Path of the projection that writes to the residual stream; head h reads its input channels [h·head_dim, (h+1)·head_dim)."""
    head_dim: int
    rows: dict[str, list[frozenset[int]]]
    """For each projection of queries, keys or values, and each of its output channels, the heads that use it."""
    groups: tuple[tuple[int, ...], ...]
    """Query heads that share keys and values."""

    @property
    def heads(self) -> int:
        return sum(len(group) for group in self.groups)

    @property
    def key_value_heads(self) -> int:
        return len(self.groups)


@dataclass(frozen=True)
class FeedForward:
    """Where the channels of one feed-forward layer live: channel j is column j of the output and row offset + j of each input."""

    output: str
    channels: int
    inputs: dict[str, tuple[int, ...]]
    """Projections that read the residual stream, each with the row offsets of its parts (two where gate and up are fused)."""
    experts: bool = False
    """Whether the projections are three-dimensional parameters of one module, an expert a slice."""


@dataclass
class Parts:
    """What was found in one block, paths relative to the network."""

    attentions: list[Attention] = field(default_factory=list)
    """Self-attention, then cross-attention if there is one."""
    feed_forward: FeedForward | None = None
    linears: list[str] = field(default_factory=list)


def is_linear(module: nn.Module) -> bool:
    """A matrix product with a ``weight``: torch's Linear, or the transposed Conv1D of GPT-2."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def output_dim(module: nn.Module) -> int:
    """Dimension of ``weight`` that holds the output channels."""
    return 0 if isinstance(module, nn.Linear) else 1


def stacks(network: nn.Module) -> list[str]:
    """Paths of the outermost lists of equal modules, one of which at least holds linear layers: the blocks of each stack."""
    found: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(outer + ".") for outer in found):
            kinds = {type(item) for item in module}
            if len(kinds) == 1 and any(is_linear(part) for item in module for part in item.modules()):
                found.append(name)
    return found


def trace(network: PreTrainedModel) -> dict[str, list[Parts]]:
    """Parts of every block of every stack.  Cost: one forward pass over a few tokens, and a backward pass through attention a head."""
    recorder = _Recorder(network)
    with torch.enable_grad():
        with recorder:
            _forward(network)
        return {stack: [recorder.parts(f"{stack}.{index}") for index in range(len(network.get_submodule(stack)))] for stack in recorder.stacks}  # type: ignore[arg-type]


def _forward(network: PreTrainedModel) -> None:
    rows = embedding_rows(network)
    ids = torch.randint(min(10, rows - 1), rows, (1, LENGTH), generator=torch.Generator().manual_seed(0)).to(network.device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if network.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if network.config.model_type in ("mamba", "mamba2"):
        del inputs["attention_mask"]
    try:
        network(**inputs)
    except TypeError:  # encoders have no cache to forgo
        network(**{key: value for key, value in inputs.items() if key != "use_cache"})


@dataclass
class _Call:
    path: str
    input: Tensor
    output: Tensor


class _Recorder:
    """Hooks that cut the graph at every linear layer, and what they saw."""

    def __init__(self, network: PreTrainedModel):
        self.network, self.stacks = network, stacks(network)
        self.calls: dict[str, list[_Call]] = defaultdict(list)
        self.entered: dict[str, list[Tensor]] = defaultdict(list)
        self.handles: list[Any] = []
        self.random = torch.Generator().manual_seed(0)

    def __enter__(self) -> _Recorder:
        for stack in self.stacks:
            blocks: Any = self.network.get_submodule(stack)
            for index, block in enumerate(blocks):
                name = f"{stack}.{index}"
                self.handles.append(block.register_forward_pre_hook(self._enter(name), with_kwargs=True))
                for path, module in block.named_modules():
                    if is_linear(module):
                        self.handles.append(module.register_forward_hook(self._call(name, f"{name}.{path}")))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _noise(self, like: Tensor) -> Tensor:
        """Positive numbers, so that no activation is dead, and small ones, so that no softmax is saturated."""
        noise = torch.rand(like.shape, generator=self.random) * 0.5 + 0.1
        return noise.to(like.device, like.dtype).requires_grad_()

    def _enter(self, block: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                leaf = self._noise(args[0])
                args = (leaf.clone(), *args[1:])  # a copy: some blocks add to their input in place
            else:
                leaf = self._noise(kwargs["hidden_states"])
                kwargs = {**kwargs, "hidden_states": leaf.clone()}
            self.entered[block].append(leaf)
            return args, kwargs

        return hook

    def _call(self, block: str, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            leaf = self._noise(output)
            self.calls[block].append(_Call(path, args[0], leaf))
            return leaf.clone()

        return hook

    # Reading what was seen.

    def parts(self, block: str) -> Parts:
        calls = self.calls[block]
        module = self.network.get_submodule(block)
        parts = Parts(linears=[f"{block}.{path}" for path, item in module.named_modules() if is_linear(item)])
        width = self.entered[block][0].shape[-1] if self.entered[block] else 0
        for call in calls:
            sources = self._sources(block, call)
            if not sources or call.output.shape[-1] != width:
                continue
            if _mixes(call, sources):
                attention = _attention(call, sources)
                if attention:
                    parts.attentions.append(attention)
            elif parts.feed_forward is None:
                parts.feed_forward = _feed_forward(call, sources)
        if parts.feed_forward is None:
            parts.feed_forward = _experts(block, module, width)
        return parts

    def _sources(self, block: str, call: _Call) -> list[_Call]:
        """The layers whose outputs this one's input is made of, if it is made of nothing else."""
        if not call.input.requires_grad:
            return []
        others = [other for other in self.calls[block] if other is not call]
        stream = self.entered[block][0]
        gradients = _gradients(_weigh(call.input, self.random), [stream, *(other.output for other in others)])
        if gradients[0] is not None:
            return []
        return [other for other, gradient in zip(others, gradients[1:], strict=True) if gradient is not None]


def _weigh(tensor: Tensor, random: torch.Generator | None = None) -> Tensor:
    """A scalar on which every element has a different influence."""
    weights = torch.rand(tensor.shape, generator=random or torch.Generator().manual_seed(1)) + 0.5
    return (tensor.float() * weights.to(tensor.device)).sum()


def _gradients(scalar: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(scalar, leaves, retain_graph=True, allow_unused=True))


def _used(gradient: Tensor | None) -> list[int]:
    """Channels with any gradient."""
    if gradient is None:
        return []
    return torch.nonzero(gradient.reshape(-1, gradient.shape[-1]).abs().sum(0)).flatten().tolist()


def _rows(scalar: Tensor, sources: list[_Call]) -> dict[str, set[int]]:
    """For each source module the output channels that the scalar depends on."""
    found: dict[str, set[int]] = defaultdict(set)
    for source, gradient in zip(sources, _gradients(scalar, [source.output for source in sources]), strict=True):
        found[source.path].update(_used(gradient))
    return found


def _mixes(call: _Call, sources: list[_Call]) -> bool:
    """Whether the input at the last position depends on other positions of its sources."""
    gradients = _gradients(_weigh(call.input[..., -1:, :]), [source.output for source in sources])
    return any(gradient is not None and gradient.ndim >= 3 and bool(gradient[..., :-1, :].abs().sum() > 0) for gradient in gradients)


def _attention(call: _Call, sources: list[_Call]) -> Attention | None:
    """Heads, from which rows each slice of the output projection's input depends on; None if there are no heads to be seen."""
    width = call.input.shape[-1]
    one = {path: len(rows) for path, rows in _rows(_weigh(call.input[..., :1]), sources).items()}
    if len(one) > 1 and min(one.values()) == 1:
        head_dim = max(one.values())
    elif len(one) == 1:
        head_dim = (next(iter(one.values())) - 1) // 2
    else:
        return None
    if head_dim < 1 or width % head_dim:
        return None
    heads = width // head_dim
    sizes = {source.path: source.output.shape[-1] for source in sources}
    users: dict[str, list[set[int]]] = {path: [set() for _ in range(size)] for path, size in sizes.items()}
    for head in range(heads):
        for path, rows in _rows(_weigh(call.input[..., head * head_dim : (head + 1) * head_dim]), sources).items():
            for row in rows:
                users[path][row].add(head)
    rows_of = {path: [frozenset(row) for row in rows] for path, rows in users.items()}
    shared = {row for rows in rows_of.values() for row in rows}
    groups: list[set[int]] = []
    for head in range(heads):
        together = {other for row in shared if head in row for other in row}
        if not any(head in group for group in groups):
            groups.append(together)
    if sum(len(group) for group in groups) != heads or len({len(group) for group in groups}) != 1:
        return None
    return Attention(call.path, head_dim, rows_of, tuple(tuple(sorted(group)) for group in groups))


def _feed_forward(call: _Call, sources: list[_Call]) -> FeedForward | None:
    """Channels, from which row of each source the first, second and last input channel of the output projection depends on."""
    channels = call.input.shape[-1]
    wanted = sorted({0, min(1, channels - 1), channels - 1})
    seen = {j: _rows(call.input[..., j].float().sum(), sources) for j in wanted}
    inputs = {}
    for source in sources:
        offsets = {j: tuple(sorted(row - j for row in seen[j].get(source.path, ()))) for j in wanted}
        if len(set(offsets.values())) != 1 or not offsets[0]:
            return None
        inputs[source.path] = offsets[0]
    return FeedForward(call.path, channels, inputs)


def _experts(block: str, module: nn.Module, width: int) -> FeedForward | None:
    """Experts kept as two three-dimensional parameters, (experts, parts · channels, width) and (experts, width, channels)."""
    for path, part in module.named_modules():
        matrices = {name: tensor.shape for name, tensor in part.named_parameters(recurse=False) if tensor.ndim == 3}
        if len(matrices) != 2:
            continue
        for output, into in (list(matrices), list(matrices)[::-1]):
            channels = matrices[output][2]
            if matrices[output][1] == width and matrices[into][2] == width and matrices[into][1] % channels == 0:
                offsets = tuple(range(0, matrices[into][1], channels))
                return FeedForward(f"{block}.{path}.{output}", channels, {f"{block}.{path}.{into}": offsets}, experts=True)
    return None
