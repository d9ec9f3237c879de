"""Early exits of a masked model: a head behind each block, what all of them say of a question, and what it costs to come there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from etude.engine import batch, cloze, fused, losses
from etude.engine.cloze import Question
from etude.engine.cost import spend
from etude.engine.eager import eager
from etude.engine.feed import Batch
from etude.engine.progress import report
from etude.engine.score import row_tokens
from etude.values.errors import InputError
from etude.values.model import Model

EXITS = "exits"
"""Name of the network's part that holds the heads."""


class ExitHead(nn.Module):
    """A block's states as a head's words are to read them, (…, width) both."""

    def __init__(self, width: int):
        super().__init__()
        self.before, self.dense, self.after = nn.LayerNorm(width), nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, states: Tensor) -> Tensor:
        return self.after(nn.functional.gelu(self.dense(self.before(states))))


@dataclass(frozen=True)
class Exits:
    """Give a network a head behind each of these blocks; the words are those of its own head.  The network's own pass does not compute them."""

    blocks: tuple[int, ...]
    width: int

    def apply(self, network: nn.Module) -> None:
        parameter = next(network.parameters())
        heads = nn.ModuleDict({str(block): ExitHead(self.width) for block in self.blocks})
        network.add_module(EXITS, heads.to(parameter.device, parameter.dtype))


def attach(model: Model) -> None:
    """Give a draft an exit behind every block but the last, which begins as a copy of the matrix in the model's own head where that has one.

    Raises InputError for several stacks of blocks, and for a head whose words are not as wide as the blocks' states.
    """
    paths, decoder = block_paths(model), words(model.network)
    embedding: Any = model.network.get_input_embeddings()
    width = embedding.weight.shape[1]
    if decoder is None or decoder.weight.shape[1] != width or _states_width(model, paths) != width:
        raise InputError(f"exits need a head whose words are as wide as the blocks' states, and this {model.base.model_type} has none")
    model.edit(Exits(tuple(range(len(paths) - 1)), width))
    outside = [module for path, module in model.network.named_modules() if isinstance(module, nn.Linear) and module is not decoder and not path.startswith((*paths, EXITS))]
    own = [module for module in outside if module.weight.shape == (width, width)]
    with torch.no_grad():
        for head in heads(model.network).values():
            head.dense.bias.zero_()  # type: ignore[union-attr, operator]
            head.dense.weight.copy_(own[0].weight if len(own) == 1 else torch.eye(width))  # type: ignore[union-attr, operator]


def heads(network: nn.Module) -> dict[int, nn.Module]:
    """The exits by the block that they stand behind."""
    found: Any = getattr(network, EXITS, {})
    return {int(block): head for block, head in found.items()}


def words(network: Any) -> nn.Linear | None:
    """The layer whose rows stand for tokens."""
    head = network.get_output_embeddings()
    return head if isinstance(head, nn.Linear) else None


def block_paths(model: Model) -> list[str]:
    """Paths of the blocks.  Raises InputError unless there is one stack."""
    if len(model.anatomy.stacks) != 1:
        raise InputError(f"exits stand behind the blocks of one stack, and this {model.base.model_type} has {len(model.anatomy.stacks)}")
    ((stack, count),) = model.anatomy.stacks.items()
    return [f"{stack}.{place}" for place in range(count)]


def _states_width(model: Model, paths: Sequence[str]) -> int:
    ids = torch.zeros((1, 2), dtype=torch.long, device=model.network.device)
    with torch.no_grad(), watched(model.network, paths) as seen:
        model.network(input_ids=ids)
    return seen[0].shape[-1]


