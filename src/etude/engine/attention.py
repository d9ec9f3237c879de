"""Attention over pieces of a forest: each token sees the trunk, and its own ancestors in its piece."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from etude.engine.forest import Piece, plan, rows, side_by_side

NAME = "etude_forest"
SEE_ALL = ("full_attention", "sliding_attention")
"""Kinds of layers that see all that is before, within their window."""


class Trunk(Cache):
    """Keys and values of what all pieces of a row begin with."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.length = 0
        self.held: dict[int, tuple[Tensor, Tensor]] = {}
        self.before: tuple[Tensor, Tensor] | None = None
        """Of the layer that attends next."""
        self.grows = False
        self.new: dict[int, tuple[Tensor, Tensor]] | None = None
        """Keys and values of the row, by layer, for whoever puts a dictionary here."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.before = self.held.get(layer_idx)
        if self.new is not None:
            self.new[layer_idx] = key_states, value_states
        if self.grows:
            new = key_states, value_states
            self.held[layer_idx] = new if self.before is None else (torch.cat([self.before[0], new[0]], 2), torch.cat([self.before[1], new[1]], 2))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def copied(self) -> Trunk:
        """One that grows on its own; the tensors are the same."""
        other = Trunk()
        other.length, other.held = self.length, dict(self.held)
        return other


@dataclass
class _Group:
    """Neighbouring pieces of one length."""

    count: int
    length: int
    mask: Tensor | None
    """(count, 1, length, length), added to the scores; None where all before is seen."""


@dataclass
class _Row:
    """Pieces side by side, on top of a trunk."""

    groups: list[_Group]
    trunk: Trunk

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """query (1, heads, tokens, width), keys and values of as many heads or fewer; gives (1, tokens, heads, width)."""
        before = self.trunk.before
        if key.shape[1] < query.shape[1]:
            key, value = (_for_every_head(one, query.shape[1]) for one in (key, value))
            before = None if before is None else (_for_every_head(before[0], query.shape[1]), _for_every_head(before[1], query.shape[1]))
        found = torch.empty((query.shape[2], query.shape[1], value.shape[3]), dtype=query.dtype, device=query.device)
        attend = _merged if query.device.type == "cpu" and query.shape[3] == value.shape[3] else _masked
        at = 0
        for group in self.groups:
            end = at + group.count * group.length
            q, k, v = (one[0, :, at:end].unflatten(1, (group.count, group.length)).transpose(0, 1) for one in (query, key, value))
            found[at:end].unflatten(0, (group.count, group.length)).copy_(attend(q, k, v, before, group.mask, scaling).transpose(1, 2))
            at = end
        return found[None]


class Layout(Protocol):
    """Who sees whom in the batch that is computed now."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor: ...


_now: Layout | None = None


@contextmanager
def laid_out(layout: Layout) -> Iterator[None]:
    """Inside, a forward pass attends so; inside `by_piece` only."""
    global _now
    _now = layout
    try:
        yield
    finally:
        _now = None


def forward(network: PreTrainedModel, row: Sequence[Piece], trunk: Trunk, grow: bool = False) -> Tensor:
    """The network's logits, or inside `losses.headless` what its head reads, of a row of pieces: (tokens, ...).

    Inside `by_piece` only.  grow: add the row's one piece to the trunk.
    """
    whole, device = side_by_side(row), network.device
    given = {"input_ids": torch.from_numpy(whole.ids)[None].to(device), "position_ids": torch.from_numpy(whole.positions)[None].to(device)}
    trunk.grows = grow
    with laid_out(_Row(_groups(row, network.dtype, device), trunk)):
        found: Tensor = network(**given, past_key_values=trunk, use_cache=True).logits[0]
    trunk.grows, trunk.before = False, None
    if grow:
        trunk.length += len(whole.ids)
    return found


def _groups(row: Sequence[Piece], dtype: torch.dtype, device: torch.device) -> list[_Group]:
    found: list[_Group] = []
    masks: list[np.ndarray] = []

    def close() -> None:
        if masks:
            seen = torch.from_numpy(np.stack(masks)[:, None]).to(device)
            found[-1].mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
            masks.clear()

    kind: tuple[int, bool] | None = None
    for piece in row:
        own = len(piece.ids), piece.seen is None
        if own != kind:
            close()
            found.append(_Group(0, own[0], None))
            kind = own
        found[-1].count += 1
        if piece.seen is not None:
            masks.append(piece.seen)
    close()
    return found


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, dropout: float = 0.0, **more: Any) -> tuple[Tensor, None]:
    assert _now is not None, "attention by pieces outside of a forward pass of its own"
    return _now.attend(query, key, value, scaling), None


