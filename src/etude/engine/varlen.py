"""Attention over packed rows, a document at a time: what a document cannot see is not computed at all.

transformers masks the other documents of a row out, and so computes the whole square; on text of short documents most of it is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from etude.engine import fused
from etude.values.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel
else:
    torch = lazy("torch")

NAME = "etude_varlen"

_lengths: list[int] | None = None
"""Of the batch that is computed now.  Of the process, not of a context: backward passes that compute activations again run in threads of torch's own."""


def lengths(positions: Tensor) -> list[int]:
    """Tokens of each document's part of packed rows, row after row; positions (rows, length) begin anew at 0."""
    begins = (positions.flatten() == 0).nonzero().squeeze(1).tolist()
    ends = [*begins[1:], positions.numel()]
    return [end - begin for begin, end in zip(begins, ends, strict=True)]


def on(network: nn.Module) -> bool:
    """Whether the network attends document by document now."""
    plain: Any = getattr(network, "_orig_mod", network)
    return getattr(plain.config, "_attn_implementation", None) == NAME


@contextmanager
def documents(network: nn.Module, positions: Tensor | None) -> Iterator[None]:
    """Inside, attention keeps to these documents; only where `by_document` has switched it on.

    A backward pass that computes activations again belongs inside too.
    """
    global _lengths
    before, _lengths = _lengths, lengths(positions) if positions is not None and on(network) else None
    try:
        yield
    finally:
        _lengths = before


@contextmanager
def by_document(network: PreTrainedModel) -> Iterator[None]:
    """Let a causal network attend document by document.

    Only one that attends by torch's own attention to all that went before; whether it then says what it says with masks is tried out on a packed
    row.  Elsewhere nothing changes.  Cost: two passes over a few tokens.
    """
    config = network.config
    before = config._attn_implementation
    narrow = getattr(config, "sliding_window", None) or any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
    if before != "sdpa" or config.is_encoder_decoder or narrow or not _same(network):
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _same(network: PreTrainedModel) -> bool:
    _register()
    ids = (torch.arange(12, device=network.device) * 7 % min(97, network.config.vocab_size))[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]], device=network.device)
    mode, before = network.training, network.config._attn_implementation
    network.eval()
    try:
        with torch.no_grad():
            expected = network(input_ids=ids, position_ids=positions, use_cache=False).logits
            network.config._attn_implementation = NAME
            with documents(network, positions):
                found = network(input_ids=ids, position_ids=positions, use_cache=False).logits
        return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError):  # the last of an encoder, which gives no logits
        return False
    finally:
        network.config._attn_implementation = before
        network.train(mode)


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, torch.compiler.disable(_attend))  # the documents are other ones in every batch, and would be compiled for anew
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **more: None)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, dropout: float = 0.0, **more: Any) -> tuple[Tensor, None]:
    """query (rows, heads, length, width), keys and values of as many heads or fewer; gives (rows, length, heads, width)."""
    rows, heads, length, width = query.shape
    pieces = _lengths or [length] * rows
    if query.device.type == "cpu" and not dropout:
        return fused.attend(query, key, value, pieces, scaling), None
    if key.shape[1] < heads:
        key, value = (one.repeat_interleave(heads // key.shape[1], 1) for one in (key, value))
    attend = torch.nn.functional.scaled_dot_product_attention
    if _lengths is None:
        return attend(query, key, value, is_causal=True, scale=scaling, dropout_p=dropout).transpose(1, 2).contiguous(), None
    flat = [one.transpose(0, 1).reshape(1, heads, rows * length, width).split(pieces, 2) for one in (query, key, value)]
    found = [attend(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout) for q, k, v in zip(*flat, strict=True)]
    return torch.cat(found, 2)[0].transpose(0, 1).reshape(rows, length, heads, width), None
