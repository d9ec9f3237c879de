"""A part of a vocabulary: a tokenizer that knows some of another's tokens alone, and a network with the rows of these alone."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.lazy import lazy
from etude.values.model import Model

if TYPE_CHECKING:
    import tokenizers
    import torch
    from transformers import PreTrainedTokenizerBase
else:
    tokenizers, torch = lazy("tokenizers"), lazy("torch")

MODELS = ("BPE", "WordPiece", "Unigram", "WordLevel")
BYTE = re.compile("<0x[0-9A-F]{2}>")
NAMED = re.compile(r"\w+_token_ids?")
"""Config fields that hold the ids of tokens."""
SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
"""Generation fields that list ids which need not exist."""


# The tokenizer.


def subset(tokenizer: PreTrainedTokenizerBase, wanted: Iterable[int]) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """A tokenizer of these tokens and of what it needs beside them, and the old id of each of its tokens, (tokens,).

    It needs its special tokens, those that it puts around texts, those that any text can be spelt with (bytes or single characters), and for BPE
    the parts of every merge whose result is kept.  A text whose pieces are all kept has the same pieces as before: of the candidates from which
    an encoder takes the first, the longest or the likeliest some are gone, but not the one that it took.  Other texts get smaller pieces, or where
    the tokenizer has no bytes and does not know a character, its token for the unknown.  Tokens keep their order; those that the vocabulary model does not know come last.
    Raises InputError for a tokenizer without a ``tokenizer.json``, or of an unknown kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data = json.loads(backend.to_str()) if isinstance(backend, tokenizers.Tokenizer) else {"model": {}}
    model = data["model"]
    if model.get("type") not in MODELS:
        raise InputError(f"a tokenizer of class {type(tokenizer).__name__} cannot be cut", remedy=f"Use one with a tokenizer.json, of kind {', '.join(MODELS)}.")
    pieces = {piece: place for place, (piece, _) in enumerate(model["vocab"])} if model["type"] == "Unigram" else model["vocab"]
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    ids = pieces | added
    chosen = set(wanted)
    kept = {token for token, old in ids.items() if old in chosen}
    kept |= {token["content"] for token in data["added_tokens"] if token["special"]} | set(tokenizer.all_special_tokens) | _framing(data["post_processor"]) | _spelling(model, pieces)
    kept.add(model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else model.get("unk_token"))
    kept &= ids.keys()
    if model["type"] == "BPE":
        model["merges"] = _merges(model, kept)
    order = sorted(kept & pieces.keys(), key=pieces.__getitem__) + sorted(kept - pieces.keys(), key=ids.__getitem__)
    number = {token: new for new, token in enumerate(order)}
    _renumber(data, pieces, number)
    return _like(tokenizer, tokenizers.Tokenizer.from_str(json.dumps(data))), [ids[token] for token in order]


def _spelling(model: Mapping[str, Any], pieces: Mapping[str, int]) -> set[str]:
    """Pieces that any text can be spelt with: bytes where the tokenizer falls back to them, else single characters, inside words and at their ends."""
    if model["type"] == "WordLevel":
        return set()
    found = {piece for piece in pieces if BYTE.fullmatch(piece)} if model.get("byte_fallback") else set()
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    return found or {piece for piece in pieces if len(piece.removeprefix(prefix).removesuffix(suffix)) == 1}


def _merges(model: Mapping[str, Any], kept: set[str]) -> list[list[str]]:
    """The merges whose results are kept, in their order; what they join is kept with them (`kept` grows)."""
    inside = len(model.get("continuing_subword_prefix") or "")
    made: dict[str, list[list[str]]] = {}
    for left, right in model["merges"]:
        made.setdefault(left + right[inside:], []).append([left, right])
    waiting = list(kept)
    while waiting:
        new = {part for merge in made.get(waiting.pop(), ()) for part in merge} - kept
        kept |= new
        waiting += new
    return [[left, right] for left, right in model["merges"] if left + right[inside:] in kept]


def _parts(processor: Mapping[str, Any] | None) -> list[Any]:
    """What a post-processor is made of, itself or the members of a sequence."""
    return [] if processor is None else list(processor["processors"]) if processor["type"] == "Sequence" else [processor]


def _framing(processor: Mapping[str, Any] | None) -> set[str]:
    """Tokens that a post-processor puts around texts."""
    found: set[str] = set()
    for part in _parts(processor):
        found |= {part[name][0] for name in ("sep", "cls") if name in part}
        found |= {token for special in part.get("special_tokens", {}).values() for token in special["tokens"]}
    return found


def _renumber(data: dict[str, Any], pieces: Mapping[str, int], number: Mapping[str, int]) -> None:
    """Let a tokenizer's own description know the numbered tokens alone, by their numbers."""
    model = data["model"]
    if model["type"] == "Unigram":
        unknown = None if model["unk_id"] is None else number[model["vocab"][model["unk_id"]][0]]
        model["vocab"], model["unk_id"] = [entry for entry in model["vocab"] if entry[0] in number], unknown
    else:
        model["vocab"] = {token: new for token, new in number.items() if token in pieces}
    data["added_tokens"] = sorted(({**token, "id": number[token["content"]]} for token in data["added_tokens"] if token["content"] in number), key=lambda token: token["id"])
    for part in _parts(data["post_processor"]):
        part.update({name: [part[name][0], number[part[name][0]]] for name in ("sep", "cls") if name in part})
        for special in part.get("special_tokens", {}).values():
            special["ids"] = [number[token] for token in special["tokens"]]
    if data["padding"]:
        data["padding"]["pad_id"] = number.get(data["padding"]["pad_token"], 0)