def _for_every_head(states: Tensor, heads: int) -> Tensor:
    return states.repeat_interleave(heads // states.shape[1], 1)


def _merged(q: Tensor, k: Tensor, v: Tensor, before: tuple[Tensor, Tensor] | None, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention to the trunk and to the piece, each by torch's own kernel, put together by the sums of their exponentials; (pieces, heads, length, width)."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own, level = attend(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scaling)
    if before is None:
        return own  # type: ignore[no-any-return]
    pieces, heads, length, width = q.shape
    all_queries = q.transpose(0, 1).reshape(1, heads, pieces * length, width)
    first, other = attend(all_queries, *before, 0.0, False, scale=scaling)
    first = first[0].unflatten(1, (pieces, length)).transpose(0, 1)
    share = torch.sigmoid(other[0].unflatten(1, (pieces, length)).transpose(0, 1) - level)[..., None].to(own.dtype)
    return own + share * (first - own)  # type: ignore[no-any-return]


def _masked(q: Tensor, k: Tensor, v: Tensor, before: tuple[Tensor, Tensor] | None, mask: Tensor | None, scaling: float | None) -> Tensor:
    """The same in one piece, under a mask."""
    attend, length = torch.nn.functional.scaled_dot_product_attention, q.shape[2]
    if before is not None:
        if mask is None:
            mask = torch.zeros(1, 1, length, length, dtype=q.dtype, device=q.device).masked_fill_(~torch.ones(length, length, dtype=torch.bool, device=q.device).tril(), -torch.inf)
        mask = torch.cat([mask.new_zeros(*mask.shape[:3], before[0].shape[2]), mask], 3)
        k, v = (torch.cat([old.expand(len(new), -1, -1, -1), new], 2) for old, new in zip(before, (k, v), strict=True))
    return attend(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **more: None)

_tried: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@contextmanager
def by_piece(network: PreTrainedModel, longest: int) -> Iterator[bool]:
    """Inside, a causal network attends by pieces, if it can: whether it then says what it says of each text alone is tried out once, on texts that share a trunk.

    longest: tokens of the longest text; none may be longer than what a sliding window shows.
    """
    config = network.config
    narrow = (getattr(config, "sliding_window", None) or longest) < longest or any(kind not in SEE_ALL for kind in getattr(config, "layer_types", None) or ())
    before = config._attn_implementation
    if before != "sdpa" or config.is_encoder_decoder or narrow:
        yield False
        return
    if network not in _tried:
        _tried[network] = _same(network)
    if not _tried[network]:
        yield False
        return
    config._attn_implementation = NAME
    try:
        yield True
    finally:
        config._attn_implementation = before


@torch.no_grad()
def _same(network: PreTrainedModel) -> bool:
    size, before = min(97, network.config.get_text_config().vocab_size), network.config._attn_implementation
    texts = [np.array(one) * 7 % size for one in ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 8, 9, 10], [1, 2, 3, 11, 12])]
    trunk = Trunk()
    try:
        expected = [network(input_ids=torch.from_numpy(text)[None].to(network.device), use_cache=False).logits[0] for text in texts]
        network.config._attn_implementation = NAME
        (tree,) = plan(texts, [1, 1, 1]).pieces
        found = forward(network, [Piece(tree.ids[:2], tree.positions[:2], None, tree.places[:0], tree.wanted[:0])], trunk, grow=True)
        assert tree.seen is not None
        rest = Piece(tree.ids[2:], tree.positions[2:], tree.seen[2:, 2:], tree.places, tree.wanted)
        (row,) = rows([rest], 64)
        found = torch.cat([found, forward(network, row, trunk)])
        said = found[torch.from_numpy(tree.places)]
        right = torch.stack([expected[text][place - 1] for text, place in tree.wanted.tolist()])
        tight = network.dtype == torch.float32
        return torch.allclose(said.float(), right.float(), rtol=1e-4 if tight else 0.1, atol=1e-4 if tight else 0.1)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError, NotImplementedError):
        return False
    finally:
        network.config._attn_implementation = before