class _Scaled(torch.autograd.Function):
    """What comes in, with another gradient."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return slope * ctx.factor, None


@contextmanager
def watched(network: nn.Module, paths: Sequence[str], balanced: bool = False) -> Iterator[dict[int, Tensor]]:
    """Inside, a pass of the network leaves the states behind each block, (rows, length, width).

    balanced: the gradient that a block gets is the mean of those from the exits behind it, not their sum, so that early blocks do not learn the faster (Li et al., "Improved
    Techniques for Training Adaptive Deep Networks", 2019, section 3.1).
    """
    seen: dict[int, Tensor] = {}
    count = len(paths)

    def watching(place: int) -> Any:
        def watch(module: nn.Module, given: Any, made: Any) -> Any:
            states = made if isinstance(made, Tensor) else made[0]
            if not balanced or not states.requires_grad:
                seen[place] = states
                return None
            seen[place] = _Scaled.apply(states, 1 / (count - place))
            further = _Scaled.apply(seen[place], float(max(1, count - place - 1)))
            return further if isinstance(made, Tensor) else (further, *made[1:])

        return watch

    handles = [network.get_submodule(path).register_forward_hook(watching(place)) for place, path in enumerate(paths)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def scores(network: nn.Module, part: Batch, asked: Sequence[Question], seen: dict[int, Tensor]) -> list[Tensor]:
    """Scores of the choices at every exit, the network's own head last, each (questions, most choices) as `cloze.scores` has them; inside `watched`, with its states."""
    said = losses.forward(network, part)
    decoder = words(network)
    most = max(len(one.places) for one in asked)
    at = torch.tensor([[*one.places, *[0] * (most - len(one.places))] for one in asked], device=said.device)
    near = [one._replace(places=np.arange(len(one.places))) for one in asked]
    rows = torch.arange(len(asked), device=said.device)[:, None]
    early = [cloze.scores(head(seen[block][rows, at]), decoder, near) for block, head in sorted(heads(network).items())]
    return [*early, cloze.scores(said, losses.head_of(network), asked)]


def answers(model: Model, asked: Sequence[Question]) -> np.ndarray:
    """What every exit says of every choice, (exits, questions, most choices), natural logarithms of probabilities; -inf where a question has fewer choices.

    Cost: one forward pass over the questions.
    """
    network, pad, done, paths = model.network, model.tokenizer.pad_token_id or 0, 0, block_paths(model)
    known = heads(network)
    if any(block >= len(paths) - 1 for block in known):
        raise InputError(f"the model has {len(paths)} blocks, and an exit behind block {max(known)}", remedy="Drop blocks before exits are made.")
    found = np.full((len(known) + 1, len(asked), max(len(one.choices) for one in asked)), -np.inf)
    order = sorted(range(len(asked)), key=lambda index: (-len(asked[index].ids), asked[index].ids.tobytes()))
    with torch.no_grad(), losses.headless(network), fused.fused(network), watched(network, paths) as seen:
        for group in batch.by_length([len(asked[index].ids) for index in order], row_tokens(network.device.type, network.num_parameters())):
            chosen = [order[place] for place in group]
            ids, real = (one.to(network.device) for one in batch.padded([asked[index].ids for index in chosen], pad))
            every = scores(network, Batch(ids, ids, mask=real.bool(), masked=True), [asked[index] for index in chosen], seen)
            for place, one in enumerate(every):
                found[place, chosen, : one.shape[1]] = one.log_softmax(1).double().cpu().numpy()
            done += len(chosen)
            report("asking", done, len(asked))
    for place, question in enumerate(asked):
        found[:, place, len(question.choices) :] = -np.inf
    spend(tokens=sum(len(one.ids) for one in asked), flops=float(costs(model, asked)[-1].sum()))
    return found


def costs(model: Model, asked: Sequence[Question]) -> np.ndarray:
    """Floating-point operations until each exit has answered, (exits, questions): the blocks to there, and every exit on the way.

    Blocks are counted by torch, at each length; an exit as the matrix that it applies at the masks and the words of the choices, and the network's own head as if it were one.
    """
    network, paths, known = model.network, block_paths(model), sorted(heads(model.network))
    blocks = {length: _block_flops(network, paths, length) for length in sorted({len(one.ids) for one in asked})}
    decoder: Any = network.get_output_embeddings()
    wide = decoder.weight.shape[1]
    found = np.zeros((len(known) + 1, len(asked)))
    for place, one in enumerate(asked):
        head = 2.0 * wide * (wide * len(one.places) + sum(map(len, one.choices)))
        to_there = np.cumsum(blocks[len(one.ids)])
        for exit_, block in enumerate([*known, len(paths) - 1]):
            found[exit_, place] = to_there[block] + (exit_ + 1) * head
    return found


def _block_flops(network: nn.Module, paths: Sequence[str], length: int) -> np.ndarray:
    """Operations of each block on a row of this length."""
    before = 0.0
    ends: list[float] = []
    counter = FlopCounterMode(display=False)

    def enter(module: nn.Module, *given: Any) -> None:
        nonlocal before
        before = float(counter.get_total_flops())

    def leave(module: nn.Module, *given: Any) -> None:
        ends.append(counter.get_total_flops() - before)

    handles = []
    for path in paths:
        block = network.get_submodule(path)
        handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    ids = torch.zeros((1, length), dtype=torch.long, device=next(network.parameters()).device)
    try:
        with torch.no_grad(), eager(network), counter:
            network(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    return np.array(ends)
