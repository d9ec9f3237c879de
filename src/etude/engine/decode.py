"""Many completions at once: rows of their own length side by side, and the next prompt in the place of each that ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from etude.engine import attention, fused, losses
from etude.engine.attention import Trunk
from etude.engine.cost import spend
from etude.engine.forest import Piece, shared
from etude.engine.progress import report
from etude.values.generator import Policy

ROWS = {"cpu": 32, "cuda": 256}
"""Completions that are written at once."""
HELD_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 18}
"""Tokens whose keys and values are held at once, unless one row alone needs more."""
PREFILL_TOKENS = 2048
"""Tokens of prompts that are read at once."""
WORTH = 32
"""Tokens that all prompts must begin with for these to be read by themselves, once."""


class Guide:
    """What a decoding method may do; each by default does nothing.

    context: the prompt's and the completion's tokens so far, (tokens,) int64.
    """

    def propose(self, context: np.ndarray) -> Sequence[int]:
        """Tokens that may come next, to be checked in one pass.  What is chosen does not depend on them, only how fast."""
        return ()

    def adjust(self, logits: Tensor, context: np.ndarray) -> Tensor:
        """Other logits, (tokens,) float32, for what comes after the context."""
        return logits

    def forbidden(self, context: np.ndarray) -> Sequence[int]:
        """Tokens that must not come next."""
        return ()


def guided(guide: Guide, logits: Tensor, context: np.ndarray) -> Tensor:
    """(tokens,) float32, as the guide wants them."""
    found = guide.adjust(logits.float(), context)
    never = list(guide.forbidden(context))
    return found.index_fill(0, torch.tensor(never, device=found.device), -math.inf) if never else found


def choose(logits: Tensor, policy: Policy, draws: Tensor) -> Tensor:
    """The next token of every row.

    logits: (rows, tokens); draws: (rows,), uniform in [0, 1), of which each row uses its own.  Returns (rows,).
    Source: the smallest set of tokens with probability top_p, as in Holtzman et al., 2020, section 3.1.
    """
    if policy.temperature == 0:
        return logits.argmax(-1)
    scores, draws = logits.float() / policy.temperature, draws.clamp(max=1 - 1e-6)  # rounded up, it would point behind the last token
    if policy.top_p == 1:
        cumulative = scores.softmax(-1).cumsum(-1)
        place = torch.searchsorted(cumulative, draws.to(cumulative)[:, None] * cumulative[:, -1:], right=True)[:, 0]
        return place.clamp_(max=logits.shape[-1] - 1)
    ordered, tokens = scores.sort(dim=-1, descending=True, stable=True)
    cumulative = ordered.softmax(-1).cumsum(-1)
    kept = 1 + (cumulative[:, :-1] < policy.top_p).sum(-1, keepdim=True)
    total = cumulative.gather(-1, kept - 1)
    place = torch.searchsorted(cumulative, draws.to(cumulative)[:, None] * total, right=True).minimum(kept - 1)
    return tokens.gather(-1, place)[:, 0]


class Slots(Cache):
    """Keys and values of rows that have lengths of their own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(layers=[])
        self.held: dict[int, tuple[Tensor, Tensor]] = {}
        """Of each layer, (rows, heads, room, width)."""
        self.lengths = torch.zeros(0, dtype=torch.long, device=device)
        self.room = 0
        self._places: tuple[Tensor, Tensor] | None = None
        self._mask: Tensor | None = None
        self._seen = 0
        self._layer = 0

    def begin(self, width: int, dtype: torch.dtype) -> Tensor:
        """Get ready to read so many tokens of each row; their positions, (rows, width)."""
        # what no row needs is the very last place: there goes what is behind a row's proposals
        positions = (self.lengths[:, None] + torch.arange(width, device=self.lengths.device)).clamp_(max=self.room - 1)
        self._seen = int(positions.max()) + 1
        self._places = torch.arange(len(positions), device=positions.device)[:, None], positions
        hidden = torch.arange(self._seen, device=positions.device) > positions[:, :, None]
        self._mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)
        return positions

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self._places is not None
        rows, positions = self._places
        for held, new in zip(self.held[layer_idx], (key_states, value_states), strict=True):
            held[rows, :, positions] = new.transpose(1, 2)
        self._layer = layer_idx
        return key_states, value_states

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """query (rows, heads, width of the step, width); gives (rows, step, heads, width)."""
        rows, heads, step, width = query.shape
        keys, values = (one[:rows, :, : self._seen] for one in self.held[self._layer])
        groups = heads // keys.shape[1]
        assert self._mask is not None
        scores = torch.matmul(query.reshape(rows, keys.shape[1], groups * step, width), keys.transpose(2, 3)).mul_(scaling or width**-0.5)
        scores.view(rows, -1, groups, step, self._seen).add_(self._mask[:, None, None])
        found = torch.matmul(scores.softmax(-1, dtype=torch.float32).to(values.dtype), values)
        return found.view(rows, heads, step, -1).transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.lengths.max()) if len(self.lengths) else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._seen, 0

    def put(self, row: int, parts: dict[int, list[tuple[Tensor, Tensor]]], length: int, room: int) -> None:
        """Fill a row, a new one if it is the next; parts: of each layer, one after the other (1, heads, tokens, width)."""
        rows = max(row + 1, len(self.lengths))
        if rows > len(self.lengths):
            self.lengths = torch.cat([self.lengths, self.lengths.new_zeros(rows - len(self.lengths))])
        self.room = max(self.room, room)
        for layer, several in parts.items():
            if layer not in self.held:
                self.held[layer] = tuple(one.new_zeros(0, one.shape[1], 0, one.shape[3]) for one in several[0])  # type: ignore[assignment]
            self.held[layer] = tuple(_roomier(one, rows, self.room) for one in self.held[layer])  # type: ignore[assignment]
            for side, held in enumerate(self.held[layer]):
                at = 0
                for part in several:
                    held[row, :, at : at + part[side].shape[2]] = part[side][0]
                    at += part[side].shape[2]
        self.lengths[row] = length

    def drop(self, row: int) -> None:
        """The last row takes this one's place."""
        last = len(self.lengths) - 1
        for held in (one for pair in self.held.values() for one in pair):
            held[row] = held[last]
        self.lengths[row] = self.lengths[last]
        self.lengths = self.lengths[:last]


