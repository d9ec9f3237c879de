"""Hidden states of texts, a vector a text and layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from etude.engine import batch, fused, losses
from etude.engine.cost import spend
from etude.engine.progress import report
from etude.engine.score import COUNTED_LENGTH, ROW_TOKENS
from etude.values.errors import InputError
from etude.values.lazy import lazy
from etude.values.model import Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

POOLS = ("mean", "first", "last")


def states(model: Model, texts: Sequence[str], *, pool: str = "mean", layers: Sequence[int] | None = None, window: int | None = None) -> np.ndarray:
    """What a model makes of each text, after its embeddings (layer 0) and after each block: (layers, texts, width), float32.

    The last layer comes after the network's final norm, as in transformers' ``hidden_states``; of an encoder–decoder they are the encoder's.
    pool: ``mean`` of the tokens, the ``first`` or the ``last`` one.  A causal model reads its start token before the text, which is not pooled: it has seen nothing
    of it.  For other models all count that the tokenizer puts around a text, so that ``first`` is BERT's [CLS], and ``mean`` is what sentence encoders use.
    layers: which of them, negative ones from the end; all by default.  window: cut texts to so many tokens, those around them included; by default nothing is cut.
    Each vector is within rounding of what its text gives alone, and does not depend on the order of the texts; the head is never computed.
    Raises ValueError for another pool; InputError for no texts, an empty one, one longer than the model reads and not cut, or a layer that is not there.
    Cost: one forward pass over the texts.
    """
    if pool not in POOLS:
        raise ValueError(f"pool is one of {', '.join(POOLS)}, got {pool!r}")
    rows = encoded(model, texts, window)
    network, reader = model.network, reader_of(model)
    skipped, pad, done, total = unpooled(model), model.tokenizer.pad_token_id or 0, 0, sum(map(len, rows))
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index]), rows[index].tobytes()))
    found: np.ndarray | None = None
    whole: AbstractContextManager[None] = losses.headless(network) if reader is network else nullcontext()
    with torch.no_grad(), whole, fused.fused(network):
        for group in batch.by_length([len(rows[index]) for index in order], ROW_TOKENS.get(network.device.type, 8192)):
            chosen = [order[place] for place in group]
            ids, real = (one.to(network.device) for one in batch.padded([rows[index] for index in chosen], pad))
            every = read(model, reader, ids, real)
            kept = _chosen(len(every), layers)
            counts = counting(real, skipped)
            if found is None:
                found = np.zeros((len(kept), len(rows), every[0].shape[-1]), np.float32)
            for place, layer in enumerate(kept):
                found[place, chosen] = pooled(every[layer].float(), counts, pool).cpu().numpy()
            done += sum(len(rows[index]) for index in chosen)
            report("reading", done, total)
        spend(tokens=total, flops=total * _flops_per_token(model, reader, min(len(rows[order[0]]), COUNTED_LENGTH)))
    assert found is not None
    return found


def encoded(model: Model, texts: Sequence[str], window: int | None) -> list[np.ndarray]:
    """Token ids of every text with what stands around it, cut to the window but for what stands behind."""
    if not len(texts):
        raise InputError("there are no texts to read")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if model.kind == "causal":
        start = batch.start_token(model.tokenizer)
        plain = model.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        rows, bare = [np.array([start, *ids], np.int64) for ids in plain], np.array([start], np.int64)
    else:
        framed = model.tokenizer([*texts, ""], return_attention_mask=False, verbose=False)["input_ids"]
        *rows, bare = (np.array(ids, np.int64) for ids in framed)
    if window is not None and not len(bare) < window <= (limit or window):
        raise InputError(f"window is {len(bare) + 1} to {limit or 'any number of'} tokens for this model, got {window}")
    for place, row in enumerate(rows):
        if len(row) <= len(bare):
            raise InputError(f"text {place} is empty", remedy="Leave out texts without a token.")
        if window is not None and len(row) > window:
            behind = _common_end(row, bare)
            rows[place] = np.concatenate([row[: window - behind], row[len(row) - behind :]])
        elif limit is not None and len(row) > limit:
            raise InputError(f"text {place} has {len(row)} tokens, and this {model.base.model_type} reads {limit} at once", remedy="Set a window to cut texts, or give shorter ones.")
    return rows


def _common_end(row: np.ndarray, bare: np.ndarray) -> int:
    """How many of the tokens around an empty text also end this one."""
    same = row[::-1][: len(bare)] == bare[::-1]
    return int(same.cumprod().sum())


def reader_of(model: Model) -> Any:
    """The part of the network that reads: without head or decoder, where it has such a part."""
    network: Any = model.network
    return network.get_encoder() if model.kind == "seq2seq" else network.base_model


def unpooled(model: Model) -> int:
    """Tokens at the beginning of a row that are read and not pooled: a causal model's start token."""
    return int(model.kind == "causal")


def counting(real: Tensor, skipped: int) -> Tensor:
    """Which tokens are pooled, of those that are real, (rows, length)."""
    counts = real.clone()
    counts[:, :skipped] = 0
    return counts


def read(model: Model, reader: Any, ids: Tensor, real: Tensor) -> tuple[Tensor, ...]:
    """The states of each layer, (rows, length, width)."""
    more = {"use_cache": False} if model.kind == "causal" else {}
    try:
        found = reader(input_ids=ids, attention_mask=real, output_hidden_states=True, **more).hidden_states
    except (IndexError, RuntimeError) as error:  # of a table of positions
        if "out of bounds" not in str(error) and "out of range" not in str(error):
            raise
        raise InputError(f"this {model.base.model_type} cannot read {ids.shape[1]} tokens at once: {error}", remedy="Set a smaller window, or give shorter texts.") from error
    return tuple(found)


def _chosen(count: int, layers: Sequence[int] | None) -> list[int]:
    """Layers counted from the first."""
    wanted = range(count) if layers is None else layers
    for layer in wanted:
        if not -count <= layer < count:
            raise InputError(f"the model has layers 0 (its embeddings) to {count - 1}, or -{count} to -1 from the end, got {layer}")
    return [layer % count for layer in wanted]


def pooled(found: Tensor, counts: Tensor, pool: str) -> Tensor:
    """One vector a row, (rows, width); counts (rows, length) is 1 where a token counts."""
    if pool == "mean":
        return (found * counts[..., None]).sum(1) / counts.sum(1, keepdim=True)
    places = torch.arange(counts.shape[1], device=counts.device)
    at = (places * counts).argmax(1) if pool == "last" else counts.argmax(1)
    return found[torch.arange(len(found), device=found.device), at]


def _flops_per_token(model: Model, reader: Any, length: int) -> float:
    """Operations of reading, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.zeros((1, length), dtype=torch.long, device=model.network.device)
    with FlopCounterMode(display=False) as counter:
        read(model, reader, ids, torch.ones_like(ids))
    return counter.get_total_flops() / length