def _like(tokenizer: Any, backend: tokenizers.Tokenizer) -> PreTrainedTokenizerBase:
    """A tokenizer with this backend, and what else the other one says: its named tokens, sides, inputs and chat template."""
    transformers = checkpoint.quiet_transformers()
    named = {name: token for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES if isinstance(token := getattr(tokenizer, name, None), str)}
    same = {name: value for name in ("model_max_length", "padding_side", "truncation_side", "model_input_names", "chat_template") if (value := getattr(tokenizer, name, None)) is not None}
    extra = list(getattr(tokenizer, "extra_special_tokens", None) or ())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named, **same, **({"extra_special_tokens": extra} if extra else {}))


# The network.


def narrowed(model: Model, tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> Model:
    """A draft whose embeddings and head have the rows of these tokens alone, with the tokenizer that goes with them; its ids are the places in `kept`.

    What depends on the vocabulary is found by building the network anew with a smaller one: every tensor that then has another shape is cut there.  Token ids that
    only the config names get rows behind the others.  Logits of what is kept are as before, which is tried out.
    Raises InputError for an architecture whose vocabulary is no number in its config, or that reads more from token ids than their rows.
    """
    old, config = model.network, copy.deepcopy(model.base)
    full = checkpoint.embedding_rows(old)
    generation = copy.deepcopy(getattr(old, "generation_config", None))
    holders = list({id(holder): holder for holder in (config, config.get_text_config(), generation) if holder is not None}.values())
    named = {one for holder in holders for ids in named_ids(holder).values() for one in ids if 0 <= one < full}
    rows = [*kept, *sorted(named - set(kept))]
    for holder in holders:
        _rename(holder, {token: new for new, token in enumerate(rows)})
    config.get_text_config().vocab_size = len(rows)
    fresh: Any = checkpoint.rebuild(config, model.edits, old.dtype)
    checkpoint.load_state(fresh, {name: _cut(name, tensor, fresh.state_dict()[name].shape, full, rows) for name, tensor in old.state_dict().items()})
    if generation is not None:
        fresh.generation_config = generation
    fresh = fresh.to(old.device).eval()
    _same(model, fresh, rows)
    return Model(fresh, tokenizer, base=config, edits=model.edits, history=model.history)


def named_ids(config: Any) -> dict[str, list[int]]:
    """Ids of tokens that a config names, by field."""
    found = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in vars(config).items() if NAMED.fullmatch(name)}
    return {name: [one for one in ids if isinstance(one, int)] for name, ids in found.items()}


def _rename(config: Any, number: Mapping[int, int]) -> None:
    """Write new ids into every field of a config that names tokens; what is no row stays as it is."""
    for name in named_ids(config):
        value = getattr(config, name)
        setattr(config, name, [number.get(one, one) for one in value] if isinstance(value, (list, tuple)) else number.get(value, value))
    for name in SUPPRESSED:
        if getattr(config, name, None):
            setattr(config, name, [number[one] for one in getattr(config, name) if one in number])


def _cut(name: str, tensor: torch.Tensor, shape: Sequence[int], full: int, rows: Sequence[int]) -> torch.Tensor:
    """The part of a tensor that belongs to some rows of the vocabulary, if any of its dimensions is one of these."""
    other = [dim for dim, (before, after) in enumerate(zip(tensor.shape, shape, strict=True)) if before != after]
    if not other:
        return tensor
    if len(other) > 1 or (tensor.shape[other[0]], shape[other[0]]) != (full, len(rows)):
        raise InputError(f"the vocabulary cannot be cut: {name} has shape {tuple(tensor.shape)}, and with {len(rows)} of {full} tokens it would be {tuple(shape)}")
    return tensor.index_select(other[0], torch.tensor(rows, device=tensor.device))


def _same(model: Model, fresh: Any, rows: Sequence[int]) -> None:
    """Raises InputError unless the network of some rows gives the same for these as that of all."""
    inputs, chosen = checkpoint.probe(fresh), torch.tensor(rows, device=fresh.device)
    before = checkpoint.outputs(model.network, {name: chosen[ids] if name.endswith("input_ids") else ids for name, ids in inputs.items()}).float()
    after = checkpoint.outputs(fresh, inputs).float()
    if before.shape != after.shape:
        before = before[..., chosen]
    gap = (before - after).abs().max().item()
    if not gap <= checkpoint.tolerance(fresh) * max(1.0, before.abs().max().item()):
        raise InputError(f"this {model.base.model_type} reads more from token ids than rows of its embedding: with other ids its outputs differ by {gap:.3g}")