def _roomier(held: Tensor, rows: int, room: int) -> Tensor:
    """The same with at least so many rows and places; what is new is zero, so that what is masked is finite."""
    if held.shape[0] >= rows and held.shape[2] >= room:
        return held
    larger = held.new_zeros(held.shape[0] if held.shape[0] >= rows else 2 * rows - 1, held.shape[1], max(room, held.shape[2]), held.shape[3])
    larger[: held.shape[0], :, : held.shape[2]] = held
    return larger


@dataclass
class _Line:
    """One completion that is being written."""

    index: int
    prompt: np.ndarray
    draws: Tensor
    """(2 · max_new_tokens,): a sample depends on its own seed alone."""
    new: list[int] = field(default_factory=list)

    @property
    def context(self) -> np.ndarray:
        return np.concatenate([self.prompt, np.array(self.new, np.int64)])


def complete(
    network: PreTrainedModel,
    policy: Policy,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    ends: set[int],
    stopped: Callable[[int, list[int]], bool],
    guide: Guide | None = None,
) -> list[list[int]]:
    """New tokens of every prompt, without the one that ends it; inside `attention.by_piece` only.

    prompts: token ids with their start token; stopped: whether a prompt (by its place) has said enough with these new tokens.
    Cost: a forward pass over the prompts, what all begin with once, and one a new token for as many rows as there is room for.
    """
    with fused.narrow(network):
        return _Writing(network, policy, prompts, seeds, ends, stopped, guide).run()


@dataclass
class _Writing:
    network: PreTrainedModel
    policy: Policy
    prompts: Sequence[np.ndarray]
    seeds: Sequence[int]
    ends: set[int]
    stopped: Callable[[int, list[int]], bool]
    guide: Guide | None

    @torch.no_grad()
    def run(self) -> list[list[int]]:
        device = self.network.device
        self.lines: list[_Line] = []
        self.found: list[list[int]] = [[] for _ in self.prompts]
        self.slots, self.trunk = Slots(device), self._common()
        self.room = max(map(len, self.prompts)) + self.policy.max_new_tokens
        rows = max(1, min(ROWS.get(device.type, 32), HELD_TOKENS.get(device.type, 1 << 14) // self.room))
        # longest first: short ones fill in at the end
        waiting = sorted(range(len(self.prompts)), key=lambda index: (len(self.prompts[index]), self.prompts[index].tobytes(), index))
        done = 0
        while waiting or self.lines:
            if waiting and len(self.lines) < rows:
                self._begin([waiting.pop() for _ in range(min(len(waiting), rows - len(self.lines)))])
            else:
                self._step()
            before, done = done, len(self.prompts) - len(waiting) - len(self.lines)
            if done > before:
                report("generating", done, len(self.prompts))
        return self.found

    def _common(self) -> Trunk:
        """What all prompts begin with, read once; each has at least one token of its own."""
        trunk, first = Trunk(), self.prompts[0]
        size = min(min(shared(first, other) for other in self.prompts), min(map(len, self.prompts)) - 1)
        if len(self.prompts) > 1 and size >= WORTH:
            attention.forward(self.network, [_chain(first[:size], 0)], trunk, grow=True)
            spend(tokens=size)
        return trunk

    def _begin(self, chosen: list[int]) -> None:
        """Read prompts, as many at once as there is room for, and choose their first tokens."""
        while chosen:
            some = [chosen.pop()]
            while chosen and sum(len(self.prompts[index]) for index in [*some, chosen[-1]]) <= PREFILL_TOKENS:
                some.append(chosen.pop())
            own = [_chain(self.prompts[index][self.trunk.length :], self.trunk.length) for index in some]
            self.trunk.new = {}
            states = attention.forward(self.network, own, self.trunk)
            new, self.trunk.new = self.trunk.new, None
            ends = np.cumsum([len(piece.ids) for piece in own])
            spend(tokens=int(ends[-1]))
            logits = self._logits(states[torch.from_numpy(ends - 1).to(states.device)])
            lines = [_Line(index, self.prompts[index], _draws(self.policy.max_new_tokens, self.seeds[index])) for index in some]
            for line, end, piece in zip(lines, ends.tolist(), own, strict=True):
                parts = {layer: [self.trunk.held[layer]] if self.trunk.length else [] for layer in new}
                for layer, (keys, values) in new.items():
                    parts[layer].append((keys[:, :, end - len(piece.ids) : end], values[:, :, end - len(piece.ids) : end]))
                self.slots.put(len(self.lines), parts, len(line.prompt), self.room)
                self.lines.append(line)
            begun = len(self.lines) - len(lines)
            chosen_tokens = self._choose(logits[:, None], lines, [()] * len(lines))
            over = [begun + place for place, (line, tokens) in enumerate(zip(lines, chosen_tokens, strict=True)) if self._take(line, tokens[:1])]
            self._end(over)

    def _step(self) -> None:
        """One more token of every row, or more where a proposal was right."""
        drafts = [self._draft(line) for line in self.lines]
        width = 1 + max(map(len, drafts))
        ids = np.zeros((len(self.lines), width), np.int64)
        for row, (line, draft) in enumerate(zip(self.lines, drafts, strict=True)):
            ids[row, : 1 + len(draft)] = [line.new[-1], *draft]
        positions = self.slots.begin(width, self.network.dtype)
        with attention.laid_out(self.slots):
            states = self.network(input_ids=torch.from_numpy(ids).to(positions.device), position_ids=positions, past_key_values=self.slots, use_cache=True).logits
        spend(tokens=sum(1 + len(draft) for draft in drafts))
        over, taken = [], []
        for row, (line, draft, tokens) in enumerate(zip(self.lines, drafts, self._choose(self._logits(states), self.lines, drafts), strict=True)):
            right = next((place for place, (one, other) in enumerate(zip(draft, tokens, strict=False)) if one != other), len(draft))
            before = len(line.new)
            if self._take(line, tokens[: right + 1]):
                over.append(row)
            taken.append(len(line.new) - before)
        self.slots.lengths += torch.tensor(taken, device=positions.device)
        self._end(over)

    def _draft(self, line: _Line) -> Sequence[int]:
        """What the guide proposes, as far as there is room."""
        most = self.policy.max_new_tokens - len(line.new) - 1
        return list(self.guide.propose(line.context))[:most] if self.guide and most > 0 else ()

    def _logits(self, states: Tensor) -> Tensor:
        head = losses.head_of(self.network)
        return states if head is None else fused.turned(states, head.weight, head.bias)

    def _choose(self, logits: Tensor, lines: Sequence[_Line], drafts: Sequence[Sequence[int]]) -> list[list[int]]:
        """For each row the tokens chosen at every place of the step, logits (rows, step, tokens); those behind a wrong proposal mean nothing."""
        rows, step, size = logits.shape
        if self.guide:
            contexts = [np.concatenate([line.context, np.array(draft[:place], np.int64)]) for line, draft in zip(lines, drafts, strict=True) for place in range(step)]
            logits = torch.stack([guided(self.guide, one, context) for one, context in zip(logits.flatten(0, 1), contexts, strict=True)])
        draws = torch.stack([line.draws[len(line.new) : len(line.new) + step] for line in lines])
        return choose(logits.reshape(-1, size), self.policy, draws.flatten()).view(rows, step).tolist()  # type: ignore[no-any-return]

    def _take(self, line: _Line, tokens: Sequence[int]) -> bool:
        """Append tokens until one ends the completion; whether it is at its end."""
        for token in tokens:
            if token in self.ends:
                return True
            line.new.append(token)
            if len(line.new) == self.policy.max_new_tokens or self.stopped(line.index, line.new):
                return True
        return False

    def _end(self, rows: list[int]) -> None:
        for row in sorted(rows, reverse=True):
            self.found[self.lines[row].index] = self.lines[row].new
            self.slots.drop(row)
            last = self.lines.pop()
            if row < len(self.lines):
                self.lines[row] = last


def _draws(count: int, seed: int) -> Tensor:
    """As many uniform numbers, and zeros for the places behind the end that a step of other rows' proposals reaches."""
    return torch.cat([torch.rand(count, generator=torch.Generator().manual_seed(seed)), torch.zeros(count)])


def _chain(ids: np.ndarray, begin: int) -> Piece:
    """Tokens that see all before them, from such a place on."""
    return Piece(ids, np.arange(begin, begin + len(ids)), None, np.zeros(0, np.int64), np.zeros((0, 2), np.int64))
